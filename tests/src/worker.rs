//! A program inside that does what it is told, line by line, and answers: the judge of its own state.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use serde_json::Value;

use crate::Host;

/// Runs each line as Python, with one scope for all; answers with the value of the last expression as JSON.
const PROGRAM: &str = include_str!("worker.py");

/// The client of such a program. Its connection outlives rollbacks.
pub struct Worker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts one, as `exec` does.
    pub fn start(host: &Host, sandbox: &str) -> Self {
        Self::start_as(host, sandbox, &["/usr/bin/python3"])
    }

    /// Starts one by other words than `python3`, which `-u -c PROGRAM` follow.
    pub fn start_as(host: &Host, sandbox: &str, words: &[&str]) -> Self {
        let mut command = host.command(["exec", "-i", sandbox, "--"].iter().chain(words).chain(&["-u", "-c", PROGRAM]));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start deltabox");
        let (input, output) = (child.stdin.take().expect("an input"), child.stdout.take().expect("an output"));
        let mut worker = Self { child, input, output: BufReader::new(output) };
        assert_eq!(worker.ask("'ready'"), "ready");
        worker
    }

    /// Runs Python, and gives what its last line is worth; panics with what Python says if it fails.
    pub fn ask(&mut self, python: &str) -> Value {
        self.tell(python);
        self.answer()
    }

    /// Asks without waiting for the answer.
    pub fn tell(&mut self, python: &str) {
        let line = serde_json::to_string(python).expect("a string") + "\n";
        self.input.write_all(line.as_bytes()).expect("write to the program");
    }

    /// Waits for an answer.
    pub fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("read from the program");
        let answer: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: `{line}`"));
        assert!(answer.get("error").is_none(), "{}", answer["error"]);
        answer["value"].clone()
    }

    /// Closes its input, and waits for its end.
    pub fn end(self) -> std::process::ExitStatus {
        let Self { mut child, input, output } = self;
        drop((input, output));
        child.wait().expect("wait for deltabox")
    }

    /// The end of a program that was killed.
    pub fn wait(mut self) -> std::process::ExitStatus {
        self.child.wait().expect("wait for deltabox")
    }
}
