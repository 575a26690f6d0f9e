//! `cwkill daemon`: what it serves, how it is told to go on or to end, and what does not stop it.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use netns_harness::{Family, HostCommand, How, Lab, Leak, TcpState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    CWKILL, PATIENCE, Ran, alone, as_typed, at, count, cwkill, in_state, lab, ran,
};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(stuck_sockets_have_their_series_until_they_are_gone),
    once!(dead_descriptors_and_their_owner_are_counted),
    once!(every_series_is_there_on_a_quiet_host),
    once!(one_sweep_is_reported_as_a_listing),
    once!(a_text_file_is_complete_at_any_time),
    once!(a_text_file_is_for_every_reader_and_has_no_names_of_others),
    once!(a_directory_that_cannot_be_written_is_named_with_its_place),
    once!(health_is_that_of_the_last_sweep),
    once!(scrapes_that_never_read_do_not_block_a_thousand_others),
    once!(an_address_in_use_is_an_error_before_anything_else),
    once!(a_second_daemon_refuses),
    once!(a_signal_ends_it_and_frees_its_place),
    once!(the_service_manager_hears_how_it_is),
    once!(the_watchdog_hears_of_a_daemon_that_waits),
    once!(the_socket_of_the_service_manager_is_used),
    once!(a_reload_takes_over_what_is_right_and_nothing_else),
    once!(a_wrong_configuration_is_named_with_its_line),
    once!(a_namespace_may_vanish_between_two_sweeps),
    once!(nothing_is_left_over_from_sweep_to_sweep),
    once!(promtool_accepts_the_metrics).needs(Need::Program("promtool")),
    once!(a_prometheus_answers_every_query_of_the_dashboard).needs(Need::Program("prometheus")),
];

/// Where the metrics are without a configuration, in the namespace of each lab.
const ADDRESS: &str = "127.0.0.1:9979";

/// The state directory, the configuration and the socket of a daemon.
pub struct Place(TempDir);

impl Place {
    /// With a configuration that listens on a Unix socket. A scrape over TCP would have sockets in the tables that are tested.
    pub fn new() -> Result<Self> {
        let place = Place(TempDir::new()?);
        place.configure(&format!("listen = \"unix:{}\"", place.path("socket")))?;
        Ok(place)
    }

    /// Writes the lines of the table `daemon`.
    pub fn configure(&self, lines: &str) -> Result<()> {
        let text = format!("[daemon]\n{lines}\n");
        Ok(std::fs::write(self.path("daemon.toml"), text)?)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// A daemon without a pause between its sweeps, unless the `arguments` say otherwise.
    pub fn command<'l>(&self, lab: &'l Lab, arguments: &str) -> HostCommand<'l> {
        let interval = match arguments.contains("--interval") {
            true => &[][..],
            false => &["--interval", "20ms"],
        };
        lab.app_host()
            .command(CWKILL)
            .args(["daemon", "--config", &self.path("daemon.toml")])
            .args(interval)
            .args(arguments.split_whitespace())
            .env("STATE_DIRECTORY", self.0.path())
    }
}

/// A daemon on the leaking host.
pub struct Daemon<'l> {
    pub lab: &'l Lab,
    child: Child,
    /// All that it has said.
    said: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    socket: String,
}

impl<'l> Daemon<'l> {
    /// Starts it, and waits for the end of its first sweep.
    pub fn start(lab: &'l Lab, place: &Place) -> Result<Self> {
        Self::start_with(lab, place, "")
    }

    pub fn start_with(lab: &'l Lab, place: &Place, arguments: &str) -> Result<Self> {
        let mut daemon = Self::spawn(lab, place, place.command(lab, arguments))?;
        daemon.wait_until("the first sweep has ended", |daemon| {
            Ok(daemon
                .get("/healthz")
                .is_ok_and(|answer| answer.status == 200))
        })?;
        Ok(daemon)
    }

    pub fn spawn(lab: &'l Lab, place: &Place, command: HostCommand<'_>) -> Result<Self> {
        Self::with_stdin(lab, place, command.stdin(Stdio::null()))
    }

    /// With the standard input of `command`.
    fn with_stdin(lab: &'l Lab, place: &Place, command: HostCommand<'_>) -> Result<Self> {
        let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let said = Arc::new(Mutex::new(String::new()));
        let stderr = child.stderr.take().context("no stderr")?;
        let into = Arc::clone(&said);
        Ok(Daemon {
            lab,
            child,
            said,
            reader: Some(std::thread::spawn(move || collect(stderr, &into))),
            socket: place.path("socket"),
        })
    }

    pub fn said(&self) -> String {
        self.said
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits for a state. `what` is for the message.
    pub fn wait_until(&mut self, what: &str, is_so: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let waited = self.lab.wait_for(PATIENCE, || {
            if let Ok(text) = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())) {
                ensure!(
                    !text.contains(") Z "),
                    "the daemon has ended: {}",
                    self.said()
                );
            }
            is_so(self)
        });
        waited.with_context(|| {
            let metrics = self
                .get("/metrics")
                .map_or_else(|error| error.to_string(), |it| it.body);
            format!("{what}; it said:\n{}\nmetrics:\n{metrics}", self.said())
        })
    }

    pub fn get(&self, path: &str) -> Result<Answer> {
        self.request(&format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n"))
    }

    fn connect(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    fn request(&self, text: &str) -> Result<Answer> {
        Answer::read(self.connect()?, text)
    }

    fn metrics(&self) -> Result<Metrics> {
        let answer = self.get("/metrics")?;
        ensure!(answer.status == 200, "{answer:?}");
        ensure!(
            answer.head.contains("text/plain; version=0.0.4"),
            "{}",
            answer.head
        );
        Ok(Metrics(answer.body))
    }

    /// Waits until a series has this value.
    fn wait_for(&mut self, series: &str, value: f64) -> Result<()> {
        self.wait_until(&format!("{series} is {value}"), |daemon| {
            Ok(daemon.metrics()?.value(series) == Some(value))
        })
    }

    /// Waits until this many more sweeps have ended.
    pub fn wait_for_sweeps(&mut self, more: f64) -> Result<()> {
        let before = self.metrics()?.sweeps();
        self.wait_until("sweeps go on", |daemon| {
            Ok(daemon.metrics()?.sweeps() >= before + more)
        })
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    /// Its effective capabilities, as bits.
    pub fn effective_capabilities(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        Ok(u64::from_str_radix(line.context("CapEff")?.trim(), 16)?)
    }

    /// Ends it by a signal. Returns what it has said.
    pub fn end(&mut self, signal: Signal) -> Result<(Option<i32>, String)> {
        self.signal(signal)?;
        let code = self.child.wait()?.code();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        Ok((code, self.said()))
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(stderr: ChildStderr, into: &Mutex<String>) {
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        let mut said = into.lock().unwrap_or_else(PoisonError::into_inner);
        said.push_str(&line);
        said.push('\n');
    }
}

/// An answer of the server.
#[derive(Debug)]
pub struct Answer {
    status: u16,
    head: String,
    pub body: String,
}

impl Answer {
    /// Sends a request, and reads until the other end closes.
    fn read(mut stream: impl Read + Write, request: &str) -> Result<Self> {
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok(Answer {
            status,
            head: head.to_owned(),
            body: body.to_owned(),
        })
    }

    /// Of a server on the leaking host.
    fn over_tcp(lab: &Lab, address: &str, request: &str) -> Result<Self> {
        let stream = lab.app_host().within(|| Ok(TcpStream::connect(address)?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Answer::read(stream, request)
    }
}

/// The text of the metrics.
struct Metrics(String);

impl Metrics {
    fn value(&self, series: &str) -> Option<f64> {
        let mut lines = self.0.lines().filter_map(|line| line.rsplit_once(' '));
        lines.find(|(name, _)| *name == series)?.1.parse().ok()
    }

    /// The sum of all series of a metric.
    fn sum(&self, metric: &str) -> f64 {
        let lines = self.0.lines().filter_map(|line| line.rsplit_once(' '));
        let of_metric = lines.filter(|(name, _)| name.split('{').next() == Some(metric));
        of_metric
            .filter_map(|(_, value)| value.parse::<f64>().ok())
            .sum()
    }

    fn sweeps(&self) -> f64 {
        self.sum("cwkill_sweeps_total")
    }

    /// The labels of a metric whose owner has this name.
    fn owner(&self, metric: &str, process: &str) -> Option<f64> {
        let start = format!("{metric}{{process=\"{process}\",");
        let line = self.0.lines().find(|line| line.starts_with(&start))?;
        line.rsplit_once(' ')?.1.parse().ok()
    }
}

fn stuck_series(cause: &str) -> String {
    format!("cwkill_stuck_sockets{{cause=\"{cause}\",age=\"under-1m\"}}")
}

fn stuck_sockets_have_their_series_until_they_are_gone(family: Family) -> Result<()> {
    let (lab, unread) = lab("unread", family, 3)?;
    let drained = lab.start("drained", family, count(2))?;
    let _waiting = lab.start("not-accepted", family, alone(8081, 4))?;
    let _bystanders = lab.start("established", family, alone(8082, 2))?;
    let place = Place::new()?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_for(&stuck_series("unread"), 3.0)?;
    daemon.wait_for(&stuck_series("drained"), 2.0)?;
    daemon.wait_for(&stuck_series("not-accepted"), 4.0)?;
    let metrics = daemon.metrics()?;
    let app = unread.app().comm();
    assert_eq!(metrics.sum("cwkill_stuck_sockets"), 9.0);
    assert_eq!(metrics.sum("cwkill_owner_stuck_sockets"), 9.0);
    assert_eq!(metrics.owner("cwkill_owner_stuck_sockets", app), Some(9.0));
    let open = metrics.owner("cwkill_owner_open_descriptors", app);
    let limit = metrics.owner("cwkill_owner_max_descriptors", app);
    assert!(open > Some(5.0) && open < limit, "{open:?} of {limit:?}");
    // None of them has become stuck since the first sweep.
    assert_eq!(metrics.sum("cwkill_new_stuck_sockets_total"), 0.0);

    // Those of one leak end, and others come.
    let closed = drained.conns().iter().filter_map(|conn| conn.app_fd);
    drained.app().close(&closed.collect::<Vec<_>>())?;
    daemon.wait_for(&stuck_series("drained"), 0.0)?;
    daemon.wait_for("cwkill_ended_stuck_sockets_total{cause=\"drained\"}", 2.0)?;
    let _more = lab.start("unread", family, alone(8083, 5))?;
    daemon.wait_for(&stuck_series("unread"), 8.0)?;
    daemon.wait_for("cwkill_new_stuck_sockets_total{cause=\"unread\"}", 5.0)?;
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 12, "it only looks");
    Ok(())
}

/// A connection that was aborted leaves its descriptor, and is in no table.
fn dead_descriptors_and_their_owner_are_counted() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 3)?;
    let place = Place::new()?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_for(&stuck_series("drained"), 3.0)?;
    cwkill(&lab, "--all --method destroy --allow-spin")?.exits(0);
    let app = leak.app().comm();
    daemon.wait_until("three descriptors are dead", |daemon| {
        let metrics = daemon.metrics()?;
        let dead = metrics.value("cwkill_dead_descriptors{verdict=\"dead\"}");
        let of_owner = |name| metrics.owner(name, app);
        // A socket that dies between the two parts of a sweep is in both.
        Ok(dead == Some(3.0)
            && of_owner("cwkill_owner_dead_descriptors") == dead
            && of_owner("cwkill_owner_stuck_sockets") == Some(0.0))
    })
}

fn every_series_is_there_on_a_quiet_host() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    let daemon = Daemon::start(&lab, &place)?;
    let metrics = daemon.metrics()?;
    for cause in ["not-accepted", "unread", "drained", "sending"] {
        assert_eq!(metrics.value(&stuck_series(cause)), Some(0.0));
        for counter in ["new", "ended"] {
            let series = format!("cwkill_{counter}_stuck_sockets_total{{cause=\"{cause}\"}}");
            assert_eq!(metrics.value(&series), Some(0.0), "{series}");
        }
    }
    for result in ["complete", "partial", "failed"] {
        let series = format!("cwkill_sweeps_total{{result=\"{result}\"}}");
        assert!(metrics.value(&series).is_some(), "{series}");
    }
    assert_eq!(metrics.value("cwkill_sweep_interval_seconds"), Some(0.02));
    assert_eq!(metrics.value("cwkill_namespaces"), Some(1.0));
    // At least the one that the tests run in is not that of the lab.
    let left_out = metrics.value("cwkill_namespaces_not_looked_into");
    assert!(left_out >= Some(1.0), "{left_out:?}");
    let at = metrics.value("cwkill_sweep_last_success_timestamp_seconds");
    let now = std::time::UNIX_EPOCH.elapsed()?.as_secs_f64();
    assert!(at.is_some_and(|at| at <= now && at > now - PATIENCE.as_secs_f64()));
    Ok(())
}

fn one_sweep_is_reported_as_a_listing() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 3)?;
    let directory = TempDir::new()?;
    let line = format!("daemon --once --textfile {}", directory.path().display());
    let once = cwkill(&lab, &line)?.exits(0);
    let listing = as_typed(&lab, "")?.exits(0);
    let rows = rows(&once.stdout);
    assert_eq!((rows.len(), &rows), (3, &self::rows(&listing.stdout)));
    assert!(
        once.stdout.contains("3 sockets stuck: 3 unread"),
        "{once:?}"
    );
    let text = std::fs::read_to_string(directory.path().join("cwkill.prom"))?;
    assert_eq!(Metrics(text).value(&stuck_series("unread")), Some(3.0));
    leak.app().kill()?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 0))?;
    cwkill(&lab, "daemon --once")?.exits(1);
    Ok(())
}

/// The rows of the application in a table, without what changes from one second to the next.
fn rows(table: &str) -> Vec<Vec<&str>> {
    let rows = table.lines().filter(|line| line.starts_with("leaky-app/"));
    let varies = |word: &str| {
        let is_age = word.ends_with('s') && word.starts_with(|c: char| c.is_ascii_digit());
        is_age || word == "(in" || word == "use)"
    };
    rows.map(|row| {
        row.split_whitespace()
            .filter(|word| !varies(word))
            .collect()
    })
    .collect()
}

fn a_text_file_is_complete_at_any_time() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let parent = TempDir::new()?;
    let directory = parent.path().join("metrics");
    std::fs::create_dir(&directory)?;
    let arguments = format!("--textfile {}", directory.display());
    let place = Place::new()?;
    let mut daemon = Daemon::start_with(&lab, &place, &arguments)?;
    let path = directory.join("cwkill.prom");
    let mut lengths = Vec::new();
    let before = daemon.metrics()?.sweeps();
    while daemon.metrics()?.sweeps() < before + 10.0 {
        let text = std::fs::read_to_string(&path)?;
        assert!(text.ends_with('\n'), "{text}");
        assert_eq!(
            Metrics(text.clone()).value(&stuck_series("unread")),
            Some(2.0)
        );
        // The series of other tests' processes and namespaces come and go, the kinds of series do not.
        lengths.push(
            text.lines()
                .filter(|line| line.starts_with("# TYPE "))
                .count(),
        );
    }
    assert!(
        lengths.windows(2).all(|pair| pair[0] == pair[1]),
        "{lengths:?}"
    );
    // A directory that is gone does not end the sweeps, and is said once. It goes at one instant: the daemon writes there again and again.
    std::fs::rename(&directory, parent.path().join("gone"))?;
    daemon.wait_until("it says that it cannot write", |daemon| {
        Ok(daemon.said().contains("cannot write"))
    })?;
    daemon.wait_for_sweeps(2.0)?;
    std::fs::create_dir(&directory)?;
    daemon.wait_until("it says that it writes", |daemon| {
        Ok(daemon.said().contains("is written again"))
    })?;
    assert_eq!(daemon.said().matches("cannot write").count(), 1);
    std::fs::rename(&directory, parent.path().join("gone again"))?;
    let missing = directory.display().to_string();
    cwkill(&lab, &format!("daemon --once --textfile {missing}"))?
        .exits(2)
        .complains(&missing);
    place.configure(&format!("textfile = \"{missing}\""))?;
    ran(place.command(&lab, ""))?
        .exits(2)
        .complains("daemon.toml:2:12: `textfile`");
    Ok(())
}

/// The unit of the package has this umask.
fn a_text_file_is_for_every_reader_and_has_no_names_of_others() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let directory = TempDir::new()?;
    let script = format!(
        "umask 077; exec {CWKILL} daemon --once --textfile {}",
        directory.path().display()
    );
    let command = lab.app_host().command("sh").args(["-c", &script]);
    ran(command)?.exits(0);
    let path = directory.path().join("cwkill.prom");
    let mode = std::fs::metadata(&path)?.permissions().mode() & 0o777;
    assert_eq!(mode, 0o644, "{mode:o}");
    let text = std::fs::read_to_string(&path)?;
    let begins = |name: &str| text.lines().any(|line| line.starts_with(name));
    assert!(begins("cwkill_sweep_last_success_timestamp_seconds "));
    assert!(!begins("process_") && !begins("cwkill_sweep_interval_seconds "));
    Ok(())
}

/// Not even root writes there: the daemon has given up the right to ignore the mode.
fn a_directory_that_cannot_be_written_is_named_with_its_place() -> Result<()> {
    let lab = Lab::new()?;
    let (place, directory) = (Place::new()?, TempDir::new()?);
    let read_only = std::fs::Permissions::from_mode(0o555);
    std::fs::set_permissions(directory.path(), read_only)?;
    let path = directory.path().display();
    ran(place.command(&lab, &format!("--textfile {path}")))?
        .exits(2)
        .complains(&format!("--textfile {path}: Permission denied"))
        .complains("ReadWritePaths=");
    place.configure(&format!("textfile = \"{path}\""))?;
    ran(place.command(&lab, ""))?
        .exits(2)
        .complains("daemon.toml:2:12: `textfile`")
        .complains("ReadWritePaths=");
    Ok(())
}

fn health_is_that_of_the_last_sweep() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_for_sweeps(1.0)?;
    for (request_line, status) in [
        ("GET /healthz", 200),
        ("HEAD /metrics", 200),
        ("GET /", 404),
        ("GET /-/reload", 404),
        ("POST /metrics", 405),
        ("PUT /healthz", 405),
        ("DELETE /", 405),
    ] {
        let answer = daemon.request(&format!("{request_line} HTTP/1.1\r\n\r\n"))?;
        assert_eq!(answer.status, status, "{request_line}: {answer:?}");
        assert_eq!(answer.body.is_empty(), request_line.starts_with("HEAD"));
    }
    Ok(())
}

fn scrapes_that_never_read_do_not_block_a_thousand_others() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    let mut daemon = Daemon::start(&lab, &place)?;
    let mut silent = Vec::new();
    for number in 0..200 {
        let mut stream = daemon.connect()?;
        if number % 2 == 0 {
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
        }
        silent.push(stream);
    }
    daemon.wait_for_sweeps(3.0)?;
    let until = Instant::now() + 2 * PATIENCE;
    // On a busy machine a client may be so slow to ask that the daemon closes its connection to make room for others.
    let scrape = || loop {
        match daemon.get("/metrics") {
            Err(_) if Instant::now() < until => {}
            other => break other,
        }
    };
    let answers: Vec<Result<Answer>> = std::thread::scope(|scope| {
        let scrapes: Vec<_> = (0..1000).map(|_| scope.spawn(scrape)).collect();
        let join = |scrape: std::thread::ScopedJoinHandle<'_, _>| scrape.join().expect("no panic");
        scrapes.into_iter().map(join).collect()
    });
    for answer in answers {
        assert_eq!(answer?.status, 200);
    }
    Ok(())
}

fn an_address_in_use_is_an_error_before_anything_else() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let _taken = lab
        .app_host()
        .within(|| Ok(std::net::TcpListener::bind(ADDRESS)?))?;
    let (place, textfile) = (Place::new()?, TempDir::new()?);
    // The default.
    place.configure("")?;
    let line = format!("--textfile {}", textfile.path().display());
    ran(place.command(&lab, &line))?.exits(3).complains(ADDRESS);
    let files = std::fs::read_dir(textfile.path())?.count();
    assert_eq!(files, 0, "it has swept");
    Ok(())
}

fn a_second_daemon_refuses() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    let mut first = Daemon::start(&lab, &place)?;
    let other = Lab::new()?;
    let pid = first.child.id().to_string();
    ran(place.command(&other, ""))?.exits(3).complains(&pid);
    // The lock ends with the process, however it ends, and the file of its socket is in nobody's way.
    first.end(Signal::SIGKILL)?;
    Daemon::start(&lab, &place)?;
    Ok(())
}

fn a_signal_ends_it_and_frees_its_place() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    // The last one waits for a sweep that is far away.
    for (signal, arguments) in [
        (Signal::SIGTERM, ""),
        (Signal::SIGINT, ""),
        (Signal::SIGTERM, "--interval 1h"),
    ] {
        let mut daemon = Daemon::start_with(&lab, &place, arguments)?;
        let (code, said) = daemon.end(signal)?;
        assert_eq!(code, Some(0), "{signal}: {said}");
        assert!(!std::path::Path::new(&place.path("socket")).exists());
    }
    Ok(())
}

/// The socket on which the service manager listens.
struct Manager(UnixDatagram);

impl Manager {
    fn at(path: &str) -> Result<Self> {
        let socket = UnixDatagram::bind(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Manager(socket))
    }

    fn next(&self) -> Result<String> {
        let mut buffer = [0; 4096];
        let length = loop {
            match self.0.recv(&mut buffer) {
                // A signal of another test of this process.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other.context("no message")?,
            }
        };
        Ok(String::from_utf8(buffer[..length].to_vec())?)
    }

    /// Reads until a message begins so.
    fn until(&self, start: &str) -> Result<String> {
        loop {
            let message = self.next()?;
            if message.starts_with(start) {
                return Ok(message);
            }
        }
    }
}

fn the_service_manager_hears_how_it_is() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let place = Place::new()?;
    let manager = Manager::at(&place.path("notify"))?;
    let command = place
        .command(&lab, "")
        .env("NOTIFY_SOCKET", place.path("notify"))
        .env("WATCHDOG_USEC", "1000000");
    let mut daemon = Daemon::spawn(&lab, &place, command)?;
    let first = manager.next()?;
    assert!(
        first.starts_with("READY=1\nSTATUS=2 stuck sockets"),
        "{first}"
    );
    // The first sweep was over by then.
    assert_eq!(daemon.metrics()?.sum("cwkill_stuck_sockets"), 2.0);
    assert_eq!(manager.next()?, "WATCHDOG=1");
    leak.app().kill()?;
    manager.until("STATUS=no stuck socket")?;
    daemon.signal(Signal::SIGHUP)?;
    let reloading = manager.until("RELOADING=1")?;
    let at = reloading
        .split_once("MONOTONIC_USEC=")
        .context("no time")?
        .1;
    assert!(at.parse::<u64>()? > 0);
    let ready = manager.next()?;
    assert!(ready.starts_with("READY=1\nSTATUS="), "{ready}");
    assert!(!ready.contains("refused"), "{ready}");
    // systemctl(1) reports a reload as done, whatever comes of it.
    place.configure("listen = 7")?;
    daemon.signal(Signal::SIGHUP)?;
    manager.until("RELOADING=1")?;
    for start in ["READY=1\nSTATUS=", "STATUS="] {
        let status = manager.until(start)?;
        assert!(
            status.ends_with("; the last reload was refused"),
            "{status}"
        );
    }
    daemon.signal(Signal::SIGTERM)?;
    manager.until("STOPPING=1")?;
    assert_eq!(daemon.child.wait()?.code(), Some(0));
    Ok(())
}

/// With a long interval: while nothing is swept, the watchdog is told all the same.
fn the_watchdog_hears_of_a_daemon_that_waits() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    let manager = Manager::at(&place.path("notify"))?;
    let command = place
        .command(&lab, "--interval 1h")
        .env("NOTIFY_SOCKET", place.path("notify"))
        .env("WATCHDOG_USEC", "20000");
    let daemon = Daemon::spawn(&lab, &place, command)?;
    manager.until("READY=1")?;
    for _ in 0..20 {
        assert_eq!(manager.next()?, "WATCHDOG=1");
    }
    assert_eq!(daemon.metrics()?.sweeps(), 1.0);
    Ok(())
}

fn the_socket_of_the_service_manager_is_used() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    let socket = UnixListener::bind(place.path("socket"))?;
    place.configure("listen = \"systemd\"")?;
    let file = place.path("daemon.toml");
    // The number of the process stays the same over exec.
    let script = format!(
        "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec {CWKILL} daemon --config {file} --interval 20ms"
    );
    let command = lab
        .app_host()
        .command("sh")
        .args(["-c", &script])
        .env("STATE_DIRECTORY", place.path(""))
        .stdin(std::os::fd::OwnedFd::from(socket));
    let mut daemon = Daemon::with_stdin(&lab, &place, command)?;
    daemon.wait_until("it serves", |daemon| Ok(daemon.metrics().is_ok()))?;
    assert_eq!(daemon.end(Signal::SIGTERM)?.0, Some(0));
    // It is the manager's.
    assert!(std::path::Path::new(&place.path("socket")).exists());
    ran(place.command(&lab, ""))?
        .exits(3)
        .complains(".socket unit");
    Ok(())
}

/// Parses the whole configuration before anything changes.
fn a_reload_takes_over_what_is_right_and_nothing_else() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let place = Place::new()?;
    let mut daemon = Daemon::start(&lab, &place)?;
    let (old, new) = (daemon.socket.clone(), place.path("other"));
    let current = "cwkill_configuration_last_reload_successful";
    let reloads = |result| format!("cwkill_configuration_reloads_total{{result=\"{result}\"}}");
    for (number, (lines, why)) in [
        ("listen = 7", "daemon.toml:2:"),
        ("lisen = \"none\"", "listen"),
        (
            "interval = \"10s\"\nlisten = \"unix:/nowhere/socket\"",
            "/nowhere",
        ),
        ("textfile = \"/nowhere\"", "/nowhere"),
        ("all_netns = true", "restart"),
        ("[[policy]]\nname = \"x\"\nmode = \"act\"", ""),
    ]
    .into_iter()
    .enumerate()
    {
        place.configure(lines)?;
        daemon.signal(Signal::SIGHUP)?;
        daemon.wait_for(&reloads("failure"), number as f64 + 1.0)?;
        assert_eq!(daemon.metrics()?.value(current), Some(0.0));
        // What it has said arrives by another thread of this test.
        daemon.wait_until(why, |daemon| Ok(daemon.said().contains(why)))?;
        daemon.wait_for_sweeps(2.0)?;
        assert_eq!(
            daemon.metrics()?.value("cwkill_sweep_interval_seconds"),
            Some(0.02)
        );
    }
    place.configure(&format!("listen = \"unix:{new}\""))?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_until("the old socket is gone", |_| {
        Ok(!std::path::Path::new(&old).exists())
    })?;
    daemon.socket = new;
    daemon.wait_for(current, 1.0)?;
    daemon.wait_for(&reloads("success"), 1.0)?;
    assert_eq!(daemon.metrics()?.sum("cwkill_stuck_sockets"), 2.0);
    daemon.wait_for_sweeps(2.0)
}

fn a_wrong_configuration_is_named_with_its_line() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    let check = |lines: &str| {
        place.configure(lines)?;
        ran(place.command(&lab, "--check-config"))
    };
    let right = check("interval = \"10s\"\nlisten = \"none\"")?.exits(0);
    assert!(right.stdout.contains("serves no metrics"), "{right:?}");
    check("interval = \"10\"")?
        .exits(2)
        .complains("daemon.toml:2:12");
    // The same error as that of a start.
    ran(place.command(&lab, ""))?
        .exits(2)
        .complains("daemon.toml:2:12");
    ran(place.command(&lab, "--once"))?
        .exits(2)
        .complains("daemon.toml:2:12");
    Ok(())
}

fn a_namespace_may_vanish_between_two_sweeps() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let place = Place::new()?;
    place.configure(&format!(
        "all_netns = true\nlisten = \"unix:{}\"",
        place.path("socket")
    ))?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_for_sweeps(1.0)?;
    assert!(daemon.metrics()?.value("cwkill_namespaces") > Some(1.0));
    // Each sweep reads the namespaces of all other tests too.
    for _ in 0..2 {
        let other = Lab::new()?;
        let _leak: Leak = other.start("unread", Family::V4, count(2))?;
        daemon.wait_for_sweeps(1.0)?;
        drop(other);
        daemon.wait_for_sweeps(1.0)?;
    }
    assert_eq!(
        daemon
            .metrics()?
            .value("cwkill_sweeps_total{result=\"failed\"}"),
        Some(0.0)
    );
    Ok(())
}

/// After a sweep as many descriptors and threads are left as after the one before, also with scrapes and sockets that come and go.
fn nothing_is_left_over_from_sweep_to_sweep() -> Result<()> {
    let (lab, leak) = lab("established", Family::V4, 20)?;
    let place = Place::new()?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_for_sweeps(5.0)?;
    let before = daemon.metrics()?;
    for conn in leak.conns() {
        leak.peer()
            .shutdown(&[conn.peer_fd.context("no peer")?], How::Write)?;
        daemon.wait_for_sweeps(5.0)?;
    }
    daemon.wait_for("cwkill_new_stuck_sockets_total{cause=\"unread\"}", 20.0)?;
    let after = daemon.metrics()?;
    assert!(after.sweeps() >= before.sweeps() + 100.0);
    for series in ["process_threads", "process_open_fds"] {
        let (before, after) = (before.value(series), after.value(series));
        // A scrape has a descriptor while it is answered.
        assert!(
            before.is_some() && after <= before.map(|it| it + 3.0),
            "{series}: {before:?}, {after:?}"
        );
    }
    let (code, said) = daemon.end(Signal::SIGTERM)?;
    assert_eq!(code, Some(0), "{said}");
    Ok(())
}

fn promtool_accepts_the_metrics() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let place = Place::new()?;
    let daemon = Daemon::start(&lab, &place)?;
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let text = daemon.metrics()?.0;
    promtool
        .stdin
        .take()
        .context("no stdin")?
        .write_all(text.as_bytes())?;
    let ran = Ran::of("promtool check metrics", promtool.wait_with_output()?)?.exits(0);
    assert_eq!(ran.stdout + &ran.stderr, "");
    Ok(())
}

/// A Prometheus on the leaking host, which scrapes the daemon and evaluates the rules.
struct Prometheus<'l> {
    lab: &'l Lab,
    child: Child,
    _place: TempDir,
}

/// Its address, in the namespace of each lab.
const PROMETHEUS: &str = "127.0.0.1:9990";

impl<'l> Prometheus<'l> {
    fn start(lab: &'l Lab) -> Result<Self> {
        let place = TempDir::new()?;
        let rules = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/packaging/prometheus/cwkill.rules.yml"
        );
        let config = format!(
            "global: {{scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 500ms}}\n\
             rule_files: [{rules:?}]\n\
             scrape_configs: [{{job_name: cwkill, static_configs: [{{targets: ['{ADDRESS}']}}]}}]\n"
        );
        let (file, data) = (
            place.path().join("prometheus.yml"),
            place.path().join("data"),
        );
        std::fs::write(&file, config)?;
        let child = lab
            .app_host()
            .command("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", data.display()))
            .arg(format!("--web.listen-address={PROMETHEUS}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Prometheus {
            lab,
            child,
            _place: place,
        })
    }

    /// The `data` of an answer of its API; `None` before it serves.
    fn api(&self, path: &str) -> Option<Value> {
        let text = format!("GET /api/v1/{path} HTTP/1.0\r\n\r\n");
        let answer = Answer::over_tcp(self.lab, PROMETHEUS, &text).ok()?;
        let mut document: Value = serde_json::from_str(&answer.body).ok()?;
        Some(document["data"].take())
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every query of the dashboard, with its variables filled in.
fn queries() -> Result<Vec<String>> {
    let text = crate::cli::document("packaging/grafana/cwkill.json")?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let panels = dashboard["panels"].as_array().context("panels")?;
    let targets = panels
        .iter()
        .filter_map(|panel| panel["targets"].as_array());
    let queries = targets.flatten().map(|target| at(target, "/expr"));
    let filled = queries.map(|query| {
        query
            .replace("$instance", ".*")
            .replace("$__rate_interval", "5s")
    });
    Ok(filled.collect())
}

fn encoded(query: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    query.bytes().map(byte).collect()
}

fn a_prometheus_answers_every_query_of_the_dashboard() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let place = Place::new()?;
    // With a policy, whose end is far away.
    place.configure(&format!(
        "listen = \"{ADDRESS}\"\n[[policy]]\nname = \"web\"\nmatch = {{ port = 8080 }}\nexpires = 2100-01-01\n"
    ))?;
    let mut daemon = Daemon::spawn(&lab, &place, place.command(&lab, ""))?;
    let prometheus = Prometheus::start(&lab)?;
    let queries = queries()?;
    assert!(queries.len() > 25, "{queries:?}");
    for query in queries {
        // A rate needs two scrapes.
        daemon.wait_until(&query, |_| {
            let path = format!("query?query={}", encoded(&query));
            let data = prometheus.api(&path).unwrap_or_default();
            let is_number = |sample: &Value| {
                at(sample, "/value/1")
                    .parse::<f64>()
                    .is_ok_and(f64::is_finite)
            };
            let samples = data["result"].as_array();
            Ok(samples.is_some_and(|all| !all.is_empty() && all.iter().all(is_number)))
        })?;
    }
    // Every rule can be evaluated, and two sockets are no reason for an alert.
    daemon.wait_until("the rules are evaluated", |_| {
        let rules = prometheus.api("rules").unwrap_or_default();
        let rules = rules["groups"][0]["rules"].as_array().cloned();
        // On a busy machine a sweep or a scrape is late, and the rule for that waits whether it goes on.
        let is_fine = |rule: &Value| {
            let state = at(rule, "/state");
            at(rule, "/health") == "ok" && (state == "inactive" || state == "pending")
        };
        Ok(rules.is_some_and(|rules| rules.len() == 12 && rules.iter().all(is_fine)))
    })
}
