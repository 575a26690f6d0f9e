//! The text of a built sweep, compared byte for byte with `golden.prom`, and what holds for every text.
//!
//! `CWKILL_RENEW_GOLDEN=1 cargo test --lib golden` writes the file anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::policies::{ActCounts, PolicyNumbers};
use super::*;
use crate::daemon::observation::{DescriptorUse, Known};
use crate::daemon::policy::breaker::{Status, Trip};
use crate::daemon::policy::{Hold, Reason};
use crate::finder::dead::{DeadSocket, Suspect, SuspectVerdict};
use crate::finder::dead_among_others::DeadDescriptors;
use crate::model::Scan;
use crate::proc::cgroup::{Cgroup, Facts};
use crate::proc::{Process, ProcessId, RemoteFd};
use crate::report::golden_tests::builder::{Listening, Who, case, socket};
use crate::sock_diag::{Cookie, Protocol};

const POD: &str = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod8f2a1c3d_1111_2222_3333_444455556666.slice/\
    cri-containerd-fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210.scope";

static JAVA: Who = Who("java", 4421, "0::/system.slice/tomcat.service");
static OTHER_JAVA: Who = Who("java", 4422, "0::/system.slice/tomcat.service");
static EVIL: Who = Who("e\"v\\i\nl\u{1b}", 666, "0::/");
static NGINX: Who = Who("nginx", 812, "0::/system.slice/nginx.service");
static WEB: Listening = Listening("0.0.0.0:80", 3, 128, &[(&NGINX, 6)]);

/// A scan of two namespaces, with a socket of each kind.
fn scan() -> Scan {
    let mut scan = case("metrics", "")
        .another_netns(4_026_532_000, Some("blue"))
        .unreadable_processes(2)
        .namespaces_not_looked_into(3)
        .sockets([
            socket("10.0.0.1:80", "10.0.0.2:5001", 1)
                .owner(&JAVA, 7)
                .queues(0, 0)
                .age_ms(90_000_000),
            socket("10.0.0.1:80", "10.0.0.2:5002", 2)
                .owner(&OTHER_JAVA, 8)
                .queues(1461, 0)
                .age_ms(61_500),
            // Two processes have it, and it counts once.
            socket("10.0.0.1:80", "10.0.0.2:5003", 3)
                .owner(&JAVA, 9)
                .owner(&EVIL, 9)
                .queues(1, 77)
                .age_ms(500),
            socket("10.0.0.1:80", "10.0.0.2:5004", 4)
                .waits_at(&WEB)
                .age_ms(700_000),
            socket("10.0.0.1:80", "10.0.0.2:5005", 5)
                .queues(0, 0)
                .ageless(),
            socket("10.0.0.1:80", "10.0.0.2:5006", 6)
                .netns(1)
                .owner(&EVIL, 4)
                .queues(0, 0)
                .age_ms(3_600_000),
        ])
        .run(false)
        .scan;
    scan.coverage.sockets_not_looked_into = Some(5000);
    scan
}

fn table(process: Process, verdicts: Vec<SuspectVerdict>) -> (Process, Vec<Suspect>) {
    let suspect = |(fd, verdict)| Suspect {
        fd: RemoteFd(fd),
        tid: None,
        inode: 1000,
        verdict,
    };
    (process, (20..).zip(verdicts).map(suspect).collect())
}

fn process(comm: &str, pid: i32, cgroup: &str) -> Process {
    Process {
        id: ProcessId {
            pid,
            start_time: 1000,
        },
        comm: comm.to_owned(),
        cgroup: Cgroup::parse(cgroup),
    }
}

fn dead() -> SuspectVerdict {
    SuspectVerdict::Dead(DeadSocket {
        protocol: Protocol::Tcp,
        cookie: Cookie(9),
        local: None,
        quiet: Duration::ZERO,
        unread: 0,
        kernel_tls: false,
    })
}

/// Suspects of a process with stuck sockets, and of one with dead descriptors only.
fn tables() -> DeadDescriptors {
    let mut in_pod = process("php-fpm", 1300, POD);
    let container = in_pod.cgroup.container.as_mut().expect("a container");
    container.name = Some("php".to_owned());
    container.facts = Facts {
        pod: Some("web-5c9".to_owned()),
        namespace: Some("shop".to_owned()),
        was_read: true,
        ..Facts::default()
    };
    DeadDescriptors {
        processes: vec![
            table(process(JAVA.0, JAVA.1, JAVA.2), vec![dead(), dead()]),
            table(
                in_pod,
                vec![
                    dead(),
                    SuspectVerdict::NeverConnected,
                    SuspectVerdict::Unknown(nix::errno::Errno::EPERM),
                ],
            ),
        ],
        ..DeadDescriptors::default()
    }
}

/// One that has acted, and one whose breaker is open.
fn policies() -> OfPolicies {
    let acts = PolicyNumbers {
        selected: 40,
        chosen: 12,
        left: BTreeMap::from([(Reason::TooYoung, 25), (Reason::OwnerShare, 3)]),
        budget_left: 88,
        expires: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_798_761_600)),
        acts: ActCounts {
            closed: 10,
            failed: 1,
            untouched: 1,
        },
        not_closed: BTreeMap::from([("gone", 1), ("would-spin", 1)]),
        ..PolicyNumbers::default()
    };
    let open = PolicyNumbers {
        selected: 7,
        hold: Some(Hold::BreakerOpen),
        status: Status::Open {
            since_ms: 1000,
            why: Trip::Refill,
        },
        budget_left: 60,
        opened: BTreeMap::from([(Trip::Refill, 1)]),
        ..PolicyNumbers::default()
    };
    OfPolicies {
        policies: BTreeMap::from([("leaks".to_owned(), acts), ("idle".to_owned(), open)]),
        host_budget_left: 188,
    }
}

fn metrics() -> Metrics {
    let descriptors = |id: ProcessId| {
        let (_, open) = [(JAVA.1, 900), (OTHER_JAVA.1, 30)]
            .into_iter()
            .find(|(pid, _)| *pid == id.pid)?;
        Some(DescriptorUse { open, limit: 1024 })
    };
    let last = |scan: &Scan| LastSweep {
        observation: Observation::of(scan, &tables(), &descriptors),
        at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_796_000_000_250),
        took: Duration::from_micros(12_500),
    };
    let (first, second) = (Scan::default(), scan());
    let mut metrics = Metrics::new(Duration::from_secs(30));
    metrics.add(last(&first), Changes::default());
    metrics.failed += 1;
    metrics.own = OwnUse {
        cpu: Some(Duration::from_millis(1250)),
        resident_bytes: Some(12 << 20),
        descriptors: Some(9),
        threads: None,
    };
    metrics.policies = policies();
    let (known, _) = Known::first(&first).next(&second);
    let (_, changes) = known.next(&second);
    metrics.add(last(&second), changes);
    metrics
}

#[test]
fn golden_metrics_are_as_they_were() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/daemon/metrics/golden.prom"
    );
    let text = metrics().text().unwrap();
    if std::env::var_os("CWKILL_RENEW_GOLDEN").is_some_and(|value| value == "1") {
        fs::write(path, text).unwrap();
        return;
    }
    let expected = fs::read_to_string(path).unwrap();
    assert!(text == expected, "{path} differs:\n{text}");
}

#[test]
fn a_text_for_the_collector_has_no_names_of_others() {
    let metrics = metrics();
    let (all, text) = (
        metrics.text().unwrap(),
        metrics.text_for_collector().unwrap(),
    );
    let is_own = |line: &str| line.contains(" process_") || line.starts_with("process_");
    let without: Vec<_> = all.lines().filter(|line| !is_own(line)).collect();
    assert_eq!(text.lines().collect::<Vec<_>>(), without);
    assert!(without.len() < all.lines().count());
}

#[test]
fn a_single_sweep_has_no_interval() {
    let mut single = Metrics::of_one_sweep();
    single.add(metrics().last.unwrap(), Changes::default());
    let text = single.text_for_collector().unwrap();
    let of_interval = |line: &&str| line.starts_with("cwkill_sweep_interval_seconds");
    assert_eq!(text.lines().filter(of_interval).count(), 0);
    assert_eq!(
        metrics()
            .text()
            .unwrap()
            .lines()
            .filter(of_interval)
            .count(),
        1
    );
}

#[test]
fn before_the_first_sweep_there_is_no_text() {
    assert_eq!(Metrics::new(Duration::from_secs(30)).text(), None);
}

/// The series of a text, without their values.
fn series(text: &str) -> Vec<&str> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.rsplit_once(' ').unwrap().0).collect()
}

#[test]
fn a_host_with_nothing_has_every_series_that_is_known_in_advance() {
    let mut nothing = Metrics::new(Duration::from_secs(30));
    let observation = Observation::of(&Scan::default(), &DeadDescriptors::default(), &|_| None);
    nothing.add(
        LastSweep {
            observation,
            at: SystemTime::UNIX_EPOCH,
            took: Duration::ZERO,
        },
        Changes::default(),
    );
    nothing.own = metrics().own;
    nothing.policies = policies();
    for numbers in nothing.policies.policies.values_mut() {
        *numbers = PolicyNumbers {
            expires: numbers.expires,
            ..PolicyNumbers::default()
        };
    }
    let (nothing, something) = (nothing.text().unwrap(), metrics().text().unwrap());
    let known: BTreeSet<_> = series(&nothing).into_iter().collect();
    let all: BTreeSet<_> = series(&something).into_iter().collect();
    let later: Vec<_> = all.difference(&known).collect();
    assert!(
        later
            .iter()
            .all(|series| series.starts_with("cwkill_owner_")),
        "{later:?}"
    );
    assert!(known.is_subset(&all));
    assert_eq!(series(&something).len(), all.len(), "a series comes twice");
}

#[test]
fn no_label_has_a_pid_or_an_address() {
    let text = metrics().text().unwrap();
    let number = |wanted: &str| {
        let labels = text.lines().filter_map(|line| line.split_once('{'));
        let labels = labels.filter_map(|(_, rest)| rest.rsplit_once('}'));
        labels.filter(|(labels, _)| labels.contains(wanted)).count()
    };
    for wanted in ["4421", "666", "10.0.0", ":80", "5001"] {
        assert_eq!(number(wanted), 0, "{wanted}");
    }
    assert!(number("tomcat.service") > 0);
}

#[test]
fn many_owners_have_a_bounded_number_of_series() {
    let owner = |number: i32| {
        let who = process(&format!("leaky-{number}"), 5000 + number, "0::/");
        table(who, vec![dead()])
    };
    let tables = DeadDescriptors {
        processes: (0..500).map(owner).collect(),
        ..DeadDescriptors::default()
    };
    let observation = Observation::of(&Scan::default(), &tables, &|_| None);
    assert_eq!(observation.kinds_of_owners, 500);
    assert_eq!(
        observation.owners.len(),
        crate::daemon::observation::MAX_OWNERS + 1
    );
    let other = &observation.owners[&OwnerLabels::other()];
    assert_eq!(other.dead, 450);
    assert_eq!(observation.dead, 500);
}

#[test]
fn a_sentence_says_how_it_is() {
    let observation = metrics().last.unwrap().observation;
    assert_eq!(
        observation.sentence(),
        "6 stuck sockets, the oldest for 1d01h, 3 dead descriptors (most of java; 5 kinds of owners); 3 network namespaces with at most 5000 TCP sockets not looked into; not everything could be seen"
    );
    let nothing = Observation::of(&Scan::default(), &DeadDescriptors::default(), &|_| None);
    assert_eq!(nothing.sentence(), "no stuck socket");
}

#[test]
fn every_series_of_a_policy_is_there_from_the_start() {
    use crate::daemon::policy::breaker::Trip;
    use crate::daemon::policy::{Hold, Reason};
    use crate::model::Target;
    use policies::{OfPolicies, PolicyNumbers};

    let mut all = exposition::Exposition::default();
    policies::add(&OfPolicies::default(), &mut all);
    assert!(text_of(all).is_empty(), "there is no policy");

    let numbers = PolicyNumbers {
        selected: 7,
        hold: Some(Hold::New),
        left: [(Reason::TooYoung, 3)].into(),
        not_closed: [("peer-alive", 4)].into(),
        ..PolicyNumbers::default()
    };
    let of = OfPolicies {
        policies: [("web".to_owned(), numbers)].into(),
        host_budget_left: 5,
    };
    let mut all = exposition::Exposition::default();
    policies::add(&of, &mut all);
    let text = text_of(all);
    for series in [
        "cwkill_policy_selected_sockets{policy=\"web\"} 7",
        "cwkill_policy_left_sockets{policy=\"web\",reason=\"too-young\"} 3",
        "cwkill_policy_held{policy=\"web\",reason=\"new\"} 1",
        "cwkill_policy_breaker{policy=\"web\",state=\"closed\"} 1",
        "cwkill_policy_breaker{policy=\"web\",state=\"open\"} 0",
        "cwkill_policy_acts_total{policy=\"web\",result=\"failed\"} 0",
        "cwkill_policy_not_closed_total{policy=\"web\",reason=\"peer-alive\"} 4",
        "cwkill_policy_not_closed_total{policy=\"web\",reason=\"gone\"} 0",
        "cwkill_budget_left 5",
    ] {
        assert!(text.lines().any(|line| line == series), "{series}:\n{text}");
    }
    for (metric, expected) in [
        ("cwkill_policy_left_sockets{", Reason::VARIANTS.len()),
        ("cwkill_policy_held{", Hold::VARIANTS.len()),
        ("cwkill_policy_breaker_opened_total{", Trip::VARIANTS.len()),
        (
            "cwkill_policy_not_closed_total{",
            Target::reason_codes().len(),
        ),
    ] {
        let lines = text.lines().filter(|line| line.starts_with(metric));
        assert_eq!(lines.count(), expected, "{metric}");
    }
}

/// The text of these metrics alone.
fn text_of(all: exposition::Exposition) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(all));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry).unwrap();
    text
}
