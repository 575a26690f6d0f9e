//! How tests are listed, left out and run. Each module lists its tests in `TESTS`. A function that is missing there is dead
//! code, which the compiler reports.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;
use libtest_mimic::{Failed, Trial};
use netns_harness::Family;
use netns_harness::owners::leaks::Leaky;
use netns_harness::owners::runtimes::Runtime;

use crate::{cgroups, reclaim};

/// A test by the name of its function.
#[derive(Clone, Copy)]
pub struct Test {
    name: &'static str,
    body: Body,
    slow: bool,
    /// At most two.
    needs: [Option<Need>; 2],
}

#[derive(Clone, Copy)]
enum Body {
    Once(fn() -> Result<()>),
    EachFamily(fn(Family) -> Result<()>),
}

/// Something that a test needs and that not every machine has.
#[derive(Clone, Copy, Debug)]
pub enum Need {
    /// Its user may make cgroups, mount /proc and become other users.
    RootOfTheMachine,
    /// The kernel reports what a program opens, to root of the machine.
    Fanotify,
    IoUring,
    /// The kernel's iterators of BPF: root of the machine, and the kernel's types.
    Iterator,
    /// Its user may mount file systems that a program serves.
    Fuse,
    /// The kernel runs 32-bit programs.
    Bits32,
    /// The debug symbols of the C library, as Debian ships them.
    DebugSymbols,
    /// A program by its name.
    Program(&'static str),
    /// The tools of a language.
    Language(Runtime),
    /// The tools of a program that leaks, and the kernel's iterators to trace it.
    Leaky(Leaky),
}

impl Need {
    /// Why the machine does not have it.
    fn missing(self) -> Option<String> {
        static IS_ROOT: LazyLock<bool> = LazyLock::new(cgroups::can_be_made);
        let (is_there, why) = match self {
            Need::Language(runtime) => {
                let tool = runtime.missing_tool()?;
                return Some(format!("{tool} is not installed"));
            }
            Need::Leaky(program) => {
                let tool = program.missing_tool();
                let missing = tool.map(|tool| format!("{tool} is not installed"));
                return missing.or_else(|| Need::Iterator.missing());
            }
            Need::Program(name) => {
                let started = std::process::Command::new(name).arg("-v").output();
                return started.err().map(|_| format!("{name} is not installed"));
            }
            Need::RootOfTheMachine => (
                *IS_ROOT,
                "only root of the machine can make cgroups, mount /proc and become other users",
            ),
            Need::Fanotify => (
                reclaim::is_root_of_the_machine(),
                "only root of the machine gets permission events of fanotify",
            ),
            Need::Fuse => (
                *IS_ROOT && std::path::Path::new("/dev/fuse").exists(),
                "there is no /dev/fuse, or only root of the machine may mount",
            ),
            Need::Iterator => (
                *IS_ROOT && std::path::Path::new("/sys/kernel/btf/vmlinux").exists(),
                "there is no /sys/kernel/btf/vmlinux, or only root of the machine may load programs of BPF",
            ),
            Need::DebugSymbols => (
                std::path::Path::new("/usr/lib/debug/.build-id").exists(),
                "libc6-dbg is not installed",
            ),
            Need::IoUring => (
                reclaim::programs::has_io_uring(),
                "the kernel has no io_uring, or not for this user",
            ),
            Need::Bits32 => (
                reclaim::programs::runs_32_bits(),
                "the kernel runs no 32-bit programs",
            ),
        };
        (!is_there).then(|| why.to_owned())
    }
}

impl Test {
    pub const fn once(name: &'static str, body: fn() -> Result<()>) -> Self {
        Test {
            name,
            body: Body::Once(body),
            slow: false,
            needs: [None; 2],
        }
    }

    pub const fn each_family(name: &'static str, body: fn(Family) -> Result<()>) -> Self {
        Test {
            name,
            body: Body::EachFamily(body),
            slow: false,
            needs: [None; 2],
        }
    }

    /// Puts it into the slow group, which runs only with `--ignored` or `--include-ignored`: chaos, repeated kills, and tests
    /// that take about ten seconds or more.
    pub const fn slow(self) -> Self {
        Test { slow: true, ..self }
    }

    pub const fn needs(self, need: Need) -> Self {
        Test {
            needs: [Some(need), self.needs[0]],
            ..self
        }
    }
}

/// Lists a function as a test that runs once.
macro_rules! once {
    ($function:ident) => {
        crate::trial::Test::once(stringify!($function), $function)
    };
}

/// Lists a function as a test that runs in each address family.
macro_rules! each_family {
    ($function:ident) => {
        crate::trial::Test::each_family(stringify!($function), $function)
    };
}

pub(crate) use {each_family, once};

/// The tests of `modules` that can run on this machine. Those that cannot are reported.
pub fn trials(modules: &[(&str, &[Test])]) -> Vec<Trial> {
    record_panics();
    let mut trials = Vec::new();
    let mut left_out: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (module, tests) in modules {
        for test in *tests {
            let name = format!("{module}::{}", test.name);
            let mut needs = test.needs.into_iter().flatten();
            if let Some(why) = needs.find_map(Need::missing) {
                left_out.entry(why).or_default().push(name);
                continue;
            }
            match test.body {
                Body::Once(body) => trials.push(trial(name, test.slow, body)),
                Body::EachFamily(body) => trials.extend(Family::ALL.map(|family| {
                    let name = format!("{name}::{}", family.name());
                    trial(name, test.slow, move || body(family))
                })),
            }
        }
    }
    // The gate installs everything and fails if it sees this in its run as root.
    for (why, names) in left_out {
        eprintln!("LEFT OUT, {why}: {}", names.join(", "));
    }
    trials
}

/// Set in the environment, it makes each test print how long it took.
const TIMES: &str = "CWKILL_TESTS_TIMES";

fn trial(name: String, slow: bool, body: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    let shown = name.clone();
    let run = move || {
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(body));
        if std::env::var_os(TIMES).is_some() {
            eprintln!("{:8.2} s  {shown}", began.elapsed().as_secs_f64());
        }
        match result {
            Ok(result) => result.map_err(|error| format!("{error:#}").into()),
            Err(panic) => Err(located(&*panic)),
        }
    };
    Trial::test(name, run)
        .with_kind(if slow { "slow" } else { "" })
        .with_ignored_flag(slow)
}

/// The message of every panic so far, after its file and line.
static PANICS: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// libtest-mimic reports the message of a panic, but not its line.
fn record_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if let (Some(place), Some(message)) = (panic.location(), message(panic.payload())) {
            let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
            panics.push((place.to_string(), message.to_owned()));
        }
        print(panic);
    }));
}

fn message(payload: &(dyn Any + Send)) -> Option<&str> {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied())
}

/// A panic as the failure of a test, with its line. The panic may come from another thread, which the test has joined.
fn located(payload: &(dyn Any + Send)) -> Failed {
    let Some(message) = message(payload) else {
        return "a panic without a message".into();
    };
    let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
    let place = panics.iter().rev().find(|(_, other)| other == message);
    let place = place.map_or("unknown place", |(place, _)| place);
    format!("{place}: {message}").into()
}
