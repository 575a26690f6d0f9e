//! Watches for new stuck sockets after cwkill has closed some, and shows which processes they belong to.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use crate::control::Control;
use crate::filter::selectors::Selectors;
use crate::finder::{self, FindError};
use crate::history::History;
use crate::model::{Coverage, Scan};
use crate::proc::netns::Namespaces;
use crate::proc::{ProcFs, Process, ProcessId};
use crate::sock_diag::Cookie;
use crate::tcp::TcpState;
use crate::text::{format_rate, per_minute, seconds};

/// A socket younger than this is not counted: a server that closes correctly leaves CLOSE-WAIT in less time.
const NEW_SOCKET_MIN_AGE: Duration = Duration::from_millis(100);
/// The longest time from Ctrl-C to the end of the watch.
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(50);
/// The maximum number of processes named in the line for people.
const MAX_NAMED: usize = 3;

/// The sockets that became stuck during a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSockets {
    /// The length of the watch. Ctrl-C makes it shorter than requested.
    pub watched: Duration,
    /// Number of sockets that became stuck during the watch and still are.
    pub new: usize,
    /// The processes that the sockets belong to, the one with the most first. A connection that was not accepted belongs to
    /// the process of its listener. `None`: the process is unknown.
    pub by: Vec<(Option<Arc<Process>>, usize)>,
    /// Whether cwkill searched for the owners.
    pub owners_known: bool,
    /// The coverage of the last scan.
    pub coverage: Coverage,
}

#[derive(Clone, Copy, Debug)]
pub struct WatchScope<'a> {
    pub namespaces: &'a Namespaces,
    /// The selectors of the run.
    pub selectors: &'a Selectors,
    /// Whether to search for owners.
    pub owners: bool,
}

/// Scans now, waits for `duration`, scans again, and counts the sockets that only the second scan shows and that are not
/// in `known`.
///
/// The minimum age and the minimum idle time of the selectors are ignored, because new sockets are young.
///
/// # Errors
/// The same as for [`finder::find`].
pub fn watch(
    scope: WatchScope<'_>,
    mut known: HashSet<Cookie>,
    duration: Duration,
    proc: &ProcFs,
    control: &dyn Control,
) -> Result<NewSockets, FindError> {
    let selectors = scope.selectors.of_any_age();
    // New sockets are not in the history, and the listing before has added the others.
    let history = History::none();
    let scan = || match scope.owners {
        true => finder::find(scope.namespaces, proc, &selectors, &history),
        false => finder::find_sockets(scope.namespaces, &selectors, &history),
    };
    known.extend(cookies(&scan()?));
    let begin = control.now();
    let elapsed = || control.now().saturating_duration_since(begin);
    while elapsed() < duration && !control.interrupted() {
        control.sleep(duration.saturating_sub(elapsed()).min(INTERRUPT_INTERVAL));
    }
    let elapsed = elapsed();
    Ok(count(scan()?, &known, elapsed))
}

/// The cookies of all targets.
pub fn cookies(scan: &Scan) -> HashSet<Cookie> {
    let targets = scan.targets.iter();
    targets.map(|target| target.socket.cookie()).collect()
}

/// Counts the sockets of `scan` that are not `known` and have reached [`NEW_SOCKET_MIN_AGE`].
fn count(scan: Scan, known: &HashSet<Cookie>, watched: Duration) -> NewSockets {
    let mut by_id: BTreeMap<Option<ProcessId>, (Option<Arc<Process>>, usize)> = BTreeMap::new();
    for target in &scan.targets {
        let is_stuck = target
            .socket
            .age
            .is_none_or(|age| age >= NEW_SOCKET_MIN_AGE);
        if is_stuck && !known.contains(&target.socket.cookie()) {
            let culprit = scan.culprit(target);
            let entry = by_id.entry(culprit.map(|process| process.id)).or_default();
            entry.0 = culprit.cloned();
            entry.1 += 1;
        }
    }
    let mut by: Vec<_> = by_id.into_values().collect();
    by.sort_by_key(|(_, new)| std::cmp::Reverse(*new));
    NewSockets {
        watched,
        new: by.iter().map(|(_, new)| new).sum(),
        by,
        owners_known: scan.owners_known,
        coverage: scan.coverage,
    }
}

impl NewSockets {
    /// New sockets per minute, at the rate of the watch.
    pub fn per_minute(&self) -> f64 {
        per_minute(self.new, self.watched)
    }

    /// One line for people; `selectors` are those of the run.
    pub fn line(&self, selectors: &Selectors) -> String {
        let time = seconds(self.watched);
        if self.new == 0 {
            return format!("none new in {time}{}", self.unseen());
        }
        let mut line = format!("{} new in {time}", self.new);
        let by = match self.owners_known {
            true => &self.by[..],
            false => &[],
        };
        for (index, (process, new)) in by.iter().take(MAX_NAMED).enumerate() {
            let separator = if index == 0 { " from " } else { ", " };
            let _ = match process {
                Some(process) => write!(line, "{separator}{process}"),
                None => write!(line, "{separator}an unknown owner"),
            };
            if by.len() > 1 {
                let _ = write!(line, " ({new})");
            }
        }
        if by.len() > MAX_NAMED {
            let _ = write!(line, " and {} more", by.len() - MAX_NAMED);
        }
        let _ = write!(line, ", {} a minute", format_rate(self.per_minute()));
        // In other states new sockets may be normal.
        if selectors.states == TcpState::CloseWait.into() {
            line.push_str(": the leak continues");
        }
        line + &self.unseen()
    }

    fn unseen(&self) -> String {
        let mut text = String::new();
        let undecided = self.coverage.undecided;
        if undecided > 0 {
            let _ = write!(text, "; {undecided} more may be new (owners not seen)");
        }
        if self.coverage.unseen_namespaces() > 0 {
            text.push_str("; not every network namespace could be seen");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Owner, Socket, Target};
    use crate::proc::RemoteFd;
    use crate::proc::testdata::process;
    use crate::sock_diag::testdata::stuck;

    fn scan(cookies: std::ops::Range<u64>) -> Scan {
        let processes = [process(4421, "java\x1b"), process(77, "java\x1b")];
        let target = |cookie| {
            let message = stuck("10.0.0.1:80", "10.0.0.2:5", cookie);
            let mut target = Target::new(Socket::from_message(&message));
            let process = &processes[usize::from(cookie % 4 == 0)];
            target.owners = vec![Owner::new(Arc::clone(process), RemoteFd(3))];
            target
        };
        Scan {
            targets: cookies.map(target).collect(),
            owners_known: true,
            ..Scan::default()
        }
    }

    fn all() -> Selectors {
        Selectors::default()
    }

    #[test]
    fn only_sockets_that_are_new_and_stay_are_counted() {
        let mut now = scan(1..9);
        now.targets[7].socket.age = Some(Duration::from_millis(1));
        let known = [Cookie(1), Cookie(2), Cookie(99)].into();
        let new = count(now, &known, Duration::from_secs(10));
        assert_eq!(new.new, 5, "3, 4, 5, 6, 7; 8 is too young");
        assert!((new.per_minute() - 30.0).abs() < 1e-9);
        let text = "5 new in 10 s from java\\u{1b}/4421 (4), java\\u{1b}/77 (1), 30 a minute";
        assert_eq!(new.line(&all()), format!("{text}: the leak continues"));
        let last_ack = Selectors {
            states: TcpState::LastAck.into(),
            ..all()
        };
        assert_eq!(new.line(&last_ack), text);
    }

    #[test]
    fn limits_of_the_scan_are_reported() {
        let ending =
            "; 4 more may be new (owners not seen); not every network namespace could be seen";
        for known in [HashSet::new(), cookies(&scan(1..3))] {
            let mut now = scan(1..3);
            now.coverage.undecided = 4;
            now.coverage.unreachable_namespaces = 1;
            let line = count(now, &known, Duration::from_secs(10)).line(&all());
            assert!(line.ends_with(ending), "{line}");
        }
    }

    #[test]
    fn nothing_new_is_reported_too() {
        let new = count(scan(1..3), &cookies(&scan(1..3)), Duration::ZERO);
        assert_eq!(new.per_minute(), 0.0);
        assert_eq!(new.line(&all()), "none new in 0 ms");
    }
}
