//! What lists, what acts, and the question on a terminal.

use std::io::{BufReader, Read as _};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};
use netns_harness::{Family, Lab, TcpState};

use crate::support::{CWKILL, PATIENCE, Ran, alone, cwkill, in_state, lab};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(an_option_that_only_narrows_closes_nothing),
    once!(on_a_terminal_several_processes_need_an_answer),
    once!(a_terminal_that_goes_away_is_no_answer),
    once!(without_a_terminal_to_show_it_nothing_is_asked),
    once!(a_list_accepts_a_comma_at_its_end_and_a_service),
];

/// Every pair of the narrowing options; tests in the library try every combination without a kernel.
fn an_option_that_only_narrows_closes_nothing() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let narrowing = [
        "--state close-wait",
        "--min-age 1ms",
        "--min-idle 1ms",
        "--cause unread",
        "-4",
        "-6",
        "--user 0",
        "--address-gone",
        "--all-netns",
    ];
    for first in narrowing {
        for second in narrowing {
            let line = match first == second {
                true => first.to_owned(),
                false => format!("{first} {second}"),
            };
            let ran = cwkill(&lab, &line)?;
            // Only one family at a time.
            if line.contains("-4") && line.contains("-6") {
                ran.exits(2);
                continue;
            }
            match line.contains("-6") || line.contains("--address-gone") {
                // Sockets of others, in other namespaces, may match.
                true => assert!(matches!(ran.code, Some(0 | 1 | 4)), "{line}: {ran:?}"),
                false => {
                    let listed = ran.exits(0);
                    let advises = listed.stdout.contains("nothing was closed: add --port");
                    assert!(advises || line == "--all-netns", "{line}: {listed:?}");
                }
            }
            assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2, "{line}");
        }
    }
    cwkill(&lab, "state close-wait")?.exits(0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    cwkill(&lab, "--port 8080 --state close-wait")?.exits(0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// Runs cwkill on a terminal of its own, with `answer` as the input.
fn on_a_terminal(lab: &Lab, line: &str, answer: &str) -> Result<Ran> {
    // script(1) ends with the status of its command.
    let command = format!("printf '{answer}' | script -qec '{CWKILL} {line}' /dev/null");
    let output = lab
        .app_host()
        .command("sh")
        .args(["-c", &command])
        .output()?;
    Ran::of(&command, output)
}

fn on_a_terminal_several_processes_need_an_answer() -> Result<()> {
    let lab = Lab::new()?;
    let _first = lab.start("unread", Family::V4, alone(8001, 3))?;
    let _second = lab.start("drained", Family::V4, alone(8002, 2))?;
    let stuck = || in_state(&lab, TcpState::CloseWait);
    // No answer, and the end of the input, mean no.
    for answer in ["n\\n", "\\n", "\\004"] {
        let ran = on_a_terminal(&lab, "--port 8001,8002", answer)?.exits(4);
        assert!(ran.stdout.contains("this closes 5 sockets of"), "{ran:?}");
        assert!(ran.stdout.contains("nothing was closed"), "{ran:?}");
        assert_eq!(stuck()?, 5);
    }
    // One process needs no question, and neither does a dry run.
    for (line, left) in [("--port 8001,8002 -n", 5), ("--port 8001", 2)] {
        let ran = on_a_terminal(&lab, line, "")?.exits(0);
        assert!(!ran.stdout.contains("[y/N]"), "{ran:?}");
        assert_eq!(stuck()?, left, "{line}");
    }
    let _third = lab.start("unread", Family::V4, alone(8003, 1))?;
    on_a_terminal(&lab, "--port 8002,8003 --max-kills 2", "y\\n")?.exits(0);
    assert_eq!(stuck()?, 1);
    let _more = lab.start("drained", Family::V4, alone(8005, 2))?;
    for line in [
        "--port 8003,8005 --yes --max-kills 1",
        "--port 8003,8005 -y",
    ] {
        let ran = on_a_terminal(&lab, line, "")?.exits(0);
        assert!(!ran.stdout.contains("[y/N]"), "{ran:?}");
    }
    assert_eq!(stuck()?, 0);
    let _fourth = lab.start("unread", Family::V4, alone(8004, 1))?;
    let ran = on_a_terminal(&lab, "--all", "")?.exits(0);
    assert!(!ran.stdout.contains("[y/N]"), "{ran:?}");
    assert_eq!(stuck()?, 0);
    Ok(())
}

/// The terminal goes away while cwkill asks. Nothing is closed, even if cwkill ignores the hangup, as under nohup(1).
fn a_terminal_that_goes_away_is_no_answer() -> Result<()> {
    let lab = Lab::new()?;
    let _first = lab.start("unread", Family::V4, alone(8001, 3))?;
    let _second = lab.start("drained", Family::V4, alone(8002, 2))?;
    for before in ["", "trap \"\" HUP; "] {
        let inside = format!("{before}echo pid=$$=; exec {CWKILL} --min-idle 0s --port 8001,8002");
        let mut terminal = lab
            .app_host()
            .command("script")
            .args(["-qec", &inside, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut shown = String::new();
        let mut stdout = BufReader::new(terminal.stdout.take().context("no stdout")?).bytes();
        while !shown.contains("[y/N]") {
            let byte = stdout
                .next()
                .with_context(|| format!("no question: {shown}"))??;
            shown.push(byte.into());
        }
        let pid = shown.split('=').nth(1).context("no process number")?;
        let process = format!("/proc/{pid}");
        assert!(Path::new(&process).exists(), "{shown}");
        terminal.kill()?;
        terminal.wait()?;
        lab.wait_for(PATIENCE, || Ok(!Path::new(&process).exists()))?;
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 5, "{shown}");
    }
    Ok(())
}

/// As in watch(1), which leaves a command only the input of the terminal.
fn without_a_terminal_to_show_it_nothing_is_asked() -> Result<()> {
    let lab = Lab::new()?;
    let _first = lab.start("unread", Family::V4, alone(8001, 3))?;
    let _second = lab.start("drained", Family::V4, alone(8002, 2))?;
    let listed = on_a_terminal(&lab, "2>&1 | cat", "")?.exits(0);
    let rows = listed.stdout.lines();
    assert_eq!(rows.filter(|row| row.contains("10.78.")).count(), 5);
    assert!(!listed.stdout.contains("next:"), "{listed:?}");
    let ran = on_a_terminal(&lab, "--port 8001,8002 2>&1 | cat", "")?.exits(0);
    assert!(!ran.stdout.contains("[y/N]"), "{ran:?}");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn a_list_accepts_a_comma_at_its_end_and_a_service() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    for (line, code) in [
        ("-n --port 8080,", 0),
        ("-n --port :8080", 0),
        ("-n --port 8080 --state CLOSE_WAIT,closewait,", 0),
        ("-n --process nothing-like-it,*", 0),
        ("-n --port ssh,8443", 1),
        ("-n --uid 0", 0),
    ] {
        cwkill(&lab, line)?.exits(code);
    }
    Ok(())
}
