//! `cwkill daemon`: sweeps at intervals, and serves the numbers.
//!
//! `settings` reads the configuration, `sweep` is one sweep, `policies` decides by it, `act` closes, `once` is a single sweep without a daemon,
//! `own` says what the daemon itself uses.

mod act;
mod once;
mod own;
mod policies;
mod settings;
mod sweep;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, ensure};

use super::{drop_capabilities_and_start_threads, open_proc_for_long, say_notes};
use crate::bpf::KernelTypes;
use crate::cli::DaemonArgs;
use crate::config::Config;
use crate::daemon::alarm::{Alarm, Wake};
use crate::daemon::config::describe::MatchedNow;
use crate::daemon::config::{DaemonConfig, Mode};
use crate::daemon::http::{Published, Server};
use crate::daemon::listener::Listener;
use crate::daemon::lock::{self, DaemonLock};
use crate::daemon::metrics::{LastSweep, Metrics};
use crate::daemon::observation::{Changes, Known};
use crate::daemon::policy::state;
use crate::daemon::systemd::ServiceManager;
use crate::filter::selectors::Selectors;
use crate::finder::way::UseIterator;
use crate::history::History;
use crate::injector::way::ByIterator;
use crate::model::Method;
use crate::privileges::{Privileges, capabilities};
use crate::proc::ProcFs;
use crate::proc::since_boot;
use crate::report::ExitStatus;
use crate::sys;
use crate::terminal::{ignore_closed_reader, say, write_out};
use crate::text::{age, escape};
use policies::Policies;
use settings::Settings;
use sweep::{Sweep, Sweeper};

/// The exit status of wrong usage, and of a configuration that is wrong.
const WRONG: u8 = 2;

pub(super) fn run(args: &DaemonArgs) -> anyhow::Result<ExitCode> {
    let passed =
        sys::passed_descriptors().context("cannot use the socket of the service manager")?;
    let config = match settings::read(args) {
        Ok(config) => config,
        Err(error) => {
            say(format_args!("{error:#}"));
            return Ok(WRONG.into());
        }
    };
    if args.check_config {
        return check_config(args, config);
    }
    if let Some(name) = &args.reset {
        return order_reset(&config, name);
    }
    let settings = match Settings::of(args, config) {
        Ok(settings) => settings,
        Err(error) => {
            say(format_args!("{error:#}"));
            return Ok(WRONG.into());
        }
    };
    if args.once {
        return once::run(args, &settings).map(ExitCode::from);
    }
    let _lock = DaemonLock::take(&lock::directory())?;
    let has_socket = !passed.is_empty();
    let listener = Listener::open(&settings.listen, passed)?;
    let manager = ServiceManager::of_environment().unwrap_or_else(|error| {
        say(format_args!(
            "note: the service manager is not told how the daemon is: {error}"
        ));
        ServiceManager::default()
    });
    let alarm = Alarm::new().context("cannot handle signals")?;
    let sweeper = prepare(args, &settings)?;
    // With the privileges that are left.
    if let Err(error) = settings.try_textfile() {
        say(format_args!("{error:#}"));
        return Ok(WRONG.into());
    }
    let published = Arc::new(Published::default());
    let server = listener
        .map(|listener| Server::start(listener, Arc::clone(&published)))
        .transpose()
        .context("cannot start the server for metrics")?;
    let mut daemon = Daemon {
        args,
        policies: Policies::open(&settings.config, &lock::directory()),
        metrics: Metrics::new(settings.interval),
        settings,
        sweeper,
        server,
        has_socket,
        published,
        known: None,
        succeeded: None,
        failure: None,
        was_partial: false,
        unwritten: None,
    };
    daemon.say_start();
    daemon.run(&alarm, &manager)?;
    manager.stopping();
    Ok(ExitStatus::Done.into())
}

/// Opens what the sweeps need, drops the privileges that they do not, and starts the threads.
fn prepare(args: &DaemonArgs, settings: &Settings) -> anyhow::Result<Sweeper> {
    let privileges = Privileges::of_this_thread()?;
    let types = KernelTypes::default();
    let proc = open_proc_for_long(args.bpf, &settings.host_root, &Selectors::default(), &types)?;
    let config = Config::of_listing(settings.netns());
    let mut needed = capabilities::to_find(&settings.netns(), true, false);
    for policy in &settings.config.policies {
        let scope = policy.scope(settings.all_netns);
        // It looks by itself where its owners are.
        let follows = policy.follows_owners(config.selectors.states);
        needed.extend(capabilities::to_find(&scope, true, follows));
    }
    let destroyer = match settings.config.destroys() && privileges.net_admin {
        true => open_destroyer(args.bpf, &proc, &types),
        false => None,
    };
    if settings.config.acts() {
        // A reload may bring other methods.
        needed.extend(capabilities::to_act(&Method::ALL));
        needed.extend(capabilities::to_reclaim());
    }
    drop_capabilities_and_start_threads(&needed, Some(&proc));
    Ok(Sweeper {
        config,
        proc,
        privileges,
        destroyer,
        history: History::open(),
    })
}

/// The iterator that destroys sockets, if `use_iterator` and the host allow it. The host is no reason to end: it can allow the one that reads
/// owners, for which `use_iterator` is meant, and not this one.
fn open_destroyer(
    use_iterator: UseIterator,
    proc: &ProcFs,
    types: &KernelTypes,
) -> Option<ByIterator> {
    let chosen = ByIterator::choose(proc, use_iterator, types);
    if let Err(error) = &chosen
        && use_iterator == UseIterator::Always
    {
        say(format_args!(
            "note: sockets are destroyed by SOCK_DESTROY, because {error}"
        ));
    }
    chosen.ok()
}

/// Says what the configuration does, and how many sockets its policies match now.
///
/// # Errors
/// It cannot be written.
fn check_config(args: &DaemonArgs, mut config: DaemonConfig) -> anyhow::Result<ExitCode> {
    let matched = || -> anyhow::Result<Vec<Option<MatchedNow>>> {
        // The text file is not opened: a check changes nothing.
        let listing = DaemonConfig {
            textfile: None,
            ..config.clone()
        };
        let mut sweeper = prepare(args, &Settings::of(args, listing)?)?;
        let sweep = sweeper.sweep()?;
        Ok(policies::matched_now(
            &config,
            &sweep.scan,
            &sweep.proc,
            &sweeper,
        ))
    };
    let matched = match config.policies.is_empty() {
        true => Vec::new(),
        false => matched().unwrap_or_else(|error| {
            say(format_args!(
                "note: the sockets cannot be listed: {error:#}"
            ));
            Vec::new()
        }),
    };
    config.interval = args.interval.unwrap_or(config.interval);
    let lines = config.sentences(SystemTime::now(), &matched);
    let written = write_out(|out| lines.iter().try_for_each(|line| writeln!(out, "{line}")));
    ignore_closed_reader(written).context("cannot write what the configuration means")?;
    Ok(ExitCode::SUCCESS)
}

/// Orders the daemon that runs, or the next one, to close the breaker of a policy.
///
/// # Errors
/// The order cannot be written.
fn order_reset(config: &DaemonConfig, name: &str) -> anyhow::Result<ExitCode> {
    let names: Vec<&str> = config.policies.iter().map(|it| it.name.as_str()).collect();
    if !names.contains(&name) {
        let known = match names.is_empty() {
            true => "there is none".to_owned(),
            false => format!("they are {}", names.join(", ")),
        };
        say(format_args!(
            "there is no policy `{}`: {known}",
            escape(name)
        ));
        return Ok(WRONG.into());
    }
    let directory = lock::directory();
    state::order_reset(&directory, name).with_context(|| {
        format!(
            "cannot write the order to the state directory {}",
            directory.display()
        )
    })?;
    say(format_args!(
        "policy {name}: the daemon closes its circuit breaker at its next sweep, or when it starts"
    ));
    Ok(ExitCode::SUCCESS)
}

/// The state of the daemon between two sweeps.
struct Daemon<'a> {
    args: &'a DaemonArgs,
    settings: Settings,
    sweeper: Sweeper,
    policies: Policies,
    metrics: Metrics,
    server: Option<Server>,
    /// Whether the server has the socket of the service manager.
    has_socket: bool,
    published: Arc<Published>,
    /// The stuck sockets of the last sweep that did not fail.
    known: Option<Known>,
    /// When that sweep ended, as a time since boot.
    succeeded: Option<Duration>,
    /// Why the last sweep failed.
    failure: Option<String>,
    /// Whether the last sweep did not see everything.
    was_partial: bool,
    /// Why the text file could not be written the last time.
    unwritten: Option<String>,
}

impl Daemon<'_> {
    /// Sweeps until a signal ends it.
    ///
    /// # Errors
    /// The first sweep fails, the kernel refuses to wait, or the server has ended.
    fn run(&mut self, alarm: &Alarm, manager: &ServiceManager) -> anyhow::Result<()> {
        let mut is_first = true;
        loop {
            let began = since_boot();
            let status = match self.sweep(alarm) {
                Ok(status) => status,
                Err(error) if is_first => return Err(error).context("the first sweep failed"),
                Err(error) => self.fail(&error),
            };
            match is_first {
                true => manager.ready(&status),
                false => manager.status(&self.with_reload(&status)),
            }
            is_first = false;
            loop {
                manager.alive();
                let due = began + self.settings.interval;
                let wake = alarm.wait(due, manager.watchdog()).context("cannot wait")?;
                // A daemon without it looks alive, and answers nobody.
                ensure!(
                    !self.server.as_ref().is_some_and(Server::has_ended),
                    "the server for metrics has ended: a bug in cwkill"
                );
                match wake {
                    Wake::Due => {
                        // The time that it has waited is not that of the sweep.
                        manager.alive();
                        break;
                    }
                    Wake::Watchdog => {}
                    Wake::Reload => {
                        manager.reloading();
                        self.reload();
                        manager.ready(&self.with_reload(&status));
                    }
                    Wake::Stop => return Ok(()),
                }
            }
        }
    }

    /// The sentence about the last sweep, with the reload that systemctl(1) reports as done, also if it was refused.
    fn with_reload(&self, status: &str) -> String {
        match self.metrics.is_configuration_old {
            true => format!("{status}; the last reload was refused"),
            false => status.to_owned(),
        }
    }

    /// One sweep. Returns a sentence about it.
    fn sweep(&mut self, alarm: &Alarm) -> anyhow::Result<String> {
        let sweep = catch_unwind(AssertUnwindSafe(|| self.sweeper.sweep()));
        let sweep = sweep.unwrap_or_else(|_| Err(anyhow!("a bug in cwkill")))?;
        say_notes(self.sweeper.history.take_notes());
        self.say_changes(&sweep);
        let Sweep {
            scan,
            namespaces,
            observation,
            took,
            proc,
            ..
        } = sweep;
        let (known, changes) = match &self.known {
            Some(before) => before.next(&scan),
            None => (Known::first(&scan), Changes::default()),
        };
        self.known = Some(known);
        let (policies, sweeper) = (&mut self.policies, &self.sweeper);
        let decided = catch_unwind(AssertUnwindSafe(|| {
            policies.sweep(&scan, &proc, sweeper, alarm)
        }));
        let decided = decided.unwrap_or_else(|_| Some("the policies: a bug in cwkill".to_owned()));
        // Before the daemon counts what it holds itself.
        drop((scan, namespaces, proc));
        let mut sentence = observation.sentence();
        if let Some(decided) = decided {
            sentence = format!("{sentence}; {decided}");
        }
        self.succeeded = Some(since_boot());
        let last = LastSweep {
            observation,
            at: SystemTime::now(),
            took,
        };
        self.metrics.policies.clone_from(&self.policies.numbers);
        self.metrics.add(last, changes);
        self.publish();
        Ok(sentence)
    }

    /// Counts a sweep that failed. The numbers of the last one stay. Returns a sentence about it.
    fn fail(&mut self, error: &anyhow::Error) -> String {
        let sentence = format!("the sweep failed: {error:#}");
        if self.failure.as_ref() != Some(&sentence) {
            say(format_args!("{sentence}"));
        }
        self.failure = Some(sentence.clone());
        self.metrics.failed += 1;
        self.publish();
        sentence
    }

    fn publish(&mut self) {
        self.metrics.own = own::usage();
        let text = self.metrics.text();
        self.write_textfile();
        let interval = self.settings.interval;
        let took = self.metrics.last.as_ref().map(|last| last.took);
        self.published
            .set(text, self.succeeded, interval, took.unwrap_or_default());
    }

    /// Writes the text file. Says once that it cannot be written, and that it can be written again.
    fn write_textfile(&mut self) {
        let Some(textfile) = &self.settings.textfile else {
            self.unwritten = None;
            return;
        };
        let Some(text) = self.metrics.text_for_collector() else {
            return;
        };
        let path = textfile.path();
        let why = textfile.write(&text).err().map(|error| {
            let sentence = format!("cannot write {}: {error}", path.display());
            if self.unwritten.as_ref() != Some(&sentence) {
                say(format_args!("{sentence}"));
            }
            sentence
        });
        if self.unwritten.is_some() && why.is_none() {
            say(format_args!("{} is written again", path.display()));
        }
        self.unwritten = why;
    }

    /// Reads the configuration again. Of one that is wrong, or that cannot be used, nothing is taken over.
    fn reload(&mut self) {
        let taken = self.take_over();
        self.metrics.is_configuration_old = taken.is_err();
        match taken {
            Ok(()) => {
                self.metrics.reloads += 1;
                say(format_args!("the configuration was read again"));
                self.say_start();
            }
            Err(error) => {
                self.metrics.failed_reloads += 1;
                say(format_args!("the configuration stays as it was: {error:#}"));
            }
        }
        self.publish();
    }

    /// # Errors
    /// The configuration is wrong, or the daemon cannot do what it says. Nothing has changed then.
    fn take_over(&mut self) -> anyhow::Result<()> {
        let new = Settings::of(self.args, settings::read(self.args)?)?;
        self.settings.check_reload(&new)?;
        new.try_textfile()?;
        if new.listen != self.settings.listen && !self.has_socket {
            let listener = Listener::open(&new.listen, Vec::new())?;
            let start = |listener| Server::start(listener, Arc::clone(&self.published));
            let server = listener.map(start).transpose();
            self.server = server.context("cannot start the server for metrics")?;
        }
        self.metrics.interval = Some(new.interval);
        self.policies.configure(&new.config);
        self.settings = new;
        Ok(())
    }

    fn say_start(&self) {
        let scope = match self.settings.all_netns {
            true => "every network namespace",
            false => "this network namespace",
        };
        let interval = age(self.settings.interval);
        let at = match &self.server {
            Some(server) => format!("metrics at {}", server.name()),
            None => "no metrics are served".to_owned(),
        };
        let policies = &self.settings.config.policies;
        let acting: Vec<&str> = policies
            .iter()
            .filter(|policy| policy.mode == Mode::Act)
            .map(|policy| policy.name.as_str())
            .collect();
        let closed = match acting.is_empty() {
            true => format!("nothing is closed{}", settings::kept(&self.settings.config)),
            false => format!("sockets are closed by policy {}", acting.join(", ")),
        };
        say(format_args!(
            "watching {scope} every {interval}; {at}; {closed}"
        ));
    }

    /// Says what is different from the sweep before: that a sweep succeeds again, and that not everything can be seen.
    fn say_changes(&mut self, sweep: &Sweep) {
        if self.failure.take().is_some() {
            say(format_args!("the sweep succeeds again"));
        }
        let is_partial = sweep.observation.is_partial;
        if is_partial && !self.was_partial {
            let scan = &sweep.scan;
            say_notes(scan.coverage.notes(scan.without_known_owner()));
            say_notes(&sweep.failures);
        }
        if self.was_partial && !is_partial {
            say(format_args!("everything can be seen again"));
        }
        self.was_partial = is_partial;
    }
}
