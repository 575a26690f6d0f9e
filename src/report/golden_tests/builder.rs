//! Runs for the golden tests, built by hand from neutral words. Only `builder`, `dead_builder` and `words` know the
//! types of a run.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;

use super::words::{exclusion, judgement, method, method_error, reclaim_outcome, skip, state};
use crate::audit::record::{Caller, Entry, intents, outcomes};
use crate::cli::Cli;
use crate::config::{Action, Config};
use crate::diagnose::suggest::LanguageRuntime;
use crate::model::{
    Backlog, Coverage, DrainReason, DrainResult, Listener, ListeningSocket, Method, Outcome, Owner,
    Plan, Scan, SkipReason, Socket, Spinning, Target,
};
use crate::proc::cgroup::Cgroup;
use crate::proc::netns::Netns;
use crate::proc::{AbsentOwner, FdState, OwnerKind, Process, ProcessId, RemoteFd};
use crate::reclaim::{ReclaimRules, StopStats};
use crate::report::advice::{Advice, Facts, KeptBy, advise, kept};
use crate::report::{DeadOfProcess, Run};
use crate::sock_diag::testdata::stuck;
use crate::sock_diag::{DiagId, Family, SocketMessage};
use crate::watch::NewSockets;

/// A process: its name, number and the text of its /proc/PID/cgroup.
#[derive(Clone, Copy)]
pub struct Who(pub &'static str, pub i32, pub &'static str);

impl Who {
    pub(super) fn process(&self) -> Arc<Process> {
        Arc::new(Process {
            id: ProcessId {
                pid: self.1,
                start_time: 1000,
            },
            comm: self.0.into(),
            cgroup: Cgroup::parse(self.2),
        })
    }

    pub(super) fn owner(&self, fd: i32) -> Owner {
        Owner::new(self.process(), RemoteFd(fd))
    }
}

/// A listener: where, connections waiting, limit of the backlog, owners by descriptor.
pub struct Listening(
    pub &'static str,
    pub u32,
    pub u32,
    pub &'static [(&'static Who, i32)],
);

struct Holder {
    who: &'static Who,
    fd: i32,
    after: FdState,
    reclaim: Option<&'static str>,
}

enum Ended {
    Closed(&'static str),
    Closing(&'static str, &'static str),
    Gone,
    Skipped(&'static str),
    Failed,
}

/// A matched socket, with what is planned for it and what became of it.
pub struct Matched {
    message: SocketMessage,
    netns: usize,
    owners: Vec<Holder>,
    listener: Option<&'static Listening>,
    /// The number of listening sockets at the address of its listener, and the backlogs of others at which it may wait.
    group: (usize, Vec<(u32, u32)>),
    methods: Vec<Method>,
    excluded: Vec<(&'static str, &'static str)>,
    over_limit: bool,
    attempts: Vec<(&'static str, Option<&'static str>)>,
    ended: Option<Ended>,
    address_gone: bool,
}

/// In CLOSE-WAIT for an hour, its FIN unread.
pub fn socket(local: &str, peer: &str, cookie: u64) -> Matched {
    Matched {
        message: stuck(local, peer, cookie),
        netns: 0,
        owners: Vec::new(),
        listener: None,
        group: (1, Vec::new()),
        methods: Vec::new(),
        excluded: Vec::new(),
        over_limit: false,
        attempts: Vec::new(),
        ended: None,
        address_gone: false,
    }
}

impl Matched {
    /// On an IPv6 socket, by IPv4-mapped addresses.
    pub fn mapped(mut self) -> Self {
        let id = &self.message.id;
        self.message.id = DiagId::example(Family::V6, id.tuple(), id.cookie());
        self
    }

    /// By its name, or a number that has none.
    pub fn state(mut self, name: &str) -> Self {
        self.message.state = state(name);
        self
    }

    pub fn queues(mut self, recv_q: u32, send_q: u32) -> Self {
        (self.message.recv_q, self.message.send_q) = (recv_q, send_q);
        self
    }

    pub fn age_ms(mut self, age: u64) -> Self {
        if let Some(quiet) = &mut self.message.quiet {
            let age = Duration::from_millis(age);
            (quiet.last_ack_recv, quiet.last_data_recv) = (age, age);
            quiet.last_data_sent = age;
        }
        self
    }

    pub fn address_gone(mut self) -> Self {
        self.address_gone = true;
        self
    }

    pub fn ageless(mut self) -> Self {
        self.message.quiet = None;
        self
    }

    pub fn uid(mut self, uid: u32) -> Self {
        self.message.uid = uid;
        self
    }

    /// 0: no descriptor exists.
    pub fn inode(mut self, inode: u32) -> Self {
        self.message.inode = inode;
        self
    }

    /// In which of the namespaces of the run.
    pub fn netns(mut self, at: usize) -> Self {
        self.netns = at;
        self
    }

    pub fn owner(mut self, who: &'static Who, fd: i32) -> Self {
        self.owners.push(Holder {
            who,
            fd,
            after: FdState::Unknown,
            reclaim: None,
        });
        self
    }

    /// Its listener is one of several with SO_REUSEPORT. It may also wait at others, with these backlogs.
    pub fn in_group(mut self, size: usize, others: &[(u32, u32)]) -> Self {
        self.group = (size, others.to_vec());
        self
    }

    /// Never accepted by this listener.
    pub fn waits_at(mut self, listener: &'static Listening) -> Self {
        self.listener = Some(listener);
        self.inode(0)
    }

    pub fn plan<const N: usize>(mut self, methods: [&str; N]) -> Self {
        self.methods = methods.map(method).to_vec();
        self
    }

    pub fn exclude(mut self, method: &'static str, why: &'static str) -> Self {
        self.excluded.push((method, why));
        self
    }

    pub fn over_limit(mut self) -> Self {
        self.over_limit = true;
        self
    }

    /// The method did something; whether that was enough is the outcome.
    pub fn tried(mut self, method: &'static str) -> Self {
        self.attempts.push((method, None));
        self
    }

    /// The method did nothing.
    pub fn attempt(mut self, method: &'static str, why: &'static str) -> Self {
        self.attempts.push((method, Some(why)));
        self
    }

    fn ended(mut self, ended: Ended) -> Self {
        self.ended = Some(ended);
        self
    }

    pub fn closed_by(self, method: &'static str) -> Self {
        self.tried(method).ended(Ended::Closed(method))
    }

    pub fn closing(self, method: &'static str, state: &'static str) -> Self {
        self.tried(method).ended(Ended::Closing(method, state))
    }

    pub fn gone(self) -> Self {
        self.ended(Ended::Gone)
    }

    pub fn skipped(self, why: &'static str) -> Self {
        self.ended(Ended::Skipped(why))
    }

    pub fn failed(self) -> Self {
        self.ended(Ended::Failed)
    }

    fn last_owner(mut self, change: impl FnOnce(&mut Holder)) -> Self {
        change(self.owners.last_mut().expect("an owner comes first"));
        self
    }

    /// The last owner still has its descriptor.
    pub fn still_open(self) -> Self {
        self.last_owner(|owner| owner.after = FdState::Open)
    }

    /// The last owner has closed its descriptor.
    pub fn no_longer_open(self) -> Self {
        self.last_owner(|owner| owner.after = FdState::Closed)
    }

    /// With `--reclaim`: the outcome for the descriptor of the last owner, in the words of [`reclaim_outcome`]; in a dry run the
    /// word of a reason.
    pub fn reclaim(self, words: &'static str) -> Self {
        self.last_owner(|owner| owner.reclaim = Some(words))
    }

    fn planned(&self) -> Plan {
        let excluded = |&(name, why): &(&str, &str)| (method(name), exclusion(why));
        Plan {
            methods: self.methods.clone(),
            excluded: self.excluded.iter().map(excluded).collect(),
            skip: match self.over_limit {
                true => Some(SkipReason::OverMaxKills),
                false => self.methods.is_empty().then_some(SkipReason::NoMethod),
            },
        }
    }

    /// As it was found; `searched`: owners were searched for.
    fn found(&self, searched: bool) -> Target {
        let mut target = Target::new(Socket::from_message(&self.message));
        target.socket.netns = self.netns;
        target.socket.address_gone = self.address_gone;
        let owners = self.owners.iter().filter(|_| searched);
        target.owners = owners.map(|owner| owner.who.owner(owner.fd)).collect();
        target.plan = self.planned();
        target
    }

    /// Tries the methods, decides the outcome, and checks the descriptors.
    fn act(&self, target: &mut Target) {
        for (name, why) in &self.attempts {
            let error = why.map(method_error);
            target.record(method(name), error.map_or(Ok(()), Err));
        }
        let ended = self.ended.as_ref().expect("an act has an outcome");
        let outcome = match ended {
            Ended::Closed(name) => Outcome::Closed(method(name)),
            Ended::Closing(name, now) => Outcome::Closing(method(name), state(now)),
            Ended::Gone => Outcome::Gone,
            Ended::Skipped(why) => Outcome::Skipped(skip(why)),
            Ended::Failed => Outcome::Failed,
        };
        match ended {
            Ended::Closed(_) | Ended::Gone => target.note_vanished(),
            _ => target.outcome = Some(outcome),
        }
        assert_eq!(target.outcome, Some(outcome), "the attempts of {target:?}");
        if outcome.is_closed_or_closing() && target.socket.inode.is_some() {
            for (owner, seen) in target.owners.iter_mut().zip(&self.owners) {
                owner.after = Some(seen.after);
            }
        }
    }

    /// Decides for each descriptor what `--reclaim` does, or in a dry run would do.
    fn reclaimed(&self, target: &mut Target) {
        let is_open = target.outcome.is_none();
        for (owner, wanted) in target.owners.iter_mut().zip(&self.owners) {
            owner.reclaim = match is_open {
                true => Some(judgement(wanted.reclaim.unwrap_or_default())),
                false => wanted.reclaim.map(reclaim_outcome),
            };
        }
    }
}

/// The descriptors that were seen of new stuck sockets.
struct Watched {
    time: Duration,
    by: Vec<(Option<&'static Who>, usize)>,
    undecided: usize,
    partial: bool,
}

/// A run of `cwkill` without a command.
pub struct Case {
    pub name: &'static str,
    pub arguments: &'static str,
    pub colored: bool,
    /// Shows only the first and the last rows.
    pub long: bool,
    namespaces: Vec<(u64, Option<&'static str>)>,
    sockets: Vec<Matched>,
    in_use: usize,
    younger: usize,
    coverage: Coverage,
    watched: Option<Watched>,
    stopped: Vec<(&'static Who, u64, usize)>,
    spinning: Vec<Spinning>,
    drained: Vec<Drained>,
    dead: Vec<(&'static Who, usize)>,
}

/// In one namespace, in which all can be seen.
pub fn case(name: &'static str, arguments: &'static str) -> Case {
    Case {
        name,
        arguments,
        colored: false,
        long: false,
        namespaces: vec![(4_026_531_840, None)],
        sockets: Vec::new(),
        in_use: 0,
        younger: 0,
        coverage: Coverage::default(),
        watched: None,
        stopped: Vec::new(),
        spinning: Vec::new(),
        drained: Vec::new(),
        dead: Vec::new(),
    }
}

impl Case {
    /// The dead descriptors of a process, where no socket matches.
    pub fn dead(mut self, who: &'static Who, count: usize) -> Self {
        self.dead.push((who, count));
        self
    }

    pub fn drained(mut self, backlogs: impl IntoIterator<Item = Drained>) -> Self {
        self.drained.extend(backlogs);
        self
    }

    pub fn sockets(mut self, sockets: impl IntoIterator<Item = Matched>) -> Self {
        self.sockets.extend(sockets);
        self
    }

    pub fn colored(mut self) -> Self {
        self.colored = true;
        self
    }

    pub fn long(mut self) -> Self {
        self.long = true;
        self
    }

    pub fn another_netns(mut self, inode: u64, name: Option<&'static str>) -> Self {
        self.namespaces.push((inode, name));
        self
    }

    pub fn unreadable_processes(mut self, count: usize) -> Self {
        self.coverage.unreadable_processes = count;
        self
    }

    pub fn hidden_processes(mut self) -> Self {
        self.coverage.hidden_processes = true;
        self
    }

    /// Sockets that are left alone because data has moved in them.
    pub fn in_use(mut self, count: usize) -> Self {
        self.in_use = count;
        self
    }

    /// Sockets that are younger than `--min-age`.
    pub fn younger(mut self, count: usize) -> Self {
        self.younger = count;
        self
    }

    pub fn namespaces_not_looked_into(mut self, count: usize) -> Self {
        self.coverage.namespaces_not_looked_into = count;
        self
    }

    /// A selected owner that does not exist.
    pub fn absent(mut self, kind: OwnerKind, value: &str) -> Self {
        let absent = AbsentOwner::new(kind, value);
        self.coverage.absent_owners.push(absent);
        self
    }

    pub fn undecided(mut self, count: usize) -> Self {
        self.coverage.undecided = count;
        self
    }

    pub fn unreachable_namespaces(mut self, count: usize, why: Option<&str>) -> Self {
        self.coverage.unreachable_namespaces = count;
        self.coverage.namespace_failure = why.map(str::to_owned);
        self
    }

    /// The namespaces of this many processes are unknown.
    pub fn unknown_namespaces(mut self, count: usize) -> Self {
        self.coverage.unknown_namespaces = count;
        self
    }

    /// New stuck sockets that came within a time, by process.
    pub fn watched<const N: usize>(
        mut self,
        milliseconds: u64,
        by: [(Option<&'static Who>, usize); N],
    ) -> Self {
        self.watched = Some(Watched {
            time: Duration::from_millis(milliseconds),
            by: by.to_vec(),
            undecided: 0,
            partial: false,
        });
        self
    }

    /// New ones whose owners could not be read, and whether some namespaces could not be seen.
    pub fn watched_without_seeing(mut self, undecided: usize, partial: bool) -> Self {
        let watched = self.watched.as_mut().expect("it was watched");
        (watched.undecided, watched.partial) = (undecided, partial);
        self
    }

    /// A process that spins since its descriptor 20 is closed; `epoll`: its epoll set that has the socket; `ended`: it did.
    pub fn spinning(mut self, who: &'static Who, epoll: Option<i32>, ended: bool) -> Self {
        self.spinning.push(Spinning {
            process: who.owner(20).process,
            fd: Some(RemoteFd(20)),
            tid: Some(who.1 + 1),
            before: 2,
            after: 99,
            epoll: epoll.map(RemoteFd),
            in_select: false,
            ended,
        });
        self
    }

    /// The last of them spins since several sockets were closed, and waits in select(2).
    pub fn in_select(mut self) -> Self {
        if let Some(one) = self.spinning.last_mut() {
            (one.fd, one.tid, one.in_select) = (None, None, true);
        }
        self
    }

    /// A process that was stopped to close its descriptors: microseconds, descriptors closed.
    pub fn stopped(mut self, who: &'static Who, micros: u64, freed: usize) -> Self {
        self.stopped.push((who, micros, freed));
        self
    }

    pub fn config(&self, verbose: bool) -> Config {
        let words = ["cwkill"].into_iter();
        let words = words.chain(self.arguments.split_whitespace());
        let config = Cli::try_parse_from(words).and_then(|cli| Config::from_args(cli.args));
        let config = config.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        Config { verbose, ..config }
    }

    /// The run: before the act if `config` wants one and nothing is `done`, else at its end.
    pub fn run(&self, done: bool) -> Run {
        let config = &self.config(false);
        let mut scan = Scan {
            namespaces: self
                .namespaces
                .iter()
                .map(|(inode, name)| Arc::new(Netns::example(*inode, *name)))
                .collect(),
            in_use: self.in_use,
            younger: self.younger,
            coverage: self.coverage.clone(),
            owners_known: config.owners,
            ..Scan::default()
        };
        let acted = done && config.action == Action::Act;
        let reclaimed = config.reclaim.is_some() && (acted || config.action != Action::Act);
        for matched in &self.sockets {
            let mut target = matched.found(config.owners);
            target.listener = matched.listener.map(|it| {
                let accepting = it.3.iter().filter(|_| config.owners);
                let accepting = accepting.map(|(who, fd)| who.owner(*fd)).collect();
                place(&mut scan.listeners, it, accepting, &matched.group)
            });
            if acted {
                matched.act(&mut target);
            }
            if reclaimed {
                matched.reclaimed(&mut target);
            }
            scan.targets.push(target);
        }
        let has_result = acted || config.action != Action::Act;
        let drained = self.drained.iter();
        let backlogs = drained.map(|drained| drained.backlog(has_result)).collect();
        let owners = scan.targets.iter().flat_map(|target| &target.owners);
        let rules = config.reclaim.as_ref().filter(|_| reclaimed);
        let advice = rules.map(|rules| advice(owners, rules, (true, !acted)));
        let dead = self.dead.iter();
        let dead = dead.map(|(who, count)| DeadOfProcess {
            process: who.process(),
            count: *count,
            closable: *count,
            command: format!("cwkill reclaim --pid {}", who.1),
        });
        let dead = dead.collect();
        Run {
            advice: advice.unwrap_or_default(),
            dead_descriptors: scan.targets.is_empty().then_some(dead),
            dead_descriptors_failure: None,
            acted,
            backlogs: config.drain_backlogs.map(|_| backlogs),
            reclaim_requested: reclaimed,
            spinning: match acted {
                true => self.spinning.clone(),
                false => Vec::new(),
            },
            stops: match reclaimed {
                true => stops(&self.stopped),
                false => Vec::new(),
            },
            new_sockets: self
                .watched
                .as_ref()
                .filter(|_| done)
                .map(|it| it.new_sockets(config.owners)),
            ..Run::new(scan)
        }
    }
}

fn listening_socket((waiting, backlog): (u32, u32), inode: u32) -> ListeningSocket {
    ListeningSocket {
        id: stuck("0.0.0.0:1", "0.0.0.0:0", 5000).id,
        inode,
        waiting,
        backlog,
        cgroup: None,
    }
}

/// A backlog with dead connections: its listener, the number of dead ones, how many were drained, and why not all.
pub struct Drained(
    pub &'static Listening,
    pub u32,
    pub u32,
    pub Option<DrainReason>,
);

impl Drained {
    fn backlog(&self, has_result: bool) -> Backlog {
        let Drained(listening, dead, drained, reason) = self;
        let taken = if has_result { *drained } else { 0 };
        let result = DrainResult {
            drained: taken,
            reason: reason.clone(),
            left_one: reason.is_none() && taken > 0 && taken < *dead,
            stop_time: Duration::from_micros(1250),
        };
        let expected = *drained == 0 && reason.is_none();
        Backlog {
            netns: 0,
            local: listening.0.parse().expect("an address"),
            socket: listening_socket((listening.1 - taken, listening.2), 5000),
            group_size: 1,
            owners: listening.3.iter().map(|(who, fd)| who.owner(*fd)).collect(),
            waiting_before: listening.1,
            dead: *dead,
            result: (has_result && !expected).then_some(result),
        }
    }
}

/// The index of a listener that is known, or is added.
fn place(
    listeners: &mut Vec<Listener>,
    listening: &Listening,
    owners: Vec<Owner>,
    (group_size, others): &(usize, Vec<(u32, u32)>),
) -> usize {
    let local: SocketAddr = listening.0.parse().expect("an address");
    let known = listeners.iter().position(|other| other.local == local);
    known.unwrap_or_else(|| {
        listeners.push(Listener {
            local,
            sockets: [(listening.1, listening.2)]
                .iter()
                .chain(others)
                .zip(5000..)
                .map(|(backlog, inode)| listening_socket(*backlog, inode))
                .collect(),
            group_size: *group_size,
            uid: 0,
            owners,
        });
        listeners.len() - 1
    })
}

impl Watched {
    fn new_sockets(&self, owners_known: bool) -> NewSockets {
        let by = self.by.iter();
        NewSockets {
            watched: self.time,
            new: self.by.iter().map(|(_, new)| new).sum(),
            by: by.map(|(who, new)| (who.map(Who::process), *new)).collect(),
            owners_known,
            coverage: Coverage {
                undecided: self.undecided,
                unreachable_namespaces: usize::from(self.partial),
                ..Coverage::default()
            },
        }
    }
}

pub(super) fn stops(stopped: &[(&'static Who, u64, usize)]) -> Vec<StopStats> {
    let stop = |(who, micros, freed): &(&Who, u64, usize)| StopStats {
        process: who.process(),
        freed: *freed,
        replaced: 0,
        stop_time: Duration::from_micros(*micros),
    };
    stopped.iter().map(stop).collect()
}

/// The audit records of `run`: before anything is done, or after all.
pub fn records<'r>(run: &'r Run, who: &Caller, done: bool) -> Vec<Entry<'r>> {
    match done {
        false => {
            let begin = Entry::begin(run, who.sentence());
            [begin].into_iter().chain(intents(run)).collect()
        }
        true => outcomes(run).chain([Entry::end(run)]).collect(),
    }
}

/// What to do about the descriptors of `owners` that were kept; `run`: whether it has closed the sockets too, and whether it has only
/// predicted it.
pub(super) fn advice<'o>(
    owners: impl Iterator<Item = &'o Owner>,
    rules: &ReclaimRules,
    (closed_sockets, predicted): (bool, bool),
) -> Vec<Advice> {
    let facts = |process: &Process| Facts {
        runtime: LanguageRuntime::of(None, &process.comm),
        reached: None,
        inside: None,
    };
    let by = KeptBy {
        rules,
        closed_sockets,
        predicted,
    };
    advise(&kept(owners, &facts), by)
}
