//! Changes between the scan and the act. The tests call the stages one by one on real sockets, and change the world
//! between them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netns_harness::{Dial, Family, Lab, Leak, Recv, TcpState};

use cwkill::finder::netns::Which;
use cwkill::finder::owners::Proc;
use cwkill::finder::sock_diag::{
    DestroyError, Detail, DiagId, LookupError, SockDiag, SocketMessage,
};
use cwkill::finder::{self, Found};
use cwkill::injector::ladder::{self, Outcome, Rules, Surroundings, Verdict};
use cwkill::injector::{self, ActError, MethodName, Scene, Target};
use cwkill::plan::{self, Policy};
use cwkill::privileges::Privileges;
use cwkill::selectors::Selectors;

use crate::support::{PATIENCE, connections, in_state, lab};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_reused_descriptor_number_is_not_touched),
    each_family!(a_reused_tuple_is_not_touched),
    each_family!(an_owner_that_dies_does_not_affect_others),
    once!(a_socket_that_closes_on_its_own_is_gone),
    once!(a_socket_accepted_meanwhile_is_skipped),
    once!(the_act_goes_through_the_remaining_owners),
    once!(lost_answers_are_not_taken_for_others),
    once!(silence_means_done_only_if_no_answer_was_lost),
];

pub struct Now;

impl Surroundings for Now {
    fn now(&self) -> Instant {
        Instant::now()
    }
    fn pause(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
    fn interrupted(&self) -> bool {
        false
    }
    fn acted(&self, _: MethodName, _: usize) {}
}

/// Finds all stuck sockets of the leaking host, runs `change`, then acts.
fn act_after(
    lab: &Lab,
    methods: &[MethodName],
    change: impl FnOnce() -> Result<()> + Send,
) -> Result<(Found, Vec<Outcome>)> {
    lab.app_host().within(|| {
        let proc = Proc::default();
        let selectors = Selectors::default();
        let found = find(&proc, &selectors)?;
        let policy = Policy {
            methods: methods.to_vec(),
            discard_unsent: false,
            max_kills: None,
            idle_only: false,
        };
        let plans = plan::build(&found, &policy, &Privileges::of_this_thread()?);
        change()?;
        let mut methods = injector::methods(&policy.methods, &proc)?;
        let rules = Rules {
            grace: Duration::from_millis(500),
            discard_unsent: false,
            selectors: &selectors,
            kernel: cwkill::kernel::KernelVersion::running(),
        };
        let all: Vec<usize> = (0..found.sockets.len()).collect();
        let mut diag = SockDiag::open()?;
        let outcomes = ladder::climb(&found, &plans, &all, &mut methods, &mut diag, rules, &Now);
        Ok((found, outcomes))
    })
}

fn find(proc: &Proc, selectors: &Selectors) -> Result<Found> {
    let here = Which::Ours.open(proc)?;
    Ok(finder::find(&here.open, proc, selectors)?)
}

/// Runs one method alone, without the recheck before it, on the sockets found before `change`.
fn bare_act_after(
    lab: &Lab,
    method: MethodName,
    change: impl FnOnce() -> Result<()> + Send,
) -> Result<Result<(), ActError>> {
    lab.app_host().within(|| {
        let proc = Proc::default();
        let found = find(&proc, &Selectors::default())?;
        assert_eq!(found.sockets.len(), 1, "{found:#?}");
        change()?;
        let mut methods = injector::methods(&[method], &proc)?;
        let mut scene = OnlyCookies(SockDiag::open()?, found.sockets[0].id);
        let mut results = methods[0].act(&[Target::new(&found, 0)], &mut scene);
        Ok(results.remove(0))
    })
}

/// The lookups that a method makes itself, by cookie alone.
struct OnlyCookies(SockDiag, DiagId);

impl Scene for OnlyCookies {
    fn grace(&self) -> Duration {
        Duration::from_millis(700)
    }
    fn surroundings(&self) -> &dyn Surroundings {
        &Now
    }
    fn still_fit(&mut self, targets: &[usize], _: bool) -> Vec<bool> {
        self.look(targets).iter().map(Result::is_ok).collect()
    }
    fn look(&mut self, targets: &[usize]) -> Vec<Result<SocketMessage, LookupError>> {
        let looks = self.0.lookup(&vec![self.1; targets.len()], Detail::Quiet);
        looks.expect("the kernel can be asked")
    }
}

/// The owner closes the stuck descriptor and gets its number again for a new bystander connection.
fn swap_descriptor(leak: &Leak) -> Result<(netns_harness::Fd, netns_harness::Fd)> {
    let old = leak.conns()[0];
    let fd = old.app_fd.context("no descriptor")?;
    leak.app().close(&[fd])?;
    let peer = leak.peer();
    let ends = peer.connect(leak.pair().app_address, 1, Dial::default(), PATIENCE)?;
    let accepted = leak.app().accept(leak.pair().listener, 1, PATIENCE)?;
    assert_eq!(accepted[0].fd, fd, "the number is used again");
    Ok((fd, ends[0].fd))
}

#[track_caller]
fn lives(leak: &Leak, app: netns_harness::Fd, peer: netns_harness::Fd) -> Result<()> {
    leak.peer().send(&[peer], b"still here?")?;
    let got = leak.app().recv(app, 100, PATIENCE)?;
    assert_eq!(got, Recv::Data(b"still here?".to_vec()));
    leak.app().send(&[app], b"yes")?;
    let got = leak.peer().recv(peer, 100, PATIENCE)?;
    assert_eq!(got, Recv::Data(b"yes".to_vec()));
    Ok(())
}

fn a_reused_descriptor_number_is_not_touched(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 1)?;
    let mut bystander = None;
    let swap = || {
        bystander = Some(swap_descriptor(&leak)?);
        Ok(())
    };
    let (_, outcomes) = act_after(&lab, &MethodName::AUTO, swap)?;
    assert!(matches!(outcomes[0].verdict, Verdict::Gone), "{outcomes:?}");
    let (app, peer) = bystander.context("swapped")?;
    lives(&leak, app, peer)?;

    // Without the recheck, the method itself compares the cookie.
    let (lab, leak) = crate::support::lab("drained", family, 1)?;
    let mut bystander = None;
    let swap = || {
        bystander = Some(swap_descriptor(&leak)?);
        Ok(())
    };
    let result = bare_act_after(&lab, MethodName::Shutdown, swap)?;
    assert!(
        matches!(result, Err(ActError::DescriptorsGone)),
        "{result:?}"
    );
    let (app, peer) = bystander.context("swapped")?;
    lives(&leak, app, peer)
}

/// Both ends close the stuck connection, and the peer opens a new one from the same port.
fn swap_connection(lab: &Lab, leak: &Leak) -> Result<(netns_harness::Fd, netns_harness::Fd)> {
    let old = leak.conns()[0];
    let before = connections(lab)?;
    // After the application's reset, neither side keeps the 4-tuple.
    leak.app().set_option(
        &leak.app_fds(),
        netns_harness::SocketOption::Linger(Some(0)),
    )?;
    leak.app().close(&leak.app_fds())?;
    leak.peer().close(&leak.peer_fds())?;
    lab.wait_for(PATIENCE, || Ok(connections(lab)?.is_empty()))?;
    let dial = Dial {
        from: Some(old.peer),
        ..Dial::default()
    };
    let ends = leak
        .peer()
        .connect(leak.pair().app_address, 1, dial, PATIENCE)?;
    let accepted = leak.app().accept(leak.pair().listener, 1, PATIENCE)?;
    let now = connections(lab)?;
    assert_eq!(
        (now[0].local, now[0].peer),
        (before[0].local, before[0].peer)
    );
    Ok((accepted[0].fd, ends[0].fd))
}

fn a_reused_tuple_is_not_touched(family: Family) -> Result<()> {
    for method in MethodName::AUTO {
        let (lab, leak) = lab("drained", family, 1)?;
        let mut bystander = None;
        let swap = || {
            bystander = Some(swap_connection(&lab, &leak)?);
            Ok(())
        };
        let (_, outcomes) = act_after(&lab, &[method], swap)?;
        assert!(matches!(outcomes[0].verdict, Verdict::Gone), "{outcomes:?}");
        let (app, peer) = bystander.context("swapped")?;
        lives(&leak, app, peer)?;
    }

    let (lab, leak) = lab("drained", family, 1)?;
    let mut bystander = None;
    let swap = || {
        bystander = Some(swap_connection(&lab, &leak)?);
        Ok(())
    };
    let result = bare_act_after(&lab, MethodName::Destroy, swap)?;
    assert!(matches!(result, Err(ActError::Gone)), "{result:?}");
    let (app, peer) = bystander.context("swapped")?;
    lives(&leak, app, peer)?;
    assert_eq!(in_state(&lab, TcpState::Listen)?, 1);

    // The elicited ACK now comes from the new connection. The lookup after it detects that.
    for method in [MethodName::Rst, MethodName::Probe] {
        let (lab, leak) = crate::support::lab("drained", family, 1)?;
        let mut bystander = None;
        let swap = || {
            bystander = Some(swap_connection(&lab, &leak)?);
            Ok(())
        };
        let _ = bare_act_after(&lab, method, swap)?;
        let (app, peer) = bystander.context("swapped")?;
        lives(&leak, app, peer)?;
        assert_eq!(in_state(&lab, TcpState::Listen)?, 1);
    }
    assert_eq!(in_state(&lab, TcpState::Listen)?, 1);
    Ok(())
}

fn an_owner_that_dies_does_not_affect_others(family: Family) -> Result<()> {
    let (lab, doomed) = lab("unread", family, 3)?;
    let other = netns_harness::Options {
        port: 9090,
        own: true,
        count: 2,
        ..Default::default()
    };
    let _other = lab.start("unread", family, other)?;
    let (found, outcomes) = act_after(&lab, &MethodName::AUTO, || {
        doomed.app().kill()?;
        // With unread data, the kernel answers close(2) with a reset, and the sockets are gone at once.
        lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 2))
    })?;
    for (socket, outcome) in found.sockets.iter().zip(&outcomes) {
        let as_wanted = match socket.tuple.local.port() {
            9090 => matches!(outcome.verdict, Verdict::Closed(MethodName::Shutdown)),
            _ => matches!(outcome.verdict, Verdict::Gone),
        };
        assert!(as_wanted, "{outcome:?}");
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn a_socket_that_closes_on_its_own_is_gone() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 2)?;
    let first = leak.app_fds()[0];
    let (_, outcomes) = act_after(&lab, &MethodName::AUTO, || leak.app().close(&[first]))?;
    let gone = outcomes
        .iter()
        .filter(|o| matches!(o.verdict, Verdict::Gone));
    assert_eq!(gone.count(), 1);
    let closed = |o: &&Outcome| matches!(o.verdict, Verdict::Closed(MethodName::Shutdown));
    assert_eq!(outcomes.iter().filter(closed).count(), 1);
    Ok(())
}

fn a_socket_accepted_meanwhile_is_skipped() -> Result<()> {
    let (lab, leak) = lab("not-accepted", Family::V4, 2)?;
    let (_, outcomes) = act_after(&lab, &MethodName::AUTO, || {
        leak.app().accept(leak.pair().listener, 1, PATIENCE)?;
        Ok(())
    })?;
    let left = outcomes
        .iter()
        .filter(|o| matches!(o.verdict, Verdict::Skipped(ladder::Skip::Accepted)));
    assert_eq!(left.count(), 1);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

/// cwkill acts through an owner that still has the socket.
fn the_act_goes_through_the_remaining_owners() -> Result<()> {
    let (lab, leak) = lab("forked", Family::V4, 2)?;
    let (found, outcomes) = act_after(&lab, &[MethodName::Shutdown], || {
        leak.app().close(&leak.app_fds())
    })?;
    assert!(found.sockets.iter().all(|socket| socket.owners.len() == 3));
    let closed = |o: &&Outcome| matches!(o.verdict, Verdict::Closed(MethodName::Shutdown));
    assert_eq!(outcomes.iter().filter(closed).count(), 2);
    Ok(())
}

/// The receive queue has room for a few answers only. Every lookup still gets its answer, and a lost answer to a destroy
/// request is reported as lost.
fn lost_answers_are_not_taken_for_others() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 200)?;
    lab.app_host().within(|| {
        let found = find(&Proc::default(), &Selectors::default())?;
        let ids: Vec<DiagId> = found.sockets.iter().map(|socket| socket.id).collect();
        let mut tiny = SockDiag::with_queue(1)?;
        let seen = tiny.lookup(&ids, Detail::Quiet)?;
        assert_eq!(seen.iter().filter(|look| look.is_ok()).count(), 200);
        let mut lost = 0;
        for result in tiny.destroy(&ids)? {
            match result {
                Ok(()) => {}
                Err(DestroyError::AnswerLost) => lost += 1,
                Err(other) => anyhow::bail!("{other:?}"),
            }
        }
        assert!(lost > 0, "the queue was too large for this test");
        Ok(())
    })?;
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

/// Many destroy requests with one answer: failures are reported, and if answers were lost, no request counts as done.
fn silence_means_done_only_if_no_answer_was_lost() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 200)?;
    lab.app_host().within(|| {
        let found = find(&Proc::default(), &Selectors::default())?;
        let ids: Vec<DiagId> = found.sockets.iter().map(|socket| socket.id).collect();
        let mut diag = SockDiag::open()?;
        let (gone, there) = (&ids[..50], &ids[50..150]);
        assert!(diag.destroy_together(gone)?.iter().all(Result::is_ok));
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 150);
        // Every third socket is gone.
        let mixed: Vec<DiagId> = (gone.iter())
            .zip(there.chunks(2))
            .flat_map(|(gone, two)| [*gone, two[0], two[1]])
            .collect();
        for (at, result) in diag.destroy_together(&mixed)?.iter().enumerate() {
            match (at % 3, result) {
                (0, Err(DestroyError::Gone)) | (1 | 2, Ok(())) => {}
                other => anyhow::bail!("{at}: {other:?}"),
            }
        }
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 50);
        // The queue has no room for the answers about the sockets that are gone.
        let mut tiny = SockDiag::with_queue(1)?;
        let (gone, there) = (&ids[..40], &ids[150..]);
        let all: Vec<DiagId> = gone.iter().chain(&there[..20]).copied().collect();
        let results = tiny.destroy_together(&all)?;
        let lost =
            |result: &Result<(), DestroyError>| matches!(result, Err(DestroyError::AnswerLost));
        assert!(
            results.iter().any(lost),
            "the queue was too large for this test"
        );
        assert!(!results.iter().any(Result::is_ok), "{results:?}");
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 30);
        Ok(())
    })
}
