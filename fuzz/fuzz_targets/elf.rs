//! Fuzzes the way from a stack to functions and lines, by programs with changed bytes. `ELF_SEEDS` has the paths of the programs.
#![no_main]

use std::sync::LazyLock;

use cwkill::fuzzing::Program;
use libfuzzer_sys::fuzz_target;

static PROGRAMS: LazyLock<Vec<Program>> = LazyLock::new(|| {
    let paths = std::env::var("ELF_SEEDS").expect("scripts/fuzz sets ELF_SEEDS");
    let read = |path| Program::new(std::fs::read(path).expect("a program"));
    paths.split(':').map(read).collect()
});

// cwkill goes on after a panic of the library that reads symbols. libfuzzer-sys has set a hook that ends the process at any; one that nobody
// catches still does.
fuzz_target!(init: drop(std::panic::take_hook()), |data: &[u8]| {
    if let Some((which, data)) = data.split_first() {
        PROGRAMS[usize::from(*which) % PROGRAMS.len()].trace(data);
    }
});
