//! Programs in Python.

use std::time::Duration;

use super::Story;

#[test]
fn five_threads_in_a_ring() {
    let mut story = Story::python(include_str!("../programs/real/threaded.py"));
    story.voices = (0..5).map(|k| k.to_string()).collect();
    story.run();
}

#[test]
fn a_database_and_its_writer() {
    // With a rollback journal it takes a file whose inode number has changed for another one (docs/checkpoints.md).
    let mut story = Story::python(include_str!("../programs/real/database.py"));
    story.words.push("wal".to_owned());
    story.run();
}

#[test]
fn five_hundred_descriptors() {
    let mut story = Story::python(include_str!("../programs/real/descriptors.py"));
    story.gap = Duration::from_millis(30);
    story.run();
}
