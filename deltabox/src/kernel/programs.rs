//! BPF probes: type information and program types, each by loading a program of two instructions.

use std::ffi::CStr;
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::Ground;
use super::probe::{Failure, Outcome, at};
use crate::sys::bpf::{Instruction, ProgramType, TypeKind, VmlinuxBtf, prog_load, raw_tracepoint_open, silence_libbpf};

/// `r0 = 0; exit`.
const RETURN_ZERO: [Instruction; 2] = [
    Instruction { code: 0xb7, registers: 0, offset: 0, immediate: 0 },
    Instruction { code: 0x95, registers: 0, offset: 0, immediate: 0 },
];

/// The kernel's type information is there and parses.
pub(super) fn btf(ground: &Ground) -> Outcome {
    let btf = types(ground)?;
    btf.find(c"task_struct", TypeKind::Struct).map_err(at("find struct task_struct in BTF"))?;
    Ok(format!("{} types", btf.n_types()))
}

fn types(ground: &Ground) -> Result<&VmlinuxBtf, Failure> {
    let loaded = ground.btf.get_or_init(|| {
        silence_libbpf();
        VmlinuxBtf::load()
    });
    loaded.as_ref().map_err(|error| {
        let number = error.raw_os_error().unwrap_or(libc::EIO);
        at("parse /sys/kernel/btf/vmlinux")(Errno::from_raw(number))
    })
}

/// A program bound to a tracepoint is loaded and attached.
pub(super) fn tp_btf(ground: &Ground) -> Outcome {
    let id = find(ground, c"btf_trace_sched_process_exit", TypeKind::Typedef)?;
    let mut log = Vec::new();
    let program = prog_load(ProgramType::TpBtf(id), &RETURN_ZERO, &mut log).map_err(refused("load", &log))?;
    let link = raw_tracepoint_open(program.as_fd()).map_err(refused("attach to sched_process_exit", &log))?;
    drop(link);
    Ok("loaded and attached to sched_process_exit".to_owned())
}

/// A raw tracepoint program is loaded.
pub(super) fn raw_tracepoint(_: &Ground) -> Outcome {
    silence_libbpf();
    load(ProgramType::RawTracepoint)
}

/// A program on a kernel function's entry is loaded. The function is the kernel's own test target.
pub(super) fn fentry(ground: &Ground) -> Outcome {
    load(ProgramType::Fentry(find(ground, c"bpf_fentry_test1", TypeKind::Function)?))
}

/// A program on a security hook is loaded.
pub(super) fn lsm(ground: &Ground) -> Outcome {
    load(ProgramType::Lsm(find(ground, c"bpf_lsm_file_open", TypeKind::Function)?))
}

/// A kprobe program is loaded, and the kernel can attach such.
pub(super) fn kprobe(_: &Ground) -> Outcome {
    silence_libbpf();
    let loaded = load(ProgramType::Kprobe)?;
    std::fs::metadata("/sys/bus/event_source/devices/kprobe").map_err(at("stat the perf event source kprobe"))?;
    Ok(loaded)
}

/// An iterator program is loaded.
pub(super) fn iterator(ground: &Ground) -> Outcome {
    load(ProgramType::Iter(find(ground, c"bpf_iter_task", TypeKind::Function)?))
}

fn find(ground: &Ground, name: &CStr, kind: TypeKind) -> Result<u32, Failure> {
    types(ground)?.find(name, kind).map_err(at(&format!("find {} in BTF", name.to_string_lossy())))
}

fn load(kind: ProgramType) -> Outcome {
    let mut log = Vec::new();
    let program = prog_load(kind, &RETURN_ZERO, &mut log).map_err(refused("load", &log))?;
    drop(program);
    Ok("loaded".to_owned())
}

/// A refusal with the verifier's last word, which tells a policy (nothing said) from a bad program.
fn refused(op: &str, verifier_log: &[u8]) -> impl FnOnce(std::io::Error) -> Failure {
    let said = String::from_utf8_lossy(verifier_log);
    let said = match said.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) => format!("{op} (verifier: {line})"),
        None => format!("{op} (verifier log empty)"),
    };
    move |error| at(&said)(error)
}
