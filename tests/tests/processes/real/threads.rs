//! A compiled program with many threads.

use std::time::Duration;

use super::Story;

#[test]
fn sixty_four_threads_of_a_compiled_program() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_program-threads")).expect("the program");
    let mut story = Story::new(&["/srv/program-threads"]);
    story.files.push(("program-threads", program));
    story.voices = (0..64).map(|k| k.to_string()).collect();
    story.gap = Duration::from_millis(10);
    story.run();
}
