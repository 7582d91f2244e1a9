//! The `deltabox` command.

fn main() {}
