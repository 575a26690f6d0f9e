//! The `cwkill` program.
fn main() {}
