//! `cwkill trace` with bad luck: programs that it cannot read, files that are damaged or hang, and more than it can follow; and with a real
//! program.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use netns_harness::owners::leaks::{Leaker, Leaky};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Dial, Lab, SsRow, TcpState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::at_one_instant::{hanging, walkers};
use crate::support::{FILE_BY_FUSE, PATIENCE, Ran, at};
use crate::trace::{Scene, Tracing, codes};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(a_32_bit_program_is_told)
        .needs(Need::Bits32)
        .needs(Need::Iterator),
    once!(a_library_that_was_cut_before_costs_its_names).needs(Need::Leaky(Leaky::C)),
    once!(a_library_that_is_cut_meanwhile_costs_its_names).needs(Need::Leaky(Leaky::C)),
    once!(a_module_of_redis_is_named)
        .needs(Need::Leaky(Leaky::Redis))
        .needs(Need::DebugSymbols),
    once!(a_process_that_keeps_the_lock_of_a_socket_does_not_hold_the_report_up)
        .needs(Need::Leaky(Leaky::C)),
    once!(a_process_that_has_ended_is_told).needs(Need::Leaky(Leaky::C)),
    once!(a_process_that_ends_is_named_if_it_was_seen_before).needs(Need::Leaky(Leaky::C)),
    once!(a_program_on_a_hung_mount_is_told)
        .needs(Need::Fuse)
        .slow(),
    once!(a_reader_that_is_killed_twice_is_told)
        .needs(Need::Fuse)
        .slow(),
    once!(a_storm_is_counted_and_keeps_the_shares)
        .needs(Need::Leaky(Leaky::C))
        .slow(),
];

/// The stack of such a program is not one of 64-bit words.
fn a_32_bit_program_is_told() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Bits32, "idle", 1)?;
    let tracing = Tracing::start(&lab, &format!("--pid {} --json", owner.pid()))?;
    owner.leak_ends(2)?;
    let ran = tracing.interrupted()?.exits(4);
    let document = ran.json();
    assert_eq!(at(&document, "/became_stuck"), "2", "{document:#}");
    assert_eq!(at(&document, "/place_unknown"), "2", "{document:#}");
    assert_eq!(at(&document, "/places"), "[]", "{document:#}");
    assert_eq!(codes(&document), ["thirty-two-bits"], "{document:#}");
    ran.complains("no stack is known of 2 sockets");
    Ok(())
}

/// A library through which the server reads. It needs nothing but its code, so the server goes on without the rest of the file.
const LIBRARY: &str = r#"
__attribute__((noinline)) static long read_by_library(int fd, void *buffer, unsigned long count)
{
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "a"(0L), "D"((long)fd), "S"(buffer), "d"(count) : "rcx", "r11", "memory");
	return result;
}

long read(int fd, void *buffer, unsigned long count)
{
	long result = read_by_library(fd, buffer, count);
	__asm__ volatile("" : "+r"(result));
	return result;
}
"#;

/// The library on a file system in memory, and a server that runs with it.
struct WithLibrary {
    scene: Scene,
    directory: tempfile::TempDir,
}

impl WithLibrary {
    fn start() -> Result<Self> {
        let directory = tempfile::tempdir_in("/dev/shm")?;
        let source = directory.path().join("library.c");
        fs::write(&source, LIBRARY)?;
        let library = directory.path().join("library.so");
        let built = Command::new("cc")
            .args(["-O2", "-g", "-shared", "-fPIC", "-nostdlib", "-o"])
            .args([&library, &source])
            .output()?;
        ensure!(built.status.success(), "{built:?}");
        let preload = format!("LD_PRELOAD={}", library.display());
        // Nothing is looked up in the library later.
        let wrapper = ["env", &preload, "LD_BIND_NOW=1"];
        let scene = Scene::start_through(&wrapper, Leaky::C)?;
        Ok(WithLibrary { scene, directory })
    }

    /// Cuts the file behind its code: what is left is no file of a program any more. What is mapped behind the cut is gone, too: whoever reads it
    /// gets SIGBUS.
    fn cut(&self) -> Result<()> {
        let library = self.directory.path().join("library.so");
        // The code is in the second page.
        Ok(fs::File::options()
            .write(true)
            .open(library)?
            .set_len(0x2000)?)
    }
}

/// The kernel's walk over sockets waits for the lock of each.
fn a_process_that_keeps_the_lock_of_a_socket_does_not_hold_the_report_up() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    let mut owner = hanging(&scene.lab)?;
    let tracing = Tracing::start(&scene.lab, "--port 7000 --json")?;
    scene.visit(b'L', 3)?;
    scene.until_stuck(3)?;
    let ran = tracing.interrupted()?.exits(0);
    let document = ran.json();
    let why = at(&document, "/walk_incomplete");
    assert_eq!(why, "a process keeps the lock of a socket", "{document:#}");
    assert_eq!(at(&document, "/became_stuck"), "3", "{document:#}");
    assert_eq!(functions(&document)[1], "read_to_end", "{document:#}");
    ran.complains("keeps the lock of a socket");
    // Nobody waits for its child.
    assert_eq!(walkers(&scene.lab)?, 1);
    owner.unlock_the_socket()?;
    scene
        .lab
        .wait_for(PATIENCE, || Ok(walkers(&scene.lab)? == 0))
}

/// It has read the end of a connection that another process keeps. When it accepted that, nobody watched.
fn a_process_that_has_ended_is_told() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    let connection = scene.connect()?;
    scene.lab.wait_for(PATIENCE, || {
        let rows = scene.lab.app_host().ss(&[])?;
        let is_accepted = |row: &SsRow| {
            row.state == TcpState::Established && row.local.port() == 7000 && !row.owners.is_empty()
        };
        Ok(rows.iter().any(is_accepted))
    })?;
    let tracing = Tracing::start(&scene.lab, "--port 7000 --json")?;
    scene.finish(&connection, b'E')?;
    until_the_server_has_ended(&scene)?;
    scene.until_stuck(1)?;
    let ran = tracing.interrupted()?.exits(4);
    let document = ran.json();
    assert_eq!(at(&document, "/place_unknown"), "1", "{document:#}");
    assert_eq!(codes(&document), ["ended"], "{document:#}");
    let pid = scene.server.pid();
    ran.complains(&format!("process {pid}: it ended before"));
    end_the_child(&scene)
}

fn a_process_that_ends_is_named_if_it_was_seen_before() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    let tracing = Tracing::start(&scene.lab, "--port 7000 --json")?;
    scene.visit(b'L', 1)?;
    // Until its files are open.
    let program = fs::canonicalize(scene.server.file())?;
    scene.lab.wait_for(PATIENCE, || {
        let Some(reader) = tracing.reader_of(scene.server.pid())? else {
            return Ok(false);
        };
        let files = fs::read_dir(format!("/proc/{reader}/fd"))?;
        let files = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
        let open: Vec<PathBuf> = files.collect();
        Ok(open.contains(&program) && open.iter().any(|file| file.ends_with("libc.so.6")))
    })?;
    scene.visit(b'E', 1)?;
    until_the_server_has_ended(&scene)?;
    scene.until_stuck(2)?;
    let document = tracing.interrupted()?.exits(0).json();
    let places = document["places"].as_array().into_iter().flatten();
    let callers = places.map(|place| {
        let own = at(place, "/read/first_own_frame").parse::<usize>()? + 1;
        Ok(at(place, &format!("/read/frames/{own}/function")))
    });
    let callers: Vec<String> = callers.collect::<Result<_>>()?;
    assert_eq!(callers, ["leaky_handler", "last_handler"], "{document:#}");
    end_the_child(&scene)
}

fn end_the_child(scene: &Scene) -> Result<()> {
    for owner in scene
        .lab
        .app_host()
        .ss(&[])?
        .iter()
        .flat_map(|row| &row.owners)
    {
        if owner.comm == "leak" {
            kill(Pid::from_raw(owner.pid.try_into()?), Signal::SIGKILL)?;
        }
    }
    Ok(())
}

/// Nobody waits for it: it stays as a zombie. Its child keeps the connection.
fn until_the_server_has_ended(scene: &Scene) -> Result<()> {
    let stat = format!("/proc/{}/stat", scene.server.pid());
    scene
        .lab
        .wait_for(PATIENCE, || Ok(fs::read_to_string(&stat)?.contains(") Z ")))
}

/// The functions of the first place, the innermost first.
fn functions(document: &Value) -> Vec<String> {
    let frames = document["places"][0]["read"]["frames"].as_array();
    let frames = frames.into_iter().flatten();
    frames.map(|frame| at(frame, "/function")).collect()
}

fn a_library_that_was_cut_before_costs_its_names() -> Result<()> {
    let leak = WithLibrary::start()?;
    leak.cut()?;
    let tracing = Tracing::start(&leak.scene.lab, "--port 7000 --json")?;
    leak.scene.visit(b'L', 3)?;
    leak.scene.until_stuck(3)?;
    let document = tracing.interrupted()?.exits(0).json();
    assert_eq!(at(&document, "/became_stuck"), "3", "{document:#}");
    assert_eq!(functions(&document)[0], "null", "{document:#}");
    let module = at(&document, "/places/0/read/frames/0/module");
    assert!(module.ends_with("/library.so"), "{document:#}");
    assert_eq!(codes(&document), ["damaged"], "{document:#}");
    Ok(())
}

fn a_library_that_is_cut_meanwhile_costs_its_names() -> Result<()> {
    let leak = WithLibrary::start()?;
    let tracing = Tracing::start(&leak.scene.lab, "--port 7000 --json")?;
    leak.scene.visit(b'L', 3)?;
    leak.scene.until_stuck(3)?;
    // The file is read, and mapped, for these.
    leak.scene.lab.wait_for(PATIENCE, || {
        let readers = tracing.readers()?;
        Ok(readers.iter().any(|child| {
            let maps = fs::read_to_string(format!("/proc/{child}/maps"));
            maps.is_ok_and(|maps| maps.contains("library.so"))
        }))
    })?;
    leak.cut()?;
    // Another line of the program, with other places in the library's symbols.
    leak.scene.visit(b'M', 2)?;
    leak.scene.until_stuck(5)?;
    // The process that reads symbols may end by SIGBUS, before or after it has answered. cwkill itself goes on.
    let ran = tracing.interrupted()?;
    let document = ran.json();
    assert_eq!(at(&document, "/became_stuck"), "5", "{document:#}");
    let is_told = codes(&document) == ["damaged"];
    let named = functions(&document);
    let has_names = named.iter().any(|name| name == "leaky_handler");
    assert!(has_names || is_told, "{document:#}");
    let is_known = document["places"] != Value::Array(Vec::new());
    ran.exits(if is_known { 0 } else { 4 });
    Ok(())
}

/// A trace of a server whose file is on a file system that hangs, while so many connections leak.
fn on_a_hung_mount(
    leaks: usize,
    meanwhile: impl Fn(&Scene, &Tracing) -> Result<()>,
) -> Result<Ran> {
    let script = format!(
        "{FILE_BY_FUSE}
os.chdir(directory)
os.execv('./program', ['program', *sys.argv[2:]])
"
    );
    let wrapper = ["unshare", "-m", "python3", "-c", &script];
    let scene = Scene::start_through(&wrapper, Leaky::C)?;
    let pid = scene.server.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let server = Pid::from_raw(children.trim().parse()?);
    // Its own pages are in memory.
    scene.visit(b'L', 1)?;
    scene.visit(b'M', 1)?;
    scene.until_stuck(2)?;
    let tracing = Tracing::start(&scene.lab, "--port 7000 --json")?;
    kill(server, Signal::SIGSTOP)?;
    scene.visit(b'L', leaks)?;
    scene.until_stuck(2 + leaks)?;
    meanwhile(&scene, &tracing)?;
    let ran = tracing.interrupted()?.exits(4);
    kill(server, Signal::SIGKILL)?;
    let document = ran.json();
    assert_eq!(at(&document, "/became_stuck"), leaks.to_string());
    assert_eq!(at(&document, "/stuck_before"), "2", "{document:#}");
    assert_eq!(at(&document, "/place_unknown"), leaks.to_string());
    Ok(ran)
}

fn a_program_on_a_hung_mount_is_told() -> Result<()> {
    let ran = on_a_hung_mount(2, |_, _| Ok(()))?;
    assert_eq!(codes(&ran.json()), ["too-slow"], "{:#}", ran.json());
    ran.complains("its symbols could not be read in time");
    Ok(())
}

/// A sample that ends it twice would end it always.
fn a_reader_that_is_killed_twice_is_told() -> Result<()> {
    let ran = on_a_hung_mount(1, |scene, tracing| {
        let traced = scene.server.pid();
        let first = tracing.kill_reader(&scene.lab, traced, None)?;
        tracing.kill_reader(&scene.lab, traced, Some(first))?;
        scene
            .lab
            .wait_for(PATIENCE, || Ok(tracing.reader_of(traced)?.is_none()))
    })?;
    assert_eq!(codes(&ran.json()), ["damaged"], "{:#}", ran.json());
    ran.complains("not all of its symbols could be read");
    Ok(())
}

/// A real program, as Debian ships it: without debug symbols, and with the names that its modules may call. Of the C library it has the debug
/// symbols in a package.
fn a_module_of_redis_is_named() -> Result<()> {
    let lab = Lab::new()?;
    let redis = Leaker::start(lab.app_host(), Leaky::Redis, &["6379"])?;
    let client = lab.app_host().agent("client")?;
    lab.wait_for(PATIENCE, || {
        let rows = lab.app_host().ss(&[])?;
        Ok(rows.iter().any(|row| row.state == TcpState::Listen))
    })?;
    let listener = client.listen(([127, 0, 0, 1], 7001).into(), false, 64)?;
    let to_redis = client.connect(([127, 0, 0, 1], 6379).into(), 1, Dial::default(), PATIENCE)?;
    let tracing = Tracing::start(&lab, "--peer-port 7001 --json")?;
    for _ in 0..3 {
        client.send(&[to_redis[0].fd], b"LEAK.FETCH 7001\r\n")?;
        let accepted = client.accept(listener, 1, PATIENCE)?;
        client.close(&[accepted[0].fd])?;
    }
    lab.wait_for(PATIENCE, || {
        let rows = lab.app_host().ss(&[])?;
        let is_read = |row: &&SsRow| row.state == TcpState::CloseWait && row.recv_q == 0;
        Ok(rows.iter().filter(is_read).count() == 3)
    })?;
    let document = tracing.interrupted()?.exits(0).json();
    assert_eq!(at(&document, "/places/0/count"), "3", "{document:#}");
    assert_eq!(at(&document, "/places/0/comm"), "redis-server");
    assert_eq!(at(&document, "/places/0/pid"), redis.pid().to_string());
    let read = &document["places"][0]["read"];
    let own = read["first_own_frame"]
        .as_u64()
        .context("no frame of its own")?;
    let part = |frame: u64, name: &str| at(read, &format!("/frames/{frame}/{name}"));
    for (frame, function, comment) in [
        (own, "read_to_end", "the end is read here"),
        (own + 1, "fetch_command", "the leak"),
    ] {
        assert_eq!(part(frame, "function"), function, "{document:#}");
        assert!(
            part(frame, "file").ends_with("/redis_module.c"),
            "{document:#}"
        );
        let line = Leaky::Redis.line_of(comment).map(|line| line.to_string());
        assert_eq!(Some(part(frame, "line")), line, "{document:#}");
    }
    // The C library's own code.
    assert!(own > 0, "{document:#}");
    assert!(part(0, "function").contains("read"), "{document:#}");
    assert!(part(0, "file").ends_with("/read.c"), "{document:#}");
    // The callers in Redis itself.
    let names = functions(&document);
    for name in [
        "RedisModuleCommandDispatcher",
        "processCommand",
        "aeMain",
        "main",
    ] {
        assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
    }
    Ok(())
}

/// Megabytes that a process has had in memory at most.
fn peak_mb(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kb = line.and_then(|line| line.split_whitespace().next());
    let kb: u64 = kb.context("no VmHWM")?.parse()?;
    Ok(kb >> 10)
}

fn a_storm_is_counted_and_keeps_the_shares() -> Result<()> {
    // Three of four leaks are those of one handler.
    let pattern = format!("{}G", "LLLM".repeat(8));
    let (count, leaks) = (550 * pattern.len(), 550 * 32);
    let limit = ["sh", "-c", "ulimit -n 20000 && exec \"$@\"", "sh"];
    let scene = Scene::start_through(&limit, Leaky::C)?;
    let tracing = Tracing::start(&scene.lab, "--port 7000 --json")?;
    // First it gets no processor, so that the slots overflow on a slow machine, too.
    tracing.signal(Signal::SIGSTOP)?;
    let storm = Leaker::start(
        scene.lab.app_host(),
        Leaky::Storm,
        &["7000", &count.to_string(), &pattern],
    )?;
    let are_stuck = |at_least: usize| {
        scene.lab.wait_for(PATIENCE, || {
            let rows = scene.lab.app_host().ss(&[])?;
            let is_read = |row: &&SsRow| row.state == TcpState::CloseWait && row.recv_q == 0;
            Ok(rows.iter().filter(is_read).count() >= at_least)
        })
    };
    are_stuck(leaks / 4)?;
    tracing.signal(Signal::SIGCONT)?;
    are_stuck(leaks)?;
    drop(storm);
    let peak = peak_mb(tracing.child.id())?;
    let ran = tracing.interrupted()?.exits(0);
    let document = ran.json();
    let number = |name: &str| document[name].as_u64().unwrap_or_default();
    assert_eq!(number("became_stuck"), leaks as u64);
    // More than there are slots: it is counted, and told.
    assert!(number("place_unknown") > 0, "{}", summary(&document));
    ran.complains("found no free slot");
    for (place, expected, handler) in [(0, 0.75, "leaky_handler"), (1, 0.25, "other_handler")] {
        let share = document["places"][place]["share"]
            .as_f64()
            .unwrap_or_default();
        assert!((share - expected).abs() < 0.05, "{}", summary(&document));
        let stack = &document["places"][place]["read"];
        let frames = stack["frames"].as_array().into_iter().flatten();
        let mut names = frames.map(|frame| at(frame, "/function"));
        assert!(names.any(|name| name == handler), "{stack:#}");
    }
    assert!(peak < 300, "{peak} MB");
    Ok(())
}

/// A document without its long parts.
fn summary(document: &Value) -> String {
    let mut document = document.clone();
    for place in document["places"].as_array_mut().into_iter().flatten() {
        if let Some(place) = place.as_object_mut() {
            place.retain(|name, _| name == "count" || name == "share");
        }
    }
    document.to_string()
}
