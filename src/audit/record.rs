//! What a record says. Pure, but for [`Caller::this_process`].

use std::collections::BTreeSet;
use std::time::SystemTime;

use serde::Serialize;

use crate::model::{Method, Outcome, Owner, ReclaimOutcome, Scan, Target};
use crate::proc::{Process, ProcessId};
use crate::report::json::{self, JsonSocket};
use crate::report::reclaim::ReclaimRun;
use crate::report::reclaim::json::{JsonDeadDescriptor, json_dead_descriptor};
use crate::report::{Run, SocketCounts, descriptors, serialize, text};
use crate::text::escape;

/// Who runs it; the same in every record of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Caller {
    cwkill_version: &'static str,
    /// Of cwkill, in its own pid namespace.
    pid: u32,
    /// The real user.
    uid: u32,
    /// What sudo(8) says of who called it; anybody can set it who does not come by sudo.
    sudo_user: Option<String>,
    /// The user who logged in, whoever he has become since (/proc/PID/loginuid of the audit system); `None` if nobody did.
    login_uid: Option<u32>,
    /// What was typed after the name of the program; in the first record of a run.
    #[serde(skip)]
    arguments: Vec<String>,
}

impl Caller {
    /// The one who has started this process.
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
            arguments: std::env::args_os().skip(1).map(text).collect(),
        }
    }

    /// Somebody who came by sudo(8), for tests.
    #[cfg(test)]
    pub(crate) fn example() -> Self {
        Caller {
            cwkill_version: "0.1.0",
            pid: 7,
            uid: 0,
            sudo_user: Some("al\"ice\n".into()),
            login_uid: None,
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

    /// For people.
    pub fn sentence(&self) -> String {
        let mut known = Vec::new();
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

/// What happened.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Entry<'a> {
    /// Something is about to be done.
    Begin {
        /// Sockets that matched.
        matched: usize,
        /// Of those, how many are to be acted on.
        to_act_on: usize,
        /// The methods, in the order they are tried.
        methods: Vec<&'static str>,
        /// Who does it.
        #[serde(skip)]
        who: String,
    },
    /// Descriptors of dead sockets are about to be closed.
    BeginReclaim {
        /// How many were found.
        descriptors: usize,
        /// In how many processes.
        processes: usize,
        /// Who does it.
        #[serde(skip)]
        who: String,
    },
    /// A socket that is about to be acted on.
    Intent {
        /// The socket with its plan, as in the report for programs.
        socket: Box<JsonSocket<'a>>,
        /// Who holds it, or should have accepted it, and where.
        #[serde(skip)]
        whose: String,
    },
    /// What became of a socket.
    Outcome {
        /// The socket with its result, as in the report for programs.
        socket: Box<JsonSocket<'a>>,
        /// The same.
        #[serde(skip)]
        target: &'a Target,
        /// Who holds it, or should have accepted it, and where.
        #[serde(skip)]
        whose: String,
    },
    /// A descriptor that is about to be closed.
    ReclaimIntent {
        /// The descriptor, as in the report for programs.
        descriptor: Box<JsonDeadDescriptor<'a>>,
    },
    /// What became of a descriptor.
    ReclaimOutcome {
        /// The descriptor with its outcome, as in the report for programs.
        descriptor: Box<JsonDeadDescriptor<'a>>,
        /// The same.
        #[serde(skip)]
        outcome: Option<&'a ReclaimOutcome>,
    },
    /// All has been done.
    End {
        /// How many sockets had which outcome.
        summary: SocketCounts,
    },
    /// All has been done.
    EndReclaim {
        /// How many descriptors had which outcome.
        summary: descriptors::DescriptorCounts,
    },
}

/// A record for every socket that `run` is about to act on.
pub fn intents(run: &Run) -> impl Iterator<Item = Entry<'_>> {
    let targets = run.scan.targets.iter();
    targets
        .filter(|target| target.plan.skip.is_none())
        .map(|target| Entry::Intent {
            socket: Box::new(json::json_socket(run, target)),
            whose: whose(&run.scan, target),
        })
}

/// A record for every socket of a run that is over.
pub fn outcomes(run: &Run) -> impl Iterator<Item = Entry<'_>> {
    run.scan.targets.iter().map(|target| Entry::Outcome {
        socket: Box::new(json::json_socket(run, target)),
        target,
        whose: whose(&run.scan, target),
    })
}

/// A record for every descriptor that `run` is about to close.
pub fn reclaim_intents(run: &ReclaimRun) -> impl Iterator<Item = Entry<'_>> {
    run.descriptors.iter().map(|dead| Entry::ReclaimIntent {
        descriptor: Box::new(json_dead_descriptor(run, dead)),
    })
}

/// A record for every descriptor of a run that is over.
pub fn reclaim_outcomes(run: &ReclaimRun) -> impl Iterator<Item = Entry<'_>> {
    run.descriptors.iter().map(|dead| Entry::ReclaimOutcome {
        descriptor: Box::new(json_dead_descriptor(run, dead)),
        outcome: dead.owner.reclaim.as_ref(),
    })
}

/// The owners of a socket, or those of the listener that has it, and its network namespace.
fn whose(scan: &Scan, target: &Target) -> String {
    let netns = escape(&scan.netns(target).label());
    let names = owners(scan.responsible(target));
    let place = match text::units(scan, target, true).as_str() {
        "-" => String::new(),
        place => format!(" ({place})"),
    };
    match names.as_slice() {
        [] => format!("of no known owner, netns {netns}"),
        names => format!("of {}{place}, netns {netns}", names.join(", ")),
    }
}

/// How many owners a sentence names.
const NAMES: usize = 3;

fn owners(owners: &[Owner]) -> Vec<String> {
    let mut processes: Vec<&Process> = owners.iter().map(|owner| &*owner.process).collect();
    processes.dedup_by_key(|process| process.id);
    let named = processes.iter().take(NAMES);
    let mut names: Vec<String> = named.map(ToString::to_string).collect();
    if processes.len() > NAMES {
        names.push(format!("{} more", processes.len() - NAMES));
    }
    names
}

impl Entry<'_> {
    /// The record of what `run` is about to do for `who`.
    pub fn begin(run: &Run, who: String) -> Self {
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
            who,
        }
    }

    /// The record of what `run` is about to do for `who`.
    pub fn begin_reclaim(run: &ReclaimRun, who: String) -> Self {
        let owners = run.descriptors.iter().map(|dead| dead.owner.process.id);
        let processes: BTreeSet<ProcessId> = owners.collect();
        Entry::BeginReclaim {
            descriptors: run.descriptors.len(),
            processes: processes.len(),
            who,
        }
    }

    /// The record of what `run` has done.
    pub fn end(run: &Run) -> Self {
        Entry::End {
            summary: SocketCounts::of(run),
        }
    }

    /// The record of what `run` has done.
    pub fn end_reclaim(run: &ReclaimRun) -> Self {
        Entry::EndReclaim {
            summary: run.counts(),
        }
    }

    /// The kind of record.
    pub fn event(&self) -> &'static str {
        match self {
            Entry::Begin { .. } | Entry::BeginReclaim { .. } => "begin",
            Entry::Intent { .. } | Entry::ReclaimIntent { .. } => "intent",
            Entry::Outcome { .. } | Entry::ReclaimOutcome { .. } => "outcome",
            Entry::End { .. } | Entry::EndReclaim { .. } => "end",
        }
    }

    /// Whether it is about what is to be done to one socket or descriptor.
    pub fn is_intent(&self) -> bool {
        self.event() == "intent"
    }

    /// For people.
    pub fn message(&self) -> String {
        match self {
            Entry::Begin {
                matched,
                to_act_on: 0,
                who,
                ..
            } => format!("{who}: nothing can be done to the {matched} sockets that matched"),
            Entry::Begin {
                matched,
                to_act_on,
                methods,
                who,
            } => format!(
                "{who}: about to act on {to_act_on} of {matched} sockets by {}",
                methods.join(", ")
            ),
            Entry::BeginReclaim {
                descriptors,
                processes,
                who,
            } => format!(
                "{who}: about to close {descriptors} descriptors of dead sockets in {processes} processes"
            ),
            Entry::Intent { socket, whose } => format!(
                "{} {} {whose}: to be closed by {}",
                socket.local,
                socket.peer,
                socket.plan.join(", then ")
            ),
            Entry::Outcome {
                socket,
                target,
                whose,
            } => format!(
                "{} {} {whose}: {}",
                socket.local,
                socket.peer,
                text::result(target, true).map_or_else(String::new, |(text, _)| text)
            ),
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

    /// The outcome, and by which method.
    pub fn outcome(&self) -> Option<&'static str> {
        match self {
            Entry::ReclaimOutcome { outcome, .. } => Some(outcome.as_ref()?.name()),
            _ => Some(self.socket()?.result.as_ref()?.outcome),
        }
    }

    /// The method that closed it.
    pub fn method(&self) -> Option<&'static str> {
        self.socket()?.result.as_ref()?.method
    }

    /// The local end.
    pub fn local(&self) -> Option<String> {
        Some(self.socket()?.local.to_string())
    }

    /// The peer's end.
    pub fn peer(&self) -> Option<String> {
        Some(self.socket()?.peer.to_string())
    }

    /// The kernel's identity of the socket.
    pub fn cookie(&self) -> Option<&str> {
        match self {
            Entry::ReclaimIntent { descriptor } | Entry::ReclaimOutcome { descriptor, .. } => {
                Some(&descriptor.cookie)
            }
            _ => Some(&self.socket()?.cookie),
        }
    }

    /// Whether something did not work.
    pub fn is_failure(&self) -> bool {
        match self {
            Entry::Outcome { target, .. } => target.outcome == Some(Outcome::Failed),
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

    /// A run over one socket on which both methods were to be tried.
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
    fn a_sentence_says_who_does_what_to_whom() {
        let mut run = run();
        let who = Caller::example().sentence();
        assert_eq!(who, r#"uid 0 (sudo by al"ice\n)"#);
        let begin = |run: &Run| Entry::begin(run, who.clone()).message();
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
