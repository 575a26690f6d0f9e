//! What a cause means, and what the state of a process adds to it, in plain words. Pure.

use std::fmt::Write as _;

use super::group::{OfCause, Service};
use crate::model::Cause;

/// What the state of a process at two looks says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    Usual,
    /// Stopped by a signal (T).
    Stopped,
    /// Held by a debugger (t).
    Traced,
    /// In uninterruptible sleep at both looks (D); once is usual while it waits for a disk.
    Uninterruptible,
    /// This one of its other threads is.
    ThreadUninterruptible(i32),
    /// It has ended, and its parent has not taken note (Z).
    Zombie,
    /// It is no longer there.
    Gone,
}

impl Condition {
    /// From the states at the first look, if it was seen then, and at the second.
    pub fn of(first: Option<char>, second: Option<char>) -> Condition {
        match (first, second) {
            (_, None) => Condition::Gone,
            (_, Some('T')) => Condition::Stopped,
            (_, Some('t')) => Condition::Traced,
            (_, Some('Z' | 'X')) => Condition::Zombie,
            (Some('D'), Some('D')) => Condition::Uninterruptible,
            _ => Condition::Usual,
        }
    }

    /// With the other threads that were in uninterruptible sleep at both looks.
    pub fn with_threads(self, asleep: &[i32]) -> Condition {
        match (self, asleep.first()) {
            (Condition::Usual, Some(thread)) => Condition::ThreadUninterruptible(*thread),
            _ => self,
        }
    }

    /// The name in JSON.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Condition::Usual => None,
            Condition::Stopped => Some("stopped"),
            Condition::Traced => Some("traced"),
            Condition::Uninterruptible => Some("uninterruptible"),
            Condition::ThreadUninterruptible(_) => Some("thread-uninterruptible"),
            Condition::Zombie => Some("zombie"),
            Condition::Gone => Some("gone"),
        }
    }

    /// What it means for the sockets, if anything.
    pub fn verdict(self) -> Option<&'static str> {
        match self {
            Condition::Usual => None,
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

/// Services that are named.
const NAMED: usize = 2;

/// What a cause says of the program.
pub fn of_cause(cause: Cause, sockets: &OfCause) -> String {
    // What is no connection of the application is another matter.
    if matches!(cause, Cause::Handshake | Cause::Orphan | Cause::Listening) {
        return meaning(cause, &[]);
    }
    if sockets.close_wait == 0 {
        return "not in CLOSE-WAIT: cwkill cannot tell whether this is wrong".into();
    }
    // A peer that takes nothing is asked again and again, and answers: only that it lasts can be told.
    let (seen, how) = match cause {
        Cause::Sending => (sockets.lasting, "queued"),
        _ => (sockets.idle, "idle"),
    };
    let mut text = match (seen, cause) {
        (0, Cause::Sending) => "just arrived: bytes on their way, as far as two scans show".into(),
        (0, _) => "just arrived, or still in use: no leak as far as two scans show".into(),
        _ => meaning(cause, &sockets.services),
    };
    if seen > 0 && seen < sockets.close_wait {
        let _ = write!(
            text,
            " ({seen} of {} {how} in both scans)",
            sockets.close_wait
        );
    }
    if sockets.close_wait < sockets.count {
        let others = sockets.count - sockets.close_wait;
        let _ = write!(
            text,
            " ({others} of them not in CLOSE-WAIT, and not judged)"
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
            "not accepting: closing sockets will not help, the accept loop is stuck".into()
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

/// The code to look at, with numbers if there are several.
fn code(services: &[(Service, usize)]) -> String {
    let named = services.iter().take(NAMED).map(|(service, count)| {
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
    if services.len() > NAMED {
        let _ = write!(text, " and {} more", services.len() - NAMED);
    }
    text
}

/// What dead descriptors mean.
pub const DEAD: &str = "descriptors of connections that are over, in no table of ss: only the process \
    can close them";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_disk_once_is_no_hang() {
        let of = |first, second| Condition::of(Some(first), Some(second));
        assert_eq!(of('D', 'D'), Condition::Uninterruptible);
        for usual in [of('D', 'S'), of('S', 'D'), of('R', 'S')] {
            assert_eq!(usual, Condition::Usual);
        }
        assert_eq!(Condition::of(None, Some('D')), Condition::Usual);
        assert_eq!(of('S', 'T'), Condition::Stopped);
        assert_eq!(of('T', 'S'), Condition::Usual);
        assert_eq!(Condition::of(Some('S'), None), Condition::Gone);
        let thread = Condition::Usual.with_threads(&[8, 9]);
        assert_eq!(thread, Condition::ThreadUninterruptible(8));
        assert_eq!(Condition::Usual.with_threads(&[]), Condition::Usual);
        assert_eq!(Condition::Stopped.with_threads(&[8]), Condition::Stopped);
    }

    fn sockets(services: &[(Service, usize)]) -> OfCause {
        OfCause {
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
        let text = |services: &[_]| of_cause(Cause::Drained, &sockets(services));
        let one = text(&[(Handles(8080), 3)]);
        assert!(
            one.ends_with("a leak in the code that handles :8080"),
            "{one}"
        );
        let one = text(&[(CallsOut(5432), 3)]);
        assert!(one.ends_with("that calls :5432"), "{one}");
        let several = text(&[(CallsOut(5432), 2), (Handles(80), 1), (Handles(81), 1)]);
        let wanted = "that calls :5432 (2) and that handles :80 (1) and 1 more";
        assert!(several.ends_with(wanted), "{several}");
        let mut open = OfCause {
            close_wait: 0,
            ..sockets(&[(Handles(8080), 3)])
        };
        assert!(!of_cause(Cause::Drained, &open).contains("leak"));
        // One of another state does not hide those that leak.
        (open.close_wait, open.idle) = (2, 2);
        let some = of_cause(Cause::Drained, &open);
        assert!(
            some.contains("never closes") && some.contains("(1 of them not in"),
            "{some}"
        );
    }

    #[test]
    fn what_has_just_come_or_moves_is_no_leak() {
        let text = |cause, seen| {
            let sockets = OfCause {
                idle: seen,
                ..sockets(&[(Service::Handles(80), 3)])
            };
            of_cause(cause, &sockets)
        };
        for cause in [Cause::Drained, Cause::Unread, Cause::NotAccepted] {
            assert!(text(cause, 0).starts_with("just arrived"), "{cause}");
            assert!(
                text(cause, 2).ends_with("(2 of 3 idle in both scans)"),
                "{cause}"
            );
        }
        // Probes are answered, so that it is never idle.
        assert_eq!(text(Cause::Sending, 0), text(Cause::Sending, 3));
        let sending = |lasting| {
            let sockets = OfCause {
                lasting,
                ..sockets(&[])
            };
            of_cause(Cause::Sending, &sockets)
        };
        assert!(sending(0).starts_with("just arrived"));
        assert!(sending(3).contains("check the peers"));
    }
}
