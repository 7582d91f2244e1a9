//! Stream sockets that carry descriptors (SCM_RIGHTS). Also compiled into init.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Descriptors in one message at most (chosen: a batch of injected calls takes so many; the kernel's limit is 253).
const MAX_SENT: usize = 64;
/// Room for one SCM_RIGHTS header with [`MAX_SENT`] descriptors, aligned as cmsghdr wants it.
type Control = [u64; 2 + MAX_SENT / 2];

/// Sends `bytes` with `fds` attached to the first of them. Returns how many bytes went (never SIGPIPE).
///
/// # Errors
/// As sendmsg(2); `InvalidInput` for more than 64 descriptors.
pub fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_SENT {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut control: Control = [0; 2 + MAX_SENT / 2];
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut message = empty_message(&mut iov);
    if !fds.is_empty() {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let len_bytes = size_of_val(raw.as_slice());
        let len = u32::try_from(len_bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: pure arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(len) } as usize;
        // SAFETY: msg_control points to a zeroed, aligned buffer of at least msg_controllen bytes.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: pure arithmetic.
        let cmsg_len = unsafe { libc::CMSG_LEN(len) } as usize;
        // SAFETY: the buffer has room for one header, so the pointer is not null and is aligned.
        unsafe { header.write(libc::cmsghdr { cmsg_len, cmsg_level: libc::SOL_SOCKET, cmsg_type: libc::SCM_RIGHTS }) };
        // SAFETY: points just behind the header written above, inside the same buffer.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: `data` has room for `len_bytes` bytes by CMSG_SPACE above; the regions do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(raw.as_ptr().cast::<u8>(), data, len_bytes) };
    }
    // SAFETY: `message` points to buffers that live through the call.
    let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Receives up to `buf.len()` bytes; descriptors that came with them are appended to `fds` (close-on-exec).
/// 0 bytes means that the other side has closed.
///
/// # Errors
/// As recvmsg(2).
pub fn recv_with_fds(socket: BorrowedFd<'_>, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut control: Control = [0; 2 + MAX_SENT / 2];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut message = empty_message(&mut iov);
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>();
    // SAFETY: `message` points to buffers that live through the call and are ours to write.
    let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel filled msg_control with msg_controllen bytes of well-formed headers.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: a non-null header lies inside the buffer.
        let head = unsafe { header.read() };
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: pure arithmetic.
            let data_offset = unsafe { libc::CMSG_LEN(0) } as usize;
            // SAFETY: the payload follows the header inside the buffer.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            for i in 0..(head.cmsg_len - data_offset) / size_of::<RawFd>() {
                // SAFETY: `i` is below the number of descriptors that the header says follow it.
                let slot = unsafe { data.add(i) };
                // SAFETY: in bounds as above; the payload is aligned only to a byte for our purposes.
                let fd = unsafe { slot.read_unaligned() };
                // SAFETY: the kernel installed this descriptor for us in this very call.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: `header` came from this message.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(n)
}

fn empty_message(iov: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: msghdr is plain old data; all zeroes is a valid empty message.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_arrive_with_the_bytes_they_were_sent_with() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut r, w) = std::io::pipe().unwrap();
        assert_eq!(send_with_fds(a.as_fd(), b"xy", &[w.as_fd(), a.as_fd()]).unwrap(), 2);
        let (mut buf, mut fds) = ([0; 16], Vec::new());
        assert_eq!(recv_with_fds(b.as_fd(), &mut buf, &mut fds).unwrap(), 2);
        assert_eq!(fds.len(), 2);
        drop(w);
        let mut end: std::io::PipeWriter = fds.remove(0).into();
        std::io::Write::write_all(&mut end, b"hello").unwrap();
        drop(end);
        let mut text = String::new();
        r.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn a_closed_peer_is_zero_bytes_to_read_and_epipe_to_write() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(b);
        assert_eq!(recv_with_fds(a.as_fd(), &mut [0; 4], &mut Vec::new()).unwrap(), 0);
        assert_eq!(send_with_fds(a.as_fd(), b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
