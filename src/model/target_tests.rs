use strum::VariantNames;

use Method::{Destroy, Probe, Rst, Shutdown};

use super::*;
use crate::model::DrainReason;
use crate::proc::testdata::process;
use crate::sock_diag::testdata::stuck;

fn target() -> Target {
    let message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
    Target::new(Socket::from_message(&message))
}

/// A target with these attempts.
fn attempted(attempts: &[(Method, Option<MethodError>)]) -> Target {
    let mut target = target();
    for (method, error) in attempts {
        target.attempt(*method, error.clone());
    }
    target
}

const LOST: Option<MethodError> = Some(MethodError::AnswerLost(Errno::ENOBUFS));
const IGNORED: Option<MethodError> = Some(MethodError::RstIgnored);
const GONE: Option<MethodError> = Some(MethodError::Gone);
const SILENT: Option<MethodError> = Some(MethodError::PeerSilent);

#[test]
fn the_last_method_that_acted_or_maybe_did_has_closed_the_socket() {
    for (attempts, acted, closed_by) in [
        (&[][..], None, None),
        (&[(Shutdown, GONE), (Probe, SILENT)], None, None),
        (&[(Shutdown, None)], Some(Shutdown), Some(Shutdown)),
        (
            &[(Shutdown, None), (Destroy, None), (Rst, GONE)],
            Some(Destroy),
            Some(Destroy),
        ),
        (&[(Destroy, LOST), (Probe, SILENT)], None, Some(Destroy)),
        (&[(Rst, IGNORED)], None, Some(Rst)),
        (
            &[(Shutdown, None), (Rst, IGNORED)],
            Some(Shutdown),
            Some(Rst),
        ),
        (
            &[(Rst, IGNORED), (Shutdown, None)],
            Some(Shutdown),
            Some(Shutdown),
        ),
    ] {
        let mut target = attempted(attempts);
        assert_eq!(target.acted(), acted, "{attempts:?}");
        assert_eq!(target.maybe_closed_by(), closed_by, "{attempts:?}");
        target.note_vanished();
        let outcome = closed_by.map_or(Outcome::Gone, Outcome::Closed);
        assert_eq!(target.outcome, Some(outcome), "{attempts:?}");
        target.note_time_wait();
        let outcome = acted.map_or(Outcome::Gone, Outcome::Closed);
        assert_eq!(target.outcome, Some(outcome), "{attempts:?}");
    }
}

#[test]
fn an_answer_of_the_peer_decides_the_outcome() {
    let mut target = target();
    target.record(Probe, Err(MethodError::PeerSilent));
    assert_eq!(target.outcome, None);
    target.record(Probe, Err(MethodError::PeerAlive));
    let alive = Outcome::Skipped(SkipReason::PeerAlive);
    assert_eq!(target.outcome, Some(alive));
    assert_eq!(target.attempts.len(), 2);
}

#[test]
fn a_descriptor_is_open_if_any_owner_still_has_one() {
    let open = |outcome, states: &[Option<FdState>]| {
        let mut target = target();
        target.outcome = outcome;
        for (fd, state) in (3..).zip(states) {
            let mut owner = Owner::new(process(7, "app"), RemoteFd(fd));
            owner.after = *state;
            target.owners.push(owner);
        }
        target.descriptor_open()
    };
    let closed = Some(Outcome::Closed(Destroy));
    let closing = Some(Outcome::Closing(Shutdown, TcpState::LastAck));
    let (yes, no, unknown) = (
        Some(FdState::Open),
        Some(FdState::Closed),
        Some(FdState::Unknown),
    );
    assert_eq!(open(closed, &[no, yes]), Some(true));
    assert_eq!(open(closing, &[yes]), Some(true));
    assert_eq!(open(closed, &[unknown, yes]), Some(true));
    assert_eq!(open(closed, &[no, no]), Some(false));
    assert_eq!(open(closed, &[no, unknown]), None);
    assert_eq!(open(closed, &[no, None]), None, "not checked");
    assert_eq!(open(closed, &[]), None, "no owner is known");
    let skipped = Outcome::Skipped(SkipReason::PeerAlive);
    for outcome in [Outcome::Gone, Outcome::Failed, skipped] {
        assert_eq!(open(Some(outcome), &[yes]), None, "{outcome:?}");
    }
    assert_eq!(open(None, &[yes]), None);
}

#[test]
fn a_socket_that_was_never_accepted_has_no_open_descriptor() {
    let mut target = target();
    target.socket.inode = None;
    assert_eq!(target.descriptor_open(), None);
    target.outcome = Some(Outcome::Closed(Destroy));
    assert_eq!(target.descriptor_open(), Some(false));
}

#[test]
fn a_run_that_broke_off_fails_the_targets_without_an_outcome() {
    let bug = |method| Attempt {
        method,
        error: Some(MethodError::Bug),
        at_one_instant: false,
    };

    let mut untouched = target();
    untouched.plan.methods = vec![Shutdown, Destroy];
    untouched.fail_unfinished(MethodError::Bug);
    assert_eq!(untouched.outcome, Some(Outcome::Failed));
    assert_eq!(untouched.attempts, [bug(Shutdown), bug(Destroy)]);

    let mut begun = attempted(&[(Shutdown, None)]);
    begun.plan.methods = vec![Shutdown, Destroy];
    begun.fail_unfinished(MethodError::Bug);
    assert_eq!(begun.outcome, Some(Outcome::Failed));
    assert_eq!(begun.attempts[1..], [bug(Shutdown)]);

    let mut skipped = target();
    skipped.plan.skip = Some(SkipReason::OverMaxKills);
    skipped.fail_unfinished(MethodError::Bug);
    let over = Outcome::Skipped(SkipReason::OverMaxKills);
    assert_eq!(skipped.outcome, Some(over));
    assert!(skipped.attempts.is_empty());

    let mut closed = target();
    closed.outcome = Some(Outcome::Closed(Destroy));
    closed.fail_unfinished(MethodError::Bug);
    assert_eq!(closed.outcome, Some(Outcome::Closed(Destroy)));
    assert!(closed.attempts.is_empty());
}

#[test]
fn the_reason_is_that_of_the_skip_or_of_the_last_attempt() {
    let code = |outcome, attempts: &[(Method, Option<MethodError>)]| {
        let mut target = attempted(attempts);
        target.outcome = outcome;
        target.reason_code()
    };
    let failed = Some(Outcome::Failed);
    let attempts = [(Shutdown, GONE), (Rst, IGNORED)];
    assert_eq!(code(failed, &attempts), Some("rst-ignored"));
    assert_eq!(
        code(failed, &[(Rst, IGNORED), (Destroy, None)]),
        Some("still-there")
    );
    assert_eq!(code(failed, &[]), Some("still-there"));
    let skipped = Some(Outcome::Skipped(SkipReason::UnsentData(5)));
    assert_eq!(code(skipped, &attempts), Some("unsent-data"));
    let closing = Outcome::Closing(Shutdown, TcpState::LastAck);
    for outcome in [
        None,
        Some(Outcome::Closed(Rst)),
        Some(closing),
        Some(Outcome::Gone),
    ] {
        assert_eq!(code(outcome, &attempts), None, "{outcome:?}");
    }
}

/// The codes stand in JSON and in the log, and scripts compare them.
#[test]
fn codes_are_stable() {
    assert_eq!(
        Outcome::VARIANTS,
        ["closed", "closing", "gone", "skipped", "failed"]
    );
    assert_eq!(
        SkipReason::VARIANTS,
        [
            "no-method",
            "over-max-kills",
            "unsent-data",
            "no-longer-selected",
            "in-use",
            "accepted",
            "would-spin",
            "owner-spins",
            "too-many-threads",
            "canary-refused",
            "peer-alive",
            "interrupted",
        ]
    );
    assert_eq!(
        Exclusion::VARIANTS,
        [
            "not-accepted",
            "no-owner",
            "owners-not-searched",
            "unsent-data",
            "address-gone",
            "not-permitted",
            "mptcp-not-accepted",
            "mptcp",
            "wrong-state",
        ]
    );
    assert_eq!(
        MethodError::VARIANTS,
        [
            "gone",
            "descriptors-gone",
            "other-pid-namespace",
            "not-permitted",
            "refused-despite-privilege",
            "not-supported",
            "orphan-on-old-kernel",
            "unsent-data",
            "address-gone",
            "no-ack",
            "rst-ignored",
            "peer-alive",
            "peer-silent",
            "answer-lost",
            "walk-held-up",
            "bug",
            "system-call",
        ]
    );
    assert_eq!(
        DrainReason::VARIANTS,
        [
            "live-connection",
            "no-owner",
            "no-duplicate",
            "not-tcp",
            "owner-not-stopped",
            "new-owner",
            "accepted-elsewhere",
            "stop-limit-reached",
            "lost-live-connection",
            "interrupted",
            "system-call",
        ]
    );
    let all = [
        Outcome::VARIANTS,
        SkipReason::VARIANTS,
        Exclusion::VARIANTS,
        MethodError::VARIANTS,
        DrainReason::VARIANTS,
    ];
    for code in all.concat() {
        let is_word = |word: &str| {
            !word.is_empty()
                && word
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        assert!(code.split('-').all(is_word), "{code}");
    }
    assert_eq!(SkipReason::UnsentData(5).code(), "unsent-data");
    assert_eq!(
        Exclusion::WrongState(TcpState::Listen, "x").code(),
        "wrong-state"
    );
    assert_eq!(MethodError::NoAck(None).code(), "no-ack");
    assert_eq!(Outcome::Closed(Rst).name(), "closed");
}

#[test]
fn the_errno_is_that_of_the_system_call() {
    let denied = MethodError::NotPermitted(Privilege::NetAdmin, Errno::EPERM);
    assert_eq!(denied.errno(), Some(Errno::EPERM));
    let no_ack = MethodError::NoAck(Some(Box::new(denied)));
    assert_eq!(no_ack.errno(), Some(Errno::EPERM));
    assert!(
        no_ack
            .to_string()
            .contains(": needs CAP_NET_ADMIN; the socket sent no ACK"),
        "{no_ack}"
    );
    assert_eq!(MethodError::NoAck(None).errno(), None);
    assert_eq!(MethodError::Bug.errno(), None);
}

#[test]
fn the_man_page_lists_every_code() {
    let page = include_str!("../../man/cwkill.8");
    let page = page
        .split(".SH \"REASON CODES\"")
        .nth(1)
        .expect("the section");
    let lists = [
        SkipReason::VARIANTS,
        Exclusion::VARIANTS,
        MethodError::VARIANTS,
        DrainReason::VARIANTS,
        &["still-there"],
    ];
    for code in lists.concat() {
        let line = format!("\n.B {}\n", code.replace('-', "\\-"));
        assert!(page.contains(&line), "{code}");
    }
}
