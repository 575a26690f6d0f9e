//! What a record says. Pure, but for [`Caller::this_process`].

use std::time::SystemTime;

use serde::Serialize;

use crate::injector::MethodName;
use crate::injector::ladder::Verdict;
use crate::pipeline::{Deed, Run};
use crate::report::json::{self, JsonSocket};
use crate::report::{Tally, text};

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
    /// What was typed after the name of the program.
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

    /// `entry` as a JSON object, written at `time`.
    pub fn line(&self, entry: &Entry<'_>, time: SystemTime) -> String {
        #[derive(Serialize)]
        struct Record<'a> {
            event: &'static str,
            time: String,
            #[serde(flatten)]
            caller: &'a Caller,
            #[serde(flatten)]
            entry: &'a Entry<'a>,
        }
        json::line(&Record {
            event: entry.event(),
            time: humantime::format_rfc3339_micros(time).to_string(),
            caller: self,
            entry,
        })
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
    },
    /// What became of a socket.
    Outcome {
        /// The socket with its result, as in the report for programs.
        socket: Box<JsonSocket<'a>>,
        /// The same, as the ladder has it.
        #[serde(skip)]
        deed: &'a Deed,
        /// Who holds it, or should have accepted it.
        #[serde(skip)]
        whose: String,
    },
    /// All has been done.
    End {
        /// How many sockets had which outcome.
        summary: Tally,
    },
}

/// A record for every socket of a run that is over.
pub fn outcomes(run: &Run) -> impl Iterator<Item = Entry<'_>> {
    let sockets = json::sockets(run).zip(&run.found.sockets);
    sockets
        .zip(run.deeds.iter().flatten())
        .map(|((json, socket), deed)| Entry::Outcome {
            socket: Box::new(json),
            deed,
            whose: text::whose(&run.found, socket, true),
        })
}

impl Entry<'_> {
    /// What `run` is about to do.
    pub fn begin(run: &Run) -> Self {
        let mut methods: Vec<MethodName> = Vec::new();
        for method in run.plans.iter().flat_map(|plan| &plan.methods) {
            if !methods.contains(method) {
                methods.push(*method);
            }
        }
        Entry::Begin {
            matched: run.plans.len(),
            to_act_on: run
                .plans
                .iter()
                .filter(|plan| !plan.methods.is_empty())
                .count(),
            methods: methods.into_iter().map(MethodName::name).collect(),
        }
    }

    /// What `run` has done.
    pub fn end(run: &Run) -> Self {
        Entry::End {
            summary: Tally::of(run),
        }
    }

    /// The kind of record.
    pub fn event(&self) -> &'static str {
        match self {
            Entry::Begin { .. } => "begin",
            Entry::Outcome { .. } => "outcome",
            Entry::End { .. } => "end",
        }
    }

    /// For people.
    pub fn message(&self) -> String {
        match self {
            Entry::Begin {
                matched,
                to_act_on,
                methods,
            } => format!(
                "about to act on {to_act_on} of {matched} sockets by {}",
                methods.join(", ")
            ),
            Entry::Outcome {
                socket,
                deed,
                whose,
            } => format!(
                "{} {} of {whose}: {}",
                socket.local,
                socket.peer,
                text::result(&deed.outcome, true).0
            ),
            Entry::End { summary } => summary.sentence(),
        }
    }

    /// The outcome, and by which method.
    pub fn outcome(&self) -> Option<&'static str> {
        Some(self.socket()?.result.as_ref()?.outcome)
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
        Some(&self.socket()?.cookie)
    }

    /// Whether something did not work.
    pub fn is_failure(&self) -> bool {
        matches!(self, Entry::Outcome { deed, .. } if matches!(deed.outcome.verdict, Verdict::Failed))
    }

    fn socket(&self) -> Option<&JsonSocket<'_>> {
        match self {
            Entry::Outcome { socket, .. } => Some(socket),
            Entry::Begin { .. } | Entry::End { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finder::netns::Which;
    use crate::finder::owners::Proc;
    use crate::finder::sock_diag::testdata::stuck;
    use crate::finder::{Found, Socket};
    use crate::injector::ActError;
    use crate::injector::ladder::{Attempt, Outcome};
    use crate::plan::Plan;
    use serde_json::Value;
    use std::time::Duration;

    fn caller() -> Caller {
        Caller {
            cwkill_version: "0.1.0",
            pid: 7,
            uid: 0,
            sudo_user: Some("al\"ice\n".into()),
            login_uid: None,
            arguments: vec!["--all".into()],
        }
    }

    /// A run over one socket on which both methods were tried.
    fn run() -> Run {
        let denied = std::io::Error::from_raw_os_error(libc::EPERM);
        Run {
            namespaces: Which::Ours.open(&Proc::default()).unwrap().open,
            found: Found {
                sockets: vec![Socket::from_message(&stuck("[::1]:80", "[::2]:5", 9))],
                ..Found::default()
            },
            plans: vec![Plan {
                methods: vec![MethodName::Destroy, MethodName::Rst],
                left_out: Vec::new(),
                over_limit: false,
            }],
            deeds: Some(vec![Deed {
                outcome: Outcome {
                    verdict: Verdict::Failed,
                    attempts: vec![Attempt {
                        method: MethodName::Destroy,
                        error: Some(ActError::Os("SOCK_DESTROY", denied)),
                    }],
                },
                descriptors: None,
            }]),
            refill: None,
            reclaimed: None,
        }
    }

    fn line(entry: &Entry<'_>) -> Value {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_500);
        serde_json::from_str(&caller().line(entry, time)).unwrap()
    }

    #[test]
    fn every_record_says_who_and_when() {
        let run = run();
        for entry in [Entry::begin(&run), Entry::end(&run)] {
            let record = line(&entry);
            assert_eq!(record["event"], entry.event());
            assert_eq!(record["time"], "1970-01-01T00:00:01.500000Z");
            assert_eq!(record["sudo_user"], "al\"ice\n");
            assert_eq!(record["login_uid"], Value::Null);
            assert_eq!(record["arguments"][0], "--all");
        }
        let begin = line(&Entry::begin(&run));
        assert_eq!(begin["to_act_on"], 1);
        assert_eq!(begin["methods"], serde_json::json!(["destroy", "rst"]));
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
