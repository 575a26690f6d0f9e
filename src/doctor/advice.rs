//! What follows from the host and the trials: for each method on which sockets it works. Why not, and what to
//! change, is gathered by the `Builder` of its row. Pure.

use caps::Capability;

use super::host::{Count, Host};
use super::row::{Builder, Row, Works};
use super::trials::{Trials, Tried};
use crate::model::Method;

/// All conclusions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// A row a method.
    pub rows: Vec<Row>,
    /// Whether `auto` works.
    pub auto: Works,
}

impl Advice {
    /// Draws the conclusions.
    pub fn new(host: &Host, trials: &Trials) -> Self {
        let rows = match &trials.blind {
            Some(why) => blind(host, why),
            None => vec![
                shutdown(host, trials),
                destroy(host, trials),
                rst(host, trials),
                probe(host, trials),
                reclaim(host),
            ],
        };
        let auto = rows.iter().filter(|row| row.auto).map(|row| row.works);
        let auto = auto.reduce(Works::and).unwrap_or(Works::No);
        Advice { rows, auto }
    }
}

fn shutdown(host: &Host, trials: &Trials) -> Row {
    let tried = trials.of(Method::Shutdown, false, true);
    let mut row = Builder::of(Method::Shutdown, host);
    row.failure(tried);
    let (own, others) = row.through_owners(Works::of(tried));
    row.build(own, others, None)
}

fn destroy(host: &Host, trials: &Trials) -> Row {
    let tried = trials.of(Method::Destroy, false, true);
    let mut row = Builder::of(Method::Destroy, host);
    row.failure(tried);
    let works = Works::of(tried);
    row.build(works, works, Some(works))
}

fn rst(host: &Host, trials: &Trials) -> Row {
    let mut row = Builder::of(Method::Rst, host);
    let drawn = |ipv6| trials.of(Method::Rst, ipv6, false);
    row.failure(drawn(false));
    let mut ownerless = Works::of(drawn(false));
    if host.ipv6 {
        row.failure(drawn(true));
        ownerless = ownerless.and(Works::of(drawn(true)));
    }
    // Where no ACK can be drawn, repair mode may still give the numbers.
    let repaired = trials.of(Method::Rst, false, true);
    let (own, others) = match (ownerless, repaired) {
        (Works::Yes, _) => (Works::Yes, Works::Yes),
        (_, Tried::Works) => {
            let (own, others) = row.through_owners(Works::Yes);
            // The rest goes the other way.
            (own.or(ownerless), others.or(ownerless))
        }
        _ => (ownerless, ownerless),
    };
    row.build(own, others, Some(ownerless))
}

fn probe(host: &Host, trials: &Trials) -> Row {
    let mut row = Builder::of(Method::Probe, host);
    let (owned, ownerless) = (
        trials.of(Method::Probe, false, true),
        trials.of(Method::Probe, false, false),
    );
    row.failure(owned);
    row.failure(ownerless);
    let (owned, ownerless) = (Works::of(owned), Works::of(ownerless));
    let (mut own, mut others) = row.through_owners(owned);
    // An owner that cannot be seen is none: its socket is asked by segments.
    let by_segments = |count: Count, by_rule: Works| {
        let kinds = [
            (count.reached, owned),
            (count.seen - count.reached, Works::No),
            (count.total - count.seen, ownerless),
        ];
        let works = kinds.into_iter().filter(|(processes, _)| *processes > 0);
        works
            .map(|(_, works)| works)
            .reduce(Works::and)
            .unwrap_or(by_rule)
    };
    if let Ok(reach) = &host.reach {
        own = by_segments(reach.same_user, own);
        others = by_segments(reach.others, others);
    }
    if host.hides_others() {
        others = ownerless;
    }
    row.build(own, others, Some(ownerless))
}

/// The command that is no method, and frees descriptors inside their owners.
const RECLAIM: &str = "reclaim";

/// It traces the owner, for which the kernel asks the same as for a duplicate of its descriptor (kernel/ptrace.c,
/// __ptrace_may_access with PTRACE_MODE_ATTACH).
fn reclaim(host: &Host) -> Row {
    let mut row = Builder::new(RECLAIM, false, host);
    let (mut own, mut others) = row.through_owners(Works::Yes);
    // kernel/seccomp.c, seccomp_get_filter
    if (host.filtered || !host.has(Capability::CAP_SYS_ADMIN))
        && let Ok(reach) = &host.reach
    {
        let filtered = reach.same_user.filtered + reach.others.filtered;
        if filtered > 0 {
            let change = match host.filtered {
                true => "run cwkill where no filter of system calls is on it".to_owned(),
                // Not a thing to grant a binary for good.
                false if host.uid != 0 => "run cwkill with sudo".to_owned(),
                false => row.grant(Capability::CAP_SYS_ADMIN),
            };
            row.say(
                format!("{filtered} processes have a seccomp filter that cannot be read: they are left alone"),
                change,
            );
        }
        for (works, count) in [(&mut own, reach.same_user), (&mut others, reach.others)] {
            if count.filtered > 0 {
                *works = match count.filtered == count.reached {
                    true => Works::No,
                    false => Works::Partly,
                };
            }
        }
    }
    if !host.kcmp {
        row.say(
            "this kernel has no kcmp(2): whether a process shares its table of descriptors cannot be seen".to_owned(),
            "a kernel with CONFIG_KCMP (a seccomp profile that answers ENOSYS to kcmp looks the same)",
        );
        (own, others) = (Works::No, Works::No);
    }
    row.build(own, others, None)
}

/// Nothing works where no socket can be listed, for this reason.
fn blind(host: &Host, why: &str) -> Vec<Row> {
    let cure = "let cwkill open netlink sockets (AF_NETLINK) and read /proc: RestrictAddressFamilies= and SystemCallFilter= of a \
                unit, the seccomp profile of a container, mount -t proc proc /proc; in the kernel modprobe tcp_diag";
    let row = |mut row: Builder<'_>, ownerless| {
        row.say(why.to_owned(), cure);
        row.build(Works::No, Works::No, ownerless)
    };
    let methods = [
        (Method::Shutdown, None),
        (Method::Destroy, Some(Works::No)),
        (Method::Rst, Some(Works::No)),
        (Method::Probe, Some(Works::No)),
    ];
    let methods = methods.map(|(method, ownerless)| row(Builder::of(method, host), ownerless));
    let reclaim = row(Builder::new(RECLAIM, false, host), None);
    methods.into_iter().chain([reclaim]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::host::{Missed, Namespaces, Reach};
    use crate::doctor::trials::Subject;
    use crate::model::MethodError;
    use crate::model::Privilege;

    fn host(capabilities: &[Capability], same_user: Count, others: Count) -> Host {
        Host {
            kernel: "6.18.0".into(),
            uid: 0,
            capabilities: capabilities.iter().copied().collect(),
            first_user_namespace: Some(true),
            filtered: false,
            user_namespaces_forbidden: None,
            ptrace_scope: None,
            hidepid: None,
            namespaces: Ok(Namespaces::default()),
            reach: Ok(Reach {
                same_user,
                others,
                missed: [(same_user, true), (others, false)]
                    .into_iter()
                    .flat_map(|(count, same_user)| {
                        (count.reached..count.total).map(move |_| same_user)
                    })
                    .map(|same_user| Missed {
                        pid: 7,
                        comm: Some("a\u{1b}".into()),
                        same_user,
                        seen: false,
                    })
                    .collect(),
            }),
            pidfd_getfd: Ok(()),
            kcmp: true,
            repair: Ok(()),
            raw_v4: Ok(()),
            raw_v6: Ok(()),
            capture: Ok(()),
            ipv6: true,
        }
    }

    fn count(total: usize, reached: usize) -> Count {
        Count {
            total,
            seen: reached,
            reached,
            filtered: 0,
        }
    }

    /// All trials succeed but those that `fails` has an error for.
    fn trials(fails: impl Fn(Subject) -> Option<Tried>) -> Trials {
        use Method::{Destroy, Probe, Rst, Shutdown};
        let subjects = [
            (Shutdown, false, true),
            (Destroy, false, true),
            (Rst, false, true),
            (Rst, false, false),
            (Rst, true, false),
            (Probe, false, true),
            (Probe, false, false),
        ];
        let subject = |(method, ipv6, owned)| Subject {
            method,
            ipv6,
            owned,
        };
        Trials {
            blind: None,
            tried: subjects
                .map(subject)
                .map(|subject| (subject, fails(subject).unwrap_or(Tried::Works)))
                .into(),
        }
    }

    fn denied(need: Privilege) -> Tried {
        Tried::Failed(MethodError::NotPermitted(need, nix::errno::Errno::EPERM))
    }

    fn row(advice: &Advice, name: &str) -> Row {
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
    fn where_all_trials_succeed_and_all_owners_are_in_reach_auto_works() {
        let advice = Advice::new(&host(&ALL, count(5, 5), count(9, 9)), &trials(|_| None));
        assert_eq!(advice.auto, Works::Yes);
        assert!(
            advice
                .rows
                .iter()
                .all(|row| row.works == Works::Yes && row.change.is_empty())
        );
    }

    #[test]
    fn a_user_closes_what_is_his() {
        let host = Host {
            uid: 1000,
            ..host(&[], count(5, 5), count(9, 0))
        };
        let advice = Advice::new(
            &host,
            &trials(|subject| match subject.method {
                Method::Destroy => Some(denied(Privilege::NetAdmin)),
                Method::Rst => Some(denied(Privilege::NetRaw)),
                Method::Probe if !subject.owned => Some(denied(Privilege::NetRaw)),
                _ => None,
            }),
        );
        assert_eq!(advice.auto, Works::Partly);
        let shutdown = row(&advice, "shutdown");
        assert_eq!((shutdown.own, shutdown.others), (Works::Yes, Works::No));
        assert_eq!(row(&advice, "destroy").works, Works::No);
        assert!(row(&advice, "destroy").change[0].contains("setcap"));
        assert_eq!(row(&advice, "probe").own, Works::Yes);
        assert_eq!(row(&advice, "probe").others, Works::No);
    }

    #[test]
    fn a_probe_goes_by_segments_where_the_owner_is_not_seen() {
        let seen = |seen, reached| Count {
            total: 4,
            seen,
            reached,
            filtered: 0,
        };
        for (count, works) in [
            (seen(0, 0), Works::Yes),
            (seen(4, 0), Works::No),
            (seen(1, 0), Works::Partly),
            (seen(2, 2), Works::Yes),
        ] {
            let host = host(&[Capability::CAP_NET_RAW], count, count);
            let probe = row(&Advice::new(&host, &trials(|_| None)), "probe");
            assert_eq!(probe.own, works, "{count:?}");
        }
    }

    #[test]
    fn a_capability_that_is_there_and_does_not_count_is_told_apart() {
        let refused = |subject: Subject| {
            (subject.method == Method::Destroy).then(|| denied(Privilege::NetAdmin))
        };
        let reach = count(1, 1);
        let advice = Advice::new(&host(&ALL, reach, reach), &trials(refused));
        assert!(row(&advice, "destroy").change[0].contains("user namespace"));
        let advice = Advice::new(&host(&[], reach, reach), &trials(refused));
        assert!(row(&advice, "destroy").change[0].contains("--cap-add NET_ADMIN"));
    }

    #[test]
    fn yama_is_named() {
        for (scope, text) in [(1, "ptrace_scope=0"), (3, "reboot")] {
            let host = Host {
                ptrace_scope: Some(scope),
                uid: 1000,
                ..host(&[], count(3, 0), count(9, 0))
            };
            let shutdown = row(&Advice::new(&host, &trials(|_| None)), "shutdown");
            assert_eq!(shutdown.works, Works::No);
            assert!(shutdown.why[0].contains("a\\u{1b}/7, a"), "{shutdown:?}");
            assert!(
                shutdown.change.iter().any(|line| line.contains(text)),
                "{shutdown:?}"
            );
        }
    }

    #[test]
    fn repair_mode_stands_in_for_a_elicited_ack() {
        let advice = Advice::new(
            &host(&ALL, count(5, 5), count(9, 9)),
            &trials(|subject| {
                let drawn = subject.method == Method::Rst && !subject.owned;
                drawn.then_some(Tried::Failed(MethodError::NoAck(None)))
            }),
        );
        let rst = row(&advice, "rst");
        assert_eq!((rst.works, rst.ownerless), (Works::Partly, Some(Works::No)));
        assert!(rst.change[0].contains("lo"));
    }

    #[test]
    fn what_could_not_be_tried_is_no_answer() {
        let untried = |_| Some(Tried::Untried("loopback is down".into()));
        let advice = Advice::new(&host(&ALL, count(1, 1), count(1, 1)), &trials(untried));
        assert_eq!(advice.auto, Works::Untried);
        assert_eq!(row(&advice, "destroy").change, ["ip link set lo up"]);
    }

    #[test]
    fn without_a_list_of_sockets_nothing_works() {
        let blind = Trials {
            blind: Some("no sock_diag".into()),
            tried: Vec::new(),
        };
        let advice = Advice::new(&host(&ALL, count(1, 1), count(1, 1)), &blind);
        assert_eq!(advice.auto, Works::No);
        assert_eq!(advice.rows.len(), 5);
        for row in &advice.rows {
            assert_eq!(
                (row.works, row.why[0].as_str()),
                (Works::No, "no sock_diag")
            );
            assert_eq!(row.change.len(), 1);
        }
    }

    #[test]
    fn reclaim_leaves_the_filtered_alone_where_filters_cannot_be_read() {
        let some = Count {
            filtered: 2,
            ..count(5, 5)
        };
        let mut host = host(&ALL, some, count(9, 9));
        let of = |host: &Host| row(&Advice::new(host, &trials(|_| None)), "reclaim");
        let before = of(&host);
        assert_eq!((before.own, before.others), (Works::Partly, Works::Yes));
        assert!(before.change[0].contains("SYS_ADMIN"));
        host.capabilities.insert(Capability::CAP_SYS_ADMIN);
        assert_eq!(of(&host).works, Works::Yes);
        host.filtered = true;
        assert_eq!(of(&host).works, Works::Partly);
        host.kcmp = false;
        let without = of(&host);
        assert_eq!(without.works, Works::No);
        assert!(
            without
                .change
                .iter()
                .any(|change| change.contains("CONFIG_KCMP"))
        );
    }
}
