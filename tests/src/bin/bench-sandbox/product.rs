//! What is measured: the product's own client, and its command line as whole processes.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use deltabox::daemon::Place;
use deltabox::daemon::client::{Client, Ended, Local, OutputTo};
use deltabox::engine::{CreateRequest, ExecRequest, Exit, OnDisconnect, SandboxReport, Stdio as Streams, WindowSize};
use deltabox::sandbox::SandboxId;

use crate::visit::{Visit, argv};

/// One client of the daemon that the environment names.
#[derive(Debug)]
pub(crate) struct Product {
    client: Client,
}

impl Product {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { client: Client::new(Place::find(None, None))? })
    }

    pub(crate) fn create(&self, name: &str) -> anyhow::Result<SandboxReport> {
        let request = CreateRequest { name: Some(id(name)?), ..CreateRequest::default() };
        self.client.post("/v1/sandboxes", &request).with_context(|| format!("create {name}"))
    }

    pub(crate) fn remove(&self, name: &str) -> anyhow::Result<()> {
        self.client.delete(&format!("/v1/sandboxes/{name}")).with_context(|| format!("rm {name}"))
    }

    /// Runs the program until its exit status is here.
    pub(crate) fn exec(&self, name: &str, visit: Visit) -> anyhow::Result<()> {
        let tty = matches!(visit, Visit::Pty);
        let size = WindowSize { rows: 24, cols: 80 };
        let request = ExecRequest {
            argv: argv(visit).iter().map(|&arg| arg.to_owned()).collect(),
            env: Vec::new(),
            cwd: None,
            uid: 0,
            gid: None,
            stdio: if tty { Streams::Pty { size } } else { Streams::Pipes { stdin: false } },
            on_disconnect: OnDisconnect::End,
        };
        let local = Local { stdin: false, tty, output: OutputTo::Capture };
        match self.client.exec(&id(name)?, &request, local).with_context(|| format!("exec in {name}"))? {
            Ended::Exit { exit: Exit::Exited { status: 0 }, captured, .. } => {
                let expected = if matches!(visit, Visit::Kib) { 1024 } else { 0 };
                ensure!(captured.stdout.len() == expected, "{} bytes of output", captured.stdout.len());
                Ok(())
            }
            other => bail!("exec in {name}: {other:?}"),
        }
    }
}

fn id(name: &str) -> anyhow::Result<SandboxId> {
    name.parse().with_context(|| format!("the name {name}"))
}

/// How long the daemon itself says that the creation took.
pub(crate) fn engine_time(report: &SandboxReport) -> Duration {
    Duration::from_micros(report.create_us)
}

/// A program as a whole process, from fork to its end.
pub(crate) fn process(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
