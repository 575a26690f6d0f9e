//! The audit log: one structured record for every socket that was acted on, and one before and after them all.
//!
//! The log is opened, and the record that says what is about to be done is written, before anything is done; if either fails,
//! nothing is. [`record`] builds the records; the events go through `tracing` to the sinks.

mod file;
pub mod record;
mod sinks;

use std::io;
use std::path::PathBuf;

use anyhow::{Context, bail};
use nix::sys::stat::fstat;
use tracing::{Dispatch, Level};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry};

use crate::pipeline::Run;
use record::{Caller, Entry};
use sinks::{Lines, Losses};

/// Where the log goes beside a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The journal.
    Journald,
    /// A line a record on standard error.
    Stderr,
    /// Nowhere.
    None,
}

/// What the operator asked for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Where to, or as it fits: the journal when run by systemd, else standard error if `verbose`.
    pub target: Option<Target>,
    /// A file to append to.
    pub file: Option<PathBuf>,
    /// To tell what is done.
    pub verbose: bool,
}

/// An open log.
pub struct Audit {
    caller: Caller,
    dispatch: Dispatch,
    losses: Losses,
    journald: bool,
}

impl Audit {
    /// Opens what is `wanted`; `None` where that is nothing.
    ///
    /// # Errors
    /// One of them cannot be written; the error says which.
    pub fn open(wanted: &Wanted) -> anyhow::Result<Option<Audit>> {
        let losses = Losses::default();
        let mut sinks: Vec<Box<dyn Layer<Registry> + Send + Sync>> = Vec::new();
        let (target, asked_for) = match wanted.target {
            Some(target) => (target, true),
            None if is_journal(io::stderr()) => (Target::Journald, false),
            None if wanted.verbose => (Target::Stderr, false),
            None => (Target::None, false),
        };
        let mut journald = false;
        match target {
            Target::Journald => match tracing_journald::Layer::new() {
                Ok(layer) => {
                    journald = true;
                    sinks.push(Box::new(
                        layer
                            .with_syslog_identifier("cwkill".into())
                            .with_field_prefix(Some("CWKILL".into())),
                    ));
                }
                Err(error) if asked_for => {
                    return Err(error)
                        .context("cannot write to the journal (is journald running?)");
                }
                // In a sandbox without /run the journal still has our standard error.
                Err(_) => sinks.push(Box::new(Lines::stderr())),
            },
            Target::Stderr => sinks.push(Box::new(Lines::stderr())),
            Target::None => {}
        }
        if let Some(path) = &wanted.file {
            let file = file::open(path)
                .with_context(|| format!("cannot write the log {}", path.display()))?;
            let name = path.display().to_string();
            sinks.push(Box::new(Lines::json(file, name, losses.clone())));
        }
        if sinks.is_empty() {
            return Ok(None);
        }
        Ok(Some(Audit {
            caller: Caller::this_process(),
            dispatch: Dispatch::new(Registry::default().with(sinks)),
            losses,
            journald,
        }))
    }

    /// Says what is about to be done.
    ///
    /// # Errors
    /// It could not be written: nothing must be done.
    pub fn begin(&self, run: &Run) -> anyhow::Result<()> {
        self.put(&Entry::begin(run));
        match self.losses() {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }

    /// Says what was done to each socket, and that this was all. What could not be written is the answer, as a sentence.
    pub fn finish(&self, run: &Run) -> Option<String> {
        for entry in record::outcomes(run) {
            self.put(&entry);
        }
        self.put(&Entry::end(run));
        self.losses()
    }

    fn put(&self, entry: &Entry<'_>) {
        let line = self.caller.line(entry, std::time::SystemTime::now());
        let (event, outcome, method) = (entry.event(), entry.outcome(), entry.method());
        let (local, peer, cookie) = (entry.local(), entry.peer(), entry.cookie());
        let message = entry.message();
        // The level of an event is fixed where it stands.
        macro_rules! emit {
            ($level:expr) => {
                tracing::event!(
                    target: "cwkill::audit", $level,
                    event, outcome, method, local, peer, cookie, record = line, message
                )
            };
        }
        tracing::dispatcher::with_default(&self.dispatch, || match entry.is_failure() {
            true => emit!(Level::WARN),
            false => emit!(Level::INFO),
        });
    }

    /// What could not be written so far. The layer for the journal keeps its errors to itself, so whether there still is one is
    /// asked anew.
    fn losses(&self) -> Option<String> {
        if self.journald
            && let Err(error) = tracing_journald::Layer::new()
        {
            return Some(format!(
                "the journal does not take records any more: {error}"
            ));
        }
        self.losses.sentence()
    }
}

/// Whether `stream` is the journal's, as systemd.exec(5) says to find out: $JOURNAL_STREAM names the device and the inode. The
/// variable alone proves nothing: it is inherited by whatever a service starts.
fn is_journal(stream: impl std::os::fd::AsFd) -> bool {
    let (Ok(named), Ok(stat)) = (std::env::var("JOURNAL_STREAM"), fstat(stream)) else {
        return false;
    };
    named == format!("{}:{}", stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn only_regular_files_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [
            dir.path(),
            fifo.as_path(),
            Path::new("/dev/null"),
            Path::new("/nowhere/log"),
        ] {
            let wanted = Wanted {
                target: Some(Target::None),
                file: Some(path.into()),
                verbose: false,
            };
            let error = format!("{:#}", Audit::open(&wanted).err().unwrap());
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }

    #[test]
    fn nothing_wanted_is_no_log() {
        let wanted = Wanted {
            target: Some(Target::None),
            ..Wanted::default()
        };
        assert!(Audit::open(&wanted).unwrap().is_none());
    }
}
