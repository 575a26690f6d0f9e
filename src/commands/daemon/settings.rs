//! The configuration with the options of the command line, which come before it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::cli::DaemonArgs;
use crate::daemon::config::{DaemonConfig, Listen};
use crate::daemon::textfile::TextFile;
use crate::proc::netns::NetnsScope;

/// How the daemon sweeps, and where it serves.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub interval: Duration,
    pub listen: Listen,
    pub all_netns: bool,
    pub textfile: Option<TextFile>,
    pub host_root: PathBuf,
    /// The whole configuration.
    pub config: DaemonConfig,
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
            listen: config.listen.clone(),
            all_netns: config.all_netns,
            textfile: textfile.map(|it| open_textfile(it)).transpose()?,
            host_root: args.host_root.as_ref().unwrap_or(&config.host_root).clone(),
            config,
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
        ensure!(
            self.config.acts() || !new.config.acts(),
            "a first policy with mode = \"act\" takes effect only at the start, because the daemon has dropped the privileges for it: \
             systemctl restart cwkill-daemon"
        );
        Ok(())
    }
}

/// Reads the configuration.
///
/// # Errors
/// It is wrong.
pub(super) fn read(args: &DaemonArgs) -> anyhow::Result<DaemonConfig> {
    Ok(DaemonConfig::load(args.config.as_deref())?)
}

fn open_textfile(directory: &Path) -> anyhow::Result<TextFile> {
    let opened = TextFile::in_directory(directory);
    opened.with_context(|| format!("cannot write metrics into {}", directory.display()))
}
