//! The age and the idle time of a socket, and what cwkill leaves alone because of them.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use netns_harness::{
    Agent, Capability, Dial, Drained, Endpoint, Family, Fd, How, Lab, Leak, Recv, SocketOption,
    TcpState,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    CWKILL, HISTORY, PATIENCE, Ran, alone, as_typed, at, cwkill, in_state, lab, ran,
};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_connection_in_use_is_left_alone),
    once!(a_connection_in_use_is_closed_on_request),
    once!(a_download_is_cut_only_in_a_pause_of_more_than_five_seconds).slow(),
    each_family!(an_upload_that_is_still_read_is_left_alone).slow(),
    each_family!(an_idle_open_connection_is_closed_by_its_idle_time),
    each_family!(an_answered_keepalive_does_not_hide_the_age).slow(),
    each_family!(a_probe_makes_nothing_young),
    each_family!(an_owner_that_sends_keeps_its_socket_young),
    once!(a_file_that_cannot_be_used_is_replaced),
    once!(a_file_that_cannot_be_written_is_a_note),
    once!(a_locked_file_is_read_and_its_writer_gives_up),
    once!(a_directory_of_others_is_not_used).needs(Need::RootOfTheMachine),
    once!(capabilities_do_not_open_the_file).needs(Need::RootOfTheMachine),
    once!(runs_at_once_lose_nothing),
    each_family!(a_leak_of_haproxy_is_seen_and_a_download_through_it_is_not_touched)
        .slow()
        .needs(Need::Program("haproxy")),
];

/// Waits until this many sockets have been idle for `time`.
fn idle(lab: &Lab, time: &str, count: usize) -> Result<()> {
    lab.wait_for(PATIENCE, || {
        let line = format!("-n --json --min-idle {time}");
        Ok(cwkill(lab, &line)?.sockets().len() == count)
    })
}

/// Beside a leak, which is closed.
fn a_connection_in_use_is_left_alone(family: Family) -> Result<()> {
    let (lab, _half_closed) = lab("half-closed", family, 2)?;
    let listed = as_typed(&lab, "")?.exits(0);
    let marked = listed
        .stdout
        .lines()
        .filter(|line| line.contains("ms (in use) "));
    assert!(marked.count() > 0, "{listed:?}");
    for line in ["--all", "--all --no-owners --method destroy", "-n"] {
        let ran = as_typed(&lab, line)?.exits(1);
        assert!(
            ran.stdout
                .contains("2 in use and left alone (--min-idle): data moved in the last 5s"),
            "{ran:?}"
        );
        let json = as_typed(&lab, &format!("{line} --json"))?.exits(1).json();
        assert_eq!(at(&json, "/summary/in_use"), "2");
        assert_eq!(at(&json, "/summary/matched"), "0");
    }
    let _leak = lab.start("drained", family, alone(9000, 3))?;
    idle(&lab, "5s", 3)?;
    let json = as_typed(&lab, "--all --json")?.exits(0).json();
    let summary = json["summary"].as_object().context("no summary")?;
    assert_eq!(summary["closed"], 3);
    assert_eq!(summary["in_use"], 2);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

fn a_connection_in_use_is_closed_on_request() -> Result<()> {
    let (lab, _half_closed) = lab("half-closed", Family::V4, 1)?;
    let sockets = cwkill(&lab, "--all --min-idle 0s --json")?.sockets();
    assert_eq!(at(&sockets[0], "/result/method"), "shutdown");
    assert_eq!(at(&sockets[0], "/in_use"), "true");
    Ok(())
}

/// Servers send on half-closed connections with pauses, and cwkill runs again and again, at every moment of the pauses.
fn a_download_is_cut_only_in_a_pause_of_more_than_five_seconds() -> Result<()> {
    // On a busy machine a pause can take two seconds longer.
    const PAUSES_MS: [u64; 4] = [100, 1000, 3000, 6000];
    /// Of each family.
    const DOWNLOADS: usize = 4;
    /// The agent sends this many bytes at a time.
    const AT_ONCE: u32 = 16;
    const RUNS: usize = 30;
    let lab = Lab::new()?;
    let mut ports = 8001..;
    let mut servers: Vec<(u64, u16, Leak)> = Vec::new();
    for (pause, family) in PAUSES_MS
        .iter()
        .flat_map(|pause| Family::ALL.map(|it| (*pause, it)))
    {
        let port = ports.next().context("no port")?;
        let server = lab.start("drained", family, alone(port, DOWNLOADS))?;
        let interval = Duration::from_millis(pause);
        server.app().start_sending(&server.app_fds(), interval)?;
        servers.push((pause, port, server));
    }
    let with = |wanted: u64| servers.iter().filter(move |(pause, _, _)| *pause == wanted);
    // How many bytes have arrived of each download that has not ended.
    let arrived = |(_, _, server): &(u64, u16, Leak)| -> Result<Vec<u32>> {
        let mut rows = server.pair().peer_host.ss(&[])?;
        rows.retain(|row| row.state == TcpState::FinWait2);
        Ok(rows.iter().map(|row| row.recv_q).collect())
    };
    let mut runs = 0;
    lab.wait_for(5 * PATIENCE, || {
        let ran = as_typed(&lab, "--port 8001-8012 --allow-spin --json")?;
        for socket in ran.sockets() {
            let code = at(&socket, "/result/reason_code");
            // Its server has sent between the list and the act.
            assert!(["null", "in-use"].contains(&code.as_str()), "{socket:#}");
        }
        runs += 1;
        let slow: Vec<Vec<u32>> = with(3000).map(&arrived).collect::<Result<_>>()?;
        let paused: Vec<Vec<u32>> = with(6000).map(&arrived).collect::<Result<_>>()?;
        let past_two_pauses = slow.concat().iter().all(|bytes| *bytes > 2 * AT_ONCE);
        Ok(runs >= RUNS && past_two_pauses && paused.concat().is_empty())
    })?;
    let mut open = lab.app_host().ss(&[])?;
    open.retain(|row| row.state == TcpState::CloseWait);
    let cut = PAUSES_MS.map(|pause| {
        let left = |(_, port, _): &(u64, u16, Leak)| {
            open.iter().filter(|row| row.local.port() == *port).count()
        };
        let downloads = DOWNLOADS * Family::ALL.len();
        (pause, downloads - with(pause).map(left).sum::<usize>())
    });
    let all = DOWNLOADS * Family::ALL.len();
    assert_eq!(
        cut,
        [(100, 0), (1000, 0), (3000, 0), (6000, all)],
        "{runs} runs"
    );
    // What was not cut is whole.
    for (pause, _, server) in &servers {
        let sent = server.app().stop_sending()?;
        if *pause < 6000 {
            server.app().shutdown(&server.app_fds(), How::Write)?;
            let got = server.peer().drain(&server.peer_fds(), PATIENCE)?;
            let whole =
                |(download, sent): (&Drained, &u64)| download.intact && download.bytes == *sent;
            assert!(got.iter().zip(&sent).all(whole), "{got:?}, {sent:?}");
        }
    }
    Ok(())
}

/// The peer has sent everything and finished. No clock of the kernel counts what the application reads.
fn an_upload_that_is_still_read_is_left_alone(family: Family) -> Result<()> {
    const UPLOAD: usize = 50_000;
    let (lab, leak) = lab("established", family, 1)?;
    let (app, fd) = (leak.app(), leak.app_fds()[0]);
    leak.peer().send(&leak.peer_fds(), &[b'x'; UPLOAD])?;
    leak.peer().shutdown(&leak.peer_fds(), How::Write)?;
    idle(&lab, "1s", 1)?;
    let lines = [
        "--all --min-idle 1s",
        "-n --min-idle 1s",
        "--all --no-owners --method destroy --min-idle 1s",
    ];
    for line in lines {
        let line = &format!("{line} --json");
        let json = std::thread::scope(|scope| -> Result<Value> {
            let run = scope.spawn(|| cwkill(&lab, line));
            while !run.is_finished() {
                let got = app.recv(fd, 10, PATIENCE)?;
                assert!(matches!(got, Recv::Data(_)), "{got:?}");
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(run.join().expect("no panic")?.exits(1).json())
        })?;
        assert_eq!(at(&json, "/summary/in_use"), "1", "{line}");
        assert_eq!(at(&json, "/summary/matched"), "0", "{line}");
    }
    app.send(&[fd], b"received")?;
    let answer = leak.peer().recv(leak.peer_fds()[0], 100, PATIENCE)?;
    assert_eq!(answer, Recv::Data(b"received".to_vec()));

    // An application that has stopped to read.
    idle(&lab, "1s", 1)?;
    let sockets = cwkill(&lab, "--all --min-idle 1s --json")?
        .exits(0)
        .sockets();
    assert_eq!(at(&sockets[0], "/cause"), "unread");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn an_idle_open_connection_is_closed_by_its_idle_time(family: Family) -> Result<()> {
    let (lab, _leak) = lab("established", family, 2)?;
    let line = "--all --state established --min-idle 1s --json";
    lab.wait_for(PATIENCE, || {
        Ok(cwkill(&lab, &format!("-n {line}"))?.sockets().len() == 2)
    })?;
    cwkill(&lab, line)?.exits(0);
    assert_eq!(in_state(&lab, TcpState::Established)?, 0);
    Ok(())
}

/// Runs cwkill with the history in this directory.
fn with_history(lab: &Lab, directory: &Path, arguments: &str) -> Result<Ran> {
    let command = lab.app_host().command(CWKILL).env(HISTORY, directory);
    ran(command.args(arguments.split_whitespace()))
}

/// A number of the one socket in a run.
fn number(sockets: &[Value], name: &str) -> Result<u64> {
    assert_eq!(sockets.len(), 1, "{sockets:#?}");
    sockets[0][name].as_u64().context(name.to_owned())
}

/// Probes every second.
const KEEPALIVE: SocketOption = SocketOption::KeepAlive {
    idle_s: 1,
    interval_s: 1,
    probes: 100,
};

/// A directory that ends with the test.
fn directory() -> Result<TempDir> {
    Ok(tempfile::tempdir()?)
}

fn an_answered_keepalive_does_not_hide_the_age(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 1)?;
    let history = directory()?;
    leak.app().set_option(&leak.app_fds(), KEEPALIVE)?;
    lab.wait_for(PATIENCE, || {
        let sockets = with_history(&lab, history.path(), "--json")?.sockets();
        let now = cwkill(&lab, "-n --json")?.sockets();
        Ok(number(&sockets, "age_ms")? >= 4000 && number(&now, "age_ms")? < 2000)
    })?;
    let socket = &with_history(&lab, history.path(), "--json")?.sockets()[0];
    assert_eq!(at(socket, "/age_source"), "history");
    // Nothing is known without the history.
    let without = cwkill(&lab, "-n --json")?.sockets();
    assert!(number(&without, "age_ms")? < 4000);
    assert_eq!(at(&without[0], "/age_source"), "kernel");
    // Every command uses it.
    let old = "--min-age 4s";
    with_history(&lab, history.path(), &format!("check -c 0 {old}"))?.exits(2);
    let diagnosed = with_history(
        &lab,
        history.path(),
        &format!("diagnose {old} --sample 100ms"),
    )?;
    assert!(diagnosed.stdout.contains("never closes"), "{diagnosed:?}");
    with_history(&lab, history.path(), &format!("-n {old}"))?.exits(0);
    with_history(
        &lab,
        history.path(),
        &format!("--all {old} --no-owners --method destroy"),
    )?
    .exits(0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn a_probe_makes_nothing_young(family: Family) -> Result<()> {
    for scenario in ["drained", "not-accepted"] {
        let (lab, _leak) = lab(scenario, family, 1)?;
        let history = directory()?;
        let line = "-n --json --min-age 1s --min-idle 1s";
        lab.wait_for(PATIENCE, || {
            Ok(with_history(&lab, history.path(), line)?.code == Some(0))
        })?;
        let probe = "--all --min-age 1s --min-idle 1s --method probe --grace 20s --json";
        let probed = with_history(&lab, history.path(), probe)?
            .exits(4)
            .sockets();
        assert_eq!(at(&probed[0], "/result/reason_code"), "peer-alive");
        let later = with_history(&lab, history.path(), line)?.exits(0).sockets();
        assert_eq!(at(&later[0], "/age_source"), "history");
        assert!(number(&later, "age_ms")? >= number(&probed, "age_ms")?);
    }
    Ok(())
}

/// Beside an old socket, which shows how much time has passed.
fn an_owner_that_sends_keeps_its_socket_young(family: Family) -> Result<()> {
    let (lab, _half_closed) = lab("half-closed", family, 1)?;
    let _old = lab.start("drained", family, alone(9000, 1))?;
    let history = directory()?;
    lab.wait_for(PATIENCE, || {
        let old = with_history(&lab, history.path(), "-n --json --min-age 3s --port 9000")?;
        with_history(&lab, history.path(), "--json")?.exits(0);
        Ok(old.code == Some(0))
    })?;
    for line in ["--min-age 2s", "--min-idle 2s"] {
        let ran = with_history(&lab, history.path(), &format!("-n --json {line}"))?.exits(0);
        let sockets = ran.sockets();
        assert_eq!(sockets.len(), 1, "{ran:?}");
        assert_eq!(at(&sockets[0], "/local/port"), "9000");
    }
    Ok(())
}

/// Puts something in the place of the file.
type Put = Box<dyn Fn() -> Result<()>>;

/// What takes the place of the file, and why it is not used.
fn bad_files(at: &Path, beside: &Path) -> Result<Vec<(&'static str, Put)>> {
    let file = at.to_owned();
    let target = beside.to_owned();
    let with = move |content: Vec<u8>| {
        let file = file.clone();
        move || Ok(fs::write(&file, &content)?)
    };
    let good = fs::read(at)?;
    let mut changed = good.clone();
    changed[60] ^= 1;
    let file = at.to_owned();
    let place = file.clone();
    let link = move || Ok(symlink(&target, &place)?);
    let place = file.clone();
    let fifo = move || {
        let status = std::process::Command::new("mkfifo").arg(&place).status()?;
        assert!(status.success());
        Ok(())
    };
    let place = file.clone();
    let huge = move || Ok(fs::File::create(&place)?.set_len(1 << 40)?);
    let for_others = move || {
        fs::write(&file, &good)?;
        Ok(fs::set_permissions(&file, Permissions::from_mode(0o666))?)
    };
    let cut = fs::read(at)?[..50].to_vec();
    Ok(vec![
        ("it is damaged", Box::new(with(changed))),
        ("it is damaged", Box::new(with(cut))),
        (
            "not a file of this version",
            Box::new(with(b"hello".to_vec())),
        ),
        ("not a file of this version", Box::new(with(Vec::new()))),
        ("it is a symbolic link", Box::new(link)),
        ("it is not a regular file", Box::new(fifo)),
        ("it is too large", Box::new(huge)),
        ("others can write it", Box::new(for_others)),
    ])
}

/// The run that finds it works all the same, and no socket is older than without a history.
fn a_file_that_cannot_be_used_is_replaced() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 1)?;
    leak.app().set_option(&leak.app_fds(), KEEPALIVE)?;
    let history = directory()?;
    let file = history.path().join("history");
    with_history(&lab, history.path(), "")?.exits(0);
    let beside = history.path().join("beside");
    fs::write(&beside, "untouched")?;
    for (why, place) in bad_files(&file, &beside)? {
        fs::remove_file(&file)?;
        place()?;
        let ran = with_history(&lab, history.path(), "--json")?.exits(0);
        assert!(ran.stderr.contains(why), "{why}: {ran:?}");
        assert_eq!(at(&ran.sockets()[0], "/age_source"), "kernel", "{why}");
        let ran = with_history(&lab, history.path(), "--json")?.exits(0);
        assert_eq!(ran.stderr, "", "{why}");
    }
    assert_eq!(fs::read_to_string(beside)?, "untouched");
    Ok(())
}

fn a_file_that_cannot_be_written_is_a_note() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 2)?;
    let history = directory()?;
    let mounted = history.path().display();
    for (prepare, why) in [
        ("mount -o remount,ro,size=64k", "Read-only file system"),
        (
            "head -c 65536 /dev/zero >$M/full; :",
            "No space left on device",
        ),
        ("mkdir $M/history; :", "it is not a regular file"),
    ] {
        let script = format!(
            "export M={mounted}; mount -t tmpfs -o size=64k,mode=0700 none $M && {{ {prepare} $M; {CWKILL} -n --json; }}"
        );
        let command = lab
            .app_host()
            .command("unshare")
            .env(HISTORY, history.path());
        let ran = ran(command.args(["--mount", "sh", "-c", &script]))?;
        assert!(ran.stderr.contains(why), "{why}: {ran:?}");
        assert!(ran.stderr.contains("cannot write the history"), "{ran:?}");
        assert_eq!(at(&ran.json(), "/summary/matched"), "2", "{ran:?}");
    }
    Ok(())
}

/// Another run holds the lock for longer than a run waits.
fn a_locked_file_is_read_and_its_writer_gives_up() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 2)?;
    let history = directory()?;
    with_history(&lab, history.path(), "")?.exits(0);
    let written = fs::read(history.path().join("history"))?;
    let directory = fs::File::open(history.path())?;
    directory.lock()?;
    let ran = with_history(&lab, history.path(), "--json")?.exits(0);
    assert_eq!(at(&ran.json(), "/summary/matched"), "2", "{ran:?}");
    assert!(!ran.stderr.contains("cannot read the history"), "{ran:?}");
    ran.complains("another run of cwkill has kept it locked")
        .complains("ages in later runs may be too small");
    assert_eq!(fs::read(history.path().join("history"))?, written);
    drop(directory);
    let ran = with_history(&lab, history.path(), "")?.exits(0);
    assert!(!ran.stderr.contains("history"), "{ran:?}");
    Ok(())
}

fn a_directory_of_others_is_not_used() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let history = directory()?;
    with_history(&lab, history.path(), "")?.exits(0);
    fs::set_permissions(history.path(), Permissions::from_mode(0o777))?;
    with_history(&lab, history.path(), "")?.complains("others can write the directory");
    fs::set_permissions(history.path(), Permissions::from_mode(0o755))?;
    with_history(&lab, history.path(), "")?.exits(0);
    std::os::unix::fs::chown(history.path().join("history"), Some(NOBODY), None)?;
    with_history(&lab, history.path(), "")?.complains("it belongs to another user");
    std::os::unix::fs::chown(history.path(), Some(NOBODY), None)?;
    with_history(&lab, history.path(), "")?.complains("the directory belongs to another user");
    Ok(())
}

/// The overflow user.
const NOBODY: u32 = 65534;

/// A user who was granted capabilities must not read or write with them what is root's.
fn capabilities_do_not_open_the_file() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let history = directory()?;
    with_history(&lab, history.path(), "")?.exits(0);
    fs::set_permissions(history.path(), Permissions::from_mode(0o700))?;
    let before = fs::read(history.path().join("history"))?;
    let granted = [
        Capability::CAP_DAC_READ_SEARCH,
        Capability::CAP_DAC_OVERRIDE,
        Capability::CAP_FOWNER,
    ];
    let command = lab.app_host().command(CWKILL).env(HISTORY, history.path());
    let ran = ran(command.uid(NOBODY).capabilities(&granted))?;
    assert!(ran.stderr.contains("Permission denied"), "{ran:?}");
    assert_eq!(fs::read(history.path().join("history"))?, before);
    Ok(())
}

/// Each sees other sockets.
fn runs_at_once_lose_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let ports: Vec<u16> = (8001..8009).collect();
    let start = |port: &u16| lab.start("drained", Family::V4, alone(*port, 3));
    let leaks: Vec<_> = ports.iter().map(start).collect::<Result<_>>()?;
    for leak in &leaks {
        leak.app().set_option(&leak.app_fds(), KEEPALIVE)?;
    }
    let history = directory()?;
    let command = |port: &u16| {
        let command = lab.app_host().command(CWKILL).env(HISTORY, history.path());
        command.args(["-n", "--json", "--port", &port.to_string()])
    };
    std::thread::scope(|scope| {
        let runs: Vec<_> = ports
            .iter()
            .map(|port| scope.spawn(|| ran(command(port))))
            .collect();
        for run in runs {
            run.join().expect("no panic")?.exits(0);
        }
        anyhow::Ok(())
    })?;
    lab.wait_for(PATIENCE, || {
        let all = with_history(&lab, history.path(), "-n --json --min-age 3s")?;
        Ok(all.sockets().len() == 24)
    })
}

/// A process that ends with the test.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A proxy with keepalive at both sides, as people run it, only with a shorter interval.
const HAPROXY: &str = "
defaults
  mode tcp
  option tcpka
  timeout connect 1h
  timeout client 1h
  timeout server 1h
frontend front
  bind :::8888 v4v6
  clitcpka-idle 1s
  clitcpka-intvl 1s
  default_backend back
backend back
  server one 127.0.0.1:9000
";

/// Through the proxy: the descriptor of the client, and that of the server.
fn through_proxy(
    lab: &Lab,
    client: &Agent,
    to: SocketAddr,
    server: (&Agent, Fd),
) -> Result<[Endpoint; 2]> {
    let mut ends = Vec::new();
    lab.wait_for(PATIENCE, || {
        ends = client
            .connect(to, 1, Dial::default(), PATIENCE)
            .unwrap_or_default();
        Ok(!ends.is_empty())
    })?;
    let (server, listener) = server;
    let accepted = server.accept(listener, 1, PATIENCE)?;
    // haproxy aborts if the client sends FIN before haproxy has a connection to the server.
    client.send(&[ends[0].fd], b"request")?;
    let got = server.recv(accepted[0].fd, 100, PATIENCE)?;
    assert_eq!(got, Recv::Data(b"request".to_vec()));
    Ok([ends[0], accepted[0]])
}

fn a_leak_of_haproxy_is_seen_and_a_download_through_it_is_not_touched(
    family: Family,
) -> Result<()> {
    // Only for its link and its peer's host.
    let (lab, link) = lab("established", family, 1)?;
    let host = lab.app_host();
    let server = host.agent("server")?;
    let listener = server.listen("127.0.0.1:9000".parse()?, false, 16)?;
    let directory = directory()?;
    let config = directory.path().join("haproxy.cfg");
    fs::write(&config, HAPROXY)?;
    let proxy = host.command("haproxy").arg("-db").arg("-f").arg(&config);
    let _proxy = Running(proxy.stderr(std::process::Stdio::null()).spawn()?);
    let client = link.pair().peer_host.agent("client")?;
    let mut address = link.pair().app_address;
    address.set_port(8888);

    let [stuck, _] = through_proxy(&lab, &client, address, (&server, listener))?;
    client.shutdown(&[stuck.fd], How::Write)?;
    let [download, source] = through_proxy(&lab, &client, address, (&server, listener))?;
    server.start_sending(&[source.fd], Duration::from_millis(20))?;
    client.shutdown(&[download.fd], How::Write)?;

    let line = "--port 8888 --json";
    lab.wait_for(PATIENCE, || {
        let idle = cwkill(&lab, &format!("-n {line} --min-idle 4s"))?;
        Ok(idle.code == Some(0))
    })?;
    // Its keepalive is answered each second, so that the kernel alone does not know its age.
    let all = cwkill(&lab, &format!("-n {line} --no-owners"))?
        .exits(0)
        .sockets();
    assert_eq!(all.len(), 2);
    lab.wait_for(PATIENCE, || {
        Ok(cwkill(&lab, &format!("-n {line} --min-age 4s"))?.code == Some(1))
    })?;
    let closed = cwkill(&lab, &format!("{line} --min-idle 4s"))?
        .exits(0)
        .json();
    assert_eq!(at(&closed, "/summary/in_use"), "1");
    assert_eq!(
        at(&closed, "/sockets/0/peer/port"),
        stuck.local.port().to_string()
    );
    assert_eq!(at(&closed, "/sockets/0/owners/0/comm"), "haproxy");
    for _ in 0..3 {
        let left = as_typed(&lab, line)?.exits(1).json();
        assert_eq!(at(&left, "/summary/in_use"), "1");
    }

    let sent = server.stop_sending()?;
    server.shutdown(&[source.fd], How::Write)?;
    let got = client.drain(&[download.fd], PATIENCE)?;
    assert_eq!(vec![got[0].bytes], sent);
    Ok(())
}
