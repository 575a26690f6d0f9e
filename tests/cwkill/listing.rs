//! The listing, compared with `ss`.

use anyhow::{Context, Result};
use netns_harness::{AgentOptions, Dial, Family, How, Lab, SsRow, TcpState};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::Value;

use crate::support::{PATIENCE, at, connections, count, cwkill, in_state, lab};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    once!(a_document_says_when_where_and_how_many),
    each_family!(the_listing_agrees_with_ss),
    each_family!(a_socket_never_accepted_has_its_listener),
    each_family!(all_owners_of_a_shared_socket_are_listed),
    each_family!(bystanders_are_not_listed),
    once!(thousands_of_sockets_are_listed),
    once!(a_socket_in_a_full_descriptor_table_is_found),
    once!(without_owners_the_listing_says_so),
    once!(json_lines_have_one_line_per_socket),
    once!(a_hostile_name_does_not_reach_the_terminal),
    once!(quiet_prints_nothing),
    once!(no_match_is_status_1),
];

fn rows_by_cookie(rows: &[SsRow], socket: &Value) -> Result<SsRow> {
    let cookie = u64::from_str_radix(&at(socket, "/cookie"), 16)?;
    let row = rows.iter().find(|row| row.cookie == cookie);
    row.cloned()
        .with_context(|| format!("ss shows no socket with the cookie of {socket:#}"))
}

fn the_listing_agrees_with_ss(family: Family) -> Result<()> {
    let (lab, _unread) = lab("unread", family, 3)?;
    let _drained = lab.start("drained", family, count(2))?;
    let before = connections(&lab)?;
    let ran = cwkill(&lab, "--json")?.exits(0);
    let sockets = ran.sockets();
    assert_eq!(sockets.len(), 5);
    for socket in &sockets {
        let row = rows_by_cookie(&before, socket)?;
        let endpoint = |end: &str| {
            let address = at(socket, &format!("/{end}/address"));
            let port = at(socket, &format!("/{end}/port"));
            (address, port)
        };
        let of =
            |address: std::net::SocketAddr| (address.ip().to_string(), address.port().to_string());
        assert_eq!(endpoint("local"), of(row.local));
        assert_eq!(endpoint("peer"), of(row.peer));
        assert_eq!(at(socket, "/recv_q"), row.recv_q.to_string());
        assert_eq!(at(socket, "/send_q"), row.send_q.to_string());
        assert_eq!(at(socket, "/inode"), row.inode.to_string());
        let ip = match family {
            Family::V6 => "ipv6",
            Family::V4 | Family::Mapped => "ipv4",
        };
        assert_eq!(at(socket, "/family"), ip);
        assert_eq!(at(socket, "/state"), "close-wait");
        let cause = if row.recv_q > 0 { "unread" } else { "drained" };
        assert_eq!(at(socket, "/cause"), cause);
        let [owner] = &row.owners[..] else {
            anyhow::bail!("one owner: {row:?}");
        };
        assert_eq!(at(socket, "/owners/0/pid"), owner.pid.to_string());
        assert_eq!(at(socket, "/owners/0/comm"), owner.comm);
        assert_eq!(at(socket, "/owners/0/fds"), format!("[{}]", owner.fd));
        assert_eq!(at(socket, "/result"), "null");
    }
    let inode = lab.app_host().netns_inode()?.to_string();
    assert_eq!(at(&sockets[0], "/netns/inode"), inode);
    assert_eq!(connections(&lab)?, before);
    Ok(())
}

fn a_socket_never_accepted_has_its_listener(family: Family) -> Result<()> {
    let (lab, leak) = lab("not-accepted", family, 3)?;
    let sockets = cwkill(&lab, "--json")?.exits(0).sockets();
    assert_eq!(sockets.len(), 3);
    for socket in &sockets {
        assert_eq!(at(socket, "/cause"), "not-accepted");
        assert_eq!(at(socket, "/inode"), "null");
        assert_eq!(at(socket, "/owners"), "[]");
        assert_eq!(at(socket, "/listener/port"), "8080");
        assert_eq!(at(socket, "/listener/waiting"), "3");
        let pid = leak.app().pid().to_string();
        assert_eq!(at(socket, "/listener/owners/0/pid"), pid);
    }
    // The owner of the listener is responsible, so it selects the socket.
    let pid = leak.app().pid();
    cwkill(&lab, &format!("--pid {pid} --dry-run"))?.exits(0);
    let other = leak.peer().pid();
    cwkill(&lab, &format!("--pid {other} --dry-run"))?.exits(1);
    Ok(())
}

fn all_owners_of_a_shared_socket_are_listed(family: Family) -> Result<()> {
    let (lab, _leak) = lab("forked", family, 1)?;
    let row = connections(&lab)?.remove(0);
    assert_eq!(row.owners.len(), 3);
    let socket = cwkill(&lab, "--json")?.exits(0).sockets().remove(0);
    let owners = socket["owners"].as_array().context("owners")?;
    let mut ours: Vec<String> = owners.iter().map(|owner| at(owner, "/pid")).collect();
    let mut theirs: Vec<String> = row.owners.iter().map(|o| o.pid.to_string()).collect();
    ours.sort();
    theirs.sort();
    assert_eq!(ours, theirs);
    let table = cwkill(&lab, "")?.exits(0).stdout;
    assert!(table.contains(" +2"), "{table}");
    let all = cwkill(&lab, "-v")?.exits(0).stdout;
    assert!(theirs.iter().all(|pid| all.contains(pid.as_str())), "{all}");
    Ok(())
}

fn bystanders_are_not_listed(family: Family) -> Result<()> {
    let (lab, _bystanders) = lab("established", family, 4)?;
    let ran = cwkill(&lab, "--json")?.exits(1);
    assert_eq!(ran.sockets().len(), 0);
    Ok(())
}

/// More sockets than fit into one datagram of a dump, one chunk of a descriptor table, or one block of the printed table.
fn thousands_of_sockets_are_listed() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V6, 2500)?;
    let sockets = cwkill(&lab, "--json")?.exits(0).sockets();
    assert_eq!(sockets.len(), 2500);
    let owned = |socket: &&Value| socket["owners"].as_array().is_some_and(|o| o.len() == 1);
    assert_eq!(sockets.iter().filter(owned).count(), 2500);
    let table = cwkill(&lab, "-H")?.exits(0).stdout;
    let rows: Vec<&str> = table
        .lines()
        .filter(|line| line.contains("drained"))
        .collect();
    assert_eq!(rows.len(), 2501);
    let column = |row: &&str| row.find("drained");
    let columns: std::collections::BTreeSet<_> = rows[..2500].iter().map(column).collect();
    assert_eq!(
        columns.len(),
        1,
        "the columns of all blocks are aligned: {columns:?}"
    );
    Ok(())
}

fn json_lines_have_one_line_per_socket() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let ran = cwkill(&lab, "--jsonl")?.exits(0);
    let lines: Vec<Value> = ran
        .stdout
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    assert_eq!(lines.len(), 3);
    for line in &lines {
        assert_eq!(at(line, "/schema_version"), "1");
        assert_eq!(at(line, "/local/port"), "8080");
        // The start of the run.
        assert_eq!(at(line, "/time"), at(&lines[0], "/time"));
        let age = humantime::parse_rfc3339(&at(line, "/time"))?.elapsed()?;
        assert!(age < PATIENCE, "{line}");
    }
    Ok(())
}

fn a_hostile_name_does_not_reach_the_terminal() -> Result<()> {
    let lab = Lab::new()?;
    // Escape, newline, DEL, a C1 control and a mark that reverses text: 14 of the 15 bytes that a name may have.
    let evil = "\x1b[2J\n\x7f\u{9b}\u{202e}x";
    let options = AgentOptions {
        comm: evil.to_owned(),
        ..AgentOptions::default()
    };
    let _leaker = crate::support::leaker(&lab, &options)?;
    let json = cwkill(&lab, "--json")?.exits(0);
    harmless(&json);
    assert_eq!(at(&json.sockets()[0], "/owners/0/comm"), evil);
    harmless(&cwkill(&lab, "--jsonl")?.exits(0));
    for arguments in ["", "-v", "--port 7000 -n", "--port 7000"] {
        let ran = cwkill(&lab, arguments)?.exits(0);
        harmless(&ran);
        let shown = "\\u{1b}[2J\\n\\u{7f}\\u{9b}\\u{202e}x/";
        assert!(ran.stdout.contains(shown), "{}", ran.stdout);
    }
    Ok(())
}

/// The output has nothing that moves a cursor or reorders text.
#[track_caller]
fn harmless(ran: &crate::support::Ran) {
    for text in [&ran.stdout, &ran.stderr] {
        let harmful = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(harmful), "{text:?}");
    }
}

fn quiet_prints_nothing() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    for arguments in ["-q", "--all -q -n", "--all -q"] {
        let ran = cwkill(&lab, arguments)?.exits(0);
        assert_eq!((ran.stdout, ran.stderr), Default::default());
    }
    Ok(())
}

fn no_match_is_status_1() -> Result<()> {
    let lab = Lab::new()?;
    for arguments in ["", "--all", "--all -n", "--json"] {
        cwkill(&lab, arguments)?.exits(1);
    }
    Ok(())
}

/// Most descriptors that the test opens in one process.
const MANY_DESCRIPTORS: u64 = 1_000_000;

/// The stuck socket has a number near the end of a full table, and later behind a wide gap.
fn a_socket_in_a_full_descriptor_table_is_found() -> Result<()> {
    let limit = getrlimit(Resource::RLIMIT_NOFILE)?.1.min(MANY_DESCRIPTORS);
    let filling = usize::try_from(limit)? - 100;
    let lab = Lab::new()?;
    let app = lab.app_host().agent("hoarder")?;
    app.open_files(filling)?;
    let address = "127.0.0.1:7000".parse()?;
    let listener = app.listen(address, false, 16)?;
    let peer = lab.app_host().agent("peer")?;
    let ends = peer.connect(address, 1, Dial::default(), PATIENCE)?;
    let accepted = app.accept(listener, 1, PATIENCE)?;
    peer.shutdown(&[ends[0].fd], How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 1))?;
    let found = || -> Result<(String, String)> {
        let sockets = cwkill(&lab, "--all -n --json")?.exits(0).sockets();
        assert_eq!(sockets.len(), 1);
        Ok((
            at(&sockets[0], "/owners/0/pid"),
            at(&sockets[0], "/owners/0/fds/0"),
        ))
    };
    let wanted = (app.pid().to_string(), accepted[0].fd.0.to_string());
    assert!(usize::try_from(accepted[0].fd.0)? > filling, "{wanted:?}");
    assert_eq!(found()?, wanted);
    app.close_files()?;
    assert_eq!(found()?, wanted);
    Ok(())
}

fn without_owners_the_listing_says_so() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let dry = cwkill(&lab, "--all --no-owners -n --json")?.exits(0);
    assert_eq!(dry.json()["owners_known"], Value::Bool(false));
    for socket in dry.sockets() {
        assert_eq!(socket["owners"], Value::Array(Vec::new()));
        assert_eq!(at(&socket, "/excluded/0/method"), "shutdown");
        assert_eq!(at(&socket, "/plan/0"), "destroy");
    }
    let table = cwkill(&lab, "--all --no-owners")?.exits(0);
    assert!(!table.stdout.contains("unknown"), "{table:#?}");
    table.complains("owners were not searched for");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn a_document_says_when_where_and_how_many() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 3)?;
    let _more = lab.start("drained", Family::V4, crate::support::alone(8081, 2))?;
    let _never = lab.start("not-accepted", Family::V4, count(1))?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let host = nix::sys::utsname::uname()?;
    let host = host.nodename().to_str().context("UTF-8")?;
    for line in [
        "--json",
        "-n --json",
        "diagnose --sample 10ms --json",
        "doctor --json",
        "reclaim --json",
        "--all --allow-spin --method destroy --json",
        "reclaim --process no-such-process --json",
    ] {
        // The times of a document have milliseconds.
        let millis = std::time::Duration::from_millis(1);
        let before = std::time::SystemTime::now() - millis;
        let document = cwkill(&lab, line)?.json();
        let time = humantime::parse_rfc3339(document["time"].as_str().context("no time")?)?;
        assert!(
            before <= time && time <= std::time::SystemTime::now(),
            "{line}"
        );
        assert_eq!(document["host"], host, "{line}");
        assert_eq!(document["boot_id"], boot.trim(), "{line}");
        let Some(by_cause) = document["by_cause"].as_object() else {
            assert!(!line.contains("--all"), "{line}");
            continue;
        };
        let causes = [
            "unread",
            "drained",
            "not-accepted",
            "sending",
            "handshake",
            "orphan",
        ];
        let counts = causes.map(|cause| by_cause[cause].as_u64());
        assert_eq!(counts, [3, 2, 1, 0, 0, 0].map(Some), "{line}");
        let by_process = document["by_process"].as_array().context("no processes")?;
        let matched = by_process.iter().filter_map(|one| one["matched"].as_u64());
        assert_eq!(matched.sum::<u64>(), 6, "each socket counts once: {line}");
        let first = by_process
            .iter()
            .find(|one| one["pid"] == leak.app().pid())
            .context("no such process")?;
        assert_eq!(first["by_cause"]["unread"], 3, "{first}");
        let closed = by_process.iter().filter_map(|one| one["closed"].as_u64());
        let closed: u64 = closed.sum();
        assert_eq!(closed, if line.contains("--all") { 6 } else { 0 }, "{line}");
    }
    Ok(())
}
