//! A program with much memory.

use std::time::Duration;

use super::Story;

#[test]
fn a_gigabyte_of_memory() {
    let mut story = Story::python(include_str!("../programs/real/memory.py"));
    story.gap = Duration::from_millis(50);
    story.run();
}
