//! What is said of one method: whether it works, why not, and what to change. Pure.

use caps::Capability;

use super::host::{Count, Host, Missed};
use super::trials::Tried;
use crate::model::Privilege;
use crate::model::{Method, MethodError};
use crate::privileges::HOW_TO_GRANT;
use crate::text::escape;

/// Whether something works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Works {
    /// On every socket.
    Yes,
    /// On some.
    Partly,
    /// On none.
    No,
    /// It could not be tried.
    Untried,
}

impl Works {
    /// As in the table and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Works::Yes => "yes",
            Works::Partly => "partly",
            Works::No => "no",
            Works::Untried => "untried",
        }
    }

    /// Of two kinds of sockets together.
    pub(super) fn and(self, other: Works) -> Works {
        match (self, other) {
            (a, b) if a == b => a,
            (Works::No, Works::Untried) | (Works::Untried, Works::No) => Works::Untried,
            _ => Works::Partly,
        }
    }

    /// Of two ways to the same sockets.
    pub(super) fn or(self, other: Works) -> Works {
        match (self, other) {
            (Works::Yes, _) | (_, Works::Yes) => Works::Yes,
            (a, b) => a.and(b),
        }
    }

    pub(super) fn of(tried: &Tried) -> Works {
        match tried {
            Tried::Works => Works::Yes,
            Tried::Failed(_) => Works::No,
            Tried::Untried(_) => Works::Untried,
        }
    }
}

/// What a method can do here.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// It is part of `auto`.
    pub auto: bool,
    /// On sockets of all kinds together.
    pub works: Works,
    /// On sockets that a process of our user holds.
    pub own: Works,
    /// On sockets that a process of another user holds.
    pub others: Works,
    /// On sockets without a known owner; `None`: it is not for those.
    pub ownerless: Option<Works>,
    /// Why not, one a line.
    pub why: Vec<String>,
    /// What to change, one a line.
    pub change: Vec<String>,
}

/// How many processes are named.
const NAMES: usize = 3;

fn name(process: &Missed) -> String {
    let comm = process.comm.as_deref().unwrap_or("?");
    format!("{}/{}", escape(comm), process.pid)
}

/// Gathers the reasons of one row, each once.
pub(super) struct Builder<'a> {
    name: &'static str,
    auto: bool,
    host: &'a Host,
    why: Vec<String>,
    change: Vec<String>,
}

impl<'a> Builder<'a> {
    pub(super) fn of(method: Method, host: &'a Host) -> Self {
        Self::new(method.name(), Method::AUTO.contains(&method), host)
    }

    /// For what is no method of the ladder, too.
    pub(super) fn new(name: &'static str, auto: bool, host: &'a Host) -> Self {
        Builder {
            name,
            auto,
            host,
            why: Vec::new(),
            change: Vec::new(),
        }
    }

    pub(super) fn build(self, own: Works, others: Works, ownerless: Option<Works>) -> Row {
        let works = ownerless.into_iter().fold(own.and(others), Works::and);
        // One of two ways may be barred, and the other lead to everything.
        let (why, change) = match works {
            Works::Yes => (Vec::new(), Vec::new()),
            _ => (self.why, self.change),
        };
        Row {
            name: self.name,
            auto: self.auto,
            works,
            own,
            others,
            ownerless,
            why,
            change,
        }
    }

    pub(super) fn say(&mut self, why: String, change: impl Into<String>) {
        let change = change.into();
        if !self.why.contains(&why) {
            self.why.push(why);
        }
        if !self.change.contains(&change) {
            self.change.push(change);
        }
    }

    /// Why a trial did not succeed, if so.
    pub(super) fn failure(&mut self, tried: &Tried) {
        match tried {
            Tried::Works => {}
            Tried::Untried(why) => {
                let change = match why.as_str() {
                    "loopback is down" => "ip link set lo up",
                    _ => {
                        "run doctor again; something prevents a connection over loopback (nftables?)"
                    }
                };
                self.say(why.clone(), change);
            }
            Tried::Failed(error) => {
                let change = self.cure(error);
                self.say(error.to_string(), change);
            }
        }
    }

    fn cure(&self, error: &MethodError) -> String {
        match error {
            MethodError::NotPermitted(Privilege::NetAdmin, _) => self.grant(Capability::CAP_NET_ADMIN),
            MethodError::NotPermitted(Privilege::NetRaw, _) => self.grant(Capability::CAP_NET_RAW),
            // It was our own process.
            MethodError::NotPermitted(Privilege::Ptrace, _) => {
                "a filter of system calls forbids it: allow pidfd_open and pidfd_getfd in the seccomp profile of the \
                 container or unit"
                    .into()
            }
            MethodError::NotSupported(..) if self.name == Method::Destroy.name() => {
                "a kernel with CONFIG_INET_DIAG_DESTROY=y; rst does the same without it".into()
            }
            MethodError::NotSupported(..) => {
                "Linux 5.6 or later, and a seccomp profile that allows pidfd_open and pidfd_getfd".into()
            }
            MethodError::ForeignPidNamespace => {
                "mount -t proc proc /proc in this pid namespace, or run cwkill outside".into()
            }
            MethodError::NoAck(_) | MethodError::RstIgnored => {
                "let everything pass on lo: nft insert rule inet TABLE CHAIN iifname lo accept".into()
            }
            _ => "see the message; `cwkill --all -n -v` shows what is left to the other methods".into(),
        }
    }

    /// How to come by a capability.
    pub(super) fn grant(&self, capability: Capability) -> String {
        let short = capability.to_string();
        let short = short.trim_start_matches("CAP_");
        if self.host.has(capability) {
            "the network namespace is not of this user namespace, so the capability does not count there: run cwkill in the \
             user namespace that made the network namespace (nsenter --preserve-credentials -U -n -t PID), or as root outside"
                .into()
        } else if self.host.uid == 0 {
            format!(
                "this root lacks CAP_{short}: --cap-add {short} for a container, CapabilityBoundingSet= and \
                 AmbientCapabilities= for a unit"
            )
        } else {
            HOW_TO_GRANT.into()
        }
    }

    /// What a method that works through owners can do for ours and for others, and what stands in its way.
    pub(super) fn through_owners(&mut self, works: Works) -> (Works, Works) {
        if works != Works::Yes {
            return (works, works);
        }
        let reach = match &self.host.reach {
            Ok(reach) => reach,
            Err(error) => {
                self.say(
                    error.clone(),
                    "mount -t proc proc /proc in this pid namespace, or run cwkill outside",
                );
                return (Works::No, Works::No);
            }
        };
        let ptrace = self.host.has(Capability::CAP_SYS_PTRACE);
        let search = self.host.has(Capability::CAP_DAC_READ_SEARCH);
        let judge = |count: Count, if_none| match (count.reached, count.total) {
            (_, 0) => if_none,
            (reached, total) if reached == total => Works::Yes,
            (0, _) => Works::No,
            _ => Works::Partly,
        };
        // Without a process to ask, what the rules say (kernel/ptrace.c, __ptrace_may_access; security/yama).
        let scope = self.host.ptrace_scope.unwrap_or(0);
        let by_rule = |own: bool| match (scope, ptrace) {
            (3.., _) => Works::No,
            (_, true) => Works::Yes,
            (0, false) if own => Works::Yes,
            _ => Works::No,
        };
        let own = judge(reach.same_user, by_rule(true));
        let mut others = judge(
            reach.others,
            match self.host.first_user_namespace {
                Some(true) | None => by_rule(false),
                // The capability counts for some and not for others, and there are only ours to tell by.
                Some(false) => own,
            },
        );
        if self.host.hides_others() {
            let value = self.host.hidepid.as_deref().unwrap_or_default();
            self.say(
                format!("/proc hides the processes of others (hidepid={value})"),
                "run as root, or: mount -o remount,hidepid=0 /proc",
            );
            others = Works::No;
        }
        for (count, same_user, whose) in [
            (reach.same_user, true, "this user"),
            (reach.others, false, "other users"),
        ] {
            let missed = reach
                .missed
                .iter()
                .filter(|missed| missed.same_user == same_user);
            let missed: Vec<String> = missed.map(name).collect();
            if missed.is_empty() {
                continue;
            }
            let why = format!(
                "{} of {} processes of {whose} cannot be reached into ({}{})",
                missed.len(),
                count.total,
                missed[..missed.len().min(NAMES)].join(", "),
                if missed.len() > NAMES { ", ..." } else { "" },
            );
            let change = if scope >= 3 {
                "kernel.yama.ptrace_scope is 3: nothing lifts that but a reboot with another value in /etc/sysctl.d".into()
            } else if !ptrace && scope > 0 && same_user {
                format!("sysctl kernel.yama.ptrace_scope=0 (it is {scope}), or run as root")
            } else if !ptrace {
                self.grant(Capability::CAP_SYS_PTRACE)
            } else if !search && count.seen < count.total {
                self.grant(Capability::CAP_DAC_READ_SEARCH)
            } else if self.host.first_user_namespace == Some(false) {
                "they are outside this user namespace: run cwkill outside it".into()
            } else {
                "a security module (SELinux, AppArmor, smack) may forbid it: see `dmesg` and `ausearch -m avc`".to_owned()
            };
            self.say(why, change);
        }
        (own, others)
    }
}
