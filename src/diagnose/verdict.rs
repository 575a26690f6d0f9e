//! Explains in one sentence what a cause or the state of a process means for the operator. Pure.

use std::fmt::Write as _;

use super::group::{CauseCount, Service};
use crate::model::Cause;

/// The condition of a process, from its states (/proc/PID/stat) at the two scans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Normal,
    /// Stopped by a signal (state T).
    Stopped,
    /// Stopped by a debugger (state t).
    Traced,
    /// The main thread was in uninterruptible sleep (state D) at both scans. Once alone is normal during disk access.
    Uninterruptible,
    /// Another thread was, with this thread id.
    ThreadUninterruptible(i32),
    /// The process has ended, and its parent has not yet waited for it (state Z).
    Zombie,
    Gone,
}

impl Condition {
    /// The condition by the states at the first and the second scan; `None`: the process was not there.
    pub fn of(first: Option<char>, second: Option<char>) -> Condition {
        match (first, second) {
            (_, None) => Condition::Gone,
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

    /// The name in JSON; `None` for [`Condition::Normal`].
    pub fn name(self) -> Option<&'static str> {
        match self {
            Condition::Normal => None,
            Condition::Stopped => Some("stopped"),
            Condition::Traced => Some("traced"),
            Condition::Uninterruptible => Some("uninterruptible"),
            Condition::ThreadUninterruptible(_) => Some("thread-uninterruptible"),
            Condition::Zombie => Some("zombie"),
            Condition::Gone => Some("gone"),
        }
    }

    /// The meaning for the sockets; `None` for [`Condition::Normal`].
    pub fn verdict(self) -> Option<&'static str> {
        match self {
            Condition::Normal => None,
            Condition::Stopped => {
                Some("stopped by a signal: it closes and accepts nothing until it is continued")
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
            Condition::Gone => Some("ended during the scan"),
        }
    }
}

/// The maximum number of services in one sentence.
const MAX_NAMED: usize = 2;

/// The meaning of a cause for the program.
pub fn cause_verdict(cause: Cause, sockets: &CauseCount) -> String {
    // These are not connections of the application.
    if matches!(cause, Cause::Handshake | Cause::Orphan | Cause::Listening) {
        return meaning(cause, &[]);
    }
    if sockets.close_wait == 0 {
        return "not in CLOSE-WAIT: cwkill cannot tell whether this is wrong".into();
    }
    // A peer that accepts the bytes slowly keeps a sending socket from being idle, so only the duration counts.
    let (persistent, how) = match cause {
        Cause::Sending => (sockets.lasting, "queued"),
        _ => (sockets.idle, "idle"),
    };
    let mut text = match (persistent, cause) {
        (0, Cause::Sending) => "just arrived: bytes on their way, as far as two scans show".into(),
        (0, _) => "just arrived, or still in use: no leak as far as two scans show".into(),
        _ => meaning(cause, &sockets.services),
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

fn meaning(cause: Cause, services: &[(Service, usize)]) -> String {
    match cause {
        Cause::Drained => format!(
            "reads to the end and never closes: a leak in the code {}",
            code(services)
        ),
        Cause::Unread => "not reading: idle pool or blocked worker".into(),
        Cause::NotAccepted => {
            "not accepting: closing them frees no slot of the backlog, only accept(2) does".into()
        }
        Cause::Sending => {
            "bytes queued to peers that accept them slowly or not at all: check the peers before closing"
                .into()
        }
        Cause::Handshake => "peers that do not finish the handshake: slow, spoofed or gone".into(),
        Cause::Orphan => "closed by its process: the kernel is still finishing it".into(),
        Cause::Listening => "a listener: nothing is wrong with it".into(),
    }
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
pub const DEAD: &str = "descriptors of connections that are over, in no table of ss: only the process \
    can close them";

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
        assert_eq!(Condition::of(Some('S'), None), Condition::Gone);
        let thread = Condition::Normal.with_threads(&[8, 9]);
        assert_eq!(thread, Condition::ThreadUninterruptible(8));
        assert_eq!(Condition::Normal.with_threads(&[]), Condition::Normal);
        assert_eq!(Condition::Stopped.with_threads(&[8]), Condition::Stopped);
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
        let text = |services: &[_]| cause_verdict(Cause::Drained, &counts(services));
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
        assert!(!cause_verdict(Cause::Drained, &open).contains("leak"));
        // A socket in another state does not hide those that leak.
        (open.close_wait, open.idle) = (2, 2);
        let some = cause_verdict(Cause::Drained, &open);
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
            cause_verdict(cause, &counts)
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
            cause_verdict(Cause::Sending, &counts)
        };
        assert!(sending(0).starts_with("just arrived"));
        assert!(sending(3).contains("check the peers"));
    }
}
