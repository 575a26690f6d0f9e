//! The numbers of one sweep: stuck sockets by cause and age, their owners, dead descriptors, and what could not be seen. Pure.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use strum::{IntoStaticStr, VariantArray};

use crate::finder::dead::{Suspect, SuspectVerdict};
use crate::finder::dead_among_others::DeadDescriptors;
use crate::model::{Cause, Scan};
use crate::proc::{Process, ProcessId};
use crate::sock_diag::Cookie;
use crate::text::{age, counted, escape};

/// The causes that a socket in CLOSE-WAIT can have.
pub const CAUSES: [Cause; 4] = [
    Cause::NotAccepted,
    Cause::Unread,
    Cause::Drained,
    Cause::Sending,
];

/// So many owners have numbers of their own; the others share [`OwnerLabels::other`]. Each is a series for each of its numbers.
pub const MAX_OWNERS: usize = 50;

/// The name in [`Observation::unseen`] of the descriptors for which it cannot be told whether they are dead.
pub const MAY_BE_DEAD: &str = "descriptors-that-may-be-dead";

/// For how long sockets have been stuck, in classes. The name is the variant in kebab case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum AgeClass {
    #[strum(serialize = "under-1m")]
    UnderOneMinute,
    #[strum(serialize = "1m-to-10m")]
    UnderTenMinutes,
    #[strum(serialize = "10m-to-1h")]
    UnderOneHour,
    #[strum(serialize = "1h-to-1d")]
    UnderOneDay,
    #[strum(serialize = "over-1d")]
    OverOneDay,
    /// The kernel does not report it.
    Unknown,
}

impl AgeClass {
    fn of(age: Option<Duration>) -> Self {
        match age.map(|age| age.as_secs()) {
            None => AgeClass::Unknown,
            Some(0..60) => AgeClass::UnderOneMinute,
            Some(60..600) => AgeClass::UnderTenMinutes,
            Some(600..3600) => AgeClass::UnderOneHour,
            Some(3600..86_400) => AgeClass::UnderOneDay,
            Some(_) => AgeClass::OverOneDay,
        }
    }

    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// A kind of owner: processes that are equal in all of these do the same work. Text that a process can choose is escaped; a part that does
/// not exist is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerLabels {
    pub process: String,
    /// Empty in a container: there it has the id of the container, and the container has labels of its own. The numbers of transient units
    /// are masked.
    pub unit: String,
    /// The kubernetes namespace of its pod.
    pub namespace: String,
    pub pod: String,
    /// The name of its container; without one, the runtime with the abbreviated id.
    pub container: String,
}

impl OwnerLabels {
    fn of(process: &Process) -> Self {
        let text = |text: Option<&str>| text.map(escape).unwrap_or_default();
        let container = process.cgroup.container.as_ref();
        OwnerLabels {
            process: escape(&process.comm),
            unit: match (container, process.cgroup.unit.as_deref()) {
                (None, Some(unit)) => escape(&lasting_name(unit)),
                _ => String::new(),
            },
            namespace: text(container.and_then(|it| it.facts.namespace.as_deref())),
            pod: text(container.and_then(|it| it.facts.pod.as_deref())),
            container: container.map_or_else(String::new, |container| {
                let name = container.name.as_deref();
                name.map_or_else(|| escape(&container.with_id()), escape)
            }),
        }
    }

    /// Of the sockets whose owner is not known.
    fn unknown() -> Self {
        OwnerLabels {
            process: "(unknown)".to_owned(),
            unit: String::new(),
            namespace: String::new(),
            pod: String::new(),
            container: String::new(),
        }
    }

    /// Of all owners beyond [`MAX_OWNERS`].
    pub fn other() -> Self {
        let other = || "other".to_owned();
        OwnerLabels {
            process: other(),
            unit: other(),
            namespace: other(),
            pod: other(),
            container: other(),
        }
    }
}

/// The name of a unit without what is another at each start: a series for each session or connection would never end.
///
/// Scopes are always transient, and so are the units of systemd-run(1) (`run-`) and those that dbus-broker starts (`dbus-:`). A socket unit
/// with Accept=yes has an instance `NUMBER-ENDS` for each connection (systemd.socket(5)). Other instances are names that an
/// administrator has given, such as `postgresql@15-main.service`.
fn lasting_name(unit: &str) -> Cow<'_, str> {
    let Some((name, kind)) = unit.rsplit_once('.') else {
        return unit.into();
    };
    if kind == "scope" || name.starts_with("run-") || name.starts_with("dbus-:") {
        return format!("{}.{kind}", masked(name)).into();
    }
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_digit());
    if let Some((template, instance)) = name.split_once('@')
        && let Some((number, ends)) = instance.split_once('-')
        && is_number(number)
        && (ends.contains(':') || ends.split('-').all(is_number))
    {
        return format!("{template}@*.{kind}").into();
    }
    unit.into()
}

/// With `*` for each word that has a digit, or that is a part of an id in hexadecimal.
fn masked(name: &str) -> String {
    let is_part_of_id =
        |word: &str| word.len() >= 4 && word.bytes().all(|it| it.is_ascii_hexdigit());
    let mut text = String::new();
    for part in name.split_inclusive(['-', '_', '.', '@', ':']) {
        let word = part.trim_end_matches(['-', '_', '.', '@', ':']);
        let varies = word.bytes().any(|it| it.is_ascii_digit()) || is_part_of_id(word);
        text += if varies { "*" } else { word };
        text += &part[word.len()..];
    }
    text
}

/// The descriptors of a process that are open, and how many it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorUse {
    pub open: u64,
    /// The soft limit RLIMIT_NOFILE.
    pub limit: u64,
}

impl DescriptorUse {
    /// Whether less of the limit is left than in the `other` process, in proportion.
    fn is_fuller_than(self, other: DescriptorUse) -> bool {
        u128::from(self.open) * u128::from(other.limit)
            > u128::from(other.open) * u128::from(self.limit)
    }
}

/// What the processes of one kind have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnerNumbers {
    /// Stuck sockets that they are responsible for. Each counts for one process only.
    pub stuck: u64,
    /// The age of the oldest of these.
    pub oldest: Duration,
    /// Descriptors of dead sockets.
    pub dead: u64,
    /// The descriptors of the process that is nearest to its limit; `None` if those of none could be read.
    pub fullest: Option<DescriptorUse>,
}

impl OwnerNumbers {
    fn leaked(&self) -> u64 {
        self.stuck + self.dead
    }

    fn merge(&mut self, other: &OwnerNumbers) {
        self.stuck += other.stuck;
        self.oldest = self.oldest.max(other.oldest);
        self.dead += other.dead;
        if let Some(descriptors) = other.fullest {
            self.see(descriptors);
        }
    }

    fn see(&mut self, descriptors: DescriptorUse) {
        if self
            .fullest
            .is_none_or(|fullest| descriptors.is_fuller_than(fullest))
        {
            self.fullest = Some(descriptors);
        }
    }
}

/// What was left out on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NotLookedInto {
    pub namespaces: u64,
    /// Their TCP sockets, of which some may be stuck; `None` if it is not known of each.
    pub sockets: Option<u64>,
}

impl NotLookedInto {
    fn of(scan: &Scan) -> Self {
        let coverage = &scan.coverage;
        let sockets = match coverage.namespaces_not_looked_into {
            0 => Some(0),
            _ => coverage.sockets_not_looked_into,
        };
        NotLookedInto {
            namespaces: coverage.namespaces_not_looked_into as u64,
            sockets: sockets.map(|count| count as u64),
        }
    }

    /// For a sentence; `None` if there can be no stuck socket.
    fn text(self) -> Option<String> {
        let namespaces = counted_u64(self.namespaces, "network namespace");
        match self.sockets {
            Some(0) => None,
            Some(sockets) => {
                let sockets = counted_u64(sockets, "TCP socket");
                Some(format!(
                    "{namespaces} with at most {sockets} not looked into"
                ))
            }
            None => Some(format!("{namespaces} not looked into")),
        }
    }
}

/// What one sweep has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Stuck sockets. Causes and ages without any are missing.
    pub stuck: BTreeMap<(Cause, AgeClass), u64>,
    /// The age of the oldest stuck socket of each cause.
    pub oldest: BTreeMap<Cause, Duration>,
    /// Dead descriptors of all processes.
    pub dead: u64,
    /// The owners with the most stuck sockets and dead descriptors, and one for all others.
    pub owners: BTreeMap<OwnerLabels, OwnerNumbers>,
    /// The kinds of owners, also those without numbers of their own.
    pub kinds_of_owners: usize,
    /// The network namespaces that were read.
    pub namespaces: usize,
    /// The network namespaces that were left out, because the daemon looks into its own only.
    pub not_looked_into: NotLookedInto,
    /// What could not be seen, by its name. Every name is there.
    pub unseen: BTreeMap<&'static str, u64>,
    /// Whether a stuck socket or its owner may have been missed.
    pub is_partial: bool,
}

impl Observation {
    /// `descriptors`: how many descriptors a process has open, if it can be read. It is asked of those that leak.
    pub fn of(
        scan: &Scan,
        dead: &DeadDescriptors,
        descriptors: &dyn Fn(ProcessId) -> Option<DescriptorUse>,
    ) -> Self {
        let mut observation = Observation {
            namespaces: scan.namespaces.len() - scan.unlisted.len(),
            not_looked_into: NotLookedInto::of(scan),
            unseen: unseen(scan, dead),
            is_partial: scan.coverage.may_have_missed()
                || scan.coverage.has_hidden_owners()
                || scan.coverage.other_pid_namespaces
                || !dead.failures.is_empty(),
            ..Observation::default()
        };
        let mut owners = Owners::default();
        for target in &scan.targets {
            let socket = &target.socket;
            let class = (socket.cause, AgeClass::of(socket.age));
            *observation.stuck.entry(class).or_default() += 1;
            let age = socket.age.unwrap_or_default();
            let oldest = observation.oldest.entry(socket.cause).or_default();
            *oldest = age.max(*oldest);
            let numbers = match scan.culprit(target) {
                Some(process) => owners.of(process),
                None => owners.unknown.get_or_insert_default(),
            };
            numbers.stuck += 1;
            numbers.oldest = numbers.oldest.max(age);
        }
        for (process, suspects) in &dead.processes {
            let is_dead = |one: &&Suspect| matches!(one.verdict, SuspectVerdict::Dead(_));
            let count = suspects.iter().filter(is_dead).count() as u64;
            observation.dead += count;
            if count > 0 {
                owners.of(process).dead += count;
            }
        }
        owners.see(descriptors);
        let by_kind = owners.by_kind();
        observation.kinds_of_owners = by_kind.len();
        observation.owners = largest(by_kind, MAX_OWNERS);
        observation
    }

    pub fn stuck_of(&self, cause: Cause, class: AgeClass) -> u64 {
        self.stuck.get(&(cause, class)).copied().unwrap_or(0)
    }

    /// All stuck sockets.
    pub fn all_stuck(&self) -> u64 {
        self.stuck.values().sum()
    }

    /// One sentence for `systemctl status`.
    pub fn sentence(&self) -> String {
        let mut text = match self.all_stuck() {
            0 => "no stuck socket".to_owned(),
            stuck => {
                let sockets = counted_u64(stuck, "stuck socket");
                let oldest = self.oldest.values().max().copied().unwrap_or_default();
                format!("{sockets}, the oldest for {}", age(oldest))
            }
        };
        if self.dead > 0 {
            text += &format!(", {}", counted_u64(self.dead, "dead descriptor"));
        }
        let leaking = self
            .owners
            .iter()
            .max_by_key(|(_, numbers)| numbers.leaked());
        if let Some((owner, _)) = leaking
            && self.kinds_of_owners > 0
        {
            text += &match self.kinds_of_owners {
                1 => format!(" ({})", owner.process),
                kinds => format!(" (most of {}; {kinds} kinds of owners)", owner.process),
            };
        }
        if let Some(not_looked_into) = self.not_looked_into.text() {
            text += &format!("; {not_looked_into}");
        }
        if self.is_partial {
            text += "; not everything could be seen";
        }
        text
    }
}

fn counted_u64(number: u64, noun: &str) -> String {
    counted(usize::try_from(number).unwrap_or(usize::MAX), noun)
}

/// The numbers of each process, until they are joined by kind. With 100,000 sockets, texts are made for each process only.
#[derive(Default)]
struct Owners {
    by_process: HashMap<ProcessId, (OwnerLabels, OwnerNumbers)>,
    unknown: Option<OwnerNumbers>,
}

impl Owners {
    fn of(&mut self, process: &Process) -> &mut OwnerNumbers {
        let entry = self.by_process.entry(process.id);
        &mut entry
            .or_insert_with(|| (OwnerLabels::of(process), OwnerNumbers::default()))
            .1
    }

    fn see(&mut self, descriptors: &dyn Fn(ProcessId) -> Option<DescriptorUse>) {
        for (id, (_, numbers)) in &mut self.by_process {
            numbers.fullest = descriptors(*id);
        }
    }

    fn by_kind(self) -> HashMap<OwnerLabels, OwnerNumbers> {
        let unknown = self
            .unknown
            .map(|numbers| (OwnerLabels::unknown(), numbers));
        let mut by_kind: HashMap<OwnerLabels, OwnerNumbers> = HashMap::new();
        for (labels, numbers) in self.by_process.into_values().chain(unknown) {
            by_kind.entry(labels).or_default().merge(&numbers);
        }
        by_kind
    }
}

/// The `most` owners that leak most, and the sum of the others under one name. Of those that leak the same, the first by name.
fn largest(
    by_kind: HashMap<OwnerLabels, OwnerNumbers>,
    most: usize,
) -> BTreeMap<OwnerLabels, OwnerNumbers> {
    let mut all: Vec<_> = by_kind.into_iter().collect();
    all.sort_by(|(one, a), (other, b)| (b.leaked(), one).cmp(&(a.leaked(), other)));
    let others = all.split_off(most.min(all.len()));
    let mut owners: BTreeMap<OwnerLabels, OwnerNumbers> = all.into_iter().collect();
    for (_, numbers) in others {
        owners
            .entry(OwnerLabels::other())
            .or_default()
            .merge(&numbers);
    }
    owners
}

fn unseen(scan: &Scan, dead: &DeadDescriptors) -> BTreeMap<&'static str, u64> {
    let coverage = &scan.coverage;
    let suspects = dead.processes.iter().flat_map(|(_, suspects)| suspects);
    let maybe_dead = suspects.filter(|it| matches!(it.verdict, SuspectVerdict::Unknown(_)));
    [
        ("processes", coverage.unreadable_processes),
        (
            "processes-of-others",
            usize::from(coverage.hidden_processes),
        ),
        ("namespaces", coverage.unreachable_namespaces),
        ("namespaces-of-processes", coverage.unknown_namespaces),
        ("sockets-without-owner", scan.without_known_owner()),
        ("sockets-without-namespace", coverage.unplaced_sockets),
        ("descriptors", coverage.unexamined_descriptors),
        ("descriptor-tables", dead.unreadable),
        (MAY_BE_DEAD, maybe_dead.count()),
        ("mptcp-subflows", coverage.unlisted_subflows),
    ]
    .map(|(name, count)| (name, count as u64))
    .into()
}

/// The stuck sockets of a sweep, to compare with those of the next one.
///
/// A server that closes properly has sockets in CLOSE-WAIT for a moment, others at each sweep. So a socket counts as one that has become
/// stuck when it is seen for the second time. It is **settled** then.
#[derive(Debug, Default)]
pub struct Known(foldhash::HashMap<(u64, Cookie), Seen>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    cause: Cause,
    is_settled: bool,
}

/// How the stuck sockets of a sweep differ from those of the sweep before, by cause.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Sockets that have settled.
    pub new: BTreeMap<Cause, u64>,
    /// Sockets that had settled and are not stuck any more, by the cause they had.
    pub ended: BTreeMap<Cause, u64>,
}

impl Known {
    /// Those of the first sweep. When they became stuck is before the time of the daemon, so they have settled already.
    pub fn first(scan: &Scan) -> Self {
        Known::of(sockets(scan), |_| true)
    }

    /// Those of the sweep after this one, and what has changed.
    ///
    /// If a namespace could not be entered or listed to the end, or processes are in an unknown one, then a namespace that was not read has
    /// not ended, and its sockets stay known.
    pub fn next(&self, scan: &Scan) -> (Self, Changes) {
        let namespaces = scan.namespaces.iter().enumerate();
        let read: HashSet<u64> = namespaces
            .filter(|(index, _)| !scan.unlisted.contains(index))
            .map(|(_, netns)| netns.inode())
            .collect();
        let has_ended = scan.coverage.unseen_namespaces() == 0;
        self.compare(sockets(scan), |netns| has_ended || read.contains(&netns))
    }

    fn of(
        sockets: impl Iterator<Item = ((u64, Cookie), Cause)>,
        is_settled: impl Fn(&(u64, Cookie)) -> bool,
    ) -> Self {
        let seen = |(key, cause)| {
            let is_settled = is_settled(&key);
            (key, Seen { cause, is_settled })
        };
        Known(sockets.map(seen).collect())
    }

    /// `is_known`: whether a socket of this namespace that is not in `sockets` has ended.
    fn compare(
        &self,
        sockets: impl Iterator<Item = ((u64, Cookie), Cause)>,
        is_known: impl Fn(u64) -> bool,
    ) -> (Self, Changes) {
        let mut later = Known::of(sockets, |key| self.0.contains_key(key));
        for (key, before) in self.0.iter().filter(|((netns, _), _)| !is_known(*netns)) {
            later.0.entry(*key).or_insert(*before);
        }
        let mut changes = Changes::default();
        for (key, now) in &later.0 {
            let was_settled = self.0.get(key).is_some_and(|before| before.is_settled);
            if now.is_settled && !was_settled {
                *changes.new.entry(now.cause).or_default() += 1;
            }
        }
        for (key, before) in &self.0 {
            if before.is_settled && !later.0.contains_key(key) {
                *changes.ended.entry(before.cause).or_default() += 1;
            }
        }
        (later, changes)
    }
}

/// The stuck sockets of a sweep, each with its namespace and its cause.
fn sockets(scan: &Scan) -> impl Iterator<Item = ((u64, Cookie), Cause)> + '_ {
    scan.targets.iter().map(|target| {
        let key = (scan.netns(target).inode(), target.socket.cookie());
        (key, target.socket.cause)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Socket, Target};
    use crate::proc::netns::Netns;
    use crate::sock_diag::testdata::stuck;

    fn labels(process: &str) -> OwnerLabels {
        OwnerLabels {
            process: process.to_owned(),
            ..OwnerLabels::unknown()
        }
    }

    fn numbers(stuck: u64, dead: u64) -> OwnerNumbers {
        OwnerNumbers {
            stuck,
            dead,
            ..OwnerNumbers::default()
        }
    }

    #[test]
    fn classes_have_no_gap() {
        let class = |seconds| AgeClass::of(Some(Duration::from_secs(seconds))).name();
        let limits = [0, 59, 60, 599, 600, 3599, 3600, 86_399, 86_400, u64::MAX];
        assert_eq!(
            limits.map(class),
            [
                "under-1m",
                "under-1m",
                "1m-to-10m",
                "1m-to-10m",
                "10m-to-1h",
                "10m-to-1h",
                "1h-to-1d",
                "1h-to-1d",
                "over-1d",
                "over-1d"
            ]
        );
        assert_eq!(AgeClass::of(None).name(), "unknown");
    }

    #[test]
    fn the_owners_that_leak_most_are_named_and_the_others_are_summed() {
        let all = HashMap::from([
            (labels("a"), numbers(1, 0)),
            (labels("b"), numbers(0, 9)),
            (labels("c"), numbers(1, 0)),
            (labels("d"), numbers(3, 0)),
            (labels("e"), numbers(0, 1)),
        ]);
        let named = largest(all.clone(), 2);
        let expected = [
            (labels("b"), numbers(0, 9)),
            (labels("d"), numbers(3, 0)),
            (OwnerLabels::other(), numbers(2, 1)),
        ];
        assert_eq!(named, expected.into());
        assert_eq!(largest(all.clone(), 5).len(), 5);
        // No owner can take the name of the others, and make a series twice.
        let clash = HashMap::from([
            (OwnerLabels::other(), numbers(7, 0)),
            (labels("a"), numbers(1, 0)),
        ]);
        assert_eq!(
            largest(clash, 1),
            [(OwnerLabels::other(), numbers(8, 0))].into()
        );
    }

    #[test]
    fn the_process_nearest_to_its_limit_counts() {
        let mut numbers = OwnerNumbers::default();
        for (open, limit) in [(10, 1024), (900, 65_536), (90, 100), (91, u64::MAX)] {
            numbers.see(DescriptorUse { open, limit });
        }
        assert_eq!(
            numbers.fullest,
            Some(DescriptorUse {
                open: 90,
                limit: 100
            })
        );
    }

    #[test]
    fn a_namespace_that_was_not_read_has_not_ended() {
        let socket = |netns, cookie| ((netns, Cookie(cookie)), Cause::Drained);
        let both = || [socket(1, 10), socket(2, 20)].into_iter();
        let known = Known::of(both(), |_| true);
        let (known, changes) = known.compare([socket(1, 10)].into_iter(), |netns| netns == 1);
        assert_eq!(changes, Changes::default());
        // It is read again, with the same socket and another.
        let again = both().chain([socket(2, 21)]);
        let (known, changes) = known.compare(again, |_| true);
        assert_eq!(changes, Changes::default());
        let (_, changes) = known.compare([socket(1, 10)].into_iter(), |_| true);
        assert_eq!(changes.ended, [(Cause::Drained, 1)].into());
    }

    /// Two namespaces with a socket each.
    fn scan_of_two() -> Scan {
        let target = |netns: usize| {
            let message = stuck("10.0.0.1:80", "10.0.0.2:5", netns as u64 + 1);
            let mut target = Target::new(Socket::from_message(&message));
            target.socket.netns = netns;
            target
        };
        Scan {
            targets: vec![target(0), target(1)],
            namespaces: [1, 2].map(|it| Arc::new(Netns::example(it, None))).into(),
            ..Scan::default()
        }
    }

    #[test]
    fn the_sockets_of_a_namespace_that_was_not_listed_to_the_end_have_not_ended() {
        let known = Known::first(&scan_of_two());
        let mut partial = scan_of_two();
        partial.targets.pop();
        partial.unlisted.push(1);
        partial.coverage.unreachable_namespaces = 1;
        let (later, changes) = known.next(&partial);
        assert_eq!(changes, Changes::default());
        let observation = Observation::of(&partial, &DeadDescriptors::default(), &|_| None);
        assert_eq!(observation.namespaces, 1);
        assert_eq!(observation.unseen["namespaces"], 1);
        assert!(observation.is_partial);
        // It is listed again, and the socket has gone.
        let mut whole = scan_of_two();
        whole.targets.pop();
        let (_, changes) = later.next(&whole);
        assert_eq!(changes.ended.values().sum::<u64>(), 1);
        // A list that is complete counts at once.
        assert_eq!(known.next(&whole).1, changes);
    }

    #[test]
    fn units_that_come_and_go_have_one_name() {
        for (unit, expected) in [
            ("tomcat.service", "tomcat.service"),
            ("postgresql@15-main.service", "postgresql@15-main.service"),
            ("user@1000.service", "user@1000.service"),
            ("getty@tty1.service", "getty@tty1.service"),
            ("system-getty.slice", "system-getty.slice"),
            ("session-12.scope", "session-*.scope"),
            ("session-c1.scope", "session-*.scope"),
            ("run-u123.service", "run-*.service"),
            ("run-p12-i34.service", "run-*-*.service"),
            ("run-r0123456789abcdef0123456789abcdef.scope", "run-*.scope"),
            ("app-gnome-firefox-1234.scope", "app-gnome-firefox-*.scope"),
            (
                "vte-spawn-0b7f3b0a-52c1-beef-9d0c-aabbccddeeff.scope",
                "vte-spawn-*-*-*-*-*.scope",
            ),
            (
                "dbus-:1.2-org.x.Portal@0.service",
                "dbus-:*.*-org.x.Portal@*.service",
            ),
            ("sshd@3-10.0.0.1:22-10.0.0.2:5000.service", "sshd@*.service"),
            ("sshd@3-fe80::1:22-fe80::2:5000.service", "sshd@*.service"),
            ("coredump@3-4211-0.service", "coredump@*.service"),
            ("nothing", "nothing"),
        ] {
            assert_eq!(lasting_name(unit), expected);
        }
    }

    #[test]
    fn a_socket_is_new_when_it_is_seen_again() {
        let sweep = |cookies: &[(u64, u64)]| {
            let socket = |&(netns, cookie): &_| ((netns, Cookie(cookie)), Cause::Drained);
            cookies.iter().map(socket).collect::<Vec<_>>()
        };
        let counts = |changes: &Changes| {
            let sum = |by_cause: &BTreeMap<Cause, u64>| by_cause.values().sum::<u64>();
            (sum(&changes.new), sum(&changes.ended))
        };
        let mut known = Known::of(sweep(&[(1, 10), (1, 11)]).into_iter(), |_| true);
        for (cookies, expected) in [
            (&[(1, 10), (1, 11)][..], (0, 0)),
            // The cookie of another namespace is another socket.
            (&[(1, 11), (2, 10), (2, 12)], (0, 1)),
            (&[(1, 11), (2, 10)], (1, 0)),
            (&[(1, 11), (2, 10)], (0, 0)),
            // It was only passing through before.
            (&[(1, 11), (2, 12)], (0, 1)),
            (&[], (0, 1)),
        ] {
            let (later, changes) = known.compare(sweep(cookies).into_iter(), |_| true);
            assert_eq!(counts(&changes), expected, "{cookies:?}");
            known = later;
        }
    }
}
