//! The audit log: it records every act, and if it cannot be written, nothing is done.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;

use anyhow::{Context, Result};
use netns_harness::{AgentOptions, Family, Lab, TcpState};
use serde_json::Value;

use crate::support::{CWKILL, Ran, at, count, cwkill, in_state, lab, leaker, ran};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(every_act_is_a_record_in_the_log_file),
    once!(a_hostile_name_stays_in_its_field),
    once!(nothing_is_done_if_the_log_cannot_be_written),
    once!(a_full_disk_is_reported),
    once!(a_log_path_prepared_by_others_is_refused),
    once!(a_log_on_standard_error_must_be_writable),
    once!(a_journal_that_hangs_is_an_error_and_not_a_hang),
    once!(a_killed_run_has_logged_its_intents),
    once!(a_reclaimed_descriptor_is_recorded),
    once!(journald_gets_the_fields),
    once!(verbose_logs_to_standard_error),
    once!(a_listing_and_a_dry_run_leave_no_record),
];

/// The records in a log.
fn records(text: &str) -> Result<Vec<Value>> {
    let parse = |line: &str| serde_json::from_str(line).with_context(|| line.to_owned());
    text.lines().map(parse).collect()
}

fn every_act_is_a_record_in_the_log_file() -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("unread", Family::V4, count(3))?;
    lab.start("not-accepted", Family::V4, count(2))?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("log");
    let command = |arguments: &[&str]| {
        let command = lab.app_host().command(CWKILL).args(arguments);
        ran(command
            .arg("--log-file")
            .arg(&path)
            .env("SUDO_USER", "alice"))
    };
    // The first run cannot close the sockets that were never accepted.
    command(&["--all", "--method", "shutdown"])?.exits(4);
    command(&["--port", "8080", "--max-kills", "1"])?.exits(0);
    // A run that matches nothing writes nothing.
    command(&["--port", "9"])?.exits(1);

    assert_eq!(path.metadata()?.permissions().mode() & 0o777, 0o600);
    let records = records(&std::fs::read_to_string(&path)?)?;
    let events: Vec<String> = records.iter().map(|record| at(record, "/event")).collect();
    let wanted = [
        "begin", "intent", "intent", "intent", "outcome", "outcome", "outcome", "outcome",
        "outcome", "end", "begin", "intent", "outcome", "outcome", "end",
    ];
    assert_eq!(events, wanted);
    for record in &records {
        let begins = at(record, "/event") == "begin";
        assert_eq!(record.get("arguments").is_some(), begins);
        assert_eq!(at(record, "/uid"), "0");
        assert_eq!(at(record, "/sudo_user"), "alice");
        let login = std::fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
        let login = match login.trim() {
            "" | "4294967295" => "null",
            uid => uid,
        };
        assert_eq!(at(record, "/login_uid"), login);
        let time = at(record, "/time");
        assert!(
            humantime::parse_rfc3339(&time).is_ok() && time.ends_with('Z'),
            "{time}"
        );
    }
    assert_eq!(at(&records[0], "/matched"), "5");
    assert_eq!(at(&records[0], "/to_act_on"), "3");
    assert_eq!(at(&records[0], "/methods"), r#"["shutdown"]"#);
    assert!(at(&records[0], "/arguments").contains(r#","--method","shutdown""#));
    let closed: Vec<&Value> = records[4..9]
        .iter()
        .filter(|record| at(record, "/socket/result/outcome") == "closed")
        .collect();
    assert_eq!(closed.len(), 3);
    assert_eq!(
        at(closed[0], "/socket/owners/0/pid"),
        leak.app().pid().to_string()
    );
    assert_eq!(at(closed[0], "/socket/cause"), "unread");
    let cookies = |records: &[&Value]| -> Vec<String> {
        let cookies = records.iter().map(|record| at(record, "/socket/cookie"));
        cookies.collect()
    };
    let intended: Vec<&Value> = records[1..4].iter().collect();
    assert_eq!(cookies(&intended), cookies(&closed));
    assert_eq!(at(intended[0], "/socket/plan"), r#"["shutdown"]"#);
    let locals: Vec<String> = leak
        .conns()
        .iter()
        .map(|conn| conn.peer.port().to_string())
        .collect();
    for record in &closed {
        assert!(
            locals.contains(&at(record, "/socket/peer/port")),
            "{record:#}"
        );
    }
    assert_eq!(at(&records[9], "/summary/skipped"), "2");
    assert_eq!(at(&records[14], "/summary/closed"), "1");
    Ok(())
}

fn a_hostile_name_stays_in_its_field() -> Result<()> {
    let lab = Lab::new()?;
    let (app, _peer) = leaker(
        &lab,
        &AgentOptions {
            comm: "a\"\n{\u{1b}[2J".into(),
            ..AgentOptions::default()
        },
    )?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("log");
    let arguments = format!("--all --log stderr --log-file {}", path.display());
    let ran = cwkill(&lab, &arguments)?.exits(0);
    let text = std::fs::read_to_string(&path)?;
    assert!(!text.contains('\u{1b}') && !ran.stderr.contains('\u{1b}'));
    let records = records(&text)?;
    assert_eq!(records.len(), 4);
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", app.pid()))?;
    let wanted = comm.strip_suffix('\n').unwrap_or(&comm).to_owned();
    assert_eq!(at(&records[1], "/socket/owners/0/comm"), wanted);
    Ok(())
}

fn nothing_is_done_if_the_log_cannot_be_written() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let dir = tempfile::tempdir()?;
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status()?;
    assert!(made.success());
    for (path, why) in [
        (dir.path().display().to_string(), "directory"),
        (fifo.display().to_string(), "not a regular file"),
        ("/dev/null".into(), "not a regular file"),
        ("/proc/nowhere/log".into(), "No such file"),
    ] {
        cwkill(&lab, &format!("--all --log-file {path}"))?
            .exits(3)
            .complains("nothing was done")
            .complains(&path)
            .complains(why);
    }
    // There is no journal in this mount namespace.
    without_run(&lab, "", &format!("{CWKILL} --all --log journald"))?
        .exits(3)
        .complains("journal");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

/// Runs a command on the leaking host with an empty /run, after the script `before`.
fn without_run(lab: &Lab, before: &str, command: &str) -> Result<Ran> {
    let script = format!("mount -t tmpfs none /run; {before}\n{command}");
    ran(lab
        .app_host()
        .command("unshare")
        .args(["-m", "sh", "-ec", &script]))
}

/// A log on a file system of 48 KiB.
fn a_full_disk_is_reported() -> Result<()> {
    let on_a_small_disk = |lab: &Lab, prepare: &str| {
        let script = format!(
            "mount -t tmpfs -o size=48k,mode=755 none /run; {prepare}; \
             code=0; {CWKILL} --all --quiet --log-file /run/log || code=$?; cat /run/log; exit $code"
        );
        ran(lab
            .app_host()
            .command("unshare")
            .args(["-m", "sh", "-ec", &script]))
    };
    let (lab, _leak) = lab("unread", Family::V4, 40)?;
    // It is already full: not even the first record fits.
    on_a_small_disk(&lab, "head -c 49152 /dev/zero > /run/log")?
        .exits(3)
        .complains("nothing was done")
        .complains("No space left");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 40);
    // It fills later: all the work is done, and the full disk is reported.
    let ran = on_a_small_disk(&lab, "true")?
        .exits(3)
        .complains("the work is done (40 sockets matched: 40 closed)")
        .complains("records of the audit log could not be written to /run/log: No space left");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert!(lines.len() > 41 && lines.len() < 81, "{ran:?}");
    let whole = records(&lines[..lines.len() - 1].join("\n"))?;
    assert_eq!(at(&whole[0], "/to_act_on"), "40");
    Ok(())
}

fn journald_gets_the_fields() -> Result<()> {
    let lab = Lab::new()?;
    lab.start("unread", Family::V4, count(2))?;
    let dir = tempfile::tempdir()?;
    let journal = UnixDatagram::bind(dir.path().join("socket"))?;
    journal.set_nonblocking(true)?;
    let put = format!(
        "mkdir -p /run/systemd/journal; mount --bind {} /run/systemd/journal",
        dir.path().display()
    );
    let entries = || -> Vec<String> {
        let mut entries = Vec::new();
        let mut buffer = vec![0; 256 * 1024];
        while let Ok(length) = journal.recv(&mut buffer) {
            entries.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        // cwkill checks for the journal with an empty message.
        entries.retain(|entry| !entry.is_empty());
        entries
    };
    without_run(
        &lab,
        &put,
        &format!("{CWKILL} --all --max-kills 1 --log journald"),
    )?
    .exits(0);
    let logged = entries();
    assert_eq!(logged.len(), 5);
    let fields = [
        "CWKILL_EVENT",
        "CWKILL_OUTCOME",
        "CWKILL_COOKIE",
        "CWKILL_RECORD",
        "MESSAGE",
    ];
    let outcome = logged
        .iter()
        .find(|entry| entry.contains(": closed by shutdown"));
    let outcome = outcome.with_context(|| format!("{logged:#?}"))?;
    for field in fields {
        assert!(
            outcome.contains(&format!("{field}\n")),
            "no {field}: {outcome}"
        );
    }
    assert!(outcome.contains("SYSLOG_IDENTIFIER\n"), "{outcome}");

    // JOURNAL_STREAM names standard error of a systemd service. In another process it names another file and is ignored.
    let stderr = dir.path().join("stderr");
    let file = std::fs::File::create(&stderr)?;
    let metadata = file.metadata()?;
    for (inode, is_it) in [(metadata.ino() + 1, false), (metadata.ino(), true)] {
        lab.start("unread", Family::V4, count(1))?;
        let command = format!(
            "export JOURNAL_STREAM={}:{inode}; exec {CWKILL} --all --method destroy 2>{}",
            metadata.dev(),
            stderr.display()
        );
        without_run(&lab, &put, &command)?.exits(0);
        let logged = entries();
        assert!(logged.is_empty() != is_it, "{logged:#?}");
    }
    Ok(())
}

fn verbose_logs_to_standard_error() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 1)?;
    let owner = leak.app().pid();
    let comm = std::fs::read_to_string(format!("/proc/{owner}/comm"))?;
    let command = lab.app_host().command(CWKILL).env("SUDO_USER", "alice");
    let logged = ran(command.args(["--all", "--max-kills", "1", "-v"]))?
        .exits(0)
        .complains("cwkill: audit: uid 0 (sudo by alice")
        .complains("): about to act on 1 of 1 sockets by shutdown, destroy, rst");
    let line = logged
        .stderr
        .lines()
        .find(|line| line.ends_with(": closed by shutdown"));
    let line = line.with_context(|| logged.stderr.clone())?;
    assert!(
        line.contains(&format!(" of {}/{owner}", comm.trim_end())),
        "{line}"
    );
    assert!(line.contains(", netns "), "{line}");
    let again = lab.start("unread", Family::V4, count(1))?;
    let quiet = cwkill(&lab, "--all --log none -v")?.exits(0);
    assert!(!quiet.stderr.contains("audit"), "{quiet:?}");
    drop(again);
    Ok(())
}

fn a_listing_and_a_dry_run_leave_no_record() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("log");
    let dry = format!("--all -n --log journald --log-file {}", path.display());
    cwkill(&lab, &dry)?.exits(0);
    assert!(!path.exists());
    let listing = cwkill(&lab, "-v")?.exits(0);
    assert!(!listing.stderr.contains("audit"), "{listing:?}");
    Ok(())
}

/// The user whose processes leak could prepare a directory like this.
fn a_log_path_prepared_by_others_is_refused() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let dir = tempfile::tempdir()?;
    let refuse = |name: &str, why: &str| -> Result<()> {
        let path = dir.path().join(name);
        cwkill(&lab, &format!("--all --log-file {}", path.display()))?
            .exits(3)
            .complains("nothing was done")
            .complains(name)
            .complains(why);
        Ok(())
    };
    let profile = dir.path().join("profile");
    std::os::unix::fs::symlink(&profile, dir.path().join("dangling"))?;
    refuse("dangling", "symbolic link")?;
    assert!(!profile.exists());
    std::fs::write(&profile, "true\n")?;
    refuse("dangling", "symbolic link")?;
    std::fs::hard_link(&profile, dir.path().join("second"))?;
    refuse("second", "hard links")?;
    assert_eq!(std::fs::read_to_string(&profile)?, "true\n");
    let open = dir.path().join("open");
    std::fs::write(&open, "")?;
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o666))?;
    refuse("open", "others can write it")?;
    let shared = dir.path().join("shared");
    std::fs::create_dir(&shared)?;
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o1777))?;
    refuse("shared/log", "everybody can write to its directory")?;
    assert!(!shared.join("log").exists());
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

fn a_log_on_standard_error_must_be_writable() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let run = |arguments: &str| -> Result<Option<i32>> {
        let full = std::fs::File::options().write(true).open("/dev/full")?;
        let command = lab.app_host().command(CWKILL);
        let mut child = command
            .args(arguments.split(' '))
            .stdout(std::process::Stdio::null())
            .stderr(full)
            .spawn()?;
        Ok(child.wait()?.code())
    };
    assert_eq!(run("--all --log stderr")?, Some(3));
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    // No log was requested.
    assert_eq!(run("--all -v")?, Some(0));
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// The queue of the journal fills, because no process reads it.
fn a_journal_that_hangs_is_an_error_and_not_a_hang() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 60)?;
    let dir = tempfile::tempdir()?;
    let journal = UnixDatagram::bind(dir.path().join("socket"))?;
    let put = format!(
        "mkdir -p /run/systemd/journal; mount --bind {} /run/systemd/journal",
        dir.path().display()
    );
    let command = format!("{CWKILL} --all --log journald");
    // The first records stay in the queue, so the intents do not fit.
    without_run(&lab, &put, &command)?
        .exits(3)
        .complains("nothing was done")
        .complains("could not be written to the journal");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 60);
    drop(journal);
    Ok(())
}

/// SIGKILL arrives in the grace of a socket whose peer does not answer.
fn a_killed_run_has_logged_its_intents() -> Result<()> {
    let (lab, leak) = lab("silent-peer", Family::V4, 1)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("log");
    let log = path.display().to_string();
    let command = lab.app_host().command(CWKILL);
    let mut child = command
        .args([
            "--all",
            "--method",
            "shutdown",
            "--grace",
            "60s",
            "--log-file",
            &log,
        ])
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let acted = lab.wait_for(crate::support::PATIENCE, || {
        Ok(in_state(&lab, TcpState::LastAck)? == 1)
    });
    child.kill()?;
    child.wait()?;
    acted?;
    let records = records(&std::fs::read_to_string(&path)?)?;
    let events: Vec<String> = records.iter().map(|record| at(record, "/event")).collect();
    assert_eq!(events, ["begin", "intent"]);
    let pid = leak.app().pid().to_string();
    assert_eq!(at(&records[1], "/socket/owners/0/pid"), pid);
    Ok(())
}

/// The descriptor of a socket that an earlier run has closed.
fn a_reclaimed_descriptor_is_recorded() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 1)?;
    let owner = leak.app().pid();
    let fd = leak.conns()[0].app_fd.context("no descriptor")?;
    cwkill(&lab, "--all --method destroy")?.exits(0);
    let inode = std::fs::read_link(format!("/proc/{owner}/fd/{fd}"))?;
    let inode = inode
        .to_string_lossy()
        .trim_matches(|c: char| !c.is_ascii_digit())
        .to_owned();
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("log");
    let line = format!("reclaim --pid {owner} --reclaim-age 0s --reclaim-force --stop-limit 5s");
    let log = format!("--log stderr --log-file {}", path.display());
    cwkill(&lab, &format!("{line} -n {log}"))?.exits(0);
    assert!(!path.exists());
    // If it cannot be recorded, it is not done.
    cwkill(&lab, &format!("{line} --log-file /dev/null"))?
        .exits(3)
        .complains("nothing was done");
    std::fs::read_link(format!("/proc/{owner}/fd/{fd}"))?;
    let comm = std::fs::read_to_string(format!("/proc/{owner}/comm"))?;
    let comm = comm.trim_end();
    cwkill(&lab, &format!("{line} {log}"))?
        .exits(0)
        .complains("about to close 1 descriptors of dead sockets in 1 processes")
        .complains(&format!("of {comm}/{owner} (socket {inode}"))
        .complains(": freed");
    let records = records(&std::fs::read_to_string(&path)?)?;
    let events: Vec<String> = records.iter().map(|record| at(record, "/event")).collect();
    assert_eq!(events, ["begin", "intent", "outcome", "end"]);
    for record in &records[1..3] {
        assert_eq!(at(record, "/descriptor/pid"), owner.to_string());
        assert_eq!(at(record, "/descriptor/comm"), comm);
        assert_eq!(at(record, "/descriptor/fd"), fd.to_string());
        assert_eq!(at(record, "/descriptor/inode"), inode);
    }
    assert_eq!(at(&records[2], "/descriptor/outcome"), "freed");
    assert_eq!(at(&records[3], "/summary/freed"), "1");
    Ok(())
}
