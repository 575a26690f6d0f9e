//! The contents of the records. Pure, except [`Caller::this_process`].

use std::collections::BTreeSet;
use std::time::SystemTime;

use serde::Serialize;

use super::forwarded::ForwardedRecord;
use crate::model::{Method, Outcome, Owner, ReclaimOutcome, Scan, Target};
use crate::proc::{Process, ProcessId};
use crate::report::backlogs::{self, JsonBacklog, json_backlog};
use crate::report::json::{self, JsonSocket};
use crate::report::reclaim::ReclaimRun;
use crate::report::reclaim::json::{JsonDeadDescriptor, json_dead_descriptor};
use crate::report::{Run, SocketCounts, descriptors, serialize, text};
use crate::text::{counted, escape};

/// The user who runs cwkill; the same in every record of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Caller {
    cwkill_version: &'static str,
    /// The pid of cwkill, in its own pid namespace.
    pid: u32,
    /// The real uid.
    uid: u32,
    /// The user who called sudo(8). It comes from the environment, so a user who did not come through sudo can forge it.
    sudo_user: Option<String>,
    /// The uid of the login session, which su(1) and sudo(8) do not change (/proc/PID/loginuid); `None` if there was no login.
    login_uid: Option<u32>,
    /// The policy of the daemon by which it acts.
    #[serde(flatten)]
    policy: Option<ByPolicy>,
    /// The command line without the program's name; only in the first record of a run.
    #[serde(skip)]
    arguments: Vec<String>,
}

/// The policy of the daemon by which a run acts.
#[derive(Clone, Debug, Serialize)]
pub struct ByPolicy {
    /// Its name.
    pub policy: String,
    /// The number of the sweep, counted over all starts of the daemon.
    pub sweep: u64,
}

impl Caller {
    /// The caller of this process.
    pub fn this_process() -> Self {
        let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
        let login_uid = procfs::process::Process::myself().and_then(|process| process.loginuid());
        Caller {
            cwkill_version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            uid: nix::unistd::getuid().as_raw(),
            sudo_user: std::env::var_os("SUDO_USER").map(text),
            // include/linux/audit.h, AUDIT_UID_UNSET.
            login_uid: login_uid.ok().filter(|&uid| uid != u32::MAX),
            policy: None,
            arguments: std::env::args_os().skip(1).map(text).collect(),
        }
    }

    /// The same, as it acts by a policy of the daemon.
    pub fn by(self, policy: ByPolicy) -> Self {
        Caller {
            policy: Some(policy),
            ..self
        }
    }

    /// A caller who came through sudo(8), for tests.
    #[cfg(test)]
    pub(crate) fn example() -> Self {
        Caller {
            cwkill_version: "0.1.0",
            pid: 7,
            uid: 0,
            sudo_user: Some("al\"ice\n".into()),
            login_uid: None,
            policy: None,
            arguments: vec!["--all".into()],
        }
    }

    /// `entry` as a JSON object, written at `time`.
    pub fn line(&self, entry: &Entry<'_>, time: SystemTime) -> String {
        #[derive(Serialize)]
        struct Record<'a> {
            event: &'static str,
            time: String,
            #[serde(flatten)]
            caller: &'a Caller,
            #[serde(skip_serializing_if = "Option::is_none")]
            arguments: Option<&'a [String]>,
            #[serde(flatten)]
            entry: &'a Entry<'a>,
        }
        serialize::line(&Record {
            event: entry.event(),
            time: humantime::format_rfc3339_micros(time).to_string(),
            caller: self,
            arguments: (entry.event() == "begin").then_some(&self.arguments[..]),
            entry,
        })
    }

    /// The caller in words.
    pub fn sentence(&self) -> String {
        let mut known = Vec::new();
        if let Some(by) = &self.policy {
            known.push(format!("policy {}, sweep {}", by.policy, by.sweep));
        }
        if let Some(name) = &self.sudo_user {
            known.push(format!("sudo by {}", escape(name)));
        }
        if let Some(uid) = self.login_uid {
            known.push(format!("login uid {uid}"));
        }
        match known.is_empty() {
            true => format!("uid {}", self.uid),
            false => format!("uid {} ({})", self.uid, known.join(", ")),
        }
    }
}

/// One record, without the caller and the time.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Entry<'a> {
    /// The run is about to act on sockets.
    Begin {
        /// The number of sockets that matched.
        matched: usize,
        /// The number of those that the run will act on.
        to_act_on: usize,
        /// The methods, in the order in which they are tried.
        methods: Vec<&'static str>,
        /// The number of backlogs that the run is about to drain.
        #[serde(skip_serializing_if = "Option::is_none")]
        backlogs: Option<usize>,
        /// The caller in words.
        #[serde(skip)]
        caller: String,
    },
    /// The run is about to close descriptors of dead sockets.
    BeginReclaim {
        /// The number of descriptors that were found.
        descriptors: usize,
        /// The number of their owners.
        processes: usize,
        /// The caller in words.
        #[serde(skip)]
        caller: String,
    },
    /// The run is about to act on a socket.
    Intent {
        /// The socket with its plan, as in the JSON report.
        socket: Box<JsonSocket<'a>>,
        /// Its owners and its network namespace, in words.
        #[serde(skip)]
        owners: String,
    },
    /// The outcome of a socket.
    Outcome {
        /// The socket with its outcome, as in the JSON report.
        socket: Box<JsonSocket<'a>>,
        #[serde(skip)]
        target: &'a Target,
        /// Its owners and its network namespace, in words.
        #[serde(skip)]
        owners: String,
    },
    /// The run is about to drain a backlog, if no live connection waits in it.
    DrainIntent {
        /// The backlog, as in the JSON report.
        backlog: Box<JsonBacklog<'a>>,
        /// Its address and its owners, in words.
        #[serde(skip)]
        place: String,
    },
    /// The result of a backlog.
    DrainOutcome {
        /// The backlog with its result, as in the JSON report.
        backlog: Box<JsonBacklog<'a>>,
        /// The same in words.
        #[serde(skip)]
        sentence: String,
        /// Whether dead connections are left in it.
        #[serde(skip)]
        is_left: bool,
    },
    /// The run is about to close a descriptor.
    ReclaimIntent {
        /// The descriptor, as in the report for programs.
        descriptor: Box<JsonDeadDescriptor<'a>>,
    },
    /// The outcome of a descriptor.
    ReclaimOutcome {
        /// The descriptor with its outcome, as in the report for programs.
        descriptor: Box<JsonDeadDescriptor<'a>>,
        /// The same.
        #[serde(skip)]
        outcome: Option<&'a ReclaimOutcome>,
    },
    /// A record of a run on forwarded connections.
    Forwarded(ForwardedRecord<'a>),
    /// The run on sockets is over.
    End {
        /// How many sockets had which outcome.
        summary: SocketCounts,
    },
    /// The run on descriptors is over.
    EndReclaim {
        /// How many descriptors had which outcome.
        summary: descriptors::DescriptorCounts,
    },
}

/// One record for each socket that `run` is about to act on.
pub fn intents(run: &Run) -> impl Iterator<Item = Entry<'_>> {
    let targets = run.scan.targets.iter();
    targets
        .filter(|target| target.plan.skip.is_none())
        .map(|target| Entry::Intent {
            socket: Box::new(json::json_socket(run, target)),
            owners: owners(&run.scan, target),
        })
}

/// One record for each socket of a run that is over.
pub fn outcomes(run: &Run) -> impl Iterator<Item = Entry<'_>> {
    run.scan.targets.iter().map(|target| Entry::Outcome {
        socket: Box::new(json::json_socket(run, target)),
        target,
        owners: owners(&run.scan, target),
    })
}

/// One record for each backlog that `run` is about to drain.
pub fn drain_intents(run: &Run) -> impl Iterator<Item = Entry<'_>> {
    let backlogs = run.backlogs.iter().flatten();
    backlogs.map(|backlog| Entry::DrainIntent {
        backlog: Box::new(json_backlog(run, backlog)),
        place: backlogs::place(run, backlog),
    })
}

/// One record for each backlog of a run that is over.
pub fn drain_outcomes(run: &Run) -> impl Iterator<Item = Entry<'_>> {
    let backlogs = run.backlogs.iter().flatten();
    backlogs.map(|backlog| Entry::DrainOutcome {
        backlog: Box::new(json_backlog(run, backlog)),
        sentence: backlogs::line(run, backlog),
        is_left: backlog.is_left(),
    })
}

/// One record for each descriptor that `run` is about to close.
pub fn reclaim_intents(run: &ReclaimRun) -> impl Iterator<Item = Entry<'_>> {
    run.descriptors.iter().map(|dead| Entry::ReclaimIntent {
        descriptor: Box::new(json_dead_descriptor(run, dead)),
    })
}

/// One record for each descriptor of a run that is over.
pub fn reclaim_outcomes(run: &ReclaimRun) -> impl Iterator<Item = Entry<'_>> {
    run.descriptors.iter().map(|dead| Entry::ReclaimOutcome {
        descriptor: Box::new(json_dead_descriptor(run, dead)),
        outcome: dead.owner.reclaim.as_ref(),
    })
}

/// The owners of a socket, or of its listener, and its network namespace, in words.
fn owners(scan: &Scan, target: &Target) -> String {
    let netns = escape(&scan.netns(target).label());
    let names = names(scan.responsible(target));
    let place = match text::units(scan, target, true).as_str() {
        "-" => String::new(),
        place => format!(" ({place})"),
    };
    match names.as_slice() {
        [] => format!("of no known owner, netns {netns}"),
        names => format!("of {}{place}, netns {netns}", names.join(", ")),
    }
}

/// The maximum number of owners that a sentence names.
const MAX_NAMES: usize = 3;

fn names(owners: &[Owner]) -> Vec<String> {
    let mut processes: Vec<&Process> = owners.iter().map(|owner| &*owner.process).collect();
    processes.dedup_by_key(|process| process.id);
    let named = processes.iter().take(MAX_NAMES);
    let mut names: Vec<String> = named.map(ToString::to_string).collect();
    if processes.len() > MAX_NAMES {
        names.push(format!("{} more", processes.len() - MAX_NAMES));
    }
    names
}

impl Entry<'_> {
    /// The first record of a run on sockets. `caller`: the caller in words.
    pub fn begin(run: &Run, caller: String) -> Self {
        let targets = &run.scan.targets;
        let mut methods: Vec<Method> = Vec::new();
        for method in targets.iter().flat_map(|target| &target.plan.methods) {
            if !methods.contains(method) {
                methods.push(*method);
            }
        }
        let to_act_on = targets.iter().filter(|target| target.plan.skip.is_none());
        Entry::Begin {
            matched: targets.len(),
            to_act_on: to_act_on.count(),
            methods: methods.into_iter().map(Method::name).collect(),
            backlogs: run.backlogs.as_ref().map(Vec::len),
            caller,
        }
    }

    /// The first record of a run on descriptors. `caller`: the caller in words.
    pub fn begin_reclaim(run: &ReclaimRun, caller: String) -> Self {
        let owners = run.descriptors.iter().map(|dead| dead.owner.process.id);
        let processes: BTreeSet<ProcessId> = owners.collect();
        Entry::BeginReclaim {
            descriptors: run.descriptors.len(),
            processes: processes.len(),
            caller,
        }
    }

    /// The last record of a run on sockets.
    pub fn end(run: &Run) -> Self {
        Entry::End {
            summary: SocketCounts::of(run),
        }
    }

    /// The last record of a run on descriptors.
    pub fn end_reclaim(run: &ReclaimRun) -> Self {
        Entry::EndReclaim {
            summary: run.counts(),
        }
    }

    /// The kind of record.
    pub fn event(&self) -> &'static str {
        match self {
            Entry::Begin { .. } | Entry::BeginReclaim { .. } => "begin",
            Entry::Intent { .. } | Entry::DrainIntent { .. } | Entry::ReclaimIntent { .. } => {
                "intent"
            }
            Entry::Outcome { .. } | Entry::DrainOutcome { .. } | Entry::ReclaimOutcome { .. } => {
                "outcome"
            }
            Entry::End { .. } | Entry::EndReclaim { .. } => "end",
            Entry::Forwarded(record) => record.event(),
        }
    }

    /// Whether it is about an intended act on one socket or descriptor.
    pub fn is_intent(&self) -> bool {
        self.event() == "intent"
    }

    /// The record in words.
    pub fn message(&self) -> String {
        match self {
            Entry::Begin {
                matched,
                to_act_on,
                methods,
                backlogs,
                caller,
            } => {
                let mut parts = Vec::new();
                match to_act_on {
                    0 if *matched == 0 => {}
                    0 => parts.push(format!(
                        "nothing can be done to the {matched} sockets that matched"
                    )),
                    _ => parts.push(format!(
                        "about to act on {to_act_on} of {matched} sockets by {}",
                        methods.join(", ")
                    )),
                }
                if let Some(backlogs) = backlogs.filter(|backlogs| *backlogs > 0) {
                    parts.push(format!("about to drain {}", counted(backlogs, "backlog")));
                }
                format!("{caller}: {}", parts.join("; "))
            }
            Entry::BeginReclaim {
                descriptors,
                processes,
                caller,
            } => format!(
                "{caller}: about to close {descriptors} descriptors of dead sockets in {processes} processes"
            ),
            Entry::Intent { socket, owners } => format!(
                "{} {} {owners}: to be closed by {}",
                socket.local,
                socket.peer,
                socket.plan.join(", then ")
            ),
            Entry::Outcome {
                socket,
                target,
                owners,
            } => format!(
                "{} {} {owners}: {}",
                socket.local,
                socket.peer,
                text::result(target, true).map_or_else(String::new, |(text, _)| text)
            ),
            Entry::DrainIntent { place, .. } => {
                format!("backlog of {place}: to be drained if no live connection waits in it")
            }
            Entry::DrainOutcome { sentence, .. } => sentence.clone(),
            Entry::ReclaimIntent { descriptor } => {
                format!("{}: to be closed", descriptor.sentence())
            }
            Entry::ReclaimOutcome {
                descriptor,
                outcome,
            } => {
                let (result, _) = descriptors::result(*outcome);
                format!("{}: {result}", descriptor.sentence())
            }
            Entry::End { summary } => summary.sentence(),
            Entry::Forwarded(record) => record.message(),
            Entry::EndReclaim { summary } => {
                format!(
                    "{} descriptors: {} freed{}",
                    summary.found,
                    summary.freed,
                    summary.left()
                )
            }
        }
    }

    /// The outcome of the socket or descriptor.
    pub fn outcome(&self) -> Option<&'static str> {
        match self {
            Entry::ReclaimOutcome { outcome, .. } => Some(outcome.as_ref()?.name()),
            Entry::Forwarded(record) => record.outcome(),
            _ => Some(self.socket()?.result.as_ref()?.outcome),
        }
    }

    /// The method that closed the socket.
    pub fn method(&self) -> Option<&'static str> {
        self.socket()?.result.as_ref()?.method
    }

    /// The local address of the socket.
    pub fn local(&self) -> Option<String> {
        match self {
            Entry::Forwarded(record) => record.local(),
            _ => Some(self.socket()?.local.to_string()),
        }
    }

    /// The peer's address.
    pub fn peer(&self) -> Option<String> {
        match self {
            Entry::Forwarded(record) => record.peer(),
            _ => Some(self.socket()?.peer.to_string()),
        }
    }

    /// The cookie of the socket.
    pub fn cookie(&self) -> Option<&str> {
        match self {
            Entry::ReclaimIntent { descriptor } | Entry::ReclaimOutcome { descriptor, .. } => {
                Some(&descriptor.cookie)
            }
            _ => Some(&self.socket()?.cookie),
        }
    }

    /// Whether the outcome is a failure.
    pub fn is_failure(&self) -> bool {
        match self {
            Entry::Outcome { target, .. } => target.outcome == Some(Outcome::Failed),
            Entry::DrainOutcome { is_left, .. } => *is_left,
            Entry::Forwarded(record) => record.is_failure(),
            Entry::ReclaimOutcome { outcome, .. } => {
                matches!(outcome, Some(ReclaimOutcome::Failed(_)))
            }
            _ => false,
        }
    }

    fn socket(&self) -> Option<&JsonSocket<'_>> {
        match self {
            Entry::Intent { socket, .. } | Entry::Outcome { socket, .. } => Some(socket),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{MethodError, SkipReason, Socket};
    use crate::proc::ProcFs;
    use crate::proc::netns::NetnsScope;
    use crate::sock_diag::testdata::stuck;
    use nix::errno::Errno;
    use serde_json::Value;
    use std::time::Duration;

    /// A run on one socket, planned for two methods; the first failed.
    fn run() -> Run {
        let message = stuck("[::1]:80", "[::2]:5", 9);
        let mut target = Target::new(Socket::from_message(&message));
        target.plan.methods = vec![Method::Destroy, Method::Rst];
        let denied = MethodError::SystemCall("SOCK_DESTROY", Errno::EPERM);
        target.record(Method::Destroy, Err(denied));
        target.outcome = Some(Outcome::Failed);
        let mut run = Run::new(Scan {
            namespaces: NetnsScope::Current.open(&ProcFs::default()).unwrap().open,
            targets: vec![target],
            ..Scan::default()
        });
        run.acted = true;
        run
    }

    fn line(entry: &Entry<'_>) -> Value {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_500);
        serde_json::from_str(&Caller::example().line(entry, time)).unwrap()
    }

    #[test]
    fn every_record_says_who_and_when() {
        let run = run();
        for entry in [Entry::begin(&run, String::new()), Entry::end(&run)] {
            let record = line(&entry);
            assert_eq!(record["event"], entry.event());
            assert_eq!(record["time"], "1970-01-01T00:00:01.500000Z");
            assert_eq!(record["sudo_user"], "al\"ice\n");
            assert_eq!(record["login_uid"], Value::Null);
            assert_eq!(record.get("arguments").is_some(), entry.event() == "begin");
        }
        let begin = line(&Entry::begin(&run, String::new()));
        assert_eq!(begin["arguments"][0], "--all");
        assert_eq!(begin["to_act_on"], 1);
        assert_eq!(begin["methods"], serde_json::json!(["destroy", "rst"]));
    }

    #[test]
    fn a_sentence_names_the_caller_the_act_and_the_owners() {
        let mut run = run();
        let caller = Caller::example().sentence();
        assert_eq!(caller, r#"uid 0 (sudo by al"ice\n)"#);
        let begin = |run: &Run| Entry::begin(run, caller.clone()).message();
        assert!(begin(&run).contains(": about to act on 1 of 1 sockets by destroy, rst"));
        let intent = intents(&run).next().unwrap();
        assert!(intent.message().contains("of no known owner, netns "));
        assert!(
            intent
                .message()
                .ends_with("to be closed by destroy, then rst")
        );
        let plan = &mut run.scan.targets[0].plan;
        plan.methods.clear();
        plan.skip = Some(SkipReason::NoMethod);
        assert!(begin(&run).ends_with(": nothing can be done to the 1 sockets that matched"));
        assert!(intents(&run).next().is_none());
    }

    #[test]
    fn an_outcome_has_the_socket_and_every_attempt() {
        let run = run();
        let entry = outcomes(&run).next().unwrap();
        let record = line(&entry);
        assert_eq!(record["socket"]["peer"]["address"], "::2");
        let attempt = &record["socket"]["result"]["attempts"][0];
        assert_eq!(attempt["errno"], "EPERM");
        assert_eq!(entry.outcome(), Some("failed"));
        assert_eq!(entry.peer().as_deref(), Some("[::2]:5"));
        assert!(entry.is_failure());
        assert!(entry.message().contains("failed: destroy: SOCK_DESTROY"));
    }
}
