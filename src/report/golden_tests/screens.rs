//! What a run shows on terminals of several sizes, and in a pipe.

use std::collections::HashMap;

use super::builder::{Case, Listening, Matched, Who, case, socket};
use super::{elided, notes, section, text, written};
use crate::diagnose::limit::is_reached;
use crate::finder::table_use::TableUse;
use crate::proc::ProcessId;
use crate::report::Run;
use crate::report::overview::{Overview, Screen};
use crate::text::{columns_of, wrap};

static JAVA: Who = Who("java", 4421, "0::/system.slice/shop.service");
static NODE: Who = Who("node", 4500, "0::/");
static NGINX: Who = Who("nginx", 812, "0::/system.slice/nginx.service");
static ESCAPES: Who = Who(
    "\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b",
    666,
    "0::/",
);
static FOREIGN: Who = Who("サーバー", 700, "0::/");
static WEB: Listening = Listening("[::]:443", 129, 128, &[(&NGINX, 6)]);

/// A table in a pipe with more lines is shown only in part.
const LONG: usize = 40;

/// A run with more sockets is not shown with -v.
const SHORT: usize = 100;

/// The sizes of a terminal.
const SIZES: [(usize, usize); 4] = [(80, 24), (120, 40), (20, 24), (80, 3)];

fn cookie(number: usize) -> u64 {
    u64::try_from(number).expect("a number") << 32 | 7
}

/// Each with a peer and a cookie of its own.
fn numbered(index: usize, local: &str) -> Matched {
    let number = u64::try_from(index).expect("a number");
    let peer = format!(
        "10.0.{}.{}:{}",
        number / 250 % 250,
        number % 250 + 1,
        40_000 + number % 20_000
    );
    socket(local, &peer, cookie(index)).age_ms(3_600_000 - number)
}

/// So many sockets of one process; the last one has a large descriptor, much to read and long ports.
pub fn many(name: &'static str, arguments: &'static str, count: usize) -> Case {
    let one = |number: usize| {
        let at = |local: &str, peer: &str, fd, queued| {
            socket(local, peer, cookie(number))
                .owner(&JAVA, fd)
                .queues(queued, 0)
        };
        match number + 1 == count {
            true => at("10.0.0.1:18080", "10.0.0.200:65000", 20_000, 4_000_000),
            false => at("10.0.0.1:80", "10.0.0.2:1024", 7, 1),
        }
    };
    case(name, arguments).sockets((0..count).map(one))
}

/// A process for each number.
fn worker(number: i32) -> &'static Who {
    Box::leak(Box::new(Who("worker", 10_000 + number, "0::/")))
}

/// So many sockets of a server, a client, a listener and a process without a name.
fn leak(count: usize) -> Vec<Matched> {
    let one = |number: usize| {
        let fd = i32::try_from(number).expect("a descriptor");
        match number % 8 {
            0..4 => numbered(number, "10.0.0.1:8080")
                .owner(&JAVA, fd)
                .queues(0, 0),
            4 => numbered(number, "10.0.0.1:8443")
                .owner(&JAVA, fd)
                .queues(1461, 0),
            5 => {
                let local = format!("[2001:db8::1:2:3:4]:{}", 32_768 + number % 20_000);
                socket(
                    &local,
                    "[2001:db8:ffff:ffff:ffff:ffff:ffff:1]:5432",
                    cookie(number),
                )
                .owner(&NODE, fd)
            }
            6 => numbered(number, "10.0.0.1:443").waits_at(&WEB),
            _ => numbered(number, "10.0.0.1:80"),
        }
    };
    (0..count).map(one).collect()
}

/// A process for each number, with a name of its own.
fn distinct(number: i32) -> &'static Who {
    let name: &'static str = Box::leak(format!("worker{number}").into_boxed_str());
    Box::leak(Box::new(Who(name, 10_000 + number, "0::/")))
}

/// Processes with sockets of their own, each with fewer than the one before.
fn processes(count: i32, who: fn(i32) -> &'static Who) -> Vec<Matched> {
    let sockets = |number: i32| {
        let who = who(number);
        let count = usize::try_from(1 + 20 / (number + 1)).expect("a count");
        let first = usize::try_from(number).expect("a number") * 30;
        (first..first + count).map(move |number| numbered(number, "10.0.0.1:9000").owner(who, 4))
    };
    (0..count).flat_map(sockets).collect()
}

/// A process for each connection, two of which share theirs with a process of another kind.
fn one_kind(count: i32) -> Vec<Matched> {
    let mut sockets: Vec<Matched> = (0..count)
        .map(|number| {
            let index = usize::try_from(number).expect("a number");
            numbered(index, "10.0.0.1:22").owner(worker(number), 3)
        })
        .collect();
    sockets.push(
        numbered(100, "10.0.0.1:22")
            .owner(worker(0), 4)
            .owner(&JAVA, 9),
    );
    sockets.push(
        numbered(101, "10.0.0.1:22")
            .owner(worker(1), 4)
            .owner(worker(2), 5),
    );
    sockets.push(numbered(102, "10.0.0.1:8080").owner(&NODE, 4));
    sockets
}

pub fn screens() -> Vec<Case> {
    let planned = |matched: Matched| matched.plan(["shutdown", "destroy"]);
    let act = || {
        let one = |number: usize| numbered(number, "10.0.0.1:8080").owner(&JAVA, 20);
        let mut acted: Vec<Matched> = (0..6)
            .map(|number| planned(one(number)).closed_by("shutdown").still_open())
            .collect();
        for (number, why) in ["peer-alive", "in-use", "unsent", "unsent", "over-limit"]
            .into_iter()
            .enumerate()
        {
            acted.push(planned(one(10 + number)).skipped(why));
        }
        let other = |number| planned(numbered(number, "10.0.0.1:80").owner(&NODE, 5));
        acted.push(other(20).attempt("destroy", "denied-net-admin").failed());
        acted.push(other(21).closed_by("destroy").no_longer_open());
        acted.push(other(22).closing("shutdown", "last-ack").still_open());
        acted.push(other(23).gone());
        acted
    };
    let closed = |number: usize| {
        let closed = planned(numbered(number, "10.0.0.1:80").owner(&JAVA, 20));
        closed.closed_by("shutdown").still_open()
    };
    let dry_run = || {
        let mut sockets: Vec<Matched> = leak(20).into_iter().map(planned).collect();
        sockets.push(
            numbered(30, "10.0.0.1:81")
                .owner(&NODE, 3)
                .queues(0, 77)
                .exclude("destroy", "unsent"),
        );
        sockets
    };
    vec![
        case("screens-5", "").sockets(leak(5)),
        case("screens-5000", "").sockets(leak(5000)),
        case("screens-100000", "").sockets(leak(100_000)),
        case("screens-processes", "").sockets(processes(10_000, distinct)),
        case("screens-one-kind", "").sockets(one_kind(60)),
        case("screens-one-kind-act", "--all").sockets(
            one_kind(60)
                .into_iter()
                .map(|socket| planned(socket).closed_by("shutdown").still_open()),
        ),
        case("screens-one-kind-many", "").sockets(processes(10_000, worker)),
        case("screens-few-of-a-kind", "").sockets(processes(9, worker)),
        case("screens-nothing", ""),
        case("screens-names", "").sockets([
            numbered(1, "10.0.0.1:80").owner(&ESCAPES, 3),
            numbered(2, "10.0.0.1:80").owner(&FOREIGN, 3),
            numbered(3, "10.0.0.1:80")
                .owner(&NODE, 3)
                .owner(worker(1), 3)
                .owner(worker(2), 3),
        ]),
        case("screens-act", "--all").sockets(act()),
        case("screens-act-colored", "--all")
            .sockets(act())
            .colored(),
        case("screens-dry-run", "--port 80,81,443,8080 -n").sockets(dry_run()),
        case("screens-limit", "--limit 2").sockets(processes(6, distinct)),
        case("screens-reclaim", "--all --reclaim")
            .sockets([
                closed(1).reclaim("freed"),
                closed(2).reclaim("skipped in-epoll"),
                closed(3).reclaim("skipped in-epoll"),
                closed(4).reclaim("skipped too-young"),
            ])
            .stopped(&JAVA, 850, 1),
        case("screens-over-limit", "--port 80 --max-kills 1").sockets([
            closed(1),
            planned(numbered(2, "10.0.0.1:80").owner(&JAVA, 21))
                .over_limit()
                .skipped("over-limit"),
        ]),
        case("screens-places", "--all-netns --state close-wait,last-ack")
            .sockets([
                numbered(1, "10.0.0.1:80").owner(&JAVA, 3),
                numbered(2, "10.0.0.1:80").owner(&JAVA, 4).netns(1),
                numbered(3, "10.0.0.1:80").owner(&NODE, 4).netns(1),
                numbered(4, "10.0.0.1:80")
                    .owner(&NODE, 5)
                    .netns(1)
                    .state("last-ack"),
                numbered(5, "10.0.0.1:80").inode(0).state("last-ack"),
            ])
            .another_netns(4_026_532_001, Some("blue")),
    ]
}

/// What is known of the processes of a run.
fn tables(run: &Run) -> HashMap<ProcessId, TableUse> {
    let table = |id: &ProcessId| {
        let used = usize::try_from(id.pid).expect("a pid") % 1024;
        let table = TableUse {
            used: Some(if id.pid == JAVA.1 { 1021 } else { used }),
            limit: Some(1024),
            dead: (id.pid % 3 != 0).then_some(used % 2),
        };
        (*id, table)
    };
    run.scan.processes().keys().map(table).collect()
}

/// The screens of a run, one after the other, and what it writes into a pipe.
pub fn shown(case: &Case) -> String {
    let (mut run, config) = (case.run(true), case.config(false));
    run.scan.coverage.namespaces_not_looked_into = 2;
    let tables = tables(&run);
    let mut prose = String::new();
    for (columns, rows) in SIZES {
        let screen = Screen {
            columns,
            rows,
            color: case.colored,
            ascii: columns == 120,
        };
        let notes = notes::notes(&run).into_iter();
        let messages: Vec<String> = notes
            .flat_map(|note| wrap(&format!("cwkill: note: {note}"), columns, 2))
            .collect();
        let words: Vec<String> = case
            .arguments
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        let is_at_limit = |id: ProcessId| {
            let table = tables.get(&id).copied().unwrap_or_default();
            is_reached(table.used.map(|used| used as u64), table.limit)
        };
        let overview = Overview::new(&run, &config, screen, &messages, &words, &is_at_limit);
        let mut lines = written(|out| overview.write(&tables, out));
        for message in messages.iter().map(String::as_str).chain(overview.next()) {
            lines += &format!("{message}\n");
        }
        if !case.colored {
            check(&lines, screen);
        }
        section(&mut prose, &format!("{columns}x{rows}"), &lines);
    }
    let table = written(|out| text::write(&run, &config, case.colored, None, out));
    let table = match table.lines().count() > LONG {
        true => elided(&table),
        false => table,
    };
    section(&mut prose, "in a pipe", &table);
    // Laid out twice, a long table takes its time.
    if run.scan.targets.len() > SHORT {
        return prose;
    }
    let verbose = case.config(true);
    for columns in [80, 40] {
        let table = written(|out| text::write(&run, &verbose, case.colored, Some(columns), out));
        if !case.colored {
            check_width(&table, columns);
        }
        let table = match table.lines().count() > LONG {
            true => elided(&table),
            false => table,
        };
        section(&mut prose, &format!("-v with {columns} columns"), &table);
    }
    prose
}

/// No line of a table is wider than the terminal, except one word.
pub fn check_width(lines: &str, columns: usize) {
    for line in lines.lines() {
        let is_one_word = line.split_whitespace().count() == 1;
        assert!(
            columns_of(line) <= columns || is_one_word,
            "{columns}: {line}"
        );
    }
}

/// No row is broken by the terminal, except one word that is wider, and all rows fit with the prompt.
pub fn check(lines: &str, screen: Screen) {
    for line in lines.lines().filter(|line| !line.starts_with("next")) {
        let fits = columns_of(line) <= screen.columns;
        assert!(fits || screen.columns < 40, "{screen:?}: {line}");
    }
    let count = lines.lines().count();
    assert!(
        count < screen.rows || screen.rows < 24 || screen.columns < 80,
        "{screen:?}: {count} rows\n{lines}"
    );
}
