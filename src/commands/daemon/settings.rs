//! The configuration with the options of the command line, which come before it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{anyhow, ensure};

use crate::cli::DaemonArgs;
use crate::config::Config;
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
    /// Its directory, if the command line names it.
    textfile_option: Option<PathBuf>,
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
        let mut settings = Settings {
            interval: args.interval.unwrap_or(config.interval),
            listen: config.listen.clone(),
            all_netns: config.all_netns,
            textfile: None,
            textfile_option: args.textfile.clone(),
            host_root: args.host_root.as_ref().unwrap_or(&config.host_root).clone(),
            config,
        };
        let configured = settings.config.textfile.as_ref();
        if let Some(directory) = args.textfile.as_ref().or(configured) {
            let opened = TextFile::in_directory(directory);
            settings.textfile = Some(opened.map_err(|error| settings.textfile_error(&error))?);
        }
        Ok(settings)
    }

    /// That the directory for the text file cannot be used, with its place: a line of the configuration or the option.
    pub fn textfile_error(&self, why: &io::Error) -> anyhow::Error {
        match &self.textfile_option {
            Some(directory) => anyhow!("--textfile {}: {why}", directory.display()),
            None => self.config.textfile_error(why).into(),
        }
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
    /// It cannot. The message has its place.
    pub fn try_textfile(&self) -> anyhow::Result<()> {
        let Some(textfile) = &self.textfile else {
            return Ok(());
        };
        textfile.try_write().map_err(|why| {
            anyhow!(
                "{:#}; it must belong to the user of the daemon, and be in ReadWritePaths= of its unit",
                self.textfile_error(&why)
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
            self.config.names_netns() || !new.config.names_netns() || self.all_netns,
            "a first policy with netns takes effect only at the start, because the daemon has dropped the privileges for it: \
             systemctl restart cwkill-daemon"
        );
        ensure!(
            self.config.acts() || !new.config.acts(),
            "a first policy with mode = \"act\" takes effect only at the start, because the daemon has dropped the privileges for it: \
             systemctl restart cwkill-daemon"
        );
        let states = Config::of_listing(self.netns()).selectors.states;
        let follows = |config: &DaemonConfig| {
            (config.policies.iter()).any(|policy| policy.follows_owners(states))
        };
        // The privileges of acts and of all_netns include those for it.
        let can_follow = self.config.acts() || self.all_netns || follows(&self.config);
        ensure!(
            can_follow || !follows(&new.config),
            "a first policy with owners and an expression, a state or netns takes effect only at the start, because the daemon has dropped the privileges for it: \
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
