//! Whether new stuck sockets come after a kill, and from whom.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::time::Duration;

use crate::config::Config;
use crate::finder::{self, FindError, Found};
use crate::injector::engine::Control;
use crate::pipeline::Run;
use crate::proc::ProcFs;
use crate::sock_diag::Cookie;
use crate::tcp::TcpState;
use crate::text::{escape, format_rate, per_minute, seconds};

/// A server that closes properly passes through CLOSE-WAIT too, in less than this.
const PASSING: Duration = Duration::from_millis(100);
/// How soon Ctrl-C ends the watch.
const BLINK: Duration = Duration::from_millis(50);
/// Culprits named in the line for people.
const NAMED: usize = 3;

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSockets {
    /// How long it was watched: less than asked for after Ctrl-C.
    pub watched: Duration,
    /// Sockets that became stuck meanwhile and still are.
    pub new: usize,
    /// Whose they are, most first. `None`: no process is known.
    pub by: Vec<(Option<Culprit>, usize)>,
    /// At most so many more may match, but their owners could not be read at the last look.
    pub undecided: usize,
    /// Whether not every network namespace could be seen at the last look.
    pub partial: bool,
}

/// A process that new stuck sockets belong to; those never accepted belong to their listener's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Culprit {
    /// Its number.
    pub pid: i32,
    /// Its name.
    pub comm: String,
}

/// Looks at what matches now and again after `duration`, and counts what is there only then.
///
/// The selectors are those of the run but for the minimum age: what is new is young.
///
/// # Errors
/// As [`finder::find`].
pub fn watch(
    run: &Run,
    config: &Config,
    duration: Duration,
    proc: &ProcFs,
    control: &dyn Control,
) -> Result<NewSockets, FindError> {
    let mut selectors = config.selectors.clone();
    selectors.min_age = Duration::ZERO;
    let look = || match config.owners {
        true => finder::find(&run.namespaces, proc, &selectors),
        false => finder::find_sockets(&run.namespaces, &selectors, true),
    };
    let mut known = cookies(&look()?);
    known.extend(cookies(&run.found));
    let begin = control.now();
    let watched = || control.now().saturating_duration_since(begin);
    while watched() < duration && !control.interrupted() {
        control.sleep(duration.saturating_sub(watched()).min(BLINK));
    }
    let watched = watched();
    Ok(count(&look()?, &known, watched))
}

fn cookies(found: &Found) -> HashSet<Cookie> {
    found.sockets.iter().map(|socket| socket.cookie()).collect()
}

/// Counts the sockets of `found` that are not `known` and are not just passing through their state.
fn count(found: &Found, known: &HashSet<Cookie>, watched: Duration) -> NewSockets {
    let mut by: BTreeMap<Option<Culprit>, usize> = BTreeMap::new();
    for socket in &found.sockets {
        let stays = socket.age.is_none_or(|age| age >= PASSING);
        if stays && !known.contains(&socket.cookie()) {
            let culprit = socket.culprit(found).map(|at| Culprit {
                pid: found.processes[at].pid,
                comm: found.processes[at].comm.clone(),
            });
            *by.entry(culprit).or_default() += 1;
        }
    }
    let mut by: Vec<_> = by.into_iter().collect();
    by.sort_by_key(|(_, new)| std::cmp::Reverse(*new));
    NewSockets {
        watched,
        new: by.iter().map(|(_, new)| new).sum(),
        by,
        undecided: found.undecided,
        partial: found.unreachable_namespaces + found.untold_namespaces > 0,
    }
}

impl NewSockets {
    /// New sockets a minute, at the pace of the watch.
    pub fn per_minute(&self) -> f64 {
        per_minute(self.new, self.watched)
    }

    /// One line for people.
    pub fn line(&self, config: &Config) -> String {
        let time = seconds(self.watched);
        if self.new == 0 {
            return format!("none new in {time}{}", self.unseen());
        }
        let mut line = format!("{} new in {time}", self.new);
        let by = match config.owners {
            true => &self.by[..],
            // Nobody has looked.
            false => &[],
        };
        for (index, (culprit, new)) in by.iter().take(NAMED).enumerate() {
            let separator = if index == 0 { " from " } else { ", " };
            let _ = match culprit {
                Some(Culprit { pid, comm }) => write!(line, "{separator}{}/{pid}", escape(comm)),
                None => write!(line, "{separator}an unknown owner"),
            };
            if by.len() > 1 {
                let _ = write!(line, " ({new})");
            }
        }
        if by.len() > NAMED {
            let _ = write!(line, " and {} more", by.len() - NAMED);
        }
        let _ = write!(line, ", {} a minute", format_rate(self.per_minute()));
        // In other states new ones may be as they should be.
        if config.selectors.states == TcpState::CloseWait.into() {
            line.push_str(": the leak continues");
        }
        line + &self.unseen()
    }

    /// What could not be seen.
    fn unseen(&self) -> String {
        let mut text = String::new();
        if self.undecided > 0 {
            let _ = write!(text, "; {} more may be (owners unreadable)", self.undecided);
        }
        if self.partial {
            text.push_str("; not every network namespace could be seen");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use crate::finder::{Held, RemoteFd, Socket};
    use crate::proc::Process;
    use crate::sock_diag::testdata::stuck;
    use clap::Parser;

    fn found(cookies: std::ops::Range<u64>) -> Found {
        let process = |pid| Process {
            pid,
            start_time: 1,
            comm: "java\x1b".into(),
            cgroup: Default::default(),
        };
        let socket = |cookie| {
            let mut socket = Socket::from_message(&stuck("10.0.0.1:80", "10.0.0.2:5", cookie));
            let (process, fd) = (usize::from(cookie % 4 == 0), RemoteFd(3));
            socket.owners = vec![Held { process, fd }];
            socket
        };
        Found {
            sockets: cookies.map(socket).collect(),
            processes: vec![process(4421), process(77)],
            ..Found::default()
        }
    }

    fn line(refill: &NewSockets, arguments: &str) -> String {
        let words = ["cwkill"].into_iter().chain(arguments.split_whitespace());
        let config = Config::from_args(Cli::try_parse_from(words).unwrap().args).unwrap();
        refill.line(&config)
    }

    #[test]
    fn only_what_is_new_and_stays_is_counted() {
        let mut now = found(1..9);
        now.sockets[7].age = Some(Duration::from_millis(1));
        let known = [Cookie(1), Cookie(2), Cookie(99)].into();
        let refill = count(&now, &known, Duration::from_secs(10));
        assert_eq!(refill.new, 5, "3, 4, 5, 6, 7; 8 is passing");
        assert!((refill.per_minute() - 30.0).abs() < 1e-9);
        let text = "5 new in 10 s from java\\u{1b}/4421 (4), java\\u{1b}/77 (1), 30 a minute";
        assert_eq!(
            line(&refill, "--all"),
            format!("{text}: the leak continues")
        );
        assert_eq!(line(&refill, "--state last-ack"), text);
    }

    #[test]
    fn what_could_not_be_seen_is_said() {
        let mut now = found(1..3);
        now.undecided = 4;
        now.unreachable_namespaces = 1;
        let told = "; 4 more may be (owners unreadable); not every network namespace could be seen";
        for known in [HashSet::new(), cookies(&now)] {
            let refill = count(&now, &known, Duration::from_secs(10));
            let line = line(&refill, "--all");
            assert!(line.ends_with(told), "{line}");
        }
    }

    #[test]
    fn nothing_new_is_said_too() {
        let refill = count(&found(1..3), &cookies(&found(1..3)), Duration::ZERO);
        assert_eq!(refill.per_minute(), 0.0);
        assert_eq!(line(&refill, "--all"), "none new in 0 ms");
    }
}
