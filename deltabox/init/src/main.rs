//! The init of a sandbox: PID 1 in its namespaces, the parent of every command.
//!
//! Owns: the set-up of the mount tree from what the engine hands in (`boot`), starting commands, their
//! terminals and pipes (`command`), reaping, `kill(-1)` (`everyone`), which numbers processes get (`numbers`), and the
//! conversation with the engine (`serve`). It outlives the engine: terminals and pipes stay open here, exits are kept
//! until an engine has asked for them.
//! Knows nothing of checkpoints, layers or the store.
//!
//! Descriptors at start: 3 the first connection to the engine, 4 a listening socket for later ones.

mod boot;
mod command;
mod everyone;
mod numbers;
mod serve;
mod sys;

const FIRST_CONNECTION: i32 = 3;
const LISTENER: i32 = 4;

fn main() -> std::process::ExitCode {
    let (Ok(connection), Ok(listener)) = (sys::inherited(FIRST_CONNECTION), sys::inherited(LISTENER)) else {
        // Nobody to tell: init is only ever started by the engine.
        return std::process::ExitCode::from(2);
    };
    serve::run(connection.into(), listener.into())
}
