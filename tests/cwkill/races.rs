//! Changes between the scan and the act. The tests call the stages one by one on real sockets, and change the world
//! between them.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netns_harness::{Dial, Family, Lab, Leak, Recv, TcpState};

use cwkill::control::Control;
use cwkill::filter::selectors::Selectors;
use cwkill::finder;
use cwkill::history::History;
use cwkill::injector::engine::{self, Lookup, Rules, SocketTables};
use cwkill::injector::executors;
use cwkill::injector::plan::{self, Policy};
use cwkill::kernel::KernelVersion;
use cwkill::model::{Attempt, Method, MethodError, Outcome, Scan, SkipReason, Target};
use cwkill::privileges::Privileges;
use cwkill::proc::ProcFs;
use cwkill::proc::netns::NetnsScope;
use cwkill::sock_diag::{Cookie, DestroyError, Detail, DiagId, SockDiag};
use cwkill::tcp::StateSet;

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
];

pub struct Now;

impl Control for Now {
    fn now(&self) -> Instant {
        Instant::now()
    }
    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
    fn interrupted(&self) -> bool {
        false
    }
    fn progress(&self, _: Method, _: usize) {}
}

/// Finds and plans for all stuck sockets of the network namespace of the calling thread.
pub fn find(proc: &ProcFs, methods: &[Method]) -> Result<Scan> {
    let here = finder::open_namespaces(&NetnsScope::Current, &Selectors::default(), proc)?;
    let mut scan = finder::find(&here, proc, &Selectors::default(), &History::none())?;
    let policy = Policy {
        methods: methods.to_vec(),
        discard_unsent: false,
        allow_spin: true,
        frees_epoll_members: false,
        max_kills: None,
        has_min_time: false,
    };
    plan::build(&mut scan, &policy, &Privileges::of_this_thread()?);
    Ok(scan)
}

/// Runs the plans of `scan`; the engine asks `kernel` for the sockets.
fn act(
    scan: &mut Scan,
    proc: &ProcFs,
    methods: &[Method],
    kernel: &mut dyn SocketTables,
    grace: Duration,
) -> Result<()> {
    let selectors = Selectors::default();
    let rules = Rules {
        grace,
        discard_unsent: false,
        selectors: &selectors,
        kernel_version: KernelVersion::running(),
        destroyer: None,
    };
    let mut targets: Vec<&mut Target> = scan.targets.iter_mut().collect();
    let mut executors = executors(methods, proc)?;
    engine::run(&mut targets, &mut executors, kernel, rules, &Now);
    Ok(())
}

/// Finds all stuck sockets of the leaking host, runs `change`, then acts.
fn act_after(
    lab: &Lab,
    methods: &[Method],
    change: impl FnOnce() -> Result<()> + Send,
) -> Result<Vec<Target>> {
    lab.app_host().within(|| {
        let proc = ProcFs::default();
        let mut scan = find(&proc, methods)?;
        change()?;
        let mut kernel = SockDiag::open()?;
        let grace = Duration::from_millis(500);
        act(&mut scan, &proc, methods, &mut kernel, grace)?;
        Ok(scan.targets)
    })
}

/// Finds the one stuck socket of the leaking host, runs `change`, then acts by one method. The recheck before the act does
/// not see the change.
fn act_unchecked_after(
    lab: &Lab,
    method: Method,
    change: impl FnOnce() -> Result<()> + Send,
) -> Result<Target> {
    lab.app_host().within(|| {
        let proc = ProcFs::default();
        let mut scan = find(&proc, &[method])?;
        assert_eq!(scan.targets.len(), 1, "{:#?}", scan.targets);
        let mut kernel = OutdatedOnce::new(scan.targets[0].socket.id)?;
        change()?;
        let grace = Duration::from_millis(700);
        act(&mut scan, &proc, &[method], &mut kernel, grace)?;
        assert!(kernel.outdated.is_none(), "there was no recheck");
        Ok(scan.targets.remove(0))
    })
}

/// The kernel's socket tables. The first lookup gets the answers that were right when this was made.
struct OutdatedOnce {
    outdated: Option<Vec<Lookup>>,
    diag: SockDiag,
}

impl OutdatedOnce {
    fn new(id: DiagId) -> Result<Self> {
        let mut diag = SockDiag::open()?;
        let outdated = Some(diag.lookup(&[id], Detail::TcpInfo)?);
        Ok(OutdatedOnce { outdated, diag })
    }
}

impl SocketTables for OutdatedOnce {
    fn lookup(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Vec<Lookup>> {
        match self.outdated.take() {
            Some(answers) => Ok(answers),
            None => self.diag.lookup(ids, detail),
        }
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        self.diag.list(states)
    }
}

/// An attempt by `method` that did nothing because of `error`.
fn failed(method: Method, error: MethodError) -> Attempt {
    Attempt {
        method,
        error: Some(error),
        at_one_instant: false,
    }
}

/// The number of targets with this outcome.
fn with_outcome(targets: &[Target], outcome: Outcome) -> usize {
    targets
        .iter()
        .filter(|target| target.outcome == Some(outcome))
        .count()
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
    let targets = act_after(&lab, &Method::AUTO, swap)?;
    assert_eq!(targets[0].outcome, Some(Outcome::Gone), "{targets:?}");
    let (app, peer) = bystander.context("swapped")?;
    lives(&leak, app, peer)?;

    // If the recheck misses the change, the method itself compares the cookie.
    let (lab, leak) = crate::support::lab("drained", family, 1)?;
    let mut bystander = None;
    let swap = || {
        bystander = Some(swap_descriptor(&leak)?);
        Ok(())
    };
    let target = act_unchecked_after(&lab, Method::Shutdown, swap)?;
    assert_eq!(
        target.attempts,
        [failed(Method::Shutdown, MethodError::DescriptorsGone)]
    );
    assert_eq!(target.outcome, Some(Outcome::Gone));
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
    for method in Method::AUTO {
        let (lab, leak) = lab("drained", family, 1)?;
        let mut bystander = None;
        let swap = || {
            bystander = Some(swap_connection(&lab, &leak)?);
            Ok(())
        };
        let targets = act_after(&lab, &[method], swap)?;
        assert_eq!(targets[0].outcome, Some(Outcome::Gone), "{targets:?}");
        let (app, peer) = bystander.context("swapped")?;
        lives(&leak, app, peer)?;
    }

    let (lab, leak) = lab("drained", family, 1)?;
    let mut bystander = None;
    let swap = || {
        bystander = Some(swap_connection(&lab, &leak)?);
        Ok(())
    };
    let target = act_unchecked_after(&lab, Method::Destroy, swap)?;
    assert_eq!(
        target.attempts,
        [failed(Method::Destroy, MethodError::Gone)]
    );
    assert_eq!(target.outcome, Some(Outcome::Gone));
    let (app, peer) = bystander.context("swapped")?;
    lives(&leak, app, peer)?;
    assert_eq!(in_state(&lab, TcpState::Listen)?, 1);

    // The elicited ACK now comes from the new connection. The lookup after it detects that.
    for method in [Method::Rst, Method::Probe] {
        let (lab, leak) = crate::support::lab("drained", family, 1)?;
        let mut bystander = None;
        let swap = || {
            bystander = Some(swap_connection(&lab, &leak)?);
            Ok(())
        };
        act_unchecked_after(&lab, method, swap)?;
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
    let targets = act_after(&lab, &Method::AUTO, || {
        doomed.app().kill()?;
        // With unread data, the kernel answers close(2) with a reset, and the sockets are gone at once.
        lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 2))
    })?;
    for target in &targets {
        let wanted = match target.socket.tuple().local.port() {
            9090 => Outcome::Closed(Method::Shutdown),
            _ => Outcome::Gone,
        };
        assert_eq!(target.outcome, Some(wanted), "{target:?}");
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn a_socket_that_closes_on_its_own_is_gone() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 2)?;
    let first = leak.app_fds()[0];
    let targets = act_after(&lab, &Method::AUTO, || leak.app().close(&[first]))?;
    assert_eq!(with_outcome(&targets, Outcome::Gone), 1);
    let closed = Outcome::Closed(Method::Shutdown);
    assert_eq!(with_outcome(&targets, closed), 1);
    Ok(())
}

fn a_socket_accepted_meanwhile_is_skipped() -> Result<()> {
    let (lab, leak) = lab("not-accepted", Family::V4, 2)?;
    let targets = act_after(&lab, &Method::AUTO, || {
        leak.app().accept(leak.pair().listener, 1, PATIENCE)?;
        Ok(())
    })?;
    let accepted = Outcome::Skipped(SkipReason::Accepted);
    assert_eq!(with_outcome(&targets, accepted), 1);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

/// cwkill acts through an owner that still has the socket.
fn the_act_goes_through_the_remaining_owners() -> Result<()> {
    let (lab, leak) = lab("forked", Family::V4, 2)?;
    let targets = act_after(&lab, &[Method::Shutdown], || {
        leak.app().close(&leak.app_fds())
    })?;
    assert!(targets.iter().all(|target| target.owners.len() == 3));
    let closed = Outcome::Closed(Method::Shutdown);
    assert_eq!(with_outcome(&targets, closed), 2);
    Ok(())
}

/// The identities of the stuck sockets in the network namespace of the calling thread.
fn stuck_ids() -> Result<Vec<DiagId>> {
    let here = finder::open_namespaces(
        &NetnsScope::Current,
        &Selectors::default(),
        &ProcFs::default(),
    )?;
    let scan = finder::find_sockets(&here, &Selectors::default(), &History::none())?;
    Ok(scan.targets.iter().map(|target| target.socket.id).collect())
}

/// The receive queue has room for a few answers only. Every lookup still gets its answer, and a lost answer to a destroy
/// request is reported as lost.
fn lost_answers_are_not_taken_for_others() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 200)?;
    lab.app_host().within(|| {
        let ids = stuck_ids()?;
        let mut tiny = SockDiag::with_queue(1)?;
        let seen = tiny.lookup(&ids, Detail::TcpInfo)?;
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
