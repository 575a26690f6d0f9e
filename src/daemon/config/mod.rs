//! The configuration of the daemon: TOML in `/etc/cwkill/daemon.toml`, and then in the files of `/etc/cwkill/daemon.d` in the order of
//! their names.
//!
//! `files` reads them; `raw` has their structure; `reader` reads single values, `selectors` those of `match`, `policy` a whole policy,
//! and [`protect`] what no policy may touch; `error` says where something is wrong. [`describe`] says in words what a configuration does.

pub mod describe;
mod error;
mod files;
mod policy;
pub mod protect;
mod raw;
mod reader;
mod selectors;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use toml::Spanned;

pub use error::{ConfigError, Place};
pub use files::DEFAULT_FILE;
pub use policy::{BreakerRules, HALF_OPEN, Mode, Policy};
pub use protect::{Protected, Protection};

use error::Source;
use raw::{Field, RawFile};

use crate::model::Method;

/// What the daemon is to do.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// The time between the beginnings of two sweeps.
    pub interval: Duration,
    pub listen: Listen,
    /// Whether to look into every network namespace, or only into the one of the daemon and those that policies name.
    pub all_netns: bool,
    /// A directory of node_exporter for a file with the metrics.
    pub textfile: Option<PathBuf>,
    /// Where it is configured.
    pub textfile_at: Option<(PathBuf, Place)>,
    /// The root directory of the host, below which the names of containers are.
    pub host_root: PathBuf,
    /// A file that gets a line for every act.
    pub log_file: Option<PathBuf>,
    pub limits: Limits,
    pub protection: Protection,
    /// In the order of the files, and in each in the order of the lines.
    pub policies: Vec<Policy>,
    /// The policies with `mode = "act"` that the command line keeps from acting.
    pub kept_from_acting: Vec<String>,
    /// The files that were read.
    pub files: Vec<PathBuf>,
}

/// How many sockets of the host all policies together may act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub kills_per_sweep: u32,
    pub kills_per_hour: u32,
}

/// Where the metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    Address(SocketAddr),
    Unix(PathBuf),
    /// At the socket that systemd has opened.
    Systemd,
    None,
}

/// A percentage, from 1 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percent(pub u32);

impl Percent {
    /// This part of `whole`, rounded up, so that a part of something is never nothing.
    pub fn of(self, whole: usize) -> usize {
        let percent = usize::try_from(self.0).unwrap_or(100);
        whole.saturating_mul(percent).div_ceil(100)
    }
}

/// A number of stuck sockets of one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Sockets(u32),
    /// So much of its limit of open files (RLIMIT_NOFILE).
    OfLimit(Percent),
}

impl Level {
    /// The number of sockets; `None` if it is a part of a limit that is not known.
    pub fn sockets(self, limit: Option<u64>) -> Option<usize> {
        match self {
            Level::Sockets(number) => usize::try_from(number).ok(),
            Level::OfLimit(percent) => {
                let limit = usize::try_from(limit?).unwrap_or(usize::MAX);
                Some(percent.of(limit))
            }
        }
    }
}

/// Until when a policy may act.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expiry {
    pub at: SystemTime,
    /// As it is written.
    pub text: String,
}

/// A part of each day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Minutes after midnight. The window contains the first, and not the last. It spans midnight if the last comes first.
    from: u16,
    to: u16,
    /// Minutes by which its clock is before UTC.
    east: i32,
    /// As it is written.
    pub text: String,
}

impl Window {
    /// Whether `now` is in it.
    pub fn contains(&self, now: SystemTime) -> bool {
        const MINUTES_OF_A_DAY: i64 = 24 * 60;
        // Before 1970 the clock is wrong, and no time of day is known.
        let Ok(since) = now.duration_since(SystemTime::UNIX_EPOCH) else {
            return false;
        };
        let minutes = i64::try_from(since.as_secs() / 60).unwrap_or(0) + i64::from(self.east);
        let minute = minutes.rem_euclid(MINUTES_OF_A_DAY);
        let (from, to) = (i64::from(self.from), i64::from(self.to));
        match from < to {
            true => (from..to).contains(&minute),
            false => minute >= from || minute < to,
        }
    }
}

impl Default for DaemonConfig {
    /// Observes everything once in 30 seconds.
    fn default() -> Self {
        DaemonConfig {
            interval: Duration::from_secs(30),
            listen: Listen::Address(SocketAddr::from(([127, 0, 0, 1], 9979))),
            all_netns: false,
            textfile: None,
            textfile_at: None,
            host_root: PathBuf::from("/"),
            log_file: None,
            limits: Limits {
                kills_per_sweep: 200,
                kills_per_hour: 2000,
            },
            protection: Protection::default(),
            policies: Vec::new(),
            kept_from_acting: Vec::new(),
            files: Vec::new(),
        }
    }
}

impl DaemonConfig {
    /// Reads `file`, or without it `/etc/cwkill/daemon.toml` if there is one. Then reads the files beside it: those in `daemon.d` for
    /// `daemon.toml`, in the order of their names.
    ///
    /// # Errors
    /// `file` does not exist, a file cannot be read, or one of them is wrong. Nothing is taken of any of them then.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config = DaemonConfig::default();
        for (path, text) in files::read(file)? {
            let source = Source {
                path: &path,
                text: &text,
            };
            config.add(source)?;
            config.files.push(path);
        }
        Ok(config)
    }

    /// Whether a policy may act.
    pub fn acts(&self) -> bool {
        self.policies.iter().any(|policy| policy.mode == Mode::Act)
    }

    /// Whether a policy may act by `destroy`.
    pub fn destroys(&self) -> bool {
        let destroys = |it: &Policy| it.mode == Mode::Act && it.methods.contains(&Method::Destroy);
        self.policies.iter().any(destroys)
    }

    /// Lets every policy only observe, whatever its mode.
    pub fn observe(&mut self) {
        for policy in &mut self.policies {
            if policy.mode == Mode::Act {
                policy.mode = Mode::Observe;
                self.kept_from_acting.push(policy.name.clone());
            }
        }
    }

    /// Whether a policy names a network namespace.
    pub fn names_netns(&self) -> bool {
        self.policies.iter().any(|policy| policy.netns.is_some())
    }

    /// That the directory for the text file cannot be used, with its place.
    pub fn textfile_error(&self, why: &io::Error) -> ConfigError {
        let directory = self.textfile.clone().unwrap_or_default();
        let message = format!("`textfile`: cannot use {}: {why}", directory.display());
        match self.textfile_at.clone() {
            Some((file, place)) => ConfigError::Wrong {
                file,
                place,
                message,
            },
            None => ConfigError::Unreadable {
                path: directory,
                error: why.kind().into(),
            },
        }
    }

    /// The configuration of one file with this text.
    ///
    /// # Errors
    /// The text is wrong.
    #[cfg(test)]
    pub(crate) fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut config = DaemonConfig::default();
        config.add(Source {
            path: Path::new("daemon.toml"),
            text,
        })?;
        Ok(config)
    }

    /// Adds a file. A later file wins; policies and protections of all files add up.
    fn add(&mut self, source: Source<'_>) -> Result<(), ConfigError> {
        let raw: RawFile =
            toml::from_str(source.text).map_err(|error| source.syntax_error(&error))?;
        let daemon = &raw.daemon;
        let set = |value: Option<Duration>, into: &mut Duration| {
            value.into_iter().for_each(|it| *into = it)
        };
        set(
            source.read("interval", &daemon.interval, reader::interval)?,
            &mut self.interval,
        );
        if let Some(listen) = source.read("listen", &daemon.listen, reader::listen)? {
            self.listen = listen;
        }
        if let Some(all) = source.read("all_netns", &daemon.all_netns, reader::flag)? {
            self.all_netns = all;
        }
        if let Some(textfile) = source.read("textfile", &daemon.textfile, reader::directory)? {
            self.textfile = Some(textfile);
            let place = daemon.textfile.as_ref().map(|it| source.place(&it.span()));
            self.textfile_at = place.map(|place| (source.path.to_owned(), place));
        }
        if let Some(root) = source.read("host_root", &daemon.host_root, reader::host_root)? {
            self.host_root = root;
        }
        if let Some(file) = source.read("log_file", &daemon.log_file, reader::log_file)? {
            self.log_file = Some(file);
        }
        let limit = |name, field: &Field, into: &mut u32| -> Result<(), ConfigError> {
            if let Some(limit) = source.read(name, field, reader::count)? {
                *into = limit;
            }
            Ok(())
        };
        limit(
            "kills_per_sweep",
            &raw.limits.kills_per_sweep,
            &mut self.limits.kills_per_sweep,
        )?;
        limit(
            "kills_per_hour",
            &raw.limits.kills_per_hour,
            &mut self.limits.kills_per_hour,
        )?;
        let protection = std::mem::take(&mut self.protection);
        self.protection = protection.with(source, &raw.protect)?;
        for raw in &raw.policy {
            self.add_policy(source, raw)?;
        }
        Ok(())
    }

    fn add_policy(
        &mut self,
        source: Source<'_>,
        raw: &Spanned<raw::RawPolicy>,
    ) -> Result<(), ConfigError> {
        let policy = policy::read(source, raw)?;
        if let Some(other) = self.policies.iter().find(|other| other.name == policy.name) {
            let message = format!(
                "the name `{}` is taken by the policy at {}:{}; give each policy a name of its own",
                policy.name,
                other.file.display(),
                other.place
            );
            return Err(source.error(&raw.get_ref().name.span(), message));
        }
        self.policies.push(policy);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
