//! Shells, and processes that come and go.

use super::{LAPS, Story};

#[test]
fn a_shell_with_jobs_and_pipelines() {
    // Each shell that starts asks for its user: glibc makes a socket, fails to connect it to nscd, and closes it.
    Story::new(&["/bin/bash", "-c", include_str!("../programs/real/jobs.sh")]).run();
}

#[test]
fn python_under_a_shell_under_a_supervisor() {
    let [program, shell] =
        [include_str!("../programs/real/supervised.py"), include_str!("../programs/real/supervised.sh")];
    let program = format!("{LAPS}\n{program}");
    let mut story = Story::python(include_str!("../programs/real/supervisor.py"));
    story.create = [("PROGRAM_", &program), ("SHELL_", &shell.to_owned())]
        .into_iter()
        .flat_map(|(name, text)| ["--env".to_owned(), format!("{name}={text}")])
        .collect();
    story.seldom = vec!["supervisor".to_owned()];
    story.run();
}
