//! BPF programs and the kernel's type information, through libbpf.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use libbpf_sys as bpf;

/// One instruction, as the kernel takes it (`struct bpf_insn`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Source register in the high half, destination in the low half.
    pub registers: u8,
    /// Jump or memory offset.
    pub offset: i16,
    /// Immediate value.
    pub immediate: i32,
}

/// What a program may be attached to, with the number of the BTF type it is bound to where it needs one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramType {
    /// A tracepoint with typed arguments; the id of its `btf_trace_NAME` typedef.
    TpBtf(u32),
    /// A tracepoint with raw arguments.
    RawTracepoint,
    /// The entry of a kernel function; the function's id.
    Fentry(u32),
    /// A security hook; the id of `bpf_lsm_NAME`.
    Lsm(u32),
    /// A breakpoint on a kernel instruction.
    Kprobe,
    /// An iterator over kernel objects; the id of `bpf_iter_NAME`.
    Iter(u32),
}

impl ProgramType {
    fn numbers(self) -> (bpf::bpf_prog_type, bpf::bpf_attach_type, u32) {
        match self {
            Self::TpBtf(id) => (bpf::BPF_PROG_TYPE_TRACING, bpf::BPF_TRACE_RAW_TP, id),
            Self::RawTracepoint => (bpf::BPF_PROG_TYPE_RAW_TRACEPOINT, 0, 0),
            Self::Fentry(id) => (bpf::BPF_PROG_TYPE_TRACING, bpf::BPF_TRACE_FENTRY, id),
            Self::Lsm(id) => (bpf::BPF_PROG_TYPE_LSM, bpf::BPF_LSM_MAC, id),
            Self::Kprobe => (bpf::BPF_PROG_TYPE_KPROBE, 0, 0),
            Self::Iter(id) => (bpf::BPF_PROG_TYPE_TRACING, bpf::BPF_TRACE_ITER, id),
        }
    }
}

/// Loads `instructions` under the GPL. `verifier_log` receives what the verifier said if it refuses them.
pub fn prog_load(kind: ProgramType, instructions: &[Instruction], verifier_log: &mut Vec<u8>) -> io::Result<OwnedFd> {
    let (prog_type, expected_attach_type, attach_btf_id) = kind.numbers();
    verifier_log.clear();
    verifier_log.resize(16 << 10, 0);
    let mut opts = bpf::bpf_prog_load_opts {
        sz: size_of::<bpf::bpf_prog_load_opts>() as bpf::size_t,
        expected_attach_type,
        attach_btf_id,
        log_buf: verifier_log.as_mut_ptr().cast(),
        log_size: 16 << 10,
        ..Default::default()
    };
    // SAFETY: `Instruction` has the layout of `bpf_insn` and the length is the slice's; `opts` tells its size and
    // its log buffer is as long as told; the strings are static.
    let ret = unsafe {
        bpf::bpf_prog_load(
            prog_type,
            c"deltabox".as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr().cast(),
            instructions.len() as bpf::size_t,
            &raw mut opts,
        )
    };
    let said = verifier_log.iter().position(|byte| *byte == 0).unwrap_or(verifier_log.len());
    verifier_log.truncate(said);
    own(ret)
}

/// Attaches a loaded program that is bound to its tracepoint ([`ProgramType::TpBtf`]) until the link is dropped.
pub fn raw_tracepoint_open(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: a null name is what programs bound by BTF need.
    own(unsafe { bpf::bpf_raw_tracepoint_open(std::ptr::null(), program.as_raw_fd()) })
}

/// libbpf's result: a new descriptor or a negated error number.
fn own(ret: i32) -> io::Result<OwnedFd> {
    if ret < 0 {
        return Err(io::Error::from_raw_os_error(-ret));
    }
    // SAFETY: the kernel just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(ret) })
}

/// Keeps libbpf from writing to standard error.
pub fn silence_libbpf() {
    // SAFETY: no callback is registered, the previous one is only dropped.
    let _ = unsafe { bpf::libbpf_set_print(None) };
}

/// Which kind of type a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TypeKind {
    /// `struct NAME`.
    Struct,
    /// `typedef ... NAME`.
    Typedef,
    /// A function.
    Function,
}

/// The running kernel's parsed type information.
#[derive(Debug)]
pub struct VmlinuxBtf(NonNull<bpf::btf>);

impl VmlinuxBtf {
    /// Reads and parses `/sys/kernel/btf/vmlinux` (some megabytes, tens of milliseconds).
    pub fn load() -> io::Result<Self> {
        // SAFETY: no arguments.
        let btf = unsafe { bpf::btf__load_vmlinux_btf() };
        NonNull::new(btf).map(Self).ok_or_else(io::Error::last_os_error)
    }

    /// How many types it describes.
    pub fn n_types(&self) -> u32 {
        // SAFETY: the pointer is from `load` and freed only by Drop.
        unsafe { bpf::btf__type_cnt(self.0.as_ptr()) }
    }

    /// The number of a type, ENOENT if there is none of that name and kind.
    pub fn find(&self, name: &CStr, kind: TypeKind) -> io::Result<u32> {
        let kind = match kind {
            TypeKind::Struct => bpf::BTF_KIND_STRUCT,
            TypeKind::Typedef => bpf::BTF_KIND_TYPEDEF,
            TypeKind::Function => bpf::BTF_KIND_FUNC,
        };
        // SAFETY: the pointer is from `load`, `name` is a C string for the whole call.
        let id = unsafe { bpf::btf__find_by_name_kind(self.0.as_ptr(), name.as_ptr(), kind) };
        u32::try_from(id).map_err(|_| io::Error::from_raw_os_error(-id))
    }
}

impl Drop for VmlinuxBtf {
    fn drop(&mut self) {
        // SAFETY: the pointer is from `load` and not used after this.
        unsafe { bpf::btf__free(self.0.as_ptr()) }
    }
}
