//! The command line: exit statuses, the environment of the command, and bad input.

use std::os::unix::process::CommandExt as _;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use netns_harness::scenario;

use crate::support::{
    count_states, harness, harness_with, has_other_users, output, output_with_code,
};

pub fn tests() -> Vec<Trial> {
    crate::tests!("input":
        list_names_every_scenario_on_a_line,
        list_survives_a_closed_pipe,
        the_status_is_the_commands,
        a_missing_command_is_named,
        bad_input_is_named_with_a_good_value,
        the_command_has_stdin_and_the_host,
        programs_in_our_directory_are_found,
        several_scenarios_with_counts,
        verify_says_what_failed,
        chaos_detects_a_wrong_killer,
        works_without_root,
        says_what_to_allow_without_privileges,
    )
}

fn list_names_every_scenario_on_a_line() -> Result<()> {
    let (stdout, stderr) = output_with_code(&mut harness_with("list"), 0)?;
    let names: Vec<_> = stdout
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let expected: Vec<_> = scenario::listed().map(|scenario| scenario.name).collect();
    ensure!(names == expected && stderr.is_empty(), "{stdout}{stderr}");
    ensure!(!names.contains(&"must-fail"));
    Ok(())
}

fn list_survives_a_closed_pipe() -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let child = harness_with("list")
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    Ok(())
}

fn the_status_is_the_commands() -> Result<()> {
    for (script, code) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -9 $$", 137),
        ("kill -TERM $$", 143),
    ] {
        output_with_code(harness_with("run unread -- sh -c").arg(script), code)?;
    }
    Ok(())
}

fn a_missing_command_is_named() -> Result<()> {
    let (_, stderr) = output_with_code(&mut harness_with("run unread -- no-such-program"), 127)?;
    ensure!(stderr.contains("`no-such-program`"), "{stderr}");
    Ok(())
}

fn bad_input_is_named_with_a_good_value() -> Result<()> {
    for (arguments, named) in [
        ("run unred -- true", &["unred", "unread"][..]),
        ("run unread,unred -- true", &["unred", "not-accepted"]),
        ("run unread:x -- true", &["`x`", "40"]),
        ("run unread --count 0 -- true", &["`0`", "40"]),
        ("run unread --count -5 -- true", &["-5"]),
        ("run unread --family v5 -- true", &["v5", "v6", "mapped"]),
        ("run unread --port 0 -- true", &["`0`", "8080"]),
        ("run unread --port 70000 -- true", &["70000", "8080"]),
        ("run unread", &["command", "for example", "--"]),
        ("verify unred", &["unred", "unread"]),
        ("", &["Usage"]),
    ] {
        let (stdout, stderr) = output_with_code(&mut harness_with(arguments), 2)?;
        ensure!(stdout.is_empty(), "`{arguments}`: {stdout}");
        for word in named {
            ensure!(
                stderr.contains(word),
                "`{arguments}` does not mention {word}:\n{stderr}"
            );
        }
    }
    Ok(())
}

fn the_command_has_stdin_and_the_host() -> Result<()> {
    let script = "cat /proc/$HARNESS_APP_PID/comm; echo $HARNESS_APP_ADDR $HARNESS_PEER_ADDR $HARNESS_PORT; \
                  [ /proc/self/ns/net -ef /proc/$HARNESS_APP_PID/ns/net ] && echo here; ls /proc/self/fd | wc -l; cat";
    let (reader, writer) = std::io::pipe()?;
    std::io::Write::write_all(&mut &writer, b"from stdin")?;
    drop(writer);
    let mut command = harness_with("run unread --family v6 --port 9999 -- sh -c");
    let child = command
        .arg(script)
        .stdin(reader)
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.wait_with_output()?;
    let stdout = String::from_utf8(output.stdout)?;
    let lines: Vec<_> = stdout.lines().collect();
    ensure!(
        lines[..3] == ["leaky-app", "fd78:0:0:1::1 fd78:0:0:1::2 9999", "here"],
        "{stdout}"
    );
    ensure!(lines.last() == Some(&"from stdin"), "{stdout}");
    Ok(())
}

fn programs_in_our_directory_are_found() -> Result<()> {
    // The only program that is certain to be in the directory is the harness itself.
    let (stdout, _) = output_with_code(&mut harness_with("run unread -- netns-harness list"), 0)?;
    ensure!(stdout.contains("not-accepted"), "{stdout}");
    Ok(())
}

fn several_scenarios_with_counts() -> Result<()> {
    let arguments =
        "run not-accepted,unread:4,established:5 --count 2 --check --family mapped -- ss -Htan";
    let states = count_states(arguments)?;
    ensure!(states == (6, 5, 1), "{states:?}");
    Ok(())
}

fn verify_says_what_failed() -> Result<()> {
    let (stdout, _) = output_with_code(
        &mut harness_with("verify unread drained --family v6 --count 2"),
        0,
    )?;
    ensure!(stdout == "unread v6: ok\ndrained v6: ok\n", "{stdout}");
    let (stdout, _) = output_with_code(&mut harness_with("verify must-fail --family v6"), 1)?;
    ensure!(
        stdout.starts_with("must-fail v6: FAILED: ") && stdout.contains("recv_q: 0"),
        "{stdout}"
    );
    Ok(())
}

fn chaos_detects_a_wrong_killer() -> Result<()> {
    let mut command = harness_with("chaos --seconds 2 --connections 20 --seed 7 --instead");
    command.arg("ss -K -tn sport = :8080");
    let (stdout, _) = output_with_code(&mut command, 1)?;
    for words in [
        "\nLOST 10.78.1.1:8080 10.78.1.2:20",
        "ECONNRESET",
        "listeners alive      2 of 2",
        "FAULT: ",
    ] {
        ensure!(stdout.contains(words), "{words}: {stdout}");
    }
    Ok(())
}

fn works_without_root() -> Result<()> {
    let mut command = harness_with("run unread,forked --check -- cat /proc/self/uid_map");
    command.env("NETNS_HARNESS_USERNS", "1");
    let (stdout, _) = output_with_code(&mut command, 0)?;
    ensure!(stdout.split_whitespace().nth(2) == Some("1"), "{stdout}");
    // As user `nobody`, if possible; otherwise this test runs without root anyway.
    let mut command = harness_with("run unread,forked --check -- true");
    if has_other_users()? {
        command.uid(65534).gid(65534);
    }
    output_with_code(&mut command, 0)?;
    Ok(())
}

fn says_what_to_allow_without_privileges() -> Result<()> {
    // The limit is set in a new user namespace and does not change the machine's.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && NETNS_HARNESS_USERNS=1 exec \"$0\" run unread -- true";
    let mut command = std::process::Command::new("unshare");
    command
        .args(["-Ur", "sh", "-c", script])
        .arg(harness().get_program());
    let output = output(&mut command).context("unshare (of util-linux)")?;
    let stderr = String::from_utf8(output.stderr)?;
    ensure!(
        output.status.code() == Some(125),
        "{}: {stderr}",
        output.status
    );
    for word in [
        "root",
        "kernel.unprivileged_userns_clone",
        "max_user_namespaces",
        "apparmor",
    ] {
        ensure!(stderr.contains(word), "does not mention {word}: {stderr}");
    }
    ensure!(stderr.lines().count() == 1, "{stderr}");
    Ok(())
}
