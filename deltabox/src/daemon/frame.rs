//! The frames of an exec session: pure encoding and parsing, the same code for daemon and client.
//!
//! ```text
//!   0      1                    5                       5 + length
//!   +------+--------------------+------------------------+
//!   | kind | length, big-endian | payload                |   length <= 64 KiB
//!   +------+--------------------+------------------------+
//! ```
//! Must hold: every frame that `encode` writes parses back to itself; no input panics, an unknown kind or
//! a length out of bounds is an error before its payload is read. `docs/api.md` has the kinds.

use crate::engine::{Exit, WindowSize};

use super::types::{ErrorBody, Started};

/// Bytes before the payload.
pub const HEADER_LEN: usize = 5;
/// Most bytes in one payload. Chosen: a pipe's usual capacity, so one read fills one frame.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Bytes of standard input that a client may send before the first credit. Chosen: two pipes full and two
/// frames under way; it bounds what the daemon holds for a command that does not read.
pub const STDIN_WINDOW: u32 = 256 * 1024;

/// What the `Upgrade` header names.
pub const PROTOCOL: &str = "deltabox-exec/1";

const STDIN: u8 = 0;
const STDIN_END: u8 = 1;
const RESIZE: u8 = 2;
const SIGNAL: u8 = 3;
const DETACH: u8 = 4;
const STARTED: u8 = 16;
pub(super) const STDOUT: u8 = 17;
pub(super) const STDERR: u8 = 18;
const EXIT: u8 = 19;
const ERROR: u8 = 20;
const STDIN_CREDIT: u8 = 21;

/// From the client to the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientFrame<'a> {
    /// Bytes for standard input, within the credit.
    Stdin(&'a [u8]),
    /// End of standard input.
    StdinEnd,
    /// The client's terminal has another size.
    Resize(WindowSize),
    /// A signal for the command's process group.
    Signal(u8),
    /// The client goes, the command is to go on.
    Detach,
}

/// From the command to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerFrame<'a> {
    /// Always the first.
    Started(Started),
    /// Bytes of standard output, or of the terminal.
    Stdout(&'a [u8]),
    /// Bytes of standard error.
    Stderr(&'a [u8]),
    /// How it ended; the last frame.
    Exit(Exit),
    /// The session is over without an exit; the last frame.
    Error(ErrorBody),
    /// So many more bytes of standard input may be sent.
    StdinCredit(u32),
}

/// Bytes that are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// More than 64 KiB.
    #[error("frame of kind {kind} is {len} bytes long; at most {MAX_PAYLOAD} are allowed")]
    TooLong {
        /// Its kind.
        kind: u8,
        /// What its header says.
        len: u32,
    },
    /// Not a kind of this direction.
    #[error("frame kind {kind} is unknown in this direction")]
    UnknownKind {
        /// Its kind.
        kind: u8,
    },
    /// The payload does not fit the kind.
    #[error("frame of kind {kind} has a payload of {len} bytes that does not fit it")]
    BadPayload {
        /// Its kind.
        kind: u8,
        /// Payload bytes.
        len: usize,
    },
}

impl<'a> ClientFrame<'a> {
    /// Appends the frame to `out`. The payload must not be longer than [`MAX_PAYLOAD`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Stdin(bytes) => put(out, STDIN, bytes),
            Self::StdinEnd => put(out, STDIN_END, &[]),
            Self::Resize(size) => {
                let [r0, r1] = size.rows.to_be_bytes();
                let [c0, c1] = size.cols.to_be_bytes();
                put(out, RESIZE, &[r0, r1, c0, c1]);
            }
            Self::Signal(number) => put(out, SIGNAL, &[*number]),
            Self::Detach => put(out, DETACH, &[]),
        }
    }

    /// The frame of this kind and payload.
    pub fn parse(kind: u8, payload: &'a [u8]) -> Result<Self, FrameError> {
        match (kind, payload) {
            (STDIN, bytes) => Ok(Self::Stdin(bytes)),
            (STDIN_END, []) => Ok(Self::StdinEnd),
            (RESIZE, &[r0, r1, c0, c1]) => {
                Ok(Self::Resize(WindowSize { rows: u16::from_be_bytes([r0, r1]), cols: u16::from_be_bytes([c0, c1]) }))
            }
            (SIGNAL, &[number @ 1..=64]) => Ok(Self::Signal(number)),
            (DETACH, []) => Ok(Self::Detach),
            (STDIN_END..=DETACH, _) => Err(FrameError::BadPayload { kind, len: payload.len() }),
            _ => Err(FrameError::UnknownKind { kind }),
        }
    }
}

impl<'a> ServerFrame<'a> {
    /// Appends the frame to `out`. The payload must not be longer than [`MAX_PAYLOAD`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Started(started) => put(out, STARTED, &json(started)),
            Self::Stdout(bytes) => put(out, STDOUT, bytes),
            Self::Stderr(bytes) => put(out, STDERR, bytes),
            Self::Exit(exit) => put(out, EXIT, &json(exit)),
            Self::Error(body) => put(out, ERROR, &json(body)),
            Self::StdinCredit(n) => put(out, STDIN_CREDIT, &n.to_be_bytes()),
        }
    }

    /// The frame of this kind and payload.
    pub fn parse(kind: u8, payload: &'a [u8]) -> Result<Self, FrameError> {
        let bad = |_| FrameError::BadPayload { kind, len: payload.len() };
        match kind {
            STARTED => serde_json::from_slice(payload).map(Self::Started).map_err(bad),
            STDOUT => Ok(Self::Stdout(payload)),
            STDERR => Ok(Self::Stderr(payload)),
            EXIT => serde_json::from_slice(payload).map(Self::Exit).map_err(bad),
            ERROR => serde_json::from_slice(payload).map(Self::Error).map_err(bad),
            STDIN_CREDIT => match payload.try_into() {
                Ok(bytes) => Ok(Self::StdinCredit(u32::from_be_bytes(bytes))),
                Err(_) => Err(FrameError::BadPayload { kind, len: payload.len() }),
            },
            _ => Err(FrameError::UnknownKind { kind }),
        }
    }
}

/// The header of a payload of `len` bytes (at most [`MAX_PAYLOAD`]).
pub(super) fn header(kind: u8, len: usize) -> [u8; HEADER_LEN] {
    debug_assert!(len <= MAX_PAYLOAD);
    let [a, b, c, d] = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    [kind, a, b, c, d]
}

fn put(out: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    out.extend_from_slice(&header(kind, payload.len()));
    out.extend_from_slice(payload);
}

/// Our own plain types always serialize; an empty payload would be refused by the other side.
fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// Bytes as they come, cut into frames. Holds one read's worth: constant memory.
#[derive(Debug)]
pub struct FrameBuffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl FrameBuffer {
    /// An empty buffer, with room for the longest frame and a bit of the next.
    pub fn new() -> Self {
        Self { bytes: vec![0; HEADER_LEN + MAX_PAYLOAD + 4096].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Where the next bytes go; never empty after [`Self::take_frame`] said `None`.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    /// Says that the first `n` bytes of [`Self::room`] were filled.
    pub fn filled(&mut self, n: usize) {
        self.end = (self.end + n).min(self.bytes.len());
    }

    /// Whether bytes of an incomplete frame are left.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The next whole frame as kind and payload, `None` when more bytes are needed.
    pub fn take_frame(&mut self) -> Result<Option<(u8, &[u8])>, FrameError> {
        let held = &self.bytes[self.start..self.end];
        let Some((&[kind, a, b, c, d], rest)) = held.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes([a, b, c, d]);
        let n = usize::try_from(len).unwrap_or(usize::MAX);
        if n > MAX_PAYLOAD {
            return Err(FrameError::TooLong { kind, len });
        }
        let Some(payload) = rest.get(..n) else {
            return Ok(None);
        };
        self.start += HEADER_LEN + n;
        Ok(Some((kind, payload)))
    }

    /// What of an incomplete output frame has come, of use when no more comes: whether it is standard output
    /// (not error), and its bytes so far.
    pub(super) fn partial_output(&self) -> Option<(bool, &[u8])> {
        let (&[kind, ..], part) = self.bytes[self.start..self.end].split_first_chunk::<HEADER_LEN>()?;
        matches!(kind, STDOUT | STDERR).then_some((kind == STDOUT, part))
    }
}

impl Default for FrameBuffer {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::types::ErrorDetail;
    use super::*;

    fn client_frames(data: &[u8]) -> Vec<ClientFrame<'_>> {
        vec![
            ClientFrame::Stdin(data),
            ClientFrame::StdinEnd,
            ClientFrame::Resize(WindowSize { rows: 50, cols: 513 }),
            ClientFrame::Signal(2),
            ClientFrame::Detach,
        ]
    }

    fn server_frames(data: &[u8]) -> Vec<ServerFrame<'_>> {
        let error = ErrorDetail { code: "c".into(), message: "m".into(), hint: "h".into() };
        vec![
            ServerFrame::Started(Started { pid: 7 }),
            ServerFrame::Stdout(data),
            ServerFrame::Stderr(data),
            ServerFrame::Exit(Exit::Exited { status: 3 }),
            ServerFrame::Exit(Exit::Signaled { signal: 9, core_dumped: true }),
            ServerFrame::Exit(Exit::Lost),
            ServerFrame::Error(ErrorBody { error }),
            ServerFrame::StdinCredit(65_536),
        ]
    }

    fn feed(buffer: &mut FrameBuffer, bytes: &[u8]) {
        buffer.room()[..bytes.len()].copy_from_slice(bytes);
        buffer.filled(bytes.len());
    }

    #[test]
    fn every_frame_comes_back_as_it_was() {
        for data in [&b""[..], b"x", &[0xff; MAX_PAYLOAD]] {
            for frame in client_frames(data) {
                let mut bytes = Vec::new();
                frame.encode(&mut bytes);
                let mut buffer = FrameBuffer::new();
                feed(&mut buffer, &bytes);
                let (kind, payload) = buffer.take_frame().unwrap().unwrap();
                assert_eq!(ClientFrame::parse(kind, payload), Ok(frame));
                assert!(buffer.is_empty());
            }
            for frame in server_frames(data) {
                let mut bytes = Vec::new();
                frame.encode(&mut bytes);
                let mut buffer = FrameBuffer::new();
                feed(&mut buffer, &bytes);
                let (kind, payload) = buffer.take_frame().unwrap().unwrap();
                assert_eq!(ServerFrame::parse(kind, payload), Ok(frame));
            }
        }
    }

    #[test]
    fn every_truncation_asks_for_more() {
        for frame in server_frames(b"some bytes") {
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            for n in 0..bytes.len() {
                let mut buffer = FrameBuffer::new();
                feed(&mut buffer, &bytes[..n]);
                assert_eq!(buffer.take_frame(), Ok(None), "{frame:?} cut to {n} bytes");
                assert_eq!(buffer.is_empty(), n == 0);
                feed(&mut buffer, &bytes[n..]);
                assert!(buffer.take_frame().unwrap().is_some());
            }
        }
    }

    #[test]
    fn a_flipped_bit_gives_an_error_or_another_frame_and_never_a_panic() {
        let mut all = Vec::new();
        client_frames(b"data").iter().for_each(|frame| frame.encode(&mut all));
        server_frames(b"data").iter().for_each(|frame| frame.encode(&mut all));
        for bit in 0..all.len() * 8 {
            let mut bytes = all.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let mut buffer = FrameBuffer::new();
            feed(&mut buffer, &bytes);
            let mut n_bytes = 0;
            while let Ok(Some((kind, payload))) = buffer.take_frame() {
                let _ = ClientFrame::parse(kind, payload);
                let _ = ServerFrame::parse(kind, payload);
                n_bytes += HEADER_LEN + payload.len();
            }
            assert!(n_bytes <= all.len());
        }
    }

    #[test]
    fn the_part_of_an_output_frame_that_came_is_not_lost() {
        let mut bytes = Vec::new();
        ServerFrame::Stderr(b"some bytes").encode(&mut bytes);
        let mut buffer = FrameBuffer::new();
        feed(&mut buffer, &bytes[..4]);
        assert_eq!(buffer.partial_output(), None);
        feed(&mut buffer, &bytes[4..9]);
        assert_eq!(buffer.take_frame(), Ok(None));
        assert_eq!(buffer.partial_output(), Some((false, &b"some"[..])));
        let mut buffer = FrameBuffer::new();
        feed(&mut buffer, &[EXIT, 0, 0, 0, 9, b'{']);
        assert_eq!(buffer.partial_output(), None);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_payload_is_read() {
        let mut buffer = FrameBuffer::new();
        feed(&mut buffer, &[STDIN, 0, 1, 0, 1]);
        assert_eq!(buffer.take_frame(), Err(FrameError::TooLong { kind: STDIN, len: 65_537 }));
    }

    #[test]
    fn a_frame_of_the_other_direction_is_unknown() {
        assert_eq!(ClientFrame::parse(STDOUT, b""), Err(FrameError::UnknownKind { kind: STDOUT }));
        assert_eq!(ServerFrame::parse(STDIN, b""), Err(FrameError::UnknownKind { kind: STDIN }));
        assert_eq!(ClientFrame::parse(SIGNAL, &[0]), Err(FrameError::BadPayload { kind: SIGNAL, len: 1 }));
        assert_eq!(ClientFrame::parse(RESIZE, &[1, 2, 3]), Err(FrameError::BadPayload { kind: RESIZE, len: 3 }));
    }

    proptest! {
        #[test]
        fn frames_are_the_same_however_the_bytes_arrive(chunk in 1_usize..400, data in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut bytes = Vec::new();
            client_frames(&data).iter().for_each(|frame| frame.encode(&mut bytes));
            let mut buffer = FrameBuffer::new();
            let mut again = Vec::new();
            for part in bytes.chunks(chunk) {
                feed(&mut buffer, part);
                while let Some((kind, payload)) = buffer.take_frame().unwrap() {
                    ClientFrame::parse(kind, payload).unwrap().encode(&mut again);
                }
            }
            prop_assert_eq!(again, bytes);
        }
    }
}
