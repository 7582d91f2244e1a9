//! What the engine and a sandbox's init say to each other over their stream socket.
//!
//! ```text
//! frame:  | payload length u32 | kind u8 | descriptors u8 | 0 u16 | payload ... |      (little endian)
//! ```
//! Descriptors travel as SCM_RIGHTS with the frame's first byte, in the order the message names them.
//! Init serves one engine at a time; a new connection takes over from the old one.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use crate::wire::{Malformed, Reader, Writer};

/// Bytes before the payload.
pub const HEADER_LEN: usize = 8;
/// The longest payload either side takes (chosen: twice the kernel's usual limit for arguments and environment).
pub const MAX_PAYLOAD_LEN: usize = 4 << 20;
/// Descriptors in one frame at most (three streams, or a boot's mounts).
pub const MAX_FDS: usize = 8;

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// What a command's standard streams are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// Three pipes; descriptors: write end of stdin, read ends of stdout and stderr.
    Pipes,
    /// Two pipes, stdin from /dev/null; descriptors: read ends of stdout and stderr.
    PipesNoStdin,
    /// A terminal; descriptor: its master.
    Pty(Size),
    /// One pipe for stdout and stderr, stdin from /dev/null; descriptor: its read end.
    Log,
}

/// How init sets up its sandbox before it takes commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Name in the UTS namespace.
    pub hostname: String,
    /// The network is the host's: leave loopback alone and take `/sys` from the engine (third descriptor).
    pub host_net: bool,
    /// Highest PID + 1 in the PID namespace.
    pub pid_max: u32,
    /// Capabilities that stay in the bounding set, bit per number.
    pub caps: (u32, u32),
    /// The system call filter: an array of the kernel's `struct sock_filter`.
    pub filter: Vec<u8>,
    /// Read-only mounts to attach, one descriptor each after the fixed ones: absolute path inside.
    pub binds: Vec<String>,
}

/// A command to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Returned in the answer.
    pub seq: u32,
    /// What the engine wants to be told about the command after it lost its own memory.
    pub tag: Vec<u8>,
    /// Its standard streams.
    pub streams: Streams,
    /// User inside.
    pub uid: u32,
    /// Group inside.
    pub gid: u32,
    /// Working directory, absolute.
    pub cwd: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Whole environment.
    pub env: Vec<String>,
}

/// Engine to init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToInit {
    /// First message. Descriptors: root mount, /dev mount, with `host_net` the /sys mount, then the binds.
    Boot(Boot),
    /// Start a command.
    Start(Start),
    /// Signal a command's process group.
    Signal {
        /// The command.
        pid: u32,
        /// Signal number.
        signal: i32,
    },
    /// Close init's own copy of the command's stdin, so that the engine's close is the last.
    CloseStdin {
        /// The command.
        pid: u32,
    },
    /// Drop everything kept for a command; sent when the engine has all it wants.
    Forget {
        /// The command.
        pid: u32,
    },
    /// Tell all commands held ([`FromInit::Held`] each), then [`FromInit::ListEnd`].
    List,
    /// A command was made again by a rollback: its earlier lives have ended or do so just now. One that is not held any
    /// more is, from here on.
    Returned {
        /// The command.
        pid: u32,
        /// Which life begins; the first is 0.
        life: u32,
        /// Whether it is the one that has that number now, whose streams it keeps.
        same: bool,
        /// What the engine wants to be told about it; of no use if it is the same.
        tag: Vec<u8>,
    },
}

/// Init to engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromInit {
    /// The sandbox is set up. Descriptors: `pid_max` of its PID namespace, for writing; a stream socket on which init sets
    /// which number the next process gets (request: i32; answer: error number i32, what it was i32; little endian).
    Ready,
    /// A step of the set-up failed; init exits.
    BootFailed {
        /// The step.
        step: String,
        /// Error number.
        errno: i32,
    },
    /// The command's program runs. Descriptors as in [`Streams`].
    Started {
        /// From the request.
        seq: u32,
        /// Its PID inside.
        pid: u32,
    },
    /// The command did not start.
    StartFailed {
        /// From the request.
        seq: u32,
        /// The step.
        step: String,
        /// Error number.
        errno: i32,
    },
    /// A command ended.
    Exited {
        /// Its PID inside.
        pid: u32,
        /// Which of its lives, see [`ToInit::Returned`].
        life: u32,
        /// The status as wait4(2) gives it.
        status: i32,
    },
    /// A command that init holds. Descriptors as in [`Streams`] (without stdin if that was closed).
    Held {
        /// Its PID inside.
        pid: u32,
        /// Its present life.
        life: u32,
        /// The status, once that has ended.
        status: Option<i32>,
        /// Its streams.
        streams: Streams,
        /// From the request that started it.
        tag: Vec<u8>,
    },
    /// All held commands have been told. Descriptors as with [`FromInit::Ready`].
    ListEnd,
}

impl ToInit {
    /// The frame's bytes; `n_fds` descriptors go with them.
    pub fn encode(&self, n_fds: usize) -> Vec<u8> {
        let mut w = Writer::default();
        let kind = match self {
            Self::Boot(boot) => {
                w.bytes(boot.hostname.as_bytes());
                w.u8(boot.host_net.into());
                w.u32(boot.pid_max);
                w.u32(boot.caps.0);
                w.u32(boot.caps.1);
                w.bytes(&boot.filter);
                w.texts(&boot.binds);
                1
            }
            Self::Start(start) => {
                w.u32(start.seq);
                w.bytes(&start.tag);
                write_streams(&mut w, start.streams);
                w.u32(start.uid);
                w.u32(start.gid);
                w.bytes(start.cwd.as_bytes());
                w.texts(&start.argv);
                w.texts(&start.env);
                2
            }
            Self::Signal { pid, signal } => {
                w.u32(*pid);
                w.i32(*signal);
                3
            }
            Self::CloseStdin { pid } => {
                w.u32(*pid);
                4
            }
            Self::Forget { pid } => {
                w.u32(*pid);
                5
            }
            Self::List => 6,
            Self::Returned { pid, life, same, tag } => {
                w.u32(*pid);
                w.u32(*life);
                w.u8((*same).into());
                w.bytes(tag);
                7
            }
        };
        frame(kind, n_fds, w)
    }

    /// The message in a frame's payload.
    ///
    /// # Errors
    /// [`Malformed`] for an unknown kind, a payload that is too short or too long, or text that is not UTF-8.
    pub fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader(payload);
        let message = match kind {
            1 => Self::Boot(Boot {
                hostname: r.text()?,
                host_net: r.u8()? != 0,
                pid_max: r.u32()?,
                caps: (r.u32()?, r.u32()?),
                filter: r.bytes()?.to_vec(),
                binds: r.texts()?,
            }),
            2 => Self::Start(Start {
                seq: r.u32()?,
                tag: r.bytes()?.to_vec(),
                streams: read_streams(&mut r)?,
                uid: r.u32()?,
                gid: r.u32()?,
                cwd: r.text()?,
                argv: r.texts()?,
                env: r.texts()?,
            }),
            3 => Self::Signal { pid: r.u32()?, signal: r.i32()? },
            4 => Self::CloseStdin { pid: r.u32()? },
            5 => Self::Forget { pid: r.u32()? },
            6 => Self::List,
            7 => Self::Returned { pid: r.u32()?, life: r.u32()?, same: r.u8()? != 0, tag: r.bytes()?.to_vec() },
            _ => return Err(Malformed),
        };
        r.end()?;
        Ok(message)
    }
}

impl FromInit {
    /// The frame's bytes; `n_fds` descriptors go with them.
    pub fn encode(&self, n_fds: usize) -> Vec<u8> {
        let mut w = Writer::default();
        let kind = match self {
            Self::Ready => 65,
            Self::BootFailed { step, errno } => {
                w.bytes(step.as_bytes());
                w.i32(*errno);
                66
            }
            Self::Started { seq, pid } => {
                w.u32(*seq);
                w.u32(*pid);
                67
            }
            Self::StartFailed { seq, step, errno } => {
                w.u32(*seq);
                w.bytes(step.as_bytes());
                w.i32(*errno);
                68
            }
            Self::Exited { pid, life, status } => {
                w.u32(*pid);
                w.u32(*life);
                w.i32(*status);
                69
            }
            Self::Held { pid, life, status, streams, tag } => {
                w.u32(*pid);
                w.u32(*life);
                w.u8(status.is_some().into());
                w.i32(status.unwrap_or(0));
                write_streams(&mut w, *streams);
                w.bytes(tag);
                70
            }
            Self::ListEnd => 71,
        };
        frame(kind, n_fds, w)
    }

    /// The message in a frame's payload.
    ///
    /// # Errors
    /// As [`ToInit::decode`].
    pub fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader(payload);
        let message = match kind {
            65 => Self::Ready,
            66 => Self::BootFailed { step: r.text()?, errno: r.i32()? },
            67 => Self::Started { seq: r.u32()?, pid: r.u32()? },
            68 => Self::StartFailed { seq: r.u32()?, step: r.text()?, errno: r.i32()? },
            69 => Self::Exited { pid: r.u32()?, life: r.u32()?, status: r.i32()? },
            70 => {
                let (pid, life) = (r.u32()?, r.u32()?);
                let (ended, status) = (r.u8()? != 0, r.i32()?);
                let status = ended.then_some(status);
                Self::Held { pid, life, status, streams: read_streams(&mut r)?, tag: r.bytes()?.to_vec() }
            }
            71 => Self::ListEnd,
            _ => return Err(Malformed),
        };
        r.end()?;
        Ok(message)
    }
}

fn write_streams(w: &mut Writer, streams: Streams) {
    let (kind, size) = match streams {
        Streams::Pipes => (0, Size { rows: 0, cols: 0 }),
        Streams::PipesNoStdin => (1, Size { rows: 0, cols: 0 }),
        Streams::Pty(size) => (2, size),
        Streams::Log => (3, Size { rows: 0, cols: 0 }),
    };
    w.u8(kind);
    w.u16(size.rows);
    w.u16(size.cols);
}

fn read_streams(r: &mut Reader<'_>) -> Result<Streams, Malformed> {
    let kind = r.u8()?;
    let size = Size { rows: r.u16()?, cols: r.u16()? };
    match kind {
        0 => Ok(Streams::Pipes),
        1 => Ok(Streams::PipesNoStdin),
        2 => Ok(Streams::Pty(size)),
        3 => Ok(Streams::Log),
        _ => Err(Malformed),
    }
}

fn frame(kind: u8, n_fds: usize, payload: Writer) -> Vec<u8> {
    let mut w = Writer::default();
    w.u32(u32::try_from(payload.0.len()).unwrap_or(u32::MAX));
    w.u8(kind);
    w.u8(u8::try_from(n_fds).unwrap_or(u8::MAX));
    w.u16(0);
    w.0.extend_from_slice(&payload.0);
    w.0
}

/// Puts frames together from what a stream socket delivers in arbitrary pieces. `F` is a received descriptor.
#[derive(Debug)]
pub struct Assembler<F> {
    bytes: Vec<u8>,
    fds: VecDeque<F>,
}

/// One whole frame: kind, payload, descriptors.
pub type Frame<F> = (u8, Vec<u8>, Vec<F>);

impl<F> Default for Assembler<F> {
    fn default() -> Self {
        Self { bytes: Vec::new(), fds: VecDeque::new() }
    }
}

impl<F> Assembler<F> {
    /// Takes what one receive call gave.
    pub fn feed(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = F>) {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// The next whole frame, if it is there.
    ///
    /// # Errors
    /// [`Malformed`] if the header claims too much: the stream is lost. A frame may be short of descriptors: the
    /// receiver had no room for them (EMFILE), and the frame's reader has to cope with that.
    pub fn next_frame(&mut self) -> Result<Option<Frame<F>>, Malformed> {
        let mut header = Reader(&self.bytes);
        let (Ok(len), Ok(kind), Ok(n_fds), Ok(0)) = (header.u32(), header.u8(), header.u8(), header.u16()) else {
            return if self.bytes.len() < HEADER_LEN { Ok(None) } else { Err(Malformed) };
        };
        let len = usize::try_from(len).map_err(|_| Malformed)?;
        let n_fds = usize::from(n_fds);
        if len > MAX_PAYLOAD_LEN || n_fds > MAX_FDS {
            return Err(Malformed);
        }
        let Some(payload) = self.bytes.get(HEADER_LEN..HEADER_LEN + len) else {
            return Ok(None);
        };
        let n_fds = n_fds.min(self.fds.len());
        let payload = payload.to_vec();
        self.bytes.drain(..HEADER_LEN + len);
        Ok(Some((kind, payload, self.fds.drain(..n_fds).collect())))
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;
    use alloc::{format, vec};

    use super::*;

    fn requests() -> Vec<ToInit> {
        vec![
            ToInit::Boot(Boot {
                hostname: "box".to_string(),
                host_net: true,
                pid_max: 1 << 20,
                caps: (7, 9),
                filter: vec![1, 2, 3],
                binds: vec!["/opt/x".to_string()],
            }),
            ToInit::Start(Start {
                seq: 4,
                tag: vec![0, 255],
                streams: Streams::Pty(Size { rows: 24, cols: 80 }),
                uid: 1000,
                gid: 100,
                cwd: "/".to_string(),
                argv: vec!["sh".to_string(), String::new()],
                env: vec![],
            }),
            ToInit::Signal { pid: 3, signal: -1 },
            ToInit::CloseStdin { pid: 3 },
            ToInit::Forget { pid: 3 },
            ToInit::List,
            ToInit::Returned { pid: 3, life: 2, same: true, tag: vec![0, 255] },
        ]
    }

    fn answers() -> Vec<FromInit> {
        vec![
            FromInit::Ready,
            FromInit::BootFailed { step: "pivot".to_string(), errno: 22 },
            FromInit::Started { seq: 1, pid: 2 },
            FromInit::StartFailed { seq: 1, step: "execve".to_string(), errno: 2 },
            FromInit::Exited { pid: 2, life: 1, status: 256 },
            FromInit::Held { pid: 2, life: 0, status: None, streams: Streams::Log, tag: vec![9] },
            FromInit::Held { pid: 2, life: 3, status: Some(9), streams: Streams::Pipes, tag: vec![] },
            FromInit::ListEnd,
        ]
    }

    #[test]
    fn messages_survive_a_stream_that_delivers_byte_by_byte() {
        let mut assembler = Assembler::default();
        let mut seen = Vec::new();
        for message in requests() {
            let bytes = message.encode(1);
            for (i, byte) in bytes.iter().enumerate() {
                assembler.feed(&[*byte], (i == 0).then_some(7_i32));
                while let Some((kind, payload, fds)) = assembler.next_frame().unwrap() {
                    assert_eq!(fds, [7]);
                    seen.push(ToInit::decode(kind, &payload).unwrap());
                }
            }
        }
        assert_eq!(seen, requests());
    }

    #[test]
    fn every_truncation_and_every_extra_byte_is_malformed() {
        for message in requests() {
            let bytes = message.encode(0);
            let (kind, payload) = (bytes[4], &bytes[HEADER_LEN..]);
            for n in 0..payload.len() {
                assert_eq!(ToInit::decode(kind, &payload[..n]), Err(Malformed), "{message:?} cut at {n}");
            }
            let longer = [payload, &[0]].concat();
            assert_eq!(ToInit::decode(kind, &longer), Err(Malformed));
        }
        for message in answers() {
            let bytes = message.encode(0);
            let (kind, payload) = (bytes[4], &bytes[HEADER_LEN..]);
            assert_eq!(FromInit::decode(kind, payload), Ok(message.clone()));
            for n in 0..payload.len() {
                assert_eq!(FromInit::decode(kind, &payload[..n]), Err(Malformed), "{message:?} cut at {n}");
            }
        }
    }

    #[test]
    fn flipped_bits_never_panic_and_never_allocate_beyond_the_frame() {
        for message in requests() {
            let bytes = message.encode(0);
            for bit in 0..bytes.len() * 8 {
                let mut bad = bytes.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                let mut assembler = Assembler::<i32>::default();
                assembler.feed(&bad, []);
                if let Ok(Some((kind, payload, _))) = assembler.next_frame() {
                    let _ = format!("{:?}", ToInit::decode(kind, &payload));
                }
            }
        }
    }

    #[test]
    fn a_header_that_claims_too_much_is_refused_before_its_payload_comes() {
        let mut assembler = Assembler::<i32>::default();
        assembler.feed(&u32::MAX.to_le_bytes(), []);
        assembler.feed(&[1, 0, 0, 0], []);
        assert_eq!(assembler.next_frame(), Err(Malformed));
    }
}
