//! TBD
use std::path::Path;
use std::process::ExitCode;
/// tbd
pub fn run(_store: &Path, _json: bool) -> ExitCode {
    ExitCode::FAILURE
}
