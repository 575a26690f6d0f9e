//! The configuration with the options of the command line, which come before it.

use std::io;
use std::path::PathBuf;
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
    /// The directory for the text file is none. The message has the place in the configuration.
    pub fn of(args: &DaemonArgs, config: DaemonConfig) -> anyhow::Result<Self> {
        let textfile = match (&args.textfile, &config.textfile) {
            (Some(directory), _) => {
                let opened = TextFile::in_directory(directory);
                Some(opened.with_context(|| format!("--textfile {}", directory.display()))?)
            }
            (None, Some(directory)) => {
                let opened = TextFile::in_directory(directory);
                let error = |why: io::Error| config.textfile_error(&why);
                Some(opened.map_err(error)?)
            }
            (None, None) => None,
        };
        Ok(Settings {
            interval: args.interval.unwrap_or(config.interval),
            listen: config.listen.clone(),
            all_netns: config.all_netns,
            textfile,
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

    /// Whether the text file can be written with the privileges of this process.
    ///
    /// # Errors
    /// It cannot.
    pub fn try_textfile(&self) -> anyhow::Result<()> {
        let Some(textfile) = &self.textfile else {
            return Ok(());
        };
        textfile.try_write().with_context(|| {
            format!(
                "cannot write {}: its directory must belong to the user of the daemon, and be in ReadWritePaths= of its unit",
                textfile.path().display()
            )
        })
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

/// The policies that would act without `--observe`, to be put after a sentence.
pub(super) fn kept(config: &DaemonConfig) -> String {
    match config.kept_from_acting.as_slice() {
        [] => String::new(),
        kept => format!(" (--observe keeps policy {} from acting)", kept.join(", ")),
    }
}

/// Reads the configuration.
///
/// # Errors
/// It is wrong.
pub(super) fn read(args: &DaemonArgs) -> anyhow::Result<DaemonConfig> {
    let mut config = DaemonConfig::load(args.config.as_deref())?;
    if args.observe {
        config.observe();
    }
    Ok(config)
}
