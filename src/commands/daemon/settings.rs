//! The configuration with the options of the command line, which come before it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail, ensure};

use crate::cli::DaemonArgs;
use crate::daemon::config::{DaemonConfig, Listen, Mode};
use crate::daemon::textfile::TextFile;
use crate::proc::netns::NetnsScope;
use crate::terminal::{ignore_closed_reader, say, write_out};

/// How the daemon sweeps, and where it serves.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub interval: Duration,
    pub listen: Listen,
    pub all_netns: bool,
    pub textfile: Option<TextFile>,
    pub host_root: PathBuf,
}

impl Settings {
    /// Opens what `config` names.
    ///
    /// # Errors
    /// The directory for the text file cannot be used.
    pub fn of(args: &DaemonArgs, config: DaemonConfig) -> anyhow::Result<Self> {
        let textfile = args.textfile.as_ref().or(config.textfile.as_ref());
        Ok(Settings {
            interval: args.interval.unwrap_or(config.interval),
            listen: config.listen,
            all_netns: config.all_netns,
            textfile: textfile.map(|it| open_textfile(it)).transpose()?,
            host_root: args.host_root.clone().unwrap_or(config.host_root),
        })
    }

    pub fn netns(&self) -> NetnsScope {
        match self.all_netns {
            true => NetnsScope::All,
            false => NetnsScope::Current,
        }
    }

    /// Whether a daemon that runs with these settings can go on with `new` ones.
    ///
    /// # Errors
    /// It cannot: it has dropped the privileges for it, or has opened another directory.
    pub fn check_reload(&self, new: &Settings) -> anyhow::Result<()> {
        for (name, is_same) in [
            ("all_netns", self.all_netns == new.all_netns),
            ("host_root", self.host_root == new.host_root),
        ] {
            ensure!(
                is_same,
                "{name} takes effect only at the start: systemctl restart cwkill-daemon"
            );
        }
        Ok(())
    }
}

/// Prints what the configuration means, with the options of the command line.
///
/// # Errors
/// It cannot be written.
pub(super) fn explain(args: &DaemonArgs, mut config: DaemonConfig) -> anyhow::Result<ExitCode> {
    config.interval = args.interval.unwrap_or(config.interval);
    let lines = config.sentences(SystemTime::now(), &[]);
    let written = write_out(|out| lines.iter().try_for_each(|line| writeln!(out, "{line}")));
    ignore_closed_reader(written).context("cannot write what the configuration means")?;
    Ok(ExitCode::SUCCESS)
}

/// Reads the configuration.
///
/// # Errors
/// It is wrong, or it wants what this version cannot do.
pub(super) fn read(args: &DaemonArgs) -> anyhow::Result<DaemonConfig> {
    let config = DaemonConfig::load(args.config.as_deref())?;
    if let Some(policy) = config.policies.iter().find(|it| it.mode == Mode::Act) {
        bail!(
            "{}:{}: the policy `{}` has mode = \"act\", and this version of the daemon only counts: remove the policy, and close \
             by cwkill.timer meanwhile",
            policy.file.display(),
            policy.place,
            policy.name
        );
    }
    if let Some(policy) = config.policies.first() {
        say(format_args!(
            "note: the policy `{}` has no effect: this version of the daemon counts all stuck sockets, and evaluates no policy",
            policy.name
        ));
    }
    Ok(config)
}

fn open_textfile(directory: &Path) -> anyhow::Result<TextFile> {
    let opened = TextFile::in_directory(directory);
    opened.with_context(|| format!("cannot write metrics into {}", directory.display()))
}
