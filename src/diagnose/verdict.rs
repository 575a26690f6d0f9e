//! Explains in one sentence what a cause or the state of a process means for the operator. Pure.

use std::fmt::Write as _;

use strum::IntoStaticStr;

use super::counts::{CauseCount, Service};
use crate::model::Cause;
use crate::proc::Process;

/// The condition of a process, from its states (/proc/PID/stat) at the two scans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Normal,
    /// Stopped by a signal (state T).
    Stopped,
    /// Its cgroup is frozen.
    Frozen,
    /// Stopped by a debugger (state t).
    Traced,
    /// The main thread was in uninterruptible sleep (state D) at both scans. Once alone is normal during disk access.
    Uninterruptible,
    /// Another thread was, with this thread id.
    ThreadUninterruptible(i32),
    /// The process has ended, and its parent has not yet waited for it (state Z).
    Zombie,
    /// It was not there at the second scan.
    Exited,
}

impl Condition {
    /// The condition by the states at the first and the second scan; `None`: the process was not there.
    pub fn of(first: Option<char>, second: Option<char>) -> Condition {
        match (first, second) {
            (_, None) => Condition::Exited,
            (_, Some('T')) => Condition::Stopped,
            (_, Some('t')) => Condition::Traced,
            (_, Some('Z' | 'X')) => Condition::Zombie,
            (Some('D'), Some('D')) => Condition::Uninterruptible,
            _ => Condition::Normal,
        }
    }

    /// Adds the threads, except the main thread, that were in uninterruptible sleep at both scans.
    pub fn with_threads(self, threads: &[i32]) -> Condition {
        match (self, threads.first()) {
            (Condition::Normal, Some(thread)) => Condition::ThreadUninterruptible(*thread),
            _ => self,
        }
    }

    /// Adds that its cgroup is frozen. In cgroup v1 a frozen process is in state D.
    pub fn with_frozen(self, is_frozen: bool) -> Condition {
        match self {
            Condition::Normal | Condition::Stopped | Condition::Uninterruptible if is_frozen => {
                Condition::Frozen
            }
            _ => self,
        }
    }

    /// The name in JSON; `None` for [`Condition::Normal`].
    pub fn name(self) -> Option<&'static str> {
        match self {
            Condition::Normal => None,
            Condition::Stopped => Some("stopped"),
            Condition::Frozen => Some("frozen"),
            Condition::Traced => Some("traced"),
            Condition::Uninterruptible => Some("uninterruptible"),
            Condition::ThreadUninterruptible(_) => Some("thread-uninterruptible"),
            Condition::Zombie => Some("zombie"),
            Condition::Exited => Some("exited"),
        }
    }

    /// The meaning for the sockets; `None` for [`Condition::Normal`].
    pub fn verdict(self) -> Option<&'static str> {
        match self {
            Condition::Normal => None,
            Condition::Stopped => {
                Some("stopped by a signal: it closes and accepts nothing until it is continued")
            }
            Condition::Frozen => {
                Some("its cgroup is frozen: it closes and accepts nothing until it is thawed")
            }
            Condition::Traced => {
                Some("held by a debugger: it closes and accepts nothing until that lets it go")
            }
            Condition::Uninterruptible => Some(
                "its main thread is in uninterruptible sleep: it waits for a device or a file system, \
                 and no signal reaches it",
            ),
            Condition::ThreadUninterruptible(_) => Some(
                "not all of its threads run: some are in uninterruptible sleep, wait for a device or a file \
                 system, and no signal reaches them",
            ),
            Condition::Zombie => Some("ended, and not yet reaped by its parent"),
            Condition::Exited => Some("ended during the scan"),
        }
    }
}

/// The maximum number of services in one sentence.
const MAX_NAMED: usize = 2;

/// A fact about the owner that explains its sockets better than their causes do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Circumstance<'a> {
    #[default]
    None,
    /// The owner does not run, in this condition.
    Halted(Condition),
    /// The owner is at its limit of descriptors (RLIMIT_NOFILE).
    AtLimit,
    /// The host is at its limit of open files (fs.file-max).
    HostAtLimit,
    /// The owner has its descriptors from this process, and does not use them.
    Inherited(&'a Process),
    /// The owner is one of many processes with one connection each.
    PerConnection,
}

/// The meaning of the sockets of one cause.
///
/// Its code in JSON is the variant in kebab case, and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum Verdict {
    Leak,
    NotReading,
    NotAccepting,
    SlowPeers,
    /// As far as two scans show, they are in use.
    JustArrived,
    /// They are not in CLOSE-WAIT.
    NotJudged,
    Handshake,
    /// Closed by the process.
    Orphan,
    Listening,
    OwnerStopped,
    OwnerFrozen,
    OwnerTraced,
    AtDescriptorLimit,
    HostAtFileLimit,
    Inherited,
    ProcessPerConnection,
}

impl Verdict {
    /// The verdict on the sockets of one cause.
    pub fn of(cause: Cause, sockets: &CauseCount, circumstance: Circumstance<'_>) -> Verdict {
        match cause {
            // These are not connections of the application.
            Cause::Handshake => return Verdict::Handshake,
            Cause::Orphan => return Verdict::Orphan,
            Cause::Listening => return Verdict::Listening,
            _ if sockets.close_wait == 0 => return Verdict::NotJudged,
            _ if persistent(cause, sockets) == 0 => return Verdict::JustArrived,
            Cause::Sending => return Verdict::SlowPeers,
            Cause::Drained | Cause::Unread | Cause::NotAccepted => {}
        }
        match (circumstance, cause) {
            (Circumstance::Halted(Condition::Stopped), _) => Verdict::OwnerStopped,
            (Circumstance::Halted(Condition::Frozen), _) => Verdict::OwnerFrozen,
            (Circumstance::Halted(Condition::Traced), _) => Verdict::OwnerTraced,
            (Circumstance::AtLimit, Cause::NotAccepted) => Verdict::AtDescriptorLimit,
            (Circumstance::HostAtLimit, Cause::NotAccepted) => Verdict::HostAtFileLimit,
            (_, Cause::NotAccepted) => Verdict::NotAccepting,
            (Circumstance::Inherited(_), _) => Verdict::Inherited,
            (Circumstance::PerConnection, _) => Verdict::ProcessPerConnection,
            (_, Cause::Unread) => Verdict::NotReading,
            (_, _) => Verdict::Leak,
        }
    }

    /// The code in JSON.
    pub fn code(self) -> &'static str {
        self.into()
    }
}

/// The number of sockets that have lasted. A peer that accepts the bytes slowly keeps a sending socket from being idle, so only the
/// duration counts.
fn persistent(cause: Cause, sockets: &CauseCount) -> usize {
    match cause {
        Cause::Sending => sockets.lasting,
        _ => sockets.idle,
    }
}

/// The meaning of a cause for the program, in words.
pub fn cause_verdict(cause: Cause, sockets: &CauseCount, circumstance: Circumstance<'_>) -> String {
    let verdict = Verdict::of(cause, sockets, circumstance);
    let mut text = match verdict {
        Verdict::Leak => format!(
            "reads to the end and never closes: a leak in the code {}",
            code(&sockets.services)
        ),
        Verdict::NotReading => "not reading: idle pool or blocked worker".into(),
        Verdict::NotAccepting => {
            "not accepting: closing them frees no slot of the backlog, only accept(2) does, or --drain-backlog".into()
        }
        Verdict::SlowPeers => {
            "bytes queued to peers that accept them slowly or not at all: check the peers before closing"
                .into()
        }
        Verdict::JustArrived if cause == Cause::Sending => {
            "just arrived: bytes on their way, as far as two scans show".into()
        }
        Verdict::JustArrived => {
            "just arrived, or still in use: no leak as far as two scans show".into()
        }
        Verdict::NotJudged => {
            return "not in CLOSE-WAIT: cwkill cannot tell whether this is wrong".into();
        }
        Verdict::Handshake => {
            return "peers that do not finish the handshake: slow, spoofed or gone".into();
        }
        Verdict::Orphan => return "closed by its process: the kernel is still finishing it".into(),
        Verdict::Listening => return "a listener: nothing is wrong with it".into(),
        Verdict::OwnerStopped => "no verdict: its process is stopped".into(),
        Verdict::OwnerFrozen => "no verdict: its process is frozen".into(),
        Verdict::OwnerTraced => "no verdict: a debugger holds its process".into(),
        Verdict::AtDescriptorLimit => {
            "accept(2) fails with EMFILE: free some descriptors in its process".into()
        }
        Verdict::HostAtFileLimit => {
            "accept(2) fails with ENFILE: the host is at its limit fs.file-max".into()
        }
        Verdict::Inherited => {
            let from = match circumstance {
                Circumstance::Inherited(from) => from.to_string(),
                _ => "another process".into(),
            };
            format!("inherited from {from}, and not used here")
        }
        Verdict::ProcessPerConnection => {
            "one process per connection, busy or waiting for a client that is gone: end the process"
                .into()
        }
    };
    let (persistent, how) = match cause {
        Cause::Sending => (sockets.lasting, "queued"),
        _ => (sockets.idle, "idle"),
    };
    if persistent > 0 && persistent < sockets.close_wait {
        let _ = write!(
            text,
            " ({persistent} of {} {how} in both scans)",
            sockets.close_wait
        );
    }
    if sockets.close_wait < sockets.count {
        let other_states = sockets.count - sockets.close_wait;
        let _ = write!(
            text,
            " ({other_states} of them not in CLOSE-WAIT, and not judged)"
        );
    }
    text
}

/// The code of the services, with the number of sockets if there are several.
fn code(services: &[(Service, usize)]) -> String {
    let named = services.iter().take(MAX_NAMED).map(|(service, count)| {
        let code = match service {
            Service::Handles(port) => format!("that handles :{port}"),
            Service::CallsOut(port) => format!("that calls :{port}"),
        };
        match services.len() {
            1 => code,
            _ => format!("{code} ({count})"),
        }
    });
    let mut text = named.collect::<Vec<_>>().join(" and ");
    if services.len() > MAX_NAMED {
        let _ = write!(text, " and {} more", services.len() - MAX_NAMED);
    }
    text
}

/// The meaning of dead descriptors.
pub fn dead_verdict(circumstance: Circumstance<'_>) -> String {
    match circumstance {
        Circumstance::Inherited(from) => {
            format!("connections that are over, inherited from {from} and not used here")
        }
        _ => "descriptors of connections that are over, in no table of ss: only the process or cwkill reclaim can close them".into(),
    }
}

/// The meaning of a limit of descriptors that is reached.
pub const AT_LIMIT: &str = "at its descriptor limit: accept(2) and open(2) fail with EMFILE";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uninterruptible_once_is_normal() {
        let of = |first, second| Condition::of(Some(first), Some(second));
        assert_eq!(of('D', 'D'), Condition::Uninterruptible);
        for usual in [of('D', 'S'), of('S', 'D'), of('R', 'S')] {
            assert_eq!(usual, Condition::Normal);
        }
        assert_eq!(Condition::of(None, Some('D')), Condition::Normal);
        assert_eq!(of('S', 'T'), Condition::Stopped);
        assert_eq!(of('T', 'S'), Condition::Normal);
        assert_eq!(Condition::of(Some('S'), None), Condition::Exited);
        let thread = Condition::Normal.with_threads(&[8, 9]);
        assert_eq!(thread, Condition::ThreadUninterruptible(8));
        assert_eq!(Condition::Normal.with_threads(&[]), Condition::Normal);
        assert_eq!(Condition::Stopped.with_threads(&[8]), Condition::Stopped);
    }

    #[test]
    fn a_frozen_process_is_neither_stopped_nor_waiting_for_a_disk() {
        for condition in [
            Condition::Normal,
            Condition::Stopped,
            Condition::Uninterruptible,
        ] {
            assert_eq!(condition.with_frozen(true), Condition::Frozen);
            assert_eq!(condition.with_frozen(false), condition);
        }
        assert_eq!(Condition::Exited.with_frozen(true), Condition::Exited);
    }

    #[test]
    fn a_fact_about_the_owner_comes_before_the_cause() {
        let from = crate::proc::testdata::process(7, "server");
        let of = |cause, circumstance| Verdict::of(cause, &counts(&[]), circumstance).code();
        for (circumstance, accepted, waiting) in [
            (Circumstance::None, "leak", "not-accepting"),
            (Circumstance::AtLimit, "leak", "at-descriptor-limit"),
            (Circumstance::HostAtLimit, "leak", "host-at-file-limit"),
            (Circumstance::Inherited(&from), "inherited", "not-accepting"),
            (
                Circumstance::PerConnection,
                "process-per-connection",
                "not-accepting",
            ),
            (
                Circumstance::Halted(Condition::Stopped),
                "owner-stopped",
                "owner-stopped",
            ),
            (
                Circumstance::Halted(Condition::Frozen),
                "owner-frozen",
                "owner-frozen",
            ),
            (
                Circumstance::Halted(Condition::Traced),
                "owner-traced",
                "owner-traced",
            ),
        ] {
            assert_eq!(
                of(Cause::Drained, circumstance),
                accepted,
                "{circumstance:?}"
            );
            assert_eq!(
                of(Cause::NotAccepted, circumstance),
                waiting,
                "{circumstance:?}"
            );
            assert_eq!(of(Cause::Sending, circumstance), "slow-peers");
            let text = cause_verdict(Cause::Drained, &counts(&[]), circumstance);
            assert!(text.len() < 90, "{text}");
        }
        let new = CauseCount {
            idle: 0,
            ..counts(&[])
        };
        let of_new = Verdict::of(Cause::Drained, &new, Circumstance::Inherited(&from));
        assert_eq!(of_new, Verdict::JustArrived);
        let text = cause_verdict(Cause::Unread, &counts(&[]), Circumstance::Inherited(&from));
        assert_eq!(text, "inherited from server/7, and not used here");
    }

    #[test]
    fn the_man_page_lists_every_verdict() {
        use strum::VariantNames;
        let page = include_str!("../../man/cwkill-diagnose.8");
        for code in Verdict::VARIANTS {
            let line = format!("\n.B {}\n", code.replace('-', "\\-"));
            assert!(page.contains(&line), "{code}");
        }
    }

    fn counts(services: &[(Service, usize)]) -> CauseCount {
        CauseCount {
            count: 3,
            close_wait: 3,
            lasting: 3,
            idle: 3,
            services: services.to_vec(),
        }
    }

    #[test]
    fn verdicts_name_the_code_and_hold_for_close_wait_only() {
        use Service::{CallsOut, Handles};
        let text =
            |services: &[_]| cause_verdict(Cause::Drained, &counts(services), Circumstance::None);
        let one = text(&[(Handles(8080), 3)]);
        assert!(
            one.ends_with("a leak in the code that handles :8080"),
            "{one}"
        );
        let one = text(&[(CallsOut(5432), 3)]);
        assert!(one.ends_with("that calls :5432"), "{one}");
        let several = text(&[(CallsOut(5432), 2), (Handles(80), 1), (Handles(81), 1)]);
        let expected = "that calls :5432 (2) and that handles :80 (1) and 1 more";
        assert!(several.ends_with(expected), "{several}");
        let mut open = CauseCount {
            close_wait: 0,
            ..counts(&[(Handles(8080), 3)])
        };
        assert!(!cause_verdict(Cause::Drained, &open, Circumstance::None).contains("leak"));
        // A socket in another state does not hide those that leak.
        (open.close_wait, open.idle) = (2, 2);
        let some = cause_verdict(Cause::Drained, &open, Circumstance::None);
        assert!(
            some.contains("never closes") && some.contains("(1 of them not in"),
            "{some}"
        );
    }

    #[test]
    fn new_or_active_sockets_are_not_a_leak() {
        let text = |cause, idle| {
            let counts = CauseCount {
                idle,
                ..counts(&[(Service::Handles(80), 3)])
            };
            cause_verdict(cause, &counts, Circumstance::None)
        };
        for cause in [Cause::Drained, Cause::Unread, Cause::NotAccepted] {
            assert!(text(cause, 0).starts_with("just arrived"), "{cause}");
            assert!(
                text(cause, 2).ends_with("(2 of 3 idle in both scans)"),
                "{cause}"
            );
        }
        // The peer answers window probes, so `idle` does not matter here.
        assert_eq!(text(Cause::Sending, 0), text(Cause::Sending, 3));
        let sending = |lasting| {
            let counts = CauseCount {
                lasting,
                ..counts(&[])
            };
            cause_verdict(Cause::Sending, &counts, Circumstance::None)
        };
        assert!(sending(0).starts_with("just arrived"));
        assert!(sending(3).contains("check the peers"));
    }
}
