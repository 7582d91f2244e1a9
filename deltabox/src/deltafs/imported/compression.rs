//! What wraps the archive, told by its first bytes.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};

/// Chosen: `xz -9` needs 65 MiB, `--long` archives of zstd up to 128 MiB; more is refused, not allocated.
const XZ_MEMORY_BYTES: u64 = 256 << 20;
/// Chosen: few system calls, little memory.
const READ_BYTES: usize = 128 * 1024;

/// Why a file cannot be read as an archive.
pub(super) enum OpenError {
    Unsupported(&'static str),
    Io(io::Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The archive's bytes, decompressed as they are read; each decoder checks what its format has for checks.
pub(super) fn open_archive(mut file: File) -> Result<Box<dyn Read>, OpenError> {
    let mut magic = Vec::new();
    (&mut file).take(6).read_to_end(&mut magic)?;
    file.rewind()?;
    let file = BufReader::with_capacity(READ_BYTES, file);
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(file)?),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let concatenated = liblzma::stream::CONCATENATED;
            let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_BYTES, concatenated);
            Box::new(liblzma::bufread::XzDecoder::new_stream(file, stream.map_err(io::Error::from)?))
        }
        [b'B', b'Z', b'h', ..] => {
            return Err(OpenError::Unsupported("bzip2 is not read; decompress it first (bunzip2)"));
        }
        [b'P', b'K', 3, 4, ..] => return Err(OpenError::Unsupported("a zip archive; only tar is read")),
        [] => return Err(OpenError::Unsupported("the file is empty")),
        _ => Box::new(file),
    })
}
