//! The audit log: one structured record for each intended act on a socket or descriptor, one for its outcome, and one at the
//! beginning and the end of the run.
//!
//! cwkill opens the log and writes the intents before it acts. If either fails, it does not act. [`record`] builds the records.

mod file;
pub mod forwarded;
mod journal;
pub mod record;
mod sinks;

use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use nix::sys::stat::fstat;

use crate::config::{LogOptions, LogTarget};
use crate::model::ForwardedAct;
use crate::report::gateway::{ForwardedCounts, ForwardedRun};
use crate::report::reclaim::ReclaimRun;
use crate::report::{Run, SocketCounts};
use forwarded::ForwardedRecord;
use journal::Journal;
pub use record::ByPolicy;
use record::{Caller, Entry};
use sinks::{Losses, Rendered, SINK_TIMEOUT, Sink, To};

pub struct Audit {
    caller: Caller,
    sinks: Vec<Sink>,
    losses: Losses,
}

impl Audit {
    /// Opens the log; `None` if this run has no log.
    ///
    /// # Errors
    /// A sink cannot be written; the error names it.
    pub fn open(options: &LogOptions) -> anyhow::Result<Option<Audit>> {
        let mut sinks = Vec::new();
        let by_systemd = || is_journal(io::stderr()) || is_journal(io::stdout());
        let (target, is_explicit) = match options.target {
            Some(target) => (target, true),
            None if by_systemd() => (LogTarget::Journald, false),
            None if options.verbose => (LogTarget::Stderr, false),
            None => (LogTarget::None, false),
        };
        match target {
            LogTarget::Journald => match Journal::open(SINK_TIMEOUT) {
                Ok(journal) => sinks.push(To::Journal(journal)),
                Err(error) if is_explicit => {
                    return Err(error)
                        .context("cannot write to the journal (is journald running?)");
                }
                // In a sandbox without /run the journal still gets cwkill's standard error.
                Err(_) => sinks.push(To::Stderr { required: true }),
            },
            LogTarget::Stderr => sinks.push(To::Stderr {
                required: is_explicit,
            }),
            LogTarget::None => {}
        }
        if let Some(path) = &options.file {
            let file = file::open(path)
                .with_context(|| format!("cannot write the log {}", path.display()))?;
            sinks.push(To::File(file, path.display().to_string()));
        }
        if sinks.is_empty() {
            return Ok(None);
        }
        Ok(Some(Audit {
            caller: Caller::this_process(),
            sinks: sinks.into_iter().map(Sink::new).collect(),
            losses: Losses::default(),
        }))
    }

    /// The log of a policy of the daemon. Acts of a daemon always have one: without a journal and a file, standard error.
    ///
    /// # Errors
    /// As [`Audit::open`].
    pub fn of_policy(options: &LogOptions, policy: ByPolicy) -> anyhow::Result<Audit> {
        let opened = match Audit::open(options)? {
            Some(audit) => audit,
            None => {
                let target = Some(LogTarget::Stderr);
                let options = LogOptions {
                    target,
                    ..options.clone()
                };
                Audit::open(&options)?.context("there is no log")?
            }
        };
        Ok(Audit {
            caller: opened.caller.by(policy),
            ..opened
        })
    }

    /// Writes the intents: the run, and each socket that it is about to act on.
    ///
    /// # Errors
    /// A record could not be written: cwkill must not act.
    pub fn begin(&mut self, run: &Run) -> anyhow::Result<()> {
        self.put(&Entry::begin(run, self.caller.sentence()));
        self.intend(record::intents(run).chain(record::drain_intents(run)))
    }

    /// Writes the intents alone: the sockets of a watch that have come together.
    ///
    /// # Errors
    /// As [`Audit::begin`].
    pub fn intend_more(&mut self, run: &Run) -> anyhow::Result<()> {
        self.intend(record::intents(run))
    }

    /// Writes the outcomes of such sockets. What is missing is known at the next intent, or at the end.
    pub fn record(&mut self, run: &Run) {
        for outcome in record::outcomes(run) {
            self.put(&outcome);
        }
    }

    /// Writes the end of a watch; otherwise as [`Audit::finish`].
    pub fn finish_watch(self, counts: SocketCounts, summary: String) -> Option<String> {
        let end = Entry::End { summary: counts };
        self.put_all(std::iter::empty(), 0, end, summary)
    }

    /// Writes the intents: each descriptor that the run is about to close.
    ///
    /// # Errors
    /// As [`Audit::begin`].
    pub fn begin_reclaim(&mut self, run: &ReclaimRun) -> anyhow::Result<()> {
        self.put(&Entry::begin_reclaim(run, self.caller.sentence()));
        self.intend(record::reclaim_intents(run))
    }

    /// Writes the intents: each forwarded connection that the run is about to ask or to end.
    ///
    /// # Errors
    /// As [`Audit::begin`].
    pub fn begin_gateway(&mut self, run: &ForwardedRun) -> anyhow::Result<()> {
        let begin = ForwardedRecord::begin(run, self.caller.sentence());
        self.put(&Entry::Forwarded(begin));
        self.intend_gateway(run)
    }

    /// Writes the beginning of a watch, which is about to end connections as they come.
    ///
    /// # Errors
    /// As [`Audit::begin`].
    pub fn begin_gateway_watch(&mut self, act: ForwardedAct) -> anyhow::Result<()> {
        let begin = ForwardedRecord::begin_watch(act, self.caller.sentence());
        self.intend([Entry::Forwarded(begin)].into_iter())
    }

    /// Writes the intents alone: the connections of a watch that have come together.
    ///
    /// # Errors
    /// As [`Audit::begin`].
    pub fn intend_gateway(&mut self, run: &ForwardedRun) -> anyhow::Result<()> {
        self.intend(ForwardedRecord::intents(run).map(Entry::Forwarded))
    }

    /// Writes the outcomes of such connections. What is missing is known at the next intent, or at the end.
    pub fn record_gateway(&mut self, run: &ForwardedRun) {
        for outcome in ForwardedRecord::outcomes(run) {
            self.put(&Entry::Forwarded(outcome));
        }
    }

    /// Writes the end of a watch; otherwise as [`Audit::finish`].
    pub fn finish_gateway_watch(self, counts: ForwardedCounts, summary: String) -> Option<String> {
        let end = Entry::Forwarded(ForwardedRecord::End { summary: counts });
        self.put_all(std::iter::empty(), 0, end, summary)
    }

    fn intend<'a>(&mut self, intents: impl Iterator<Item = Entry<'a>>) -> anyhow::Result<()> {
        for entry in intents {
            if let Some(why) = self.losses.sentence() {
                bail!("{why}");
            }
            self.put(&entry);
        }
        match self.losses.sentence() {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }

    /// Writes the outcome of each socket, and the end of the run. Returns a sentence about the records that could not be
    /// written.
    ///
    /// If writing takes long, this prints the `summary` of the acts on standard error meanwhile.
    pub fn finish(self, run: &Run, summary: String) -> Option<String> {
        let outcomes: Vec<Entry<'_>> = record::drain_outcomes(run).collect();
        let count = run.scan.targets.len() + outcomes.len();
        let outcomes = record::outcomes(run).chain(outcomes);
        self.put_all(outcomes, count, Entry::end(run), summary)
    }

    /// Writes the outcome of each descriptor, and the end of the run; otherwise as [`Audit::finish`].
    pub fn finish_reclaim(self, run: &ReclaimRun, summary: String) -> Option<String> {
        let outcomes = record::reclaim_outcomes(run);
        self.put_all(
            outcomes,
            run.descriptors.len(),
            Entry::end_reclaim(run),
            summary,
        )
    }

    /// Writes the outcome of each forwarded connection, and the end of the run; otherwise as [`Audit::finish`].
    pub fn finish_gateway(self, run: &ForwardedRun, summary: String) -> Option<String> {
        let outcomes = ForwardedRecord::outcomes(run).map(Entry::Forwarded);
        let end = Entry::Forwarded(ForwardedRecord::end(run));
        self.put_all(outcomes, run.scan.connections.len(), end, summary)
    }

    fn put_all<'a>(
        mut self,
        outcomes: impl Iterator<Item = Entry<'a>>,
        count: usize,
        end: Entry<'a>,
        summary: String,
    ) -> Option<String> {
        let left = Arc::new(AtomicUsize::new(count + 1));
        let done = announce_if_slow(summary, Arc::clone(&left));
        for entry in outcomes.chain([end]) {
            self.put(&entry);
            left.fetch_sub(1, Ordering::Relaxed);
        }
        drop(done);
        self.losses.sentence()
    }

    fn put(&mut self, entry: &Entry<'_>) {
        let json = self.caller.line(entry, SystemTime::now());
        let message = entry.message();
        let (local, peer) = (entry.local(), entry.peer());
        let mut fields = vec![
            ("MESSAGE", message.as_str()),
            // syslog(3): 4 is warning, 5 is notice.
            ("PRIORITY", if entry.is_failure() { "4" } else { "5" }),
            ("SYSLOG_IDENTIFIER", "cwkill"),
            ("CWKILL_EVENT", entry.event()),
        ];
        let known = [
            ("CWKILL_OUTCOME", entry.outcome()),
            ("CWKILL_METHOD", entry.method()),
            ("CWKILL_LOCAL", local.as_deref()),
            ("CWKILL_PEER", peer.as_deref()),
            ("CWKILL_COOKIE", entry.cookie()),
        ];
        let known = known
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)));
        fields.extend(known);
        fields.push(("CWKILL_RECORD", &json));
        let rendered = Rendered {
            json: &json,
            message: &message,
            fields: &fields,
            intent: entry.is_intent(),
        };
        for sink in &mut self.sinks {
            sink.put(&rendered, &mut self.losses);
        }
    }
}

/// If the records are not written soon, prints that the work is done and that only records are left. Dropping the returned
/// sender cancels this.
fn announce_if_slow(summary: String, left: Arc<AtomicUsize>) -> mpsc::Sender<()> {
    /// The operator begins to wonder after a second or two.
    const ANNOUNCE_AFTER: Duration = Duration::from_secs(2);
    let (done, ended) = mpsc::channel::<()>();
    // If no thread can be started, the message is missing.
    let _ = std::thread::Builder::new().spawn(move || {
        if ended.recv_timeout(ANNOUNCE_AFTER) == Err(mpsc::RecvTimeoutError::Timeout) {
            let left = left.load(Ordering::Relaxed);
            let _ = writeln!(
                io::stderr(),
                "cwkill: the work is done ({summary}); {left} records of the audit log are still to be written, Ctrl-C ends \
                 cwkill without them"
            );
        }
    });
    done
}

/// Whether `stream` leads to the journal: $JOURNAL_STREAM contains its device and inode (systemd.exec(5)). The variable alone
/// proves nothing, since every process that a service starts inherits it.
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
            let options = LogOptions {
                target: Some(LogTarget::None),
                file: Some(path.into()),
                verbose: false,
            };
            let error = format!("{:#}", Audit::open(&options).err().unwrap());
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }

    #[test]
    fn an_act_of_a_policy_is_recorded_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("acts.jsonl");
        let options = LogOptions {
            target: Some(LogTarget::None),
            file: Some(path.clone()),
            verbose: false,
        };
        let policy = ByPolicy {
            policy: "web".to_owned(),
            sweep: 12,
        };
        let mut audit = Audit::of_policy(&options, policy).unwrap();
        audit
            .begin(&Run::new(crate::model::Scan::default()))
            .unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(r#""policy":"web","sweep":12,"#), "{text}");
    }

    #[test]
    fn without_a_target_there_is_no_log() {
        let options = LogOptions {
            target: Some(LogTarget::None),
            ..LogOptions::default()
        };
        assert!(Audit::open(&options).unwrap().is_none());
    }
}
