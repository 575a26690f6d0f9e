//! The conclusions about one method: whether it works, why not, and which change would help. Pure.

use caps::Capability;

use super::host::{HostInfo, ProcessCounts, UnreachableProcess};
use super::trials::TrialResult;
use crate::model::{Method, MethodError, Privilege};
use crate::privileges::HOW_TO_GRANT;
use crate::text::escape;

/// How far a method works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Support {
    /// On every socket.
    Yes,
    /// On some sockets.
    Partly,
    /// On no socket.
    No,
    /// The trial could not be run.
    Untried,
}

impl Support {
    /// The name in the table and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Support::Yes => "yes",
            Support::Partly => "partly",
            Support::No => "no",
            Support::Untried => "untried",
        }
    }

    /// The support for two kinds of sockets together.
    pub(super) fn and(self, other: Support) -> Support {
        match (self, other) {
            (a, b) if a == b => a,
            (Support::No, Support::Untried) | (Support::Untried, Support::No) => Support::Untried,
            _ => Support::Partly,
        }
    }

    /// The support by two ways to close the same sockets.
    pub(super) fn or(self, other: Support) -> Support {
        match (self, other) {
            (Support::Yes, _) | (_, Support::Yes) => Support::Yes,
            (a, b) => a.and(b),
        }
    }

    pub(super) fn of(result: &TrialResult) -> Support {
        match result {
            TrialResult::Succeeded => Support::Yes,
            TrialResult::Failed(_) => Support::No,
            TrialResult::NotRun(_) => Support::Untried,
        }
    }
}

/// The support for one method, or for `reclaim`, on this host.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MethodRow {
    pub name: &'static str,
    /// The method is part of `auto`.
    pub auto: bool,
    /// For sockets of all kinds together.
    pub works: Support,
    /// For sockets whose owner has the effective user of cwkill.
    pub own: Support,
    /// For sockets whose owner has another user.
    pub others: Support,
    /// For sockets without a known owner; `None`: the method does not apply to them.
    pub ownerless: Option<Support>,
    /// The reasons why it does not work, one per line.
    pub why: Vec<String>,
    /// The changes that would help, one per line.
    pub change: Vec<String>,
}

/// The maximum number of processes named in a reason.
const MAX_NAMED: usize = 3;

/// The names of the first processes.
pub(super) fn named<'a>(processes: impl Iterator<Item = &'a UnreachableProcess>) -> String {
    let name = |process: &UnreachableProcess| {
        let comm = process.comm.as_deref().unwrap_or("?");
        format!("{}/{}", escape(comm), process.pid)
    };
    let mut names: Vec<String> = processes.take(MAX_NAMED + 1).map(name).collect();
    if names.len() > MAX_NAMED {
        names[MAX_NAMED] = "...".to_owned();
    }
    names.join(", ")
}

/// Collects the reasons and changes of one row, each once.
pub(super) struct RowBuilder<'a> {
    name: &'static str,
    auto: bool,
    host: &'a HostInfo,
    why: Vec<String>,
    change: Vec<String>,
}

impl<'a> RowBuilder<'a> {
    pub(super) fn of(method: Method, host: &'a HostInfo) -> Self {
        Self::new(method.name(), Method::AUTO.contains(&method), host)
    }

    /// A row by name, for `reclaim`, which is not a [`Method`].
    pub(super) fn new(name: &'static str, auto: bool, host: &'a HostInfo) -> Self {
        RowBuilder {
            name,
            auto,
            host,
            why: Vec::new(),
            change: Vec::new(),
        }
    }

    pub(super) fn build(
        self,
        own: Support,
        others: Support,
        ownerless: Option<Support>,
    ) -> MethodRow {
        let works = ownerless.into_iter().fold(own.and(others), Support::and);
        // If one of two ways works on all sockets, the failure of the other does not matter.
        let (why, change) = match works {
            Support::Yes => (Vec::new(), Vec::new()),
            _ => (self.why, self.change),
        };
        MethodRow {
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

    pub(super) fn add_reason(&mut self, why: String, change: impl Into<String>) {
        let change = change.into();
        if !self.why.contains(&why) {
            self.why.push(why);
        }
        if !self.change.contains(&change) {
            self.change.push(change);
        }
    }

    /// Adds the reason why a trial did not succeed; nothing if it did.
    pub(super) fn add_failure(&mut self, result: &TrialResult) {
        match result {
            TrialResult::Succeeded => {}
            TrialResult::NotRun(why) => {
                let change = match why.as_str() {
                    "loopback is down" => "ip link set lo up",
                    _ => {
                        "run doctor again; something prevents a connection over loopback (nftables?)"
                    }
                };
                self.add_reason(why.clone(), change);
            }
            TrialResult::Failed(error) => {
                let change = self.remedy(error);
                self.add_reason(error.to_string(), change);
            }
        }
    }

    /// The change that would prevent `error`.
    fn remedy(&self, error: &MethodError) -> String {
        match error {
            // In a trial cwkill itself is the owner, so only a seccomp filter can forbid this.
            MethodError::NotPermitted(Privilege::Ptrace, _)
            | MethodError::RefusedDespitePrivilege(Privilege::Ptrace, _) => {
                "a filter of system calls forbids it: allow pidfd_open and pidfd_getfd in the seccomp profile of the \
                 container or unit"
                    .into()
            }
            MethodError::NotPermitted(privilege, _)
            | MethodError::RefusedDespitePrivilege(privilege, _) => {
                self.how_to_grant(privilege.capability())
            }
            MethodError::NotSupported(..) if self.name == Method::Destroy.name() => {
                "a kernel with CONFIG_INET_DIAG_DESTROY=y; rst does the same without it".into()
            }
            MethodError::NotSupported(..) => {
                "Linux 5.6 or later, and a seccomp profile that allows pidfd_open and pidfd_getfd".into()
            }
            MethodError::OtherPidNamespace => {
                "mount -t proc proc /proc in this pid namespace, or run cwkill outside".into()
            }
            MethodError::NoAck(_) | MethodError::RstIgnored => {
                "let everything pass on lo: nft insert rule inet TABLE CHAIN iifname lo accept".into()
            }
            _ => "see the message; `cwkill --all -n -v` shows what is left to the other methods".into(),
        }
    }

    /// The change that would give cwkill a capability.
    pub(super) fn how_to_grant(&self, capability: Capability) -> String {
        let short = capability.to_string();
        let short = short.trim_start_matches("CAP_");
        if self.host.has(capability) && self.host.first_user_namespace == Some(true) {
            "cwkill has the capability, so a security module (SELinux, AppArmor, smack) or a seccomp filter on cwkill forbids it: \
             see `dmesg` and `ausearch -m avc`"
                .into()
        } else if self.host.has(capability) {
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

    /// The support for a method that works through the owners of sockets: for owners of the same user and for owners of other
    /// users. `works` is the result of the trial. Adds the reasons for what does not work.
    pub(super) fn support_through_owners(&mut self, works: Support) -> (Support, Support) {
        if works != Support::Yes {
            return (works, works);
        }
        let reachability = match &self.host.reachability {
            Ok(reachability) => reachability,
            Err(error) => {
                self.add_reason(
                    error.clone(),
                    "mount -t proc proc /proc in this pid namespace, or run cwkill outside",
                );
                return (Support::No, Support::No);
            }
        };
        let ptrace = self.host.has(Capability::CAP_SYS_PTRACE);
        let search = self.host.has(Capability::CAP_DAC_READ_SEARCH);
        let judge = |count: ProcessCounts, if_none| match (count.reachable, count.total) {
            (_, 0) => if_none,
            (reached, total) if reached == total => Support::Yes,
            (0, _) => Support::No,
            _ => Support::Partly,
        };
        // If there is no process to count, the kernel's rules decide (kernel/ptrace.c, __ptrace_may_access; security/yama).
        let scope = self.host.ptrace_scope.unwrap_or(0);
        let by_rule = |own: bool| match (scope, ptrace) {
            (3.., _) => Support::No,
            (_, true) => Support::Yes,
            (0, false) if own => Support::Yes,
            _ => Support::No,
        };
        let own = judge(reachability.same_user, by_rule(true));
        let mut others = judge(
            reachability.others,
            match self.host.first_user_namespace {
                Some(true) | None => by_rule(false),
                // In another user namespace CAP_SYS_PTRACE counts for some processes only. The best estimate is the
                // result for processes of the same user.
                Some(false) => own,
            },
        );
        if self.host.hides_others() {
            let value = self.host.hidepid.as_deref().unwrap_or_default();
            self.add_reason(
                format!("/proc hides the processes of others (hidepid={value})"),
                "run as root, or: mount -o remount,hidepid=0 /proc",
            );
            others = Support::No;
        }
        for (count, same_user, users) in [
            (reachability.same_user, true, "this user"),
            (reachability.others, false, "other users"),
        ] {
            let processes = reachability.unreachable.iter();
            let processes = processes.filter(|process| process.same_user == same_user);
            let missing = processes.clone().count();
            if missing == 0 {
                continue;
            }
            let why = format!(
                "{missing} of {} processes of {users} cannot be reached into ({})",
                count.total,
                named(processes),
            );
            let change = if scope >= 3 {
                "kernel.yama.ptrace_scope is 3: nothing lifts that but a reboot with another value in /etc/sysctl.d".into()
            } else if !ptrace && scope > 0 && same_user {
                format!("sysctl kernel.yama.ptrace_scope=0 (it is {scope}), or run as root")
            } else if !ptrace {
                self.how_to_grant(Capability::CAP_SYS_PTRACE)
            } else if !search && count.visible < count.total {
                self.how_to_grant(Capability::CAP_DAC_READ_SEARCH)
            } else if self.host.first_user_namespace == Some(false) {
                "they are outside this user namespace: run cwkill outside it".into()
            } else {
                "a security module (SELinux, AppArmor, smack) may forbid it: see `dmesg` and `ausearch -m avc`".to_owned()
            };
            self.add_reason(why, change);
        }
        (own, others)
    }
}
