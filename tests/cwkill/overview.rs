//! What a terminal shows: one screen, whatever its size.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use netns_harness::{AgentOptions, Family, Lab, TcpState};
use regex::Regex;

use crate::support::{CWKILL, Ran, alone, cwkill, in_state, lab};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_terminal_shows_a_row_for_each_process),
    once!(a_terminal_gets_colors),
    once!(every_socket_is_shown_on_request),
    once!(a_listener_has_a_row_of_its_own),
    once!(an_act_shows_what_was_closed_and_what_was_kept),
    once!(a_small_terminal_breaks_no_word),
    once!(a_terminal_without_colors_or_utf8_gets_none),
    once!(a_terminal_may_change_its_size_meanwhile),
    once!(namespaces_that_were_not_looked_into_are_counted),
    once!(messages_break_no_word),
    once!(a_hostile_name_takes_little_room),
    once!(two_runs_have_the_same_order),
    once!(many_processes_of_one_kind_have_one_row),
    once!(every_socket_fits_into_a_narrow_terminal),
    each_family!(at_its_limit_a_process_needs_its_descriptors_freed),
    once!(the_next_command_comes_last),
    once!(after_a_part_is_freed_the_rest_has_a_command),
];

/// Runs cwkill on a terminal of this size, after `before`.
fn on_a_terminal(
    lab: &Lab,
    (columns, rows): (usize, usize),
    before: &str,
    line: &str,
) -> Result<Ran> {
    let inside =
        format!("stty cols {columns} rows {rows}; export NO_COLOR=1; {before} {CWKILL} {line}");
    let command = format!("script -qec '{inside}' /dev/null </dev/null");
    let output = lab
        .app_host()
        .command("sh")
        .args(["-c", &command])
        .output()?;
    let mut ran = Ran::of(&command, output)?;
    // The terminal puts a carriage return before each newline.
    ran.stdout = ran.stdout.replace('\r', "");
    Ok(ran)
}

const USUAL: (usize, usize) = (80, 24);

/// The last line, without the option that only tests add.
fn last(ran: &Ran) -> String {
    let last = ran.stdout.lines().last().unwrap_or_default();
    last.replace("--min-idle 0s ", "")
}

/// The row that begins with `name`, in words.
#[track_caller]
fn row<'r>(ran: &'r Ran, name: &str) -> Vec<&'r str> {
    let mut lines = ran.stdout.lines();
    let line = lines.find(|line| line.starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no row of {name}: {ran:?}"));
    line.split_whitespace().collect()
}

fn a_terminal_shows_a_row_for_each_process(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let first = lab.start("drained", family, alone(8001, 2))?;
    let second = lab.start("unread", family, alone(8002, 5))?;
    let ran = on_a_terminal(&lab, USUAL, "", "")?.exits(0);
    let header = row(&ran, "PROCESS");
    let wanted = [
        "PROCESS",
        "STUCK",
        "OLDEST",
        "CAUSES",
        "PORTS",
        "FDS/LIMIT",
        "DEAD",
    ];
    assert_eq!(header, wanted, "{ran:?}");
    for (leak, stuck, cause, port) in [
        (&first, "2", "drained", "8001"),
        (&second, "5", "unread", "8002"),
    ] {
        let pid = leak.app().pid();
        let lines = ran.stdout.lines();
        let found = lines
            .clone()
            .find(|line| line.contains(&format!("/{pid} ")));
        let row: Vec<&str> = found.context("a row")?.split_whitespace().collect();
        assert_eq!(
            (row[1], row[3], row[4], row[6]),
            (stuck, cause, port, "0"),
            "{ran:?}"
        );
        let (used, limit) = row[5].split_once('/').context("descriptors")?;
        let directory = format!("/proc/{pid}/fd");
        assert_eq!(used, std::fs::read_dir(directory)?.count().to_string());
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let soft = limits
            .lines()
            .find(|line| line.starts_with("Max open files"));
        let soft = soft.and_then(|line| line.split_whitespace().nth(3));
        assert_eq!(Some(limit), soft);
    }
    // The most comes first, and the next command is about it.
    let pid = second.app().pid();
    let table: Vec<&str> = ran.stdout.lines().collect();
    assert!(table[1].contains(&format!("/{pid} ")), "{ran:?}");
    let next = table
        .last()
        .and_then(|line| line.strip_prefix("next: cwkill "));
    let next = next.with_context(|| format!("no next command: {ran:?}"))?;
    assert!(next.ends_with(&format!("--pid {pid} -n")), "{ran:?}");
    // It is a dry run, and the one after it acts.
    let dry = on_a_terminal(&lab, USUAL, "", next)?.exits(0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 7);
    let next = dry
        .stdout
        .lines()
        .last()
        .and_then(|line| line.strip_prefix("next: cwkill "));
    let next = next.with_context(|| format!("no next command: {dry:?}"))?;
    on_a_terminal(&lab, USUAL, "", next)?.exits(0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

fn every_socket_is_shown_on_request() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 40)?;
    let rows = |ran: &Ran| {
        ran.stdout
            .lines()
            .filter(|line| line.contains("drained"))
            .count()
    };
    for line in ["-v", "--limit all"] {
        let ran = on_a_terminal(&lab, (120, 24), "", line)?.exits(0);
        assert_eq!(rows(&ran), 41, "{ran:?}");
        assert!(ran.stdout.contains("RECV-Q"), "{ran:?}");
    }
    // The row of the process, and the last line.
    assert_eq!(rows(&on_a_terminal(&lab, USUAL, "", "")?.exits(0)), 2);
    assert_eq!(rows(&cwkill(&lab, "")?.exits(0)), 41);
    assert_eq!(rows(&cwkill(&lab, "--limit all")?.exits(0)), 41);
    let some = cwkill(&lab, "--limit 3")?.exits(0);
    assert_eq!(rows(&some), 4);
    assert!(
        some.stdout.contains("and 37 more sockets: --limit all"),
        "{some:?}"
    );
    for line in ["--limit 0", "--limit few", "--limit 3 --json"] {
        cwkill(&lab, line)?.exits(2);
    }
    Ok(())
}

fn a_listener_has_a_row_of_its_own() -> Result<()> {
    let (lab, leak) = lab("not-accepted", Family::V6, 3)?;
    let ran = on_a_terminal(&lab, USUAL, "", "")?.exits(0);
    let pid = leak.app().pid();
    assert!(
        ran.stdout.contains(&format!("/{pid} (listener)      3")),
        "{ran:?}"
    );
    assert!(ran.stdout.contains("--port 8080 -n"), "{ran:?}");
    Ok(())
}

fn an_act_shows_what_was_closed_and_what_was_kept() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 5)?;
    let ran = on_a_terminal(
        &lab,
        USUAL,
        "",
        "--port 8080 --max-kills 3 --method destroy",
    )?
    .exits(0);
    let header = row(&ran, "PROCESS");
    let pid = leak.app().pid();
    let line = ran
        .stdout
        .lines()
        .find(|line| line.contains(&format!("/{pid} ")))
        .context("a row")?;
    let cells: Vec<&str> = line.split_whitespace().collect();
    let cell = |name: &str| {
        let place = header.iter().position(|title| *title == name);
        place
            .map(|place| cells[place])
            .with_context(|| format!("no {name}: {ran:?}"))
    };
    assert_eq!((cell("CLOSED")?, cell("KEPT")?), ("3", "2"), "{ran:?}");
    // The descriptors of closed sockets stay open.
    assert_eq!(cell("DEAD")?, "3", "{ran:?}");
    assert!(
        ran.stdout.contains("\n2 kept: over --max-kills\n"),
        "{ran:?}"
    );
    assert!(ran.stdout.contains("\n3 closed by destroy\n"), "{ran:?}");
    // Nothing but the limit has kept them.
    let again = "next: cwkill --port 8080 --max-kills 3 --method destroy";
    assert_eq!(last(&ran), again);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

fn a_small_terminal_breaks_no_word() -> Result<()> {
    let lab = Lab::new()?;
    let _first = lab.start("drained", Family::V4, alone(8001, 2))?;
    let _second = lab.start("unread", Family::V6, alone(8002, 1))?;
    let _third = lab.start("not-accepted", Family::V6, alone(8003, 1))?;
    let wide = on_a_terminal(&lab, (200, 50), "", "-v")?.exits(0);
    let words: BTreeSet<&str> = wide.stdout.split_whitespace().collect();
    for size in [(20, 24), (80, 3), (20, 3), (40, 10)] {
        let ran = on_a_terminal(&lab, size, "", "")?.exits(0);
        for line in ran.stdout.lines().filter(|line| !line.starts_with("next")) {
            let is_one_word = line.split_whitespace().count() == 1;
            assert!(line.len() <= size.0 || is_one_word, "{size:?}: {ran:?}");
        }
        // The totals in the same words.
        for word in ["4", "sockets", "stuck:"] {
            assert!(
                words.contains(word) && ran.stdout.split_whitespace().any(|w| w == word),
                "{ran:?}"
            );
        }
        assert!(ran.stdout.contains("PROCESS"), "{ran:?}");
    }
    Ok(())
}

fn a_terminal_without_colors_or_utf8_gets_none() -> Result<()> {
    let lab = Lab::new()?;
    let options = AgentOptions {
        comm: "caf\u{e9}".to_owned(),
        ..AgentOptions::default()
    };
    let _leaker = crate::support::leaker(&lab, &options)?;
    for (before, shown) in [
        ("NO_COLOR= TERM=dumb LC_ALL=C", "caf\\u{e9}/"),
        ("NO_COLOR= TERM=dumb LC_ALL= LC_CTYPE= LANG=", "caf\\u{e9}/"),
        ("TERM=xterm LC_ALL=C.UTF-8", "caf\u{e9}/"),
    ] {
        let ran = on_a_terminal(&lab, USUAL, before, "--port 7000 -n")?.exits(0);
        assert!(ran.stdout.contains(shown), "{ran:?}");
        assert!(!ran.stdout.contains('\x1b'), "{ran:?}");
    }
    Ok(())
}

fn a_terminal_gets_colors() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let before = "unset NO_COLOR; TERM=xterm";
    let ran = on_a_terminal(&lab, USUAL, before, "--port 8080")?.exits(0);
    assert!(ran.stdout.contains("\x1b[32m1\x1b[0m"), "{ran:?}");
    Ok(())
}

/// The size changes while the question waits for its answer.
fn a_terminal_may_change_its_size_meanwhile() -> Result<()> {
    let lab = Lab::new()?;
    let _first = lab.start("drained", Family::V4, alone(8001, 2))?;
    let _second = lab.start("drained", Family::V4, alone(8002, 1))?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().display();
    let command = format!(
        "cd {path}; \
         {{ for _ in $(seq 600); do grep -q Continue out && break; sleep 0.1; done; \
            stty -F $(cat tty) cols 30 rows 5; echo y; }} | \
         script -qfec 'tty >tty; stty cols 80 rows 24; NO_COLOR=1 {CWKILL} --port 8001,8002' out"
    );
    let output = lab
        .app_host()
        .command("sh")
        .args(["-c", &command])
        .output()?;
    let ran = Ran::of(&command, output)?.exits(0);
    // The progress stands before the table, on the same line if its escape sequences are left out.
    let (_, table) = ran.stdout.split_once("PROCESS ").context("a table")?;
    let table: Vec<&str> = table
        .lines()
        .map(|line| line.trim_end_matches('\r'))
        .collect();
    assert!(table.len() > 2, "{ran:?}");
    for line in table.iter().filter(|line| !line.starts_with("next")) {
        assert!(line.len() <= 30, "{ran:?}");
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn namespaces_that_were_not_looked_into_are_counted() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let ran = on_a_terminal(&lab, USUAL, "", "")?.exits(0);
    let text = Regex::new(" not looked into \\(--all-netns\\)(: at most [0-9]+ TCP sockets?)?\n")?;
    assert!(text.is_match(&ran.stdout), "{ran:?}");
    let ran = on_a_terminal(&lab, USUAL, "", "--all-netns")?;
    assert!(!ran.stdout.contains("not looked into"), "{ran:?}");
    Ok(())
}

/// Long lines of errors and of `doctor` are broken between words, also with colours.
fn messages_break_no_word() -> Result<()> {
    let lab = Lab::new()?;
    let sequence = Regex::new("\x1b\\[[0-9;]*m")?;
    for (line, text, code) in [
        (
            "kill 8080",
            "cwkill closes sockets as soon as a selector",
            2,
        ),
        ("--all --force", "use --reclaim-force", 2),
        ("--cause foo", "not-accepted, unread, drained, sending", 2),
        // The space tells the test support where the word ends.
        ("doctor ", "CAP_NET_ADMIN CAP_NET_RAW", 0),
    ] {
        for colours in ["", "unset NO_COLOR;"] {
            let ran = on_a_terminal(&lab, USUAL, colours, line)?;
            assert!(ran.code == Some(code) || line == "doctor ", "{ran:?}");
            let plain = sequence.replace_all(&ran.stdout, "");
            let rows: Vec<&str> = plain
                .lines()
                .map(|row| row.trim_end_matches('\r'))
                .collect();
            assert!(rows.iter().all(|row| row.len() <= 80), "{ran:?}");
            let words: Vec<&str> = plain.split_whitespace().collect();
            assert!(words.join(" ").contains(text), "{ran:?}");
        }
    }
    Ok(())
}

fn a_hostile_name_takes_little_room() -> Result<()> {
    let lab = Lab::new()?;
    let options = AgentOptions {
        comm: "\x1b".repeat(15),
        ..AgentOptions::default()
    };
    let (leaker, _peer) = crate::support::leaker(&lab, &options)?;
    let ran = on_a_terminal(&lab, USUAL, "", "--port 7000")?.exits(0);
    assert!(!ran.stdout.contains('\x1b'), "{ran:?}");
    let short = format!("\\u{{1b}}\\u{{1b}}../{} ", leaker.pid());
    assert!(ran.stdout.contains(&short), "{ran:?}");
    assert!(ran.stdout.contains("FDS/LIMIT"), "{ran:?}");
    Ok(())
}

fn many_processes_of_one_kind_have_one_row() -> Result<()> {
    const PROCESSES: u16 = 10;
    let lab = Lab::new()?;
    let leaks: Vec<_> = (0..PROCESSES)
        .map(|number| lab.start("drained", Family::V4, alone(8001 + number, 2)))
        .collect::<Result<_>>()?;
    let ran = on_a_terminal(&lab, (120, 24), "", "")?.exits(0);
    let row = row(&ran, "leaky-app");
    assert_eq!(
        row[..4],
        ["leaky-app", "(10", "processes)", "20"],
        "{ran:?}"
    );
    assert_eq!(ran.stdout.matches("leaky-app (").count(), 1, "{ran:?}");
    assert!(ran.stdout.contains("FDS/LIMIT"), "{ran:?}");
    assert_eq!(last(&ran), "next: cwkill --process leaky-app -n");
    let all = on_a_terminal(&lab, (120, 24), "", "-v")?.exits(0);
    for leak in &leaks {
        assert!(
            all.stdout
                .contains(&format!("leaky-app/{} ", leak.app().pid())),
            "{all:?}"
        );
    }
    // Other tests have processes of this name in other namespaces.
    let line = "--process leaky-app -N /proc/self/ns/net --allow-spin -y";
    let acted = on_a_terminal(&lab, (120, 24), "", line)?.exits(0);
    let next = "next, in a minute: cwkill reclaim --process leaky-app";
    assert_eq!(last(&acted), next);
    Ok(())
}

fn every_socket_fits_into_a_narrow_terminal() -> Result<()> {
    let lab = Lab::new()?;
    let _first = lab.start("drained", Family::V4, alone(8001, 2))?;
    let _second = lab.start("unread", Family::V6, alone(8002, 1))?;
    let _third = lab.start("not-accepted", Family::V6, alone(8003, 1))?;
    for (columns, line) in [
        (80, "-v"),
        (40, "-v"),
        (80, "--limit all -n"),
        (60, "-v -n"),
    ] {
        let ran = on_a_terminal(&lab, (columns, 24), "", line)?.exits(0);
        for line in ran.stdout.lines() {
            let is_one_word = line.split_whitespace().count() == 1;
            assert!(line.len() <= columns || is_one_word, "{columns}: {ran:?}");
        }
        assert!(ran.stdout.contains("leaky-app/"), "{ran:?}");
    }
    Ok(())
}

/// The next command of a listing and of a dry run frees them too.
fn at_its_limit_a_process_needs_its_descriptors_freed(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 3)?;
    let pid = leak.app().pid();
    let used = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let limit = |free: usize| -> Result<()> {
        let line = format!("--pid {pid} --nofile={}:", used + free);
        let command = lab.app_host().command("prlimit");
        crate::support::ran(command.args(line.split(' ')))?.exits(0);
        Ok(())
    };
    let last = |line: &str| -> Result<String> {
        Ok(last(&on_a_terminal(&lab, USUAL, "", line)?.exits(0)))
    };
    limit(30)?;
    assert_eq!(last("")?, format!("next: cwkill --pid {pid} -n"));
    limit(1)?;
    let listed = format!("next: cwkill --pid {pid} --reclaim -n");
    assert_eq!(last("")?, listed);
    let dry = format!("next: cwkill --pid {pid} --reclaim");
    assert_eq!(last(&format!("--pid {pid} -n"))?, dry);
    assert_eq!(last("-n")?, dry);
    assert_eq!(last(&format!("--pid {pid} --reclaim -n"))?, dry);
    Ok(())
}

fn the_next_command_comes_last() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 2)?;
    let line = "--port 8080 --allow-spin --watch-refill 300ms";
    let ran = on_a_terminal(&lab, USUAL, "", line)?.exits(0);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    let next = format!(
        "next, in a minute: cwkill reclaim --pid {}",
        leak.app().pid()
    );
    assert_eq!(lines.last(), Some(&next.as_str()), "{ran:?}");
    let before = lines[lines.len() - 2];
    assert!(before.starts_with("none new in "), "{ran:?}");
    Ok(())
}

fn after_a_part_is_freed_the_rest_has_a_command() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 3)?;
    let pid = leak.app().pid();
    cwkill(&lab, "--port 8080 --allow-spin")?.exits(0);
    // None is free: a command that frees none is not the next one.
    let ran = on_a_terminal(&lab, USUAL, "", &format!("--pid {pid} --drain-backlog"))?;
    let next = format!("minute: cwkill reclaim --pid {pid}\n");
    let later = ran.stdout.rsplit_once("next, in ");
    let (_, later) = later.with_context(|| format!("no next command: {ran:?}"))?;
    assert!(
        later.ends_with(&next) || later.contains(" seconds: "),
        "{ran:?}"
    );
    let first = leak.app_fds()[0];
    let line = format!("reclaim --pid {pid} --fd {first} --reclaim-force --reclaim-age 0s");
    let ran = on_a_terminal(&lab, USUAL, "", &line)?.exits(0);
    assert!(
        ran.stdout
            .contains("1 dead descriptor: 1 freed; 2 more that --fd leaves alone\n"),
        "{ran:?}"
    );
    let next = format!("\nnext: cwkill reclaim --pid {pid} --reclaim-age 0s\n");
    assert!(ran.stdout.ends_with(&next), "{ran:?}");
    let line = format!(
        "reclaim --pid {pid} --fd {} --reclaim-force",
        leak.app_fds()[1]
    );
    let ran = on_a_terminal(&lab, USUAL, "", &line)?.exits(0);
    let (_, later) = ran.stdout.rsplit_once("next, in ").context("a command")?;
    assert!(
        later.contains(&format!(": cwkill reclaim --pid {pid}\n")),
        "{ran:?}"
    );
    // A listing and a dry run lead to the act.
    let listed = on_a_terminal(&lab, USUAL, "", "reclaim --reclaim-age 0s")?.exits(0);
    // The list is of the whole host, on which other tests run, so any process may have most.
    let named = listed.stdout.rsplit_once("\nnext: cwkill reclaim --pid ");
    let named = named.and_then(|(_, rest)| rest.strip_suffix(" --reclaim-age 0s -n\n"));
    let named: u32 = named
        .with_context(|| format!("no next command: {listed:?}"))?
        .parse()?;
    let is_shown = listed.stdout.contains(&format!("/{named} "));
    assert!(
        is_shown || listed.stdout.contains(" more: -v shows all\n"),
        "{listed:?}"
    );
    let line = format!("reclaim --pid {pid} --reclaim-age 0s");
    let dry = on_a_terminal(&lab, USUAL, "", &format!("{line} -n"))?.exits(0);
    assert!(
        dry.stdout.ends_with(&format!("\nnext: cwkill {line}\n")),
        "{dry:?}"
    );
    let done = on_a_terminal(&lab, USUAL, "", &line)?.exits(0);
    assert!(!done.stdout.contains("next"), "{done:?}");
    Ok(())
}

/// For someone who runs it again and again.
fn two_runs_have_the_same_order() -> Result<()> {
    let lab = Lab::new()?;
    let leaks: Vec<_> = (8001..8007)
        .map(|port| lab.start("drained", Family::V4, alone(port, 2)))
        .collect::<Result<_>>()?;
    let order = || -> Result<Vec<String>> {
        let ran = on_a_terminal(&lab, USUAL, "", "-H")?.exits(0);
        let name = |line: &str| line.split_whitespace().next().map(str::to_owned);
        Ok(ran
            .stdout
            .lines()
            .take(leaks.len())
            .filter_map(name)
            .collect())
    };
    let first = order()?;
    let mut pids: Vec<u32> = leaks.iter().map(|leak| leak.app().pid()).collect();
    pids.sort_unstable();
    let names = pids.iter().map(|pid| format!("leaky-app/{pid}"));
    assert_eq!(first, names.collect::<Vec<_>>());
    for _ in 0..5 {
        assert_eq!(order()?, first);
    }
    Ok(())
}
