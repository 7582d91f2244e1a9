//! The `deltabox` command.

fn main() -> std::process::ExitCode {
    deltabox::cli::main()
}
