//! Expressions, compared with `ss` itself in a lab with every state in three address families.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use netns_harness::{Dial, Family, How, Lab, Listen, Options, SocketOption, SsRow, TcpState};
use serde_json::Value;

use crate::support::{CWKILL, PATIENCE, Ran, at, ran};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(expressions_match_the_same_sockets_as_ss),
    once!(an_expression_acts_on_what_it_matches),
    once!(errors_point_at_the_column),
];

/// Expressions that ss and cwkill read alike. `state all` is put before those that do not begin with `state` or `exclude`.
const EXPRESSIONS: &[&str] = &[
    "",
    "sport = :80",
    "sport :80",
    "sport 80",
    "sport == :80",
    "sport eq :http",
    "sport = http",
    "sport != :80",
    "sport ne 80",
    "sport neq 80",
    "sport < 443",
    "sport lt :443",
    "sport <= 443",
    "sport le 443",
    "sport leq 443",
    "sport > :443",
    "sport gt 443",
    "sport >= :443",
    "sport ge 443",
    "sport geq 443",
    "sport = *",
    "dport = :5555",
    "dport != :5555",
    "dport >= 5555",
    "dport < 1024",
    "dport = :0",
    "dport = :discard",
    "src 10.78.0.1",
    "src = 10.78.0.1",
    "src == 10.78.0.1",
    "src 10.78.0.1:80",
    "src 10.78.0.0/16",
    "src 10.78.0.0/17:443",
    "src 10.78/16",
    "src 10.78.0.0/255.255.255.0",
    "src :80",
    "src *:443",
    "src *",
    "src any",
    "src 0.0.0.0/0",
    "dst 10.78.2.2",
    "dst 10.78.2.2:5555",
    "src [fd78:0:0:1::1]",
    "src [fd78:0:0:1::1]:80",
    "src fd78::/16",
    "src [fd78::/16]:80",
    "src [::/0]",
    "dst [fd78:0:0:1::2]",
    "src [::ffff:10.78.2.1]",
    "src [::ffff:10.78.2.1]:443",
    "src [::ffff:10.78.0.0/112]",
    "not sport = :80",
    "! sport = :80",
    "! ! sport = :80",
    "not dst 10.78.2.2",
    "not src [::/16]",
    "sport = :80 and dst 10.78.0.2",
    "sport = :80 dst 10.78.0.2",
    "sport = :80 & dst 10.78.0.2",
    "sport = :80 && dport = :5555",
    "sport = :80 or dport = :5555",
    "sport = :80 | dport = :5555",
    "sport = :80 || dport = :5555",
    "sport = :80 or sport = :443 and dst 10.78.0.2",
    "sport = :80 and dst 10.78.0.2 or sport = :443",
    "sport = :80 or ( sport = :443 and dst 10.78.0.2 )",
    "( sport = :80 or sport = :443 ) and dst 10.78.0.2",
    "not ( sport = :80 or sport = :443 )",
    "not ( sport = :80 and dst 10.78.0.2 ) and dport >= 1024",
    "( ( ( sport = :80 ) ) )",
    "sport = :80 not dst 10.78.0.2 or dport = :5555 and src 10.78.0.0/16",
    "autobound",
    "not autobound",
    "autobound or sport = :80",
    "not ( autobound or sport = :80 )",
    "dev = lo",
    "dev != lo",
    "not dev 1",
    "state close-wait",
    "state CLOSE-WAIT sport = :80",
    "state established state close-wait",
    "state established dst 10.78.0.2 or sport = :443",
    "state listening",
    "state closed",
    "state time-wait",
    "state syn-sent",
    "state syn-recv",
    "state fin-wait-1",
    "state fin-wait-2",
    "state last-ack",
    "state closing",
    "state connected",
    "state connected sport = :80",
    "state synchronized",
    "state bucket",
    "state big",
    "exclude listening",
    "exclude close-wait exclude established dport = :5555",
    "state all exclude time-wait sport = :443",
    "excl connected",
];

/// The states that ss names and the kernel lists.
const STATES: [TcpState; 10] = [
    TcpState::Established,
    TcpState::SynSent,
    TcpState::SynRecv,
    TcpState::FinWait1,
    TcpState::FinWait2,
    TcpState::TimeWait,
    TcpState::CloseWait,
    TcpState::LastAck,
    TcpState::Listen,
    TcpState::Closing,
];

/// Every state in one family, on port 80, 80 and 443.
fn every_state(lab: &Lab, family: Family) -> Result<()> {
    let (port, listen) = match family {
        Family::V4 | Family::V6 => (80, Listen::Own),
        Family::Mapped => (443, Listen::Any),
    };
    let options = Options {
        count: 7,
        port,
        listen,
        own: true,
        ..Options::default()
    };
    let leak = lab.start("established", family, options)?;
    let (app, peer, pair) = (leak.app(), leak.peer(), leak.pair());
    let state_of = |local_peer| -> Result<Option<TcpState>> {
        let sockets = lab.app_host().sockets()?;
        let found = sockets.iter().find(|s| (s.local, s.peer) == local_peer);
        Ok(found.map(|socket| socket.state))
    };
    let fds: Vec<_> = leak
        .conns()
        .iter()
        .map(|conn| Some((conn.app_fd?, conn.peer_fd?, (conn.local, conn.peer))))
        .collect::<Option<_>>()
        .context("every connection has two ends")?;
    let [_, stuck, half, lossy, last, closing, gone] = fds[..] else {
        anyhow::bail!("seven connections were asked for");
    };
    peer.shutdown(&[stuck.1, last.1], How::Write)?;
    app.shutdown(&[half.0], How::Write)?;
    app.set_option(&[lossy.0], SocketOption::DropIncoming(true))?;
    app.shutdown(&[lossy.0], How::Write)?;
    lab.wait_for(PATIENCE, || {
        Ok(state_of(last.2)? == Some(TcpState::CloseWait))
    })?;
    app.set_option(&[last.0], SocketOption::DropIncoming(true))?;
    app.close(&[last.0])?;
    // The peer's FIN does not acknowledge ours, which never arrived.
    peer.set_option(&[closing.1], SocketOption::DropIncoming(true))?;
    app.shutdown(&[closing.0], How::Write)?;
    peer.shutdown(&[closing.1], How::Write)?;
    app.close(&[gone.0])?;
    lab.wait_for(PATIENCE, || {
        Ok(state_of(gone.2)? == Some(TcpState::FinWait2))
    })?;
    peer.close(&[gone.1])?;

    let unanswered = || Dial {
        drop_incoming: true,
        ..Dial::default()
    };
    let known = Dial {
        from: Some((pair.peer_address, 5555).into()),
        ..Dial::default()
    };
    peer.connect(pair.app_address, 1, known, PATIENCE)?;
    peer.connect(pair.app_address, 1, unanswered(), PATIENCE)?;
    app.connect((pair.peer_address, 9).into(), 1, unanswered(), PATIENCE)?;
    Ok(())
}

/// A lab in which every family has every state.
fn zoo() -> Result<Lab> {
    let lab = Lab::new()?;
    lab.app_host().within(|| {
        // A socket in SYN-RECV lives for 17 minutes, and not for one. The next SYN of its peer would make another.
        std::fs::write("/proc/sys/net/ipv4/tcp_synack_retries", "9")?;
        Ok(())
    })?;
    for family in Family::ALL {
        every_state(&lab, family)?;
    }
    let complete = || -> Result<bool> {
        let rows = lab.app_host().ss(&["state", "all"])?;
        let count = |state| {
            rows.iter()
                .filter(|row: &&SsRow| row.state == state)
                .count()
        };
        Ok(STATES.into_iter().all(|state| count(state) >= 3))
    };
    lab.wait_for(PATIENCE, complete).with_context(|| {
        let rows = lab.app_host().ss(&["state", "all"]);
        format!("not every state came about: {rows:#?}")
    })?;
    Ok(lab)
}

fn run(lab: &Lab, arguments: &[&str]) -> Result<Ran> {
    ran(lab.app_host().command(CWKILL).args(arguments))
}

/// The cookies of the sockets that ss lists. [`netns_harness::Host::ss`] cannot be used: ss omits the column of the
/// state if only one state is selected.
fn cookies_by_ss(lab: &Lab, words: &[&str]) -> Result<BTreeSet<String>> {
    let ran = ran(lab.app_host().command("ss").arg("-HOntea").args(words))?.exits(0);
    ran.stdout
        .lines()
        .map(|line| {
            let cookie = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix("sk:"));
            let cookie = u64::from_str_radix(cookie.context("no cookie")?, 16)?;
            Ok(format!("{cookie:016x}"))
        })
        .collect()
}

fn expressions_match_the_same_sockets_as_ss() -> Result<()> {
    let lab = zoo()?;
    let everything = lab.app_host().ss(&["state", "all"])?.len();
    let (mut wrong, mut telling) = (Vec::new(), 0);
    for expression in EXPRESSIONS {
        let names_states = expression.starts_with("state") || expression.starts_with("excl");
        let text = match names_states {
            true => (*expression).to_owned(),
            false => format!("state all {expression}"),
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        let by_ss = cookies_by_ss(&lab, &words).with_context(|| text.clone())?;
        let status = if by_ss.is_empty() { 1 } else { 0 };
        // As one argument, and as several.
        let quoted = run(&lab, &["--json", "-n", &text])?.exits(status);
        let loose = run(&lab, &[&["--json", "-n"], &words[..]].concat())?.exits(status);
        for ran in [quoted, loose] {
            let ours: BTreeSet<String> = ran.sockets().iter().map(|s| at(s, "/cookie")).collect();
            if ours != by_ss {
                wrong.push(format!("{text}: ss {by_ss:?}, cwkill {ours:?}"));
            }
        }
        telling += usize::from(!by_ss.is_empty() && by_ss.len() < everything);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(telling >= 60, "only {telling} expressions part the sockets");
    Ok(())
}

fn an_expression_acts_on_what_it_matches() -> Result<()> {
    let lab = zoo()?;
    let before = lab.app_host().ss(&[])?;
    let expression = "state close-wait sport = :80 and src 10.78.0.0/16";
    let ran = run(&lab, &["--json", expression])?.exits(0);
    let sockets = ran.sockets();
    assert_eq!(sockets.len(), 1);
    let closed: BTreeSet<u64> = sockets
        .iter()
        .map(|socket: &Value| u64::from_str_radix(&at(socket, "/cookie"), 16))
        .collect::<Result<_, _>>()?;
    let after: BTreeSet<u64> = lab.app_host().ss(&[])?.iter().map(|s| s.cookie).collect();
    let lost: BTreeSet<u64> = before
        .iter()
        .map(|row| row.cookie)
        .filter(|cookie| !after.contains(cookie))
        .collect();
    assert_eq!(lost, closed);
    Ok(())
}

fn errors_point_at_the_column() -> Result<()> {
    let lab = Lab::new()?;
    for (expression, message) in [
        ("sport = :8O80 or dport = :80", "column 9"),
        ("( sport = :80", "column 1"),
        ("state stuck", "column 7"),
        ("", "column 1"),
    ] {
        run(&lab, &[expression])?
            .exits(2)
            .complains(message)
            .complains("for example: ");
    }
    run(&lab, &["-n", "--state", "close-wait", "state close-wait"])?
        .exits(2)
        .complains("--state and `state`");
    run(&lab, &["-n", "dev nowhere0"])?
        .exits(3)
        .complains("nowhere0");
    let deep = format!("{}sport 80{}", "(".repeat(10_000), ")".repeat(10_000));
    run(&lab, &["-n", &deep])?.exits(2).complains("deeper");
    let long = ["sport 80"; 5_400].join(" or ");
    run(&lab, &["-n", &long])?.exits(1);
    Ok(())
}
