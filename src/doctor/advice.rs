//! Concludes from the host and the trials on which sockets each method works. `RowBuilder` collects the reasons
//! and the changes that would help. Pure.

use caps::Capability;

use super::host::{HostInfo, ProcessCounts};
use super::meaning::meaning;
use super::row::{MethodRow, RowBuilder, Support};
use super::trials::{TrialResult, Trials};
use crate::model::Method;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// One row per method, and one for `reclaim`.
    pub rows: Vec<MethodRow>,
    /// How far the methods of `auto` work together.
    pub auto: Support,
    /// What the processes that cwkill cannot read mean, one per line.
    pub meaning: Vec<String>,
}

impl Advice {
    pub fn new(host: &HostInfo, trials: &Trials) -> Self {
        let rows = match &trials.list_error {
            Some(why) => rows_without_list(host, why),
            None => vec![
                shutdown(host, trials),
                destroy(host, trials),
                rst(host, trials),
                probe(host, trials),
                reclaim(host),
            ],
        };
        let auto = rows.iter().filter(|row| row.auto).map(|row| row.works);
        let auto = auto.reduce(Support::and).unwrap_or(Support::No);
        let meaning = match &trials.list_error {
            Some(_) => Vec::new(),
            None => meaning(host, &rows),
        };
        Advice {
            rows,
            auto,
            meaning,
        }
    }
}

fn shutdown(host: &HostInfo, trials: &Trials) -> MethodRow {
    let result = trials.result(Method::Shutdown, false, true);
    let mut row = RowBuilder::of(Method::Shutdown, host);
    row.add_failure(result);
    let (own, others) = row.support_through_owners(Support::of(result));
    row.build(own, others, None)
}

fn destroy(host: &HostInfo, trials: &Trials) -> MethodRow {
    let result = trials.result(Method::Destroy, false, true);
    let mut row = RowBuilder::of(Method::Destroy, host);
    row.add_failure(result);
    let works = Support::of(result);
    row.build(works, works, Some(works))
}

fn rst(host: &HostInfo, trials: &Trials) -> MethodRow {
    let mut row = RowBuilder::of(Method::Rst, host);
    let by_elicited_ack = |ipv6| trials.result(Method::Rst, ipv6, false);
    row.add_failure(by_elicited_ack(false));
    let mut ownerless = Support::of(by_elicited_ack(false));
    if host.ipv6 {
        row.add_failure(by_elicited_ack(true));
        ownerless = ownerless.and(Support::of(by_elicited_ack(true)));
    }
    // If no ACK can be elicited, cwkill may still read the sequence numbers in repair mode, through the owner.
    let by_repair_mode = trials.result(Method::Rst, false, true);
    let (own, others) = match (ownerless, by_repair_mode) {
        (Support::Yes, _) => (Support::Yes, Support::Yes),
        (_, TrialResult::Succeeded) => {
            let (own, others) = row.support_through_owners(Support::Yes);
            // The other sockets depend on an elicited ACK.
            (own.or(ownerless), others.or(ownerless))
        }
        _ => (ownerless, ownerless),
    };
    row.build(own, others, Some(ownerless))
}

fn probe(host: &HostInfo, trials: &Trials) -> MethodRow {
    let mut row = RowBuilder::of(Method::Probe, host);
    let (owned, ownerless) = (
        trials.result(Method::Probe, false, true),
        trials.result(Method::Probe, false, false),
    );
    row.add_failure(owned);
    row.add_failure(ownerless);
    let (owned, ownerless) = (Support::of(owned), Support::of(ownerless));
    let (mut own, mut others) = row.support_through_owners(owned);
    // A socket whose owner is not visible counts as one without an owner: cwkill probes it with raw segments.
    let by_visibility = |count: ProcessCounts, by_rule: Support| {
        let kinds = [
            (count.reachable, owned),
            (count.visible - count.reachable, Support::No),
            (count.total - count.visible, ownerless),
        ];
        let works = kinds.into_iter().filter(|(processes, _)| *processes > 0);
        works
            .map(|(_, works)| works)
            .reduce(Support::and)
            .unwrap_or(by_rule)
    };
    if let Ok(reach) = &host.reachability {
        own = by_visibility(reach.same_user, own);
        others = by_visibility(reach.others, others);
    }
    if host.hides_others() {
        others = ownerless;
    }
    row.build(own, others, Some(ownerless))
}

/// `reclaim` is a command, not a method, but it has a row too.
const RECLAIM: &str = "reclaim";

/// `reclaim` attaches to the owner with ptrace(2). The kernel requires the same rights for this as for the duplicate of a
/// descriptor (kernel/ptrace.c, __ptrace_may_access with PTRACE_MODE_ATTACH).
fn reclaim(host: &HostInfo) -> MethodRow {
    let mut row = RowBuilder::new(RECLAIM, false, host);
    let (mut own, mut others) = row.support_through_owners(Support::Yes);
    // kernel/seccomp.c, seccomp_get_filter
    if (host.has_seccomp_filter || !host.has(Capability::CAP_SYS_ADMIN))
        && let Ok(reach) = &host.reachability
    {
        let filtered = reach.same_user.with_seccomp + reach.others.with_seccomp;
        if filtered > 0 {
            let change = match host.has_seccomp_filter {
                true => "run cwkill where no filter of system calls is on it".to_owned(),
                // CAP_SYS_ADMIN is too powerful for the file capabilities of a binary.
                false if host.uid != 0 => "run cwkill with sudo".to_owned(),
                false => row.how_to_grant(Capability::CAP_SYS_ADMIN),
            };
            row.add_reason(
                format!("{filtered} processes have a seccomp filter that cannot be read: they are left alone"),
                change,
            );
        }
        for (works, count) in [(&mut own, reach.same_user), (&mut others, reach.others)] {
            if count.with_seccomp > 0 {
                *works = match count.with_seccomp == count.reachable {
                    true => Support::No,
                    false => Support::Partly,
                };
            }
        }
    }
    if !host.kcmp {
        row.add_reason(
            "this kernel has no kcmp(2), so cwkill cannot see whether a process shares its descriptor table".to_owned(),
            "a kernel with CONFIG_KCMP (a seccomp profile that answers ENOSYS to kcmp looks the same)",
        );
        (own, others) = (Support::No, Support::No);
    }
    row.build(own, others, None)
}

/// The rows if cwkill cannot list sockets, with the reason: nothing works.
fn rows_without_list(host: &HostInfo, why: &str) -> Vec<MethodRow> {
    let change = "let cwkill open netlink sockets (AF_NETLINK) and read /proc: RestrictAddressFamilies= and SystemCallFilter= of a \
                unit, the seccomp profile of a container, mount -t proc proc /proc; in the kernel modprobe tcp_diag";
    let row = |mut row: RowBuilder<'_>, ownerless| {
        row.add_reason(why.to_owned(), change);
        row.build(Support::No, Support::No, ownerless)
    };
    let methods = [
        (Method::Shutdown, None),
        (Method::Destroy, Some(Support::No)),
        (Method::Rst, Some(Support::No)),
        (Method::Probe, Some(Support::No)),
    ];
    let methods = methods.map(|(method, ownerless)| row(RowBuilder::of(method, host), ownerless));
    let reclaim = row(RowBuilder::new(RECLAIM, false, host), None);
    methods.into_iter().chain([reclaim]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::host::{NamespaceCounts, Reachability, UnreachableProcess, testdata};
    use crate::doctor::trials::Trial;
    use crate::model::{MethodError, Privilege};

    fn host(
        capabilities: &[Capability],
        same_user: ProcessCounts,
        others: ProcessCounts,
    ) -> HostInfo {
        let unreachable = [(same_user, true), (others, false)]
            .into_iter()
            .flat_map(|(count, same_user)| (count.reachable..count.total).map(move |_| same_user))
            .map(|same_user| UnreachableProcess {
                pid: 7,
                comm: Some("a\u{1b}".into()),
                same_user,
                seen: false,
            });
        HostInfo {
            reachability: Ok(Reachability {
                same_user,
                others,
                unreachable: unreachable.collect(),
            }),
            ..testdata::host(capabilities)
        }
    }

    fn count(total: usize, reachable: usize) -> ProcessCounts {
        ProcessCounts {
            total,
            visible: reachable,
            reachable,
            with_seccomp: 0,
        }
    }

    /// All trials succeed, except those for which `fails` has another result.
    fn trials(fails: impl Fn(Trial) -> Option<TrialResult>) -> Trials {
        use Method::{Destroy, Probe, Rst, Shutdown};
        let trials = [
            (Shutdown, false, true),
            (Destroy, false, true),
            (Rst, false, true),
            (Rst, false, false),
            (Rst, true, false),
            (Probe, false, true),
            (Probe, false, false),
        ];
        let trial = |(method, ipv6, use_owner)| Trial {
            method,
            ipv6,
            use_owner,
        };
        Trials {
            list_error: None,
            by_iterator: None,
            results: trials
                .map(trial)
                .map(|trial| (trial, fails(trial).unwrap_or(TrialResult::Succeeded)))
                .into(),
        }
    }

    fn denied(need: Privilege) -> TrialResult {
        TrialResult::Failed(MethodError::NotPermitted(need, nix::errno::Errno::EPERM))
    }

    fn row(advice: &Advice, name: &str) -> MethodRow {
        advice
            .rows
            .iter()
            .find(|row| row.name == name)
            .unwrap()
            .clone()
    }

    const ALL: [Capability; 4] = [
        Capability::CAP_SYS_PTRACE,
        Capability::CAP_DAC_READ_SEARCH,
        Capability::CAP_NET_ADMIN,
        Capability::CAP_NET_RAW,
    ];

    #[test]
    fn auto_works_if_all_trials_succeed_and_all_owners_are_reachable() {
        let advice = Advice::new(&host(&ALL, count(5, 5), count(9, 9)), &trials(|_| None));
        assert_eq!(advice.auto, Support::Yes);
        assert!(
            advice
                .rows
                .iter()
                .all(|row| row.works == Support::Yes && row.change.is_empty())
        );
    }

    #[test]
    fn a_user_closes_sockets_of_own_processes() {
        let host = HostInfo {
            uid: 1000,
            ..host(&[], count(5, 5), count(9, 0))
        };
        let advice = Advice::new(
            &host,
            &trials(|trial| match trial.method {
                Method::Destroy => Some(denied(Privilege::NetAdmin)),
                Method::Rst => Some(denied(Privilege::NetRaw)),
                Method::Probe if !trial.use_owner => Some(denied(Privilege::NetRaw)),
                _ => None,
            }),
        );
        assert_eq!(advice.auto, Support::Partly);
        let shutdown = row(&advice, "shutdown");
        assert_eq!((shutdown.own, shutdown.others), (Support::Yes, Support::No));
        assert_eq!(row(&advice, "destroy").works, Support::No);
        let change = &row(&advice, "destroy").change[0];
        let (owner, rest) = change.split_once("\nchmod 0750 ").unwrap();
        assert!(owner.contains("\nchown root:GROUP "), "{change}");
        assert!(rest.contains("\nsetcap cap_dac_read_search,"), "{change}");
        assert_eq!(row(&advice, "probe").own, Support::Yes);
        assert_eq!(row(&advice, "probe").others, Support::No);
    }

    #[test]
    fn it_says_what_unreadable_processes_mean() {
        let meaning = |same_user, others| {
            Advice::new(&host(&ALL, same_user, others), &trials(|_| None)).meaning
        };
        assert_eq!(meaning(count(5, 5), count(9, 9)), Vec::<String>::new());
        assert_eq!(
            meaning(count(5, 4), count(9, 9)),
            [
                "cwkill cannot read 1 of 14 processes (a\\u{1b}/7). A stuck socket of this process is listed without a known owner, \
                 and no selector of owners (--pid, --process, --unit, --container, --pod, --namespace, --compose-service, --cgroup) \
                 finds it; destroy and rst close it, shutdown and reclaim do not. The other 13 processes are not affected."
            ]
        );
        let all = meaning(count(2, 0), count(2, 0));
        assert!(all[0].contains("4 of 4 processes (a"), "{all:?}");
        assert!(!all[0].contains("The other"), "{all:?}");
        let mut blind = host(&ALL, count(5, 5), count(9, 8));
        if let Ok(reachability) = &mut blind.reachability {
            reachability.unreachable[0].seen = true;
        }
        blind.namespaces = Ok(NamespaceCounts {
            unknown_processes: 1,
            ..NamespaceCounts::default()
        });
        let fails = |_| Some(denied(Privilege::NetAdmin));
        let meaning = Advice::new(&blind, &trials(fails)).meaning;
        assert!(
            meaning[0].contains("is listed with its owner; nothing closes it here"),
            "{meaning:?}"
        );
        assert!(
            meaning[1].contains("namespace of 1 process:"),
            "{meaning:?}"
        );
    }

    #[test]
    fn a_probe_uses_segments_if_the_owner_is_not_visible() {
        let counts = |visible, reachable| ProcessCounts {
            total: 4,
            visible,
            reachable,
            with_seccomp: 0,
        };
        for (count, works) in [
            (counts(0, 0), Support::Yes),
            (counts(4, 0), Support::No),
            (counts(1, 0), Support::Partly),
            (counts(2, 2), Support::Yes),
        ] {
            let host = host(&[Capability::CAP_NET_RAW], count, count);
            let probe = row(&Advice::new(&host, &trials(|_| None)), "probe");
            assert_eq!(probe.own, works, "{count:?}");
        }
    }

    #[test]
    fn a_capability_without_effect_gets_another_advice_than_a_missing_one() {
        let refused =
            |trial: Trial| (trial.method == Method::Destroy).then(|| denied(Privilege::NetAdmin));
        let reach = count(1, 1);
        let advice = Advice::new(&host(&ALL, reach, reach), &trials(refused));
        assert!(row(&advice, "destroy").change[0].contains("security module"));
        let inside = HostInfo {
            first_user_namespace: Some(false),
            ..host(&ALL, reach, reach)
        };
        let advice = Advice::new(&inside, &trials(refused));
        assert!(row(&advice, "destroy").change[0].contains("user namespace"));
        let advice = Advice::new(&host(&[], reach, reach), &trials(refused));
        assert!(row(&advice, "destroy").change[0].contains("--cap-add NET_ADMIN"));
    }

    #[test]
    fn yama_is_named() {
        for (scope, text) in [(1, "ptrace_scope=0"), (3, "reboot")] {
            let host = HostInfo {
                ptrace_scope: Some(scope),
                uid: 1000,
                ..host(&[], count(3, 0), count(9, 0))
            };
            let shutdown = row(&Advice::new(&host, &trials(|_| None)), "shutdown");
            assert_eq!(shutdown.works, Support::No);
            assert!(shutdown.why[0].contains("a\\u{1b}/7, a"), "{shutdown:?}");
            assert!(
                shutdown.change.iter().any(|line| line.contains(text)),
                "{shutdown:?}"
            );
        }
    }

    #[test]
    fn repair_mode_replaces_an_elicited_ack() {
        let advice = Advice::new(
            &host(&ALL, count(5, 5), count(9, 9)),
            &trials(|trial| {
                let by_elicited_ack = trial.method == Method::Rst && !trial.use_owner;
                by_elicited_ack.then_some(TrialResult::Failed(MethodError::NoAck(None)))
            }),
        );
        let rst = row(&advice, "rst");
        assert_eq!(
            (rst.works, rst.ownerless),
            (Support::Partly, Some(Support::No))
        );
        assert!(rst.change[0].contains("lo"));
    }

    #[test]
    fn without_trials_the_support_is_untried() {
        let not_run = |_| Some(TrialResult::NotRun("loopback is down".into()));
        let advice = Advice::new(&host(&ALL, count(1, 1), count(1, 1)), &trials(not_run));
        assert_eq!(advice.auto, Support::Untried);
        assert_eq!(row(&advice, "destroy").change, ["ip link set lo up"]);
    }

    #[test]
    fn without_a_list_of_sockets_nothing_works() {
        let without_list = Trials {
            by_iterator: None,
            list_error: Some("no sock_diag".into()),
            results: Vec::new(),
        };
        let advice = Advice::new(&host(&ALL, count(1, 1), count(1, 1)), &without_list);
        assert_eq!(advice.auto, Support::No);
        assert_eq!(advice.rows.len(), 5);
        for row in &advice.rows {
            assert_eq!(
                (row.works, row.why[0].as_str()),
                (Support::No, "no sock_diag")
            );
            assert_eq!(row.change.len(), 1);
        }
    }

    #[test]
    fn reclaim_leaves_processes_alone_whose_filters_cannot_be_read() {
        let some = ProcessCounts {
            with_seccomp: 2,
            ..count(5, 5)
        };
        let mut host = host(&ALL, some, count(9, 9));
        let reclaim = |host: &HostInfo| row(&Advice::new(host, &trials(|_| None)), "reclaim");
        let before = reclaim(&host);
        assert_eq!((before.own, before.others), (Support::Partly, Support::Yes));
        assert!(before.change[0].contains("SYS_ADMIN"));
        host.capabilities.insert(Capability::CAP_SYS_ADMIN);
        assert_eq!(reclaim(&host).works, Support::Yes);
        host.has_seccomp_filter = true;
        assert_eq!(reclaim(&host).works, Support::Partly);
        host.kcmp = false;
        let without = reclaim(&host);
        assert_eq!(without.works, Support::No);
        assert!(
            without
                .change
                .iter()
                .any(|change| change.contains("CONFIG_KCMP"))
        );
    }
}
