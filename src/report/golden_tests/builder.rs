//! Runs for the golden tests, built by hand from neutral words. Only this file knows the types of a run.

use std::io;
use std::mem;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;

use crate::audit::record::{Caller, Entry, intents, outcomes, reclaim_intents, reclaim_outcomes};
use crate::cli::{Cli, Command};
use crate::config::{Action, Config, Format};
use crate::finder::cgroup::Cgroup;
use crate::finder::dead::DeadSocket;
use crate::finder::listeners::Listener;
use crate::finder::netns::Netns;
use crate::finder::owners::{Holding, Process};
use crate::finder::sock_diag::testdata::stuck;
use crate::finder::sock_diag::{Cookie, DiagId, Family, SocketMessage};
use crate::finder::{Found, Held, Socket, TargetFd};
use crate::injector::ladder::{Attempt, Outcome, Skip, Verdict};
use crate::injector::{ActError, MethodName};
use crate::pipeline::{Deed, Reclaimed, Run};
use crate::plan::{LeftOut, Plan};
use crate::privileges::Need;
use crate::reclaim::command::{self, DeadDescriptor};
use crate::reclaim::evidence::Doubt;
use crate::reclaim::{Fate, Reason, Visit, Wanted};
use crate::refill::{Culprit, Refill};
use crate::sweep::Swept;
use crate::tcp::TcpState;

/// Why a method is not tried, by a word each.
pub const EXCLUSIONS: [&str; 9] = [
    "not-accepted",
    "no-owner",
    "owners-not-sought",
    "unsent",
    "needs-net-admin",
    "needs-net-raw",
    "needs-ptrace",
    "open-connection",
    "listener",
];

fn exclusion(word: &str) -> LeftOut {
    match word {
        "not-accepted" => LeftOut::NotAccepted,
        "no-owner" => LeftOut::NoOwner,
        "owners-not-sought" => LeftOut::OwnersNotSought,
        "unsent" => LeftOut::Unsent(512),
        "needs-net-admin" => LeftOut::Needs(Need::NetAdmin),
        "needs-net-raw" => LeftOut::Needs(Need::NetRaw),
        "needs-ptrace" => LeftOut::Needs(Need::Ptrace),
        "open-connection" => LeftOut::State(TcpState::Established, "it is open"),
        "listener" => LeftOut::State(TcpState::Listen, "it listens"),
        _ => panic!("exclusion {word}"),
    }
}

/// Why a socket is skipped, by a word each; `no-method` gives the reasons of its plan.
pub const SKIPS: [&str; 7] = [
    "no-method",
    "over-limit",
    "unsent",
    "no-longer-selected",
    "accepted",
    "peer-alive",
    "interrupted",
];

fn skip(word: &str, excluded: &[(MethodName, LeftOut)]) -> Skip {
    match word {
        "no-method" => Skip::NoMethod(excluded.to_vec()),
        "over-limit" => Skip::OverLimit,
        "unsent" => Skip::Unsent(77),
        "no-longer-selected" => Skip::NoLongerSelected,
        "accepted" => Skip::Accepted,
        "peer-alive" => Skip::PeerAlive,
        "interrupted" => Skip::Interrupted,
        _ => panic!("skip {word}"),
    }
}

/// Why an attempt did nothing, by a word each.
pub const ATTEMPTS: [&str; 20] = [
    "gone",
    "descriptors-gone",
    "foreign-proc",
    "denied-net-admin",
    "denied-net-raw",
    "denied-ptrace",
    "not-supported",
    "orphan",
    "unsent",
    "no-ack",
    "no-ack-no-repair",
    "rst-ignored",
    "peer-alive",
    "peer-silent",
    "interrupted",
    "unanswered",
    "os",
    "os-unknown-errno",
    "os-no-errno",
    "bug",
];

fn act_error(word: &str) -> ActError {
    let denied = |need| ActError::Denied(need, errno(libc::EPERM));
    match word {
        "gone" => ActError::Gone,
        "descriptors-gone" => ActError::DescriptorsGone,
        "foreign-proc" => ActError::ForeignProc,
        "denied-net-admin" => denied(Need::NetAdmin),
        "denied-net-raw" => denied(Need::NetRaw),
        "denied-ptrace" => denied(Need::Ptrace),
        "not-supported" => {
            ActError::NotSupported("the kernel cannot do it", errno(libc::EOPNOTSUPP))
        }
        "orphan" => ActError::Orphan,
        "unsent" => ActError::Unsent(99),
        "no-ack" => ActError::NoAck(None),
        "no-ack-no-repair" => ActError::NoAck(Some(Box::new(denied(Need::NetAdmin)))),
        "rst-ignored" => ActError::RstIgnored,
        "peer-alive" => ActError::PeerAlive,
        "peer-silent" => ActError::PeerSilent,
        "interrupted" => ActError::Interrupted,
        "unanswered" => ActError::Unanswered(errno(libc::ENOBUFS)),
        "os" => ActError::Os("pidfd_getfd", errno(libc::EMFILE)),
        "os-unknown-errno" => ActError::Os("preparing", errno(4095)),
        "os-no-errno" => ActError::Os("reading", io::ErrorKind::InvalidData.into()),
        "bug" => ActError::Os(Outcome::BUG, errno(libc::EIO)),
        _ => panic!("attempt {word}"),
    }
}

/// Why a descriptor is not closed in its process, by a word each.
pub const KEPT: [&str; 42] = [
    "in-call",
    "in-some-call",
    "in-epoll",
    "in-ring",
    "ring-in-flight",
    "ring",
    "ring-worker",
    "finalizer",
    "transfer",
    "unread-1",
    "unread",
    "too-young",
    "no-age",
    "ourselves",
    "traced-by-unknown",
    "traced",
    "filter-forbids",
    "filter-unread",
    "shared-table",
    "shared-unknown",
    "shared-closed",
    "no-kcmp",
    "leader-ended",
    "executing",
    "other-table",
    "table-unread",
    "foreign",
    "foreign-call",
    "foreign-proc",
    "limit",
    "time-over",
    "no-call",
    "unsteady",
    "denied",
    "interrupted",
    "hangs",
    "still-taken",
    "bug",
    "os",
    "os-no-errno",
    "hostile-ring-worker",
    "hostile-tracer",
];

fn reason(word: &str) -> Reason {
    let limit = Duration::from_millis(100);
    let (tid, number) = (4431, 232);
    let doubt = match word {
        "in-call" => Doubt::InCall { tid, number },
        "in-some-call" => Doubt::InSomeCall { tid, number },
        "in-epoll" => Doubt::InEpoll(4),
        "in-ring" => Doubt::InRing(5),
        "ring-in-flight" => Doubt::RingInFlight(6),
        "ring" => Doubt::Ring(7),
        "ring-worker" => Doubt::RingWorker("iou-wrk-4421".into()),
        "hostile-ring-worker" => Doubt::RingWorker("iou\x1b[2J".into()),
        "finalizer" => Doubt::Finalizer("Finalizer".into()),
        "transfer" => Doubt::Transfer { tid, number },
        "unread-1" => Doubt::Unread(1),
        "unread" => Doubt::Unread(1460),
        "too-young" => Doubt::TooYoung(Duration::from_micros(12_345_678)),
        "no-age" => Doubt::NoAge,
        _ => {
            return match word {
                "ourselves" => Reason::Ourselves,
                "traced-by-unknown" => Reason::Traced(99, None),
                "traced" => Reason::Traced(99, Some("gdb".into())),
                "hostile-tracer" => Reason::Traced(99, Some("g\u{202e}db\n".into())),
                "filter-forbids" => Reason::FilterForbids,
                "filter-unread" => Reason::FilterUnread(errno(libc::EACCES)),
                "shared-table" => Reason::SharedTable(98),
                "shared-unknown" => Reason::SharedUnknown(98, errno(libc::EPERM)),
                "shared-closed" => Reason::SharedClosed(98, errno(libc::EPERM)),
                "no-kcmp" => Reason::NoKcmp,
                "leader-ended" => Reason::LeaderEnded,
                "executing" => Reason::Executing(tid),
                "other-table" => Reason::OtherTable,
                "table-unread" => Reason::TableUnread(errno(libc::EPERM)),
                "foreign" => Reason::Foreign,
                "foreign-call" => Reason::ForeignCall(tid),
                "foreign-proc" => Reason::ForeignProc,
                "limit" => Reason::Limit(tid, limit),
                "time-over" => Reason::TimeOver(limit),
                "no-call" => Reason::NoCall,
                "unsteady" => Reason::Unsteady,
                "denied" => Reason::Denied(errno(libc::EPERM)),
                "interrupted" => Reason::Interrupted,
                "hangs" => Reason::Hangs,
                "still-taken" => Reason::StillTaken,
                "bug" => Reason::Bug,
                "os" => Reason::Os("ptrace", errno(libc::ESRCH)),
                "os-no-errno" => Reason::Os("reading", io::ErrorKind::UnexpectedEof.into()),
                _ => panic!("reason {word}"),
            };
        }
    };
    Reason::Doubt(doubt)
}

/// `freed`, `gone`, `skipped WORD` or `failed WORD`.
fn fate(words: &str) -> Fate {
    match words.split_once(' ') {
        None if words == "freed" => Fate::Freed,
        None if words == "gone" => Fate::Gone,
        Some(("skipped", word)) => Fate::Skipped(reason(word)),
        Some(("failed", word)) => Fate::Failed(reason(word)),
        _ => panic!("fate {words}"),
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

fn method(name: &str) -> MethodName {
    name.parse().expect("a method")
}

fn state(name: &str) -> TcpState {
    match name.parse() {
        Ok(state) => state,
        Err(()) => TcpState::from_kernel(name.parse().expect("a state or its number")),
    }
}

/// A process: its name, number and the text of its /proc/PID/cgroup.
#[derive(Clone, Copy)]
pub struct Who(pub &'static str, pub i32, pub &'static str);

impl Who {
    fn process(&self) -> Process {
        Process {
            pid: self.1,
            start_time: 1000,
            comm: self.0.into(),
            cgroup: Cgroup::parse(self.2),
        }
    }
}

/// A listener: where, connections waiting, limit of the backlog, owners by descriptor.
pub struct Listening(
    pub &'static str,
    pub u32,
    pub u32,
    pub &'static [(&'static Who, i32)],
);

struct Owner {
    who: &'static Who,
    fd: i32,
    after: Holding,
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
    owners: Vec<Owner>,
    listener: Option<&'static Listening>,
    methods: Vec<MethodName>,
    excluded: Vec<(&'static str, &'static str)>,
    over_limit: bool,
    attempts: Vec<(&'static str, Option<&'static str>)>,
    ended: Option<Ended>,
    swept: bool,
}

/// In CLOSE-WAIT for an hour, its FIN unread.
pub fn socket(local: &str, peer: &str, cookie: u64) -> Matched {
    Matched {
        message: stuck(local, peer, cookie),
        netns: 0,
        owners: Vec::new(),
        listener: None,
        methods: Vec::new(),
        excluded: Vec::new(),
        over_limit: false,
        attempts: Vec::new(),
        ended: None,
        swept: false,
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
        self.owners.push(Owner {
            who,
            fd,
            after: Holding::Unknown,
            reclaim: None,
        });
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

    /// Closed while the sockets were listed.
    pub fn swept(mut self) -> Self {
        self.swept = true;
        self
    }

    fn last_owner(mut self, change: impl FnOnce(&mut Owner)) -> Self {
        change(self.owners.last_mut().expect("an owner comes first"));
        self
    }

    /// The last owner still has its descriptor.
    pub fn still_open(self) -> Self {
        self.last_owner(|owner| owner.after = Holding::Open)
    }

    /// The last owner has closed its descriptor.
    pub fn no_longer_open(self) -> Self {
        self.last_owner(|owner| owner.after = Holding::Closed)
    }

    /// With `--reclaim`: what became of the descriptor of the last owner, as [`fate`] has it, or in a dry run the word of a reason.
    pub fn reclaim(self, words: &'static str) -> Self {
        self.last_owner(|owner| owner.reclaim = Some(words))
    }

    fn excluded(&self) -> Vec<(MethodName, LeftOut)> {
        let one = |&(name, why): &(&str, &str)| (method(name), exclusion(why));
        self.excluded.iter().map(one).collect()
    }

    fn outcome(&self) -> Outcome {
        let attempt = |&(name, why): &(&'static str, Option<&'static str>)| Attempt {
            method: method(name),
            error: why.map(act_error),
        };
        let verdict = match self.ended.as_ref().expect("an act has an outcome") {
            Ended::Closed(name) => Verdict::Closed(method(name)),
            Ended::Closing(name, now) => Verdict::Closing(method(name), state(now)),
            Ended::Gone => Verdict::Gone,
            Ended::Skipped(why) => Verdict::Skipped(skip(why, &self.excluded())),
            Ended::Failed => Verdict::Failed,
        };
        Outcome {
            verdict,
            attempts: self.attempts.iter().map(attempt).collect(),
        }
    }

    /// Whether each descriptor is still open; asked of a socket that is closed or about to be.
    fn descriptors(&self, outcome: &Outcome) -> Option<Vec<Holding>> {
        let over = matches!(outcome.verdict, Verdict::Closed(_) | Verdict::Closing(..));
        let known = over && (self.message.inode == 0 || !self.owners.is_empty());
        known.then(|| self.owners.iter().map(|owner| owner.after).collect())
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
    coverage: Found,
    unlisted: Option<&'static str>,
    watched: Option<Watched>,
    stopped: Vec<(&'static Who, u64, usize)>,
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
        coverage: Found::default(),
        unlisted: None,
        watched: None,
        stopped: Vec::new(),
    }
}

impl Case {
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

    pub fn undecided(mut self, count: usize) -> Self {
        self.coverage.undecided = count;
        self
    }

    pub fn unreachable_namespaces(mut self, count: usize, why: Option<&str>) -> Self {
        self.coverage.unreachable_namespaces = count;
        self.coverage.namespace_failure = why.map(str::to_owned);
        self
    }

    /// Of so many processes the namespace is not known.
    pub fn unknown_namespaces(mut self, count: usize) -> Self {
        self.coverage.untold_namespaces = count;
        self
    }

    pub fn unlisted(mut self, why: &'static str) -> Self {
        self.unlisted = Some(why);
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

    /// A process that was stopped to close its descriptors: microseconds, descriptors closed.
    pub fn stopped(mut self, who: &'static Who, micros: u64, freed: usize) -> Self {
        self.stopped.push((who, micros, freed));
        self
    }

    pub fn has_swept(&self) -> bool {
        self.sockets.iter().any(|socket| socket.swept)
    }

    pub fn config(&self, verbose: bool) -> Config {
        let words = ["cwkill"].into_iter();
        let words = words.chain(self.arguments.split_whitespace());
        let config = Cli::try_parse_from(words).and_then(|cli| Config::from_args(cli.args));
        let config = config.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        Config { verbose, ..config }
    }

    fn processes(&self) -> Vec<Process> {
        let owners = self.sockets.iter().flat_map(|socket| &socket.owners);
        let owners = owners.map(|owner| owner.who);
        let listeners = self.sockets.iter().filter_map(|socket| socket.listener);
        let accepting = listeners.flat_map(|listener| listener.3.iter().map(|(who, _)| *who));
        let sought = self.config(false).owners;
        unique(owners.chain(accepting).filter(|_| sought))
    }

    /// The run: before the act if `config` wants one and nothing is `done`, else at its end.
    pub fn run(&self, done: bool) -> Run {
        let config = &self.config(false);
        let processes = self.processes();
        let held = |who: &Who, fd| Held {
            process: index(&processes, who),
            fd: TargetFd(fd),
        };
        let mut listeners: Vec<Listener> = Vec::new();
        let mut run = Run {
            namespaces: self
                .namespaces
                .iter()
                .map(|(inode, name)| Netns::example(*inode, *name))
                .collect(),
            found: Found::default(),
            plans: Vec::new(),
            unlisted: self.unlisted.map(str::to_owned),
            swept: Swept::default(),
            deeds: None,
            refill: None,
            reclaimed: None,
        };
        let acted = done && config.action == Action::Act;
        let mut later = Vec::new();
        for matched in &self.sockets {
            let mut socket = Socket::from_message(&matched.message);
            socket.netns = matched.netns;
            let owners = matched.owners.iter().filter(|_| config.owners);
            socket.owners = owners.map(|owner| held(owner.who, owner.fd)).collect();
            socket.listener = matched.listener.map(|it| {
                let local: SocketAddr = it.0.parse().expect("an address");
                let accepting = it.3.iter().filter(|_| config.owners);
                let known = listeners.iter().position(|other| other.local == local);
                known.unwrap_or_else(|| {
                    listeners.push(Listener {
                        local,
                        inodes: vec![5000],
                        uid: 0,
                        waiting: it.1,
                        backlog: it.2,
                        owners: accepting.map(|(who, fd)| held(who, *fd)).collect(),
                    });
                    listeners.len() - 1
                })
            });
            let plan = Plan {
                methods: matched.methods.clone(),
                left_out: matched.excluded(),
                over_limit: matched.over_limit,
            };
            if matched.swept {
                run.swept.sockets.push(socket);
                run.swept.plans.push(plan);
                run.swept.outcomes.push(matched.outcome());
            } else {
                run.found.sockets.push(socket);
                run.plans.push(plan);
                later.extend(acted.then(|| matched.outcome()));
            }
        }
        let coverage = &self.coverage;
        run.found = Found {
            sockets: mem::take(&mut run.found.sockets),
            processes,
            listeners,
            owners_sought: config.owners,
            unreadable_processes: coverage.unreadable_processes,
            undecided: coverage.undecided,
            hidden_processes: coverage.hidden_processes,
            unreachable_namespaces: coverage.unreachable_namespaces,
            namespace_failure: coverage.namespace_failure.clone(),
            untold_namespaces: coverage.untold_namespaces,
        };
        if acted {
            let outcomes = run.take_in_swept(later, config.format != Format::Quiet);
            let deed = |(socket, outcome): (&Socket, Outcome)| Deed {
                descriptors: self.matched(socket).descriptors(&outcome),
                outcome,
            };
            run.deeds = Some(run.found.sockets.iter().zip(outcomes).map(deed).collect());
        }
        if config.reclaim.is_some() && (acted || config.action != Action::Act) {
            run.reclaimed = Some(self.reclaimed(&run, acted));
        }
        run.refill = self.watched.as_ref().filter(|_| done).map(Watched::refill);
        run
    }

    fn matched(&self, socket: &Socket) -> &Matched {
        let mut all = self.sockets.iter();
        all.find(|matched| matched.message.id.cookie() == socket.cookie())
            .expect("a socket of this case")
    }

    fn reclaimed(&self, run: &Run, acted: bool) -> Reclaimed {
        fn each<T>(case: &Case, run: &Run, meant: bool, one: fn(&str) -> T) -> Vec<Vec<Option<T>>> {
            let of_socket = |socket: &Socket| {
                let owners = case.matched(socket).owners.iter();
                let of_owner = |owner: &Owner| owner.reclaim.filter(|_| meant).map(one);
                owners.map(of_owner).collect()
            };
            run.found.sockets.iter().map(of_socket).collect()
        }
        Reclaimed {
            fates: each(self, run, acted, fate),
            doubts: each(self, run, !acted, reason),
            visits: visits(&run.found.processes, &self.stopped),
        }
    }
}

impl Watched {
    fn refill(&self) -> Refill {
        let culprit = |who: &Who| Culprit {
            pid: who.1,
            comm: who.0.into(),
        };
        let by = self.by.iter();
        let by: Vec<_> = by.map(|(who, new)| (who.map(culprit), *new)).collect();
        Refill {
            watched: self.time,
            new: by.iter().map(|(_, new)| new).sum(),
            by,
            undecided: self.undecided,
            partial: self.partial,
        }
    }
}

/// The processes, each once, by number.
fn unique<'w>(all: impl Iterator<Item = &'w Who>) -> Vec<Process> {
    let mut processes: Vec<Process> = all.map(Who::process).collect();
    processes.sort_by_key(|process| process.pid);
    processes.dedup_by_key(|process| process.pid);
    processes
}

fn index(processes: &[Process], who: &Who) -> usize {
    let mut all = processes.iter();
    all.position(|process| process.pid == who.1)
        .expect("a process of this case")
}

fn visits(owners: &[Process], stopped: &[(&'static Who, u64, usize)]) -> Vec<Visit> {
    let visit = |(who, micros, freed): &(&Who, u64, usize)| Visit {
        owner: index(owners, who),
        freed: *freed,
        stopped: Duration::from_micros(*micros),
    };
    stopped.iter().map(visit).collect()
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

/// A descriptor of a dead socket.
pub struct Dead {
    who: &'static Who,
    socket: DeadSocket,
    fd: i32,
    inode: u32,
    /// Of a run that acts, what became of it; else the word of what speaks against it.
    said: &'static str,
}

/// On 10.0.0.1:80 and quiet for two minutes.
pub fn dead(who: &'static Who, fd: i32, inode: u32, cookie: u64) -> Dead {
    let socket = DeadSocket {
        cookie: Cookie(cookie),
        local: Some(SocketAddr::from(([10, 0, 0, 1], 80))),
        quiet: Duration::from_secs(120),
        unread: 0,
    };
    Dead {
        who,
        socket,
        fd,
        inode,
        said: "",
    }
}

impl Dead {
    pub fn local(mut self, local: Option<&str>) -> Self {
        self.socket.local = local.map(|local| local.parse().expect("an address"));
        self
    }

    pub fn quiet_ms(mut self, quiet: u64) -> Self {
        self.socket.quiet = Duration::from_millis(quiet);
        self
    }

    pub fn unread(mut self, bytes: u32) -> Self {
        self.socket.unread = bytes;
        self
    }

    pub fn said(mut self, words: &'static str) -> Self {
        self.said = words;
        self
    }
}

/// A run of `cwkill reclaim`.
pub struct DeadCase {
    pub name: &'static str,
    pub arguments: &'static str,
    pub colored: bool,
    descriptors: Vec<Dead>,
    stopped: Vec<(&'static Who, u64, usize)>,
    unknown: usize,
    unreadable: usize,
    headless: Vec<&'static Who>,
    failed: Vec<i32>,
    hidden: bool,
}

/// A run of `cwkill reclaim` that could see all.
pub fn dead_case(name: &'static str, arguments: &'static str) -> DeadCase {
    DeadCase {
        name,
        arguments,
        colored: false,
        descriptors: Vec::new(),
        stopped: Vec::new(),
        unknown: 0,
        unreadable: 0,
        headless: Vec::new(),
        failed: Vec::new(),
        hidden: false,
    }
}

impl DeadCase {
    pub fn descriptors(mut self, descriptors: impl IntoIterator<Item = Dead>) -> Self {
        self.descriptors.extend(descriptors);
        self
    }

    pub fn colored(mut self) -> Self {
        self.colored = true;
        self
    }

    pub fn stopped(mut self, who: &'static Who, micros: u64, freed: usize) -> Self {
        self.stopped.push((who, micros, freed));
        self
    }

    /// Descriptors that may be of dead sockets.
    pub fn unknown(mut self, count: usize) -> Self {
        self.unknown = count;
        self
    }

    pub fn unreadable_processes(mut self, count: usize) -> Self {
        self.unreadable = count;
        self
    }

    /// The first thread of this process has ended.
    pub fn leader_ended(mut self, who: &'static Who) -> Self {
        self.headless.push(who);
        self
    }

    /// The files of this process could not be read.
    pub fn failed_process(mut self, pid: i32) -> Self {
        self.failed.push(pid);
        self
    }

    pub fn hidden_processes(mut self) -> Self {
        self.hidden = true;
        self
    }

    pub fn config(&self, verbose: bool) -> command::Config {
        let words = ["cwkill", "reclaim"].into_iter();
        let words = words.chain(self.arguments.split_whitespace());
        let config = Cli::try_parse_from(words).and_then(|cli| match cli.command {
            Some(Command::Reclaim(args)) => command::Config::from_args(args),
            other => panic!("{other:?}"),
        });
        let config = config.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        command::Config { verbose, ..config }
    }

    /// The run: before anything is judged or done, or at its end.
    pub fn run(&self, done: bool) -> command::Run {
        let owners = unique(self.descriptors.iter().map(|dead| dead.who));
        let acted = done && self.config(false).action == Action::Act;
        let descriptor = |dead: &Dead| DeadDescriptor {
            wanted: Wanted {
                owner: index(&owners, dead.who),
                fd: TargetFd(dead.fd),
                inode: dead.inode,
                cookie: dead.socket.cookie,
                age: Some(dead.socket.quiet),
                unread: dead.socket.unread,
                agreed: 0,
            },
            socket: dead.socket,
        };
        let said = || self.descriptors.iter().map(|dead| dead.said);
        let doubt = |word: &str| (!word.is_empty()).then(|| reason(word));
        command::Run {
            descriptors: self.descriptors.iter().map(descriptor).collect(),
            doubts: match done && !acted {
                true => said().map(doubt).collect(),
                false => Vec::new(),
            },
            fates: acted.then(|| said().map(fate).collect()),
            visits: visits(&owners, &self.stopped),
            owners,
            unknown: self.unknown,
            unreadable: self.unreadable,
            headless: self.headless.iter().map(|who| who.process()).collect(),
            failed: self
                .failed
                .iter()
                .map(|pid| (*pid, errno(libc::EIO)))
                .collect(),
            hidden: self.hidden,
        }
    }
}

/// The audit records of `run`: before anything is done, or after all.
pub fn dead_records<'r>(run: &'r command::Run, who: &Caller, done: bool) -> Vec<Entry<'r>> {
    match done {
        false => {
            let begin = Entry::begin_reclaim(run, who.sentence());
            [begin].into_iter().chain(reclaim_intents(run)).collect()
        }
        true => {
            let end = Entry::end_reclaim(run);
            reclaim_outcomes(run).chain([end]).collect()
        }
    }
}
