//! The audit log: every act is in it, and where it cannot be written nothing is done.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;

use anyhow::{Context, Result, ensure};
use netns_harness::{AgentOptions, Family, Lab, TcpState};
use serde_json::Value;

use crate::Case::{self, Once};
use crate::support::{CWKILL, Ran, at, count, cwkill, in_state, lab, leaker, ran, same};

pub const CASES: &[Case] = &[
    Once("every_act_is_a_line_in_the_file", file),
    Once("a_hostile_name_stays_in_its_field", hostile),
    Once("what_cannot_be_written_stops_the_act", refused),
    Once("a_disk_that_fills_is_told", full_disk),
    Once("journald_gets_the_fields", journald),
    Once("verbose_tells_on_standard_error", stderr),
    Once("a_listing_and_a_dry_run_leave_no_record", silent),
];

/// The records in a log.
fn records(text: &str) -> Result<Vec<Value>> {
    let parse = |line: &str| serde_json::from_str(line).with_context(|| line.to_owned());
    text.lines().map(parse).collect()
}

fn file() -> Result<()> {
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
    // The first cannot close what was never accepted.
    command(&["--all", "--method", "shutdown"])?.exits(4)?;
    command(&["--port", "8080", "--max-kills", "1"])?.exits(4)?;
    // Nothing to do, nothing to say.
    command(&["--port", "9"])?.exits(1)?;

    same(&(path.metadata()?.permissions().mode() & 0o777), &0o600)?;
    let records = records(&std::fs::read_to_string(&path)?)?;
    let events: Vec<String> = records.iter().map(|record| at(record, "/event")).collect();
    let wanted = [
        "begin", "outcome", "outcome", "outcome", "outcome", "outcome", "end",
    ];
    let wanted: Vec<_> = wanted
        .into_iter()
        .chain(["begin", "outcome", "outcome", "end"])
        .collect();
    ensure!(events == wanted, "{events:?}");
    for record in &records {
        same(&at(record, "/uid"), &"0".into())?;
        same(&at(record, "/sudo_user"), &"alice".into())?;
        let login = std::fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
        let login = match login.trim() {
            "" | "4294967295" => "null",
            uid => uid,
        };
        same(&at(record, "/login_uid"), &login.into())?;
        let time = at(record, "/time");
        ensure!(
            humantime::parse_rfc3339(&time).is_ok() && time.ends_with('Z'),
            "{time}"
        );
    }
    same(&at(&records[0], "/matched"), &"5".into())?;
    same(&at(&records[0], "/to_act_on"), &"3".into())?;
    same(&at(&records[0], "/methods"), &r#"["shutdown"]"#.into())?;
    same(&at(&records[0], "/arguments/1"), &"--method".into())?;
    let closed: Vec<&Value> = records[1..6]
        .iter()
        .filter(|record| at(record, "/socket/result/outcome") == "closed")
        .collect();
    same(&closed.len(), &3)?;
    same(
        &at(closed[0], "/socket/owners/0/pid"),
        &leak.app().pid().to_string(),
    )?;
    same(&at(closed[0], "/socket/cause"), &"unread".into())?;
    let locals: Vec<String> = leak
        .conns()
        .iter()
        .map(|conn| conn.peer.port().to_string())
        .collect();
    for record in &closed {
        ensure!(
            locals.contains(&at(record, "/socket/peer/port")),
            "{record:#}"
        );
    }
    same(&at(&records[6], "/summary/skipped"), &"2".into())?;
    same(&at(&records[10], "/summary/closed"), &"1".into())
}

fn hostile() -> Result<()> {
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
    let ran = cwkill(&lab, &arguments)?.exits(0)?;
    let text = std::fs::read_to_string(&path)?;
    ensure!(!text.contains('\u{1b}') && !ran.stderr.contains('\u{1b}'));
    let records = records(&text)?;
    same(&records.len(), &3)?;
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", app.pid()))?;
    let wanted = comm.strip_suffix('\n').unwrap_or(&comm).to_owned();
    same(&at(&records[1], "/socket/owners/0/comm"), &wanted)
}

fn refused() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let dir = tempfile::tempdir()?;
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status()?;
    ensure!(made.success());
    for (path, why) in [
        (dir.path().display().to_string(), "directory"),
        (fifo.display().to_string(), "no regular file"),
        ("/dev/null".into(), "no regular file"),
        ("/proc/nowhere/log".into(), "No such file"),
    ] {
        cwkill(&lab, &format!("--all --log-file {path}"))?
            .exits(3)?
            .complains("nothing was done")?
            .complains(&path)?
            .complains(why)?;
    }
    // No journal in there.
    without_run(&lab, "", &format!("{CWKILL} --all --log journald"))?
        .exits(3)?
        .complains("journal")?;
    same(&in_state(&lab, TcpState::CloseWait)?, &2)
}

/// Runs a script of the leaking host with an empty /run, after `before`.
fn without_run(lab: &Lab, before: &str, command: &str) -> Result<Ran> {
    let script = format!("mount -t tmpfs none /run; {before}\n{command}");
    ran(lab
        .app_host()
        .command("unshare")
        .args(["-m", "sh", "-ec", &script]))
}

/// A log on a disk of one page.
fn full_disk() -> Result<()> {
    let on_a_small_disk = |lab: &Lab, prepare: &str| {
        let script = format!(
            "mount -t tmpfs -o size=4k none /run; {prepare}; \
             code=0; {CWKILL} --all --quiet --log-file /run/log || code=$?; cat /run/log; exit $code"
        );
        ran(lab
            .app_host()
            .command("unshare")
            .args(["-m", "sh", "-ec", &script]))
    };
    let (lab, _leak) = lab("unread", Family::V4, 40)?;
    // Already full: not even the first record fits.
    on_a_small_disk(&lab, "head -c 4096 /dev/zero > /run/log")?
        .exits(3)?
        .complains("nothing was done")?
        .complains("No space left")?;
    same(&in_state(&lab, TcpState::CloseWait)?, &40)?;
    // It fills later: all is done, and told.
    let ran = on_a_small_disk(&lab, "true")?
        .exits(3)?
        .complains("the work is done (40 sockets matched: 40 closed)")?
        .complains("records of the audit log could not be written to /run/log: No space left")?;
    same(&in_state(&lab, TcpState::CloseWait)?, &0)?;
    let lines: Vec<&str> = ran.stdout.lines().collect();
    ensure!(lines.len() > 1 && lines.len() < 40, "{ran:?}");
    let whole = records(&lines[..lines.len() - 1].join("\n"))?;
    same(&at(&whole[0], "/to_act_on"), &"40".into())
}

fn journald() -> Result<()> {
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
        // Whether there is a journal is asked with an empty message.
        entries.retain(|entry| !entry.is_empty());
        entries
    };
    without_run(
        &lab,
        &put,
        &format!("{CWKILL} --all --max-kills 1 --log journald"),
    )?
    .exits(4)?;
    let told = entries();
    same(&told.len(), &4)?;
    let fields = [
        "CWKILL_EVENT",
        "CWKILL_OUTCOME",
        "CWKILL_COOKIE",
        "CWKILL_RECORD",
        "MESSAGE",
    ];
    let outcome = told
        .iter()
        .find(|entry| entry.contains("closed by shutdown"));
    let outcome = outcome.with_context(|| format!("{told:#?}"))?;
    for field in fields {
        ensure!(
            outcome.contains(&format!("{field}\n")),
            "no {field}: {outcome}"
        );
    }
    ensure!(outcome.contains("SYSLOG_IDENTIFIER\n"), "{outcome}");

    // A service of systemd, as its environment says; the same variable in another one says nothing.
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
        without_run(&lab, &put, &command)?.exits(0)?;
        let told = entries();
        ensure!(told.is_empty() != is_it, "{told:#?}");
    }
    Ok(())
}

fn stderr() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    cwkill(&lab, "--all --max-kills 1 -v")?
        .exits(0)?
        .complains("cwkill: audit: about to act on 1 of 1 sockets by shutdown, destroy, rst")?
        .complains("closed by shutdown")?;
    let again = lab.start("unread", Family::V4, count(1))?;
    let quiet = cwkill(&lab, "--all --log none -v")?.exits(0)?;
    ensure!(!quiet.stderr.contains("audit"), "{quiet:?}");
    drop(again);
    Ok(())
}

fn silent() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("log");
    let dry = format!("--all -n --log journald --log-file {}", path.display());
    cwkill(&lab, &dry)?.exits(0)?;
    ensure!(!path.exists());
    let listing = cwkill(&lab, "-v")?.exits(0)?;
    ensure!(!listing.stderr.contains("audit"), "{listing:?}");
    Ok(())
}
