//! `destroy` by the kernel's iterator: each socket is judged and destroyed at one instant, and everything else is as by SOCK_DESTROY.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netns_harness::lost_bytes::by_command;
use netns_harness::owners::{Build, Owner};
use netns_harness::{Capability, Family, Lab, Leak, SocketOption, TcpState, scenario};

use cwkill::control::Control;
use cwkill::filter::selectors::Selectors;
use cwkill::finder::way::{KernelTypes, UseIterator};
use cwkill::injector::engine::{self, Lookup, Rules, SocketTables};
use cwkill::injector::executors;
use cwkill::injector::way::ByIterator;
use cwkill::kernel::KernelVersion;
use cwkill::model::{Method, Outcome, SkipReason, Target};
use cwkill::proc::ProcFs;
use cwkill::sock_diag::{Cookie, Detail, DiagId, SockDiag};
use cwkill::tcp::StateSet;

use crate::doctor::without;
use crate::nat::sh;
use crate::races::{Now, find};
use crate::support::{CWKILL, PATIENCE, at, connections, count, cwkill, in_state, lab, ran};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(both_ways_have_the_same_outcomes).needs(Need::Iterator),
    each_family!(what_changes_after_the_plan_is_left_with_its_reason).needs(Need::Iterator),
    each_family!(a_socket_accepted_meanwhile_is_left).needs(Need::Iterator),
    each_family!(the_program_alone_sees_every_change).needs(Need::Iterator),
    once!(unsent_bytes_are_lost_only_if_allowed).needs(Need::Iterator),
    each_family!(a_walk_is_through_the_namespace_of_the_sockets).needs(Need::Iterator),
    once!(thousands_are_destroyed_and_reported).needs(Need::Iterator),
    once!(an_owner_that_hangs_does_not_hold_cwkill_up).needs(Need::Iterator),
    once!(with_always_what_a_walk_has_not_reached_stays).needs(Need::Iterator),
    once!(a_walk_is_made_again_as_soon_as_the_lock_is_free).needs(Need::Iterator),
    once!(an_interrupted_walk_reports_what_it_has_destroyed).needs(Need::Iterator),
    each_family!(no_probe_goes_out_on_a_socket_that_has_changed).needs(Need::Iterator),
    each_family!(a_reset_after_a_probe_is_the_work_of_cwkill).needs(Need::Iterator),
    once!(without_the_rights_sock_destroy_is_used).needs(Need::Iterator),
    once!(always_needs_the_right_to_destroy).needs(Need::Iterator),
    once!(where_bpf_is_refused_sock_destroy_is_used),
    once!(doctor_tries_both_ways).needs(Need::Iterator),
    once!(no_byte_is_lost_while_owners_send)
        .needs(Need::Iterator)
        .slow(),
];

/// All states but LISTEN.
const STATES: &str =
    "close-wait,established,syn-sent,syn-recv,fin-wait-1,fin-wait-2,time-wait,last-ack,closing";

/// How many sockets were in each state, with what happened to them and why.
type Outcomes = BTreeMap<[String; 4], usize>;

fn outcomes_by(way: &str, scenario: &str, family: Family) -> Result<(Outcomes, usize)> {
    let lab = Lab::new()?;
    let _leak = lab
        .start(scenario, family, count(3))
        .context(scenario.to_owned())?;
    // Open connections are closed only with a minimum idle time.
    let line = format!(
        "--all --method destroy --allow-spin --json --state {STATES} --min-idle 1ms --bpf {way}"
    );
    let mut outcomes = Outcomes::new();
    for socket in cwkill(&lab, &line)?.sockets() {
        let parts = [
            "/state",
            "/result/outcome",
            "/result/method",
            "/result/reason_code",
        ];
        *outcomes
            .entry(parts.map(|part| at(&socket, part)))
            .or_default() += 1;
    }
    Ok((outcomes, connections(&lab)?.len()))
}

fn both_ways_have_the_same_outcomes(family: Family) -> Result<()> {
    let mut closed = 0;
    for scenario in scenario::listed() {
        let name = scenario.name;
        // Its owners send all the time, so what happens depends on the moment.
        if name == "half-closed" {
            continue;
        }
        let by_sock_destroy = outcomes_by("never", name, family)?;
        let by_iterator = outcomes_by("always", name, family)?;
        assert_eq!(by_iterator, by_sock_destroy, "{name}");
        let of_method = by_iterator
            .0
            .iter()
            .filter(|(parts, _)| parts[2] == "destroy");
        closed += of_method.map(|(_, count)| count).sum::<usize>();
    }
    assert!(closed > 30, "{closed}");
    Ok(())
}

/// What happens after each lookup of a socket.
type AfterLookup<'h> = &'h mut (dyn FnMut() -> Result<()> + Send);

/// The kernel's socket tables as they were at first. If they are `outdated`, no recheck sees a change.
struct Tables<'h> {
    diag: SockDiag,
    outdated: Option<BTreeMap<u64, Lookup>>,
    after_lookup: AfterLookup<'h>,
}

impl<'h> Tables<'h> {
    fn new(ids: &[DiagId], are_outdated: bool, after_lookup: AfterLookup<'h>) -> Result<Self> {
        let mut diag = SockDiag::open()?;
        let answers = diag.lookup(ids, Detail::TcpInfo)?;
        let cookies = ids.iter().map(|id| id.cookie().0);
        let outdated = are_outdated.then(|| cookies.zip(answers).collect());
        Ok(Tables {
            diag,
            outdated,
            after_lookup,
        })
    }
}

impl SocketTables for Tables<'_> {
    fn lookup(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Vec<Lookup>> {
        let answers = match &self.outdated {
            Some(known) => ids.iter().map(|id| known[&id.cookie().0].clone()).collect(),
            None => self.diag.lookup(ids, detail)?,
        };
        if !ids.is_empty() {
            (self.after_lookup)().map_err(io::Error::other)?;
        }
        Ok(answers)
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        self.diag.list(states)
    }
}

/// How a run differs from the usual one.
#[derive(Default)]
struct Run {
    min_idle: Duration,
    discard_unsent: bool,
    outdated: bool,
}

impl Run {
    /// Finds all stuck sockets of the leaking host, runs `change`, then destroys them by the iterator. Returns them in the order of
    /// `leak`.
    fn destroy_after(
        &self,
        lab: &Lab,
        leak: &Leak,
        control: &(dyn Control + Sync),
        change: impl FnOnce() -> Result<()> + Send,
    ) -> Result<Vec<Target>> {
        self.destroy_while(lab, leak, control, change, &mut || Ok(()))
    }

    /// As [`Run::destroy_after`], with something that happens after each lookup.
    fn destroy_while(
        &self,
        lab: &Lab,
        leak: &Leak,
        control: &(dyn Control + Sync),
        change: impl FnOnce() -> Result<()> + Send,
        after_lookup: AfterLookup<'_>,
    ) -> Result<Vec<Target>> {
        self.destroy_by(&iterator()?, lab, leak, control, change, after_lookup)
    }

    /// As [`Run::destroy_while`], by an iterator that may have been used before.
    fn destroy_by(
        &self,
        by_iterator: &ByIterator,
        lab: &Lab,
        leak: &Leak,
        control: &(dyn Control + Sync),
        change: impl FnOnce() -> Result<()> + Send,
        after_lookup: AfterLookup<'_>,
    ) -> Result<Vec<Target>> {
        let mut targets = lab.app_host().within(|| {
            let proc = ProcFs::default();
            let mut scan = find(&proc, &[Method::Destroy])?;
            let ids: Vec<DiagId> = scan.targets.iter().map(|it| it.socket.id).collect();
            let mut kernel = Tables::new(&ids, self.outdated, after_lookup)?;
            change()?;
            let selectors = Selectors {
                min_idle: self.min_idle,
                ..Selectors::default()
            };
            let rules = Rules {
                grace: Duration::from_millis(200),
                discard_unsent: self.discard_unsent,
                selectors: &selectors,
                kernel_version: KernelVersion::running(),
                destroyer: Some(by_iterator),
            };
            let mut targets: Vec<&mut Target> = scan.targets.iter_mut().collect();
            let mut executors = executors(&[Method::Destroy], &proc)?;
            engine::run(&mut targets, &mut executors, &mut kernel, rules, control);
            Ok(scan.targets)
        })?;
        let place = |target: &Target| {
            let peer = target.socket.tuple().peer.port();
            leak.conns()
                .iter()
                .position(|conn| conn.peer.port() == peer)
        };
        targets.sort_by_key(place);
        Ok(targets)
    }
}

fn iterator() -> Result<ByIterator> {
    let types = KernelTypes::default();
    Ok(ByIterator::choose(
        &ProcFs::default(),
        UseIterator::Always,
        &types,
    )?)
}

fn outcomes(targets: &[Target]) -> Vec<Outcome> {
    targets.iter().filter_map(|target| target.outcome).collect()
}

const CLOSED: Outcome = Outcome::Closed(Method::Destroy);
const IN_USE: Outcome = Outcome::Skipped(SkipReason::InUse);

fn unsent(bytes: u32) -> Outcome {
    Outcome::Skipped(SkipReason::UnsentData(bytes))
}

/// The owner reads from the first socket, writes to the second, closes the third, and leaves the fourth as it is. The peer gets nothing.
fn use_three(leak: &Leak) -> Result<()> {
    let fds = leak.app_fds();
    leak.app().recv(fds[0], 1, PATIENCE)?;
    leak.pair().set_link(false)?;
    leak.app().send(&[fds[1]], b"four")?;
    leak.app().close(&[fds[2]])?;
    Ok(())
}

fn what_changes_after_the_plan_is_left_with_its_reason(family: Family) -> Result<()> {
    let (here, leak) = lab("unread", family, 4)?;
    let run = Run::default();
    let targets = run.destroy_after(&here, &leak, &Now, || use_three(&leak))?;
    // That the owner reads matters only with --min-idle.
    assert_eq!(
        outcomes(&targets),
        [CLOSED, unsent(4), Outcome::Gone, CLOSED]
    );
    assert_eq!(in_state(&here, TcpState::CloseWait)?, 1);

    let (here, leak) = lab("unread", family, 4)?;
    let run = Run {
        min_idle: Duration::from_millis(1),
        ..Run::default()
    };
    let targets = run.destroy_after(&here, &leak, &Now, || use_three(&leak))?;
    assert_eq!(outcomes(&targets), [IN_USE, IN_USE, Outcome::Gone, CLOSED]);
    assert_eq!(in_state(&here, TcpState::CloseWait)?, 2);
    Ok(())
}

fn a_socket_accepted_meanwhile_is_left(family: Family) -> Result<()> {
    let (lab, leak) = lab("not-accepted", family, 2)?;
    let accept = || {
        leak.app().accept(leak.pair().listener, 1, PATIENCE)?;
        Ok(())
    };
    let mut found = outcomes(&Run::default().destroy_after(&lab, &leak, &Now, accept)?);
    found.sort_by_key(|outcome| *outcome != CLOSED);
    assert_eq!(found, [CLOSED, Outcome::Skipped(SkipReason::Accepted)]);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

/// Every lookup has the answer from before the change. So only the program can see it, as in the moment after a recheck.
fn the_program_alone_sees_every_change(family: Family) -> Result<()> {
    let run = Run {
        outdated: true,
        ..Run::default()
    };
    let (here, leak) = lab("unread", family, 2)?;
    let targets = run.destroy_after(&here, &leak, &Now, || {
        leak.pair().set_link(false)?;
        leak.app().send(&leak.app_fds()[..1], b"seven!!")
    })?;
    assert_eq!(targets[0].outcome, Some(unsent(7)), "{targets:?}");
    assert_eq!(in_state(&here, TcpState::CloseWait)?, 1);

    let run = Run {
        min_idle: Duration::from_millis(1),
        ..run
    };
    // What was written and acknowledged counts too.
    for change in ["reads", "writes", "accepts"] {
        let scenario = if change == "accepts" {
            "not-accepted"
        } else {
            "unread"
        };
        let (here, leak) = lab(scenario, family, 1)?;
        let app = leak.app();
        let targets = run.destroy_after(&here, &leak, &Now, || {
            match change {
                "reads" => drop(app.recv(leak.app_fds()[0], 1, PATIENCE)?),
                "writes" => {
                    app.send(&leak.app_fds(), b"and so on")?;
                    here.wait_for(PATIENCE, || Ok(connections(&here)?[0].send_q == 0))?;
                }
                _ => drop(app.accept(leak.pair().listener, 1, PATIENCE)?),
            }
            Ok(())
        })?;
        assert_eq!(outcomes(&targets), [IN_USE], "{change}");
        assert_eq!(in_state(&here, TcpState::CloseWait)?, 1, "{change}");
    }
    Ok(())
}

fn unsent_bytes_are_lost_only_if_allowed() -> Result<()> {
    let (lab, _leak) = lab("sending", Family::V4, 2)?;
    let line = "--all --method destroy --allow-spin --json --bpf always";
    for socket in cwkill(&lab, line)?.exits(4).sockets() {
        assert_eq!(at(&socket, "/plan"), "[]");
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    cwkill(&lab, &format!("{line} --discard-unsent"))?.exits(0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// How many sockets were destroyed at one instant.
fn at_one_instant(sockets: &[serde_json::Value]) -> usize {
    let was = |socket: &&serde_json::Value| {
        socket["result"]["attempts"]
            .as_array()
            .is_some_and(|attempts| attempts.iter().any(|it| it["at_one_instant"] == true))
    };
    sockets.iter().filter(was).count()
}

/// cwkill runs in another namespace than the sockets, and has to enter theirs.
fn a_walk_is_through_the_namespace_of_the_sockets(family: Family) -> Result<()> {
    let (here, _leak) = lab("drained", family, 2)?;
    let (there, leak) = lab("drained", family, 3)?;
    let pid = leak.app().pid();
    let line = format!("-N {pid} --all --method destroy --allow-spin --json --bpf always");
    let sockets = cwkill(&here, &line)?.exits(0).sockets();
    assert_eq!((sockets.len(), at_one_instant(&sockets)), (3, 3));
    assert_eq!(in_state(&there, TcpState::CloseWait)?, 0);
    assert_eq!(in_state(&here, TcpState::CloseWait)?, 2);
    let line = "--all --method destroy --allow-spin --json --bpf never";
    let sockets = cwkill(&here, line)?.exits(0).sockets();
    assert_eq!((sockets.len(), at_one_instant(&sockets)), (2, 0));
    Ok(())
}

/// More than one read(2) of the iterator has room for.
const MANY: usize = 5000;

fn thousands_are_destroyed_and_reported() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V6, MANY)?;
    let line = "--all --method destroy --allow-spin --json --bpf always";
    let sockets = cwkill(&lab, line)?.exits(0).sockets();
    assert_eq!(sockets.len(), MANY);
    crate::support::all_have(&sockets, "closed", "destroy");
    assert_eq!(at_one_instant(&sockets), MANY);
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

/// A process that keeps the lock of an open connection on the leaking host.
pub fn hanging(lab: &Lab) -> Result<Owner> {
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 0)?;
    owner.lock_a_socket()?;
    Ok(owner)
}

/// The processes of cwkill on the leaking host that make a walk.
pub fn walkers(lab: &Lab) -> Result<usize> {
    let here = format!("net:[{}]", lab.app_host().netns_inode()?);
    let is_walker = |process: &std::path::Path| {
        std::fs::read_to_string(process.join("comm")).is_ok_and(|name| name == "cwkill-walk\n")
            && std::fs::read_link(process.join("ns/net")).is_ok_and(|it| it.as_os_str() == &*here)
    };
    let processes = std::fs::read_dir("/proc")?.map_while(io::Result::ok);
    Ok(processes.filter(|it| is_walker(&it.path())).count())
}

/// Enough that a socket between them is hardly the first or the last one of a walk.
const SEVERAL: usize = 300;

/// Without `--bpf always`, cwkill walks over so many sockets at most, whatever other programs have on this host. It counts a few thousand
/// more. See `ALLOWANCE` in src/injector/way.rs.
const WALKED: usize = 190_000;

/// Waits until the host has so few sockets that cwkill walks over them.
fn until_a_walk_is_used(lab: &Lab) -> Result<()> {
    let sockets = || -> Result<usize> {
        let sockstat = std::fs::read_to_string("/proc/thread-self/net/sockstat")?;
        let line = sockstat.lines().find(|line| line.starts_with("TCP: "));
        // The number of all network namespaces.
        let (_, after) = line
            .and_then(|line| line.split_once(" alloc "))
            .context("no count")?;
        Ok(after.split(' ').next().context("no number")?.parse()?)
    };
    lab.wait_for(10 * PATIENCE, || Ok(sockets()? < WALKED))
        .context("other programs have too many sockets")
}

fn an_owner_that_hangs_does_not_hold_cwkill_up() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, SEVERAL)?;
    let mut owner = hanging(&lab)?;
    until_a_walk_is_used(&lab)?;
    let line = "--all --method destroy --allow-spin --json";
    let ran = cwkill(&lab, line)?.exits(0).complains("keeps the lock");
    let sockets = ran.sockets();
    assert_eq!(sockets.len(), SEVERAL);
    crate::support::all_have(&sockets, "closed", "destroy");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    // cwkill has ended, and nobody waits for its child.
    assert_eq!(walkers(&lab)?, 1);
    assert_eq!(owner.unlock_the_socket()?, 5);
    lab.wait_for(PATIENCE, || Ok(walkers(&lab)? == 0))?;
    assert!(owner.is_alive());
    Ok(())
}

fn with_always_what_a_walk_has_not_reached_stays() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V6, SEVERAL)?;
    let mut owner = hanging(&lab)?;
    let line = "--all --method destroy --allow-spin --json --bpf always";
    let sockets = cwkill(&lab, line)?.exits(4).sockets();
    let with = |place: &str, code: &str| {
        let found = sockets.iter().filter(|socket| at(socket, place) == code);
        found.count()
    };
    let closed = with("/result/outcome", "closed");
    let left = with("/result/reason_code", "walk-held-up");
    assert_eq!(closed + left, SEVERAL);
    assert_eq!(at_one_instant(&sockets), closed);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, left);
    // The walk goes on, and destroys nothing any more.
    owner.unlock_the_socket()?;
    lab.wait_for(PATIENCE, || Ok(walkers(&lab)? == 0))?;
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, left);
    cwkill(&lab, line)?.exits(if left > 0 { 0 } else { 1 });
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// As of a daemon, which has the same iterator for all its batches.
fn a_walk_is_made_again_as_soon_as_the_lock_is_free() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, SEVERAL)?;
    let mut owner = hanging(&lab)?;
    let iterator = iterator()?;
    let destroy = || {
        iterator.begin_run();
        let mut nothing = || Ok(());
        Run::default().destroy_by(&iterator, &lab, &leak, &Now, || Ok(()), &mut nothing)
    };
    destroy()?;
    assert!(iterator.was_held_up());
    let left = in_state(&lab, TcpState::CloseWait)?;
    assert!(left > 0, "nothing is left to try again");
    destroy()?;
    assert!(iterator.was_held_up());
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, left);
    owner.unlock_the_socket()?;
    lab.wait_for(PATIENCE, || {
        iterator.begin_run();
        Ok(!iterator.was_held_up())
    })?;
    assert_eq!(outcomes(&destroy()?), vec![CLOSED; left]);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// Ctrl-C as soon as a walk of this process waits for a lock.
struct CtrlC;

impl Control for CtrlC {
    fn now(&self) -> Instant {
        Now.now()
    }
    fn sleep(&self, duration: Duration) {
        Now.sleep(duration);
    }
    fn interrupted(&self) -> bool {
        let ours = format!("PPid:\t{}\n", std::process::id());
        let waits = |process: &std::path::Path| {
            let read = |name| std::fs::read_to_string(process.join(name)).unwrap_or_default();
            let status = read("status");
            status.contains("Name:\tcwkill-walk\n")
                && status.contains(&ours)
                && read("wchan").contains("lock_sock")
        };
        let mut processes = std::fs::read_dir("/proc").expect("/proc").flatten();
        processes.any(|process| waits(&process.path()))
    }
    fn progress(&self, _: Method, _: usize) {}
}

/// An owner that hangs keeps the walk where it is, so Ctrl-C comes in its middle.
fn an_interrupted_walk_reports_what_it_has_destroyed() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, SEVERAL)?;
    let mut owner = hanging(&lab)?;
    let targets = Run::default().destroy_after(&lab, &leak, &CtrlC, || Ok(()))?;
    let with = |outcome| {
        let targets = targets.iter();
        targets.filter(|it| it.outcome == Some(outcome)).count()
    };
    let closed = with(CLOSED);
    let left = with(Outcome::Skipped(SkipReason::Interrupted));
    assert_eq!(closed + left, SEVERAL);
    assert!(CtrlC.interrupted(), "the walk does not wait");
    owner.unlock_the_socket()?;
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, left);
    Ok(())
}

/// The keepalive probes that the leaking host has sent.
fn probes(lab: &Lab) -> Result<u64> {
    lab.app_host().within(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/netstat")?;
        let mut lines = text
            .lines()
            .filter_map(|line| line.strip_prefix("TcpExt: "));
        let (names, values) = lines.next().zip(lines.next()).context("no TcpExt")?;
        let mut pairs = names.split(' ').zip(values.split(' '));
        let (_, value) = pairs
            .find(|(name, _)| *name == "TCPKeepAlive")
            .context("no TCPKeepAlive")?;
        Ok(value.parse()?)
    })
}

/// A lab with sockets whose peers connection tracking may have forgotten.
fn forgotten(family: Family, sockets: usize) -> Result<(Lab, Leak)> {
    let (lab, leak) = lab("unread", family, sockets)?;
    sh(
        &lab,
        "echo 1 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    )?;
    lab.wait_for(PATIENCE, || {
        let line = "--all --dry-run --json --min-age 2s --method destroy";
        Ok(cwkill(&lab, line)?.sockets().len() == sockets)
    })?;
    Ok((lab, leak))
}

fn no_probe_goes_out_on_a_socket_that_has_changed(family: Family) -> Result<()> {
    let (lab, leak) = forgotten(family, 2)?;
    let run = Run {
        min_idle: Duration::from_millis(1),
        ..Run::default()
    };
    let targets = run.destroy_after(&lab, &leak, &Now, || {
        leak.app().recv(leak.app_fds()[0], 1, PATIENCE)?;
        Ok(())
    })?;
    assert_eq!(outcomes(&targets), [IN_USE, CLOSED]);
    assert_eq!(probes(&lab)?, 1);
    Ok(())
}

/// The peer resets the connection after the probe, and after the recheck that follows it.
fn a_reset_after_a_probe_is_the_work_of_cwkill(family: Family) -> Result<()> {
    let (lab, leak) = forgotten(family, 1)?;
    let peers: Vec<_> = leak
        .conns()
        .iter()
        .filter_map(|conn| conn.peer_fd)
        .collect();
    leak.peer()
        .set_option(&peers, SocketOption::Linger(Some(0)))?;
    let mut is_reset = false;
    let mut reset = || {
        if !is_reset && probes(&lab)? > 0 {
            is_reset = true;
            leak.peer().close(&peers)?;
            lab.wait_for(PATIENCE, || Ok(connections(&lab)?.is_empty()))?;
        }
        Ok(())
    };
    let targets = Run::default().destroy_while(&lab, &leak, &Now, || Ok(()), &mut reset)?;
    assert_eq!(outcomes(&targets), [CLOSED]);
    assert!(!targets[0].attempts[0].at_one_instant, "{targets:?}");
    assert!(is_reset);
    Ok(())
}

fn without_the_rights_sock_destroy_is_used() -> Result<()> {
    use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON};
    for (capabilities, way, status) in [
        (&[CAP_NET_ADMIN][..], "auto", 0),
        (&[CAP_NET_ADMIN, CAP_BPF], "auto", 0),
        (&[CAP_NET_ADMIN, CAP_BPF], "always", 3),
        (&[CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON], "always", 0),
    ] {
        let (lab, _leak) = lab("not-accepted", Family::V4, 1)?;
        let line = format!("--all --no-owners --method destroy --bpf {way}");
        let command = lab.app_host().command(CWKILL);
        let command = command
            .capabilities(capabilities)
            .args(line.split_whitespace());
        let ran = ran(command)?.exits(status);
        let left = usize::from(status != 0);
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, left, "{ran:?}");
        if status != 0 {
            ran.complains("cannot use the iterator (--bpf always)");
        }
    }
    Ok(())
}

fn always_needs_the_right_to_destroy() -> Result<()> {
    use Capability::{CAP_BPF, CAP_PERFMON};
    let (lab, _leak) = lab("not-accepted", Family::V4, 1)?;
    let command = lab.app_host().command(crate::support::CWKILL);
    let line = "--all --no-owners --method destroy --bpf always";
    let capabilities = [CAP_BPF, CAP_PERFMON];
    let command = command
        .capabilities(&capabilities)
        .args(line.split_whitespace());
    ran(command)?.exits(3).complains("needs CAP_NET_ADMIN");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

/// A seccomp filter refuses bpf(2), as that of a container does.
fn where_bpf_is_refused_sock_destroy_is_used() -> Result<()> {
    let (lab, _leak) = lab("not-accepted", Family::V4, 1)?;
    let run = |way: &str| {
        let line = format!("--all --no-owners --method destroy --bpf {way}");
        ran(without(&lab, "bpf")?.args(line.split_whitespace()))
    };
    run("always")?
        .exits(3)
        .complains("cannot use the iterator (--bpf always)");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    run("auto")?.exits(0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn doctor_tries_both_ways() -> Result<()> {
    let lab = Lab::new()?;
    let line = |document: &serde_json::Value| -> Option<serde_json::Value> {
        let checks = document["checks"].as_array()?.iter();
        let mut lines = checks.filter(|check| check["name"] == "destroy by iterator");
        lines.next().cloned()
    };
    let works = line(&cwkill(&lab, "doctor --json")?.json()).context("no line")?;
    assert_eq!(works["ok"], true, "{works}");
    let refused = ran(without(&lab, "bpf")?.args(["doctor", "--json"]))?.json();
    let refused = line(&refused).context("no line")?;
    assert_eq!(refused["ok"], serde_json::Value::Null, "{refused}");
    assert!(
        at(&refused, "/detail").contains("SOCK_DESTROY"),
        "{refused}"
    );
    Ok(())
}

/// The worst case for an abort: owners that send all the time.
fn no_byte_is_lost_while_owners_send() -> Result<()> {
    const LEAST: usize = 4000;
    let lab = Lab::new()?;
    let line =
        format!("{CWKILL} --all --min-idle 0s --no-owners --method destroy --quiet --bpf always");
    let line: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let losses = by_command(&lab, &line, LEAST)?;
    assert!(losses.closed >= LEAST, "{losses:?}");
    assert_eq!((losses.with_losses, losses.bytes), (0, 0), "{losses:?}");
    Ok(())
}
