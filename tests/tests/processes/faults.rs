//! Failures and deaths of the engine at each step, and what they leave.

use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root, wait_within};
use serde_json::json;

use crate::{checkpoint, roll_back};

fn start(fault: &str) -> Option<(Host, Worker)> {
    if skipped_without_root() {
        return None;
    }
    let host = Host::start_with(&[("DELTABOX_FAULT", fault)]);
    host.create("box");
    let worker = Worker::start_as(&host, "box", &["/usr/bin/python3"]);
    Some((host, worker))
}

/// Names of the cgroups of templates.
fn templates(host: &Host) -> Vec<String> {
    let group = host.inspect("box")["cgroup"].as_str().expect("a cgroup").to_owned();
    let entries = std::fs::read_dir(group).expect("the cgroup");
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with('t')).collect()
}

#[test]
fn a_checkpoint_that_fails_at_any_step_leaves_the_program_and_nothing_else() {
    for fault in [
        "moment.take",
        "template.cloned",
        "template.attended",
        "switch.pivot",
        "rebase.give",
        "moment.save",
        "tree.write",
    ] {
        let Some((host, mut worker)) = start(fault) else { return };
        worker.ask("n = 1; f = open('/srv/f', 'w'); f.write('one'); f.flush()");
        let failed = host.cli(["--json", "checkpoint", "box"]);
        assert_eq!(failed.code(), 1, "{fault}: {failed:?}");
        let message = failed.error()["message"].as_str().expect("a message").to_owned();
        assert!(message.contains(fault), "{message}");
        wait_within(10, "its templates are gone", || templates(&host).is_empty());
        assert_eq!(
            worker.ask("f.write('two'); f.flush(); [n, open('/srv/f').read()]"),
            json!([1, "onetwo"]),
            "{fault}"
        );
        // And again: a failure uses nothing up.
        assert_eq!(host.cli(["checkpoint", "box"]).code(), 1);
        let host = host.restart_without_faults();
        checkpoint(&host);
        assert_eq!(host.sh("box", "cat /srv/f").ok(), "onetwo");
    }
}

#[test]
fn a_rollback_that_fails_before_anything_has_changed_changes_nothing() {
    let Some((host, mut worker)) = start("moment.prepare") else { return };
    worker.ask("n = 1; open('/srv/f', 'w').write('one')");
    let id = checkpoint(&host);
    worker.ask("n = 2; open('/srv/f', 'w').write('two')");
    for _ in 0..2 {
        let failed = host.cli(["--json", "rollback", "box", &id]);
        assert_eq!(failed.code(), 1, "{failed:?}");
        assert_eq!(worker.ask("[n, open('/srv/f').read()]"), json!([2, "two"]));
    }
    checkpoint(&host);
    assert!(worker.end().success());
}

#[test]
fn a_rollback_that_fails_half_way_leaves_files_and_checkpoints_and_no_process() {
    for fault in ["moment.end", "moment.restore", "state.change"] {
        let Some((host, mut worker)) = start(fault) else { return };
        worker.ask("os.umask(0o77); open('/srv/f', 'w').write('one')");
        let id = checkpoint(&host);
        worker.ask("os.umask(0); open('/srv/f', 'w').write('two')");
        let failed = host.cli(["--json", "rollback", "box", &id]);
        assert_eq!(failed.code(), 1, "{fault}: {failed:?}");
        assert_eq!(failed.error()["code"], json!("lost"), "{fault}");
        assert_eq!(worker.wait().code(), Some(128 + 9));
        assert_eq!(host.sh("box", "cat /srv/f").ok(), "one", "{fault}");
        let ps = host.cli(["--json", "ps", "box"]).json();
        assert_eq!(ps["processes"].as_array().expect("processes").len(), 1);
        assert_eq!(host.cli(["--json", "tree", "box"]).json()["head"], json!(id));
        // It can be worked with.
        host.cli(["checkpoint", "box", "--fs-only"]).ok();
    }
}

#[test]
fn an_engine_killed_in_a_checkpoint_leaves_programs_that_run_on() {
    for fault in ["moment.take", "template.born", "template.attended", "template.cloned", "switch.pivot", "switch.seal"]
    {
        let Some((mut host, mut worker)) = start(&format!("{fault}:kill")) else { return };
        worker.ask("n = 1; f = open('/srv/f', 'w'); f.write('one'); f.flush()");
        let died = host.cli(["checkpoint", "box"]);
        assert_ne!(died.code(), 0, "{fault}");
        host.wait_daemon();
        let host = host.restart_without_faults();
        // Its client comes back to it.
        assert_eq!(
            worker.ask("f.write('two'); f.flush(); [n, open('/srv/f').read()]"),
            json!([1, "onetwo"]),
            "{fault}"
        );
        assert_eq!(templates(&host), Vec::<String>::new(), "{fault}");
        let id = checkpoint(&host);
        worker.ask("n = 2");
        roll_back(&host, &id);
        assert_eq!(worker.ask("n"), json!(1));
        assert!(worker.end().success());
    }
}

#[test]
fn an_engine_killed_in_a_rollback_leaves_all_or_no_programs_and_whole_files() {
    for (fault, survives) in
        [("moment.prepare", true), ("moment.end", false), ("state.change", false), ("moment.restore", false)]
    {
        let Some((mut host, mut worker)) = start(&format!("{fault}:kill")) else { return };
        worker.ask("n = 1; os.umask(0o77); open('/srv/f', 'w').write('one')");
        let id = checkpoint(&host);
        worker.ask("n = 2; os.umask(0); open('/srv/f', 'w').write('two')");
        assert_ne!(host.cli(["rollback", "box", &id]).code(), 0, "{fault}");
        host.wait_daemon();
        let host = host.restart_without_faults();
        // Its input stays open.
        let _worker = if survives {
            assert_eq!(worker.ask("[n, open('/srv/f').read()]"), json!([2, "two"]), "{fault}");
            checkpoint(&host);
            Some(worker)
        } else {
            assert_ne!(worker.wait().code(), Some(0), "{fault}");
            let file = host.sh("box", "cat /srv/f").ok();
            assert!(["one", "two"].contains(&file.as_str()), "{fault}: {file}");
            let ps = host.cli(["--json", "ps", "box"]).json();
            assert_eq!(ps["processes"].as_array().expect("processes").len(), 1, "{fault}");
            None
        };
        // And back it is, in place or made again.
        let report = roll_back(&host, &id);
        assert_eq!(report["processes"].as_array().expect("processes").len(), 1, "{fault}: {report}");
        assert_eq!(host.sh("box", "cat /srv/f").ok(), "one", "{fault}");
        let how = if survives { "in place" } else { "fork" };
        assert_eq!(report["processes"][0]["how"], json!(how), "{fault}");
    }
}
