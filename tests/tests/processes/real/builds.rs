//! Compilers.

use std::time::Duration;

use super::Story;

#[test]
fn a_build_with_three_compilers_at_a_time() {
    let mut story = Story::new(&["/bin/dash", "-c", include_str!("../programs/real/build.sh")]);
    // It speaks after each build, and many a checkpoint lies within one.
    story.seldom = std::mem::take(&mut story.voices);
    story.gap = Duration::from_millis(40);
    story.run();
}

#[test]
fn programs_that_are_written_and_executed_at_once() {
    Story::python(include_str!("../programs/real/executes.py")).run();
}
