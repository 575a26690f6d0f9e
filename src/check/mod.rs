//! `cwkill check`: compares the number of stuck sockets with thresholds, for a monitoring system.
//!
//! The result has the format of monitoring plugins: one line of text, performance data after a bar, and the exit
//! status. [`result`] computes it; it is pure. [`threshold`] has the ranges.

pub mod threshold;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use crate::diagnose;
use crate::filter::Scope;
use crate::filter::selectors::Selectors;
use crate::finder;
use crate::finder::dead::{DeadScan, DeadSocket, SuspectVerdict};
use crate::history::History;
use crate::model::{Cause, Scan};
use crate::proc::{ProcFs, Process, ProcessId, ProcessKind};
use crate::text::{age, counted, escape};
use threshold::{Alert, Fraction, Measure, Threshold, Unit};

/// The status of a monitoring plugin; the number is the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// No threshold alerts.
    Ok = 0,
    /// The warning threshold alerts.
    Warning = 1,
    /// The critical threshold alerts.
    Critical = 2,
    /// An error, or something that was not visible could change the status.
    Unknown = 3,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::Ok => "OK",
            Status::Warning => "WARNING",
            Status::Critical => "CRITICAL",
            Status::Unknown => "UNKNOWN",
        }
    }
}

impl From<Status> for std::process::ExitCode {
    fn from(status: Status) -> Self {
        std::process::ExitCode::from(status as u8)
    }
}

/// The thresholds that were given, one or both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Thresholds {
    pub warning: Option<Threshold>,
    pub critical: Option<Threshold>,
}

impl Thresholds {
    fn given(self) -> impl Iterator<Item = Threshold> {
        self.warning.into_iter().chain(self.critical)
    }

    /// Whether a threshold is a percentage of a limit.
    fn use_limits(self) -> bool {
        self.given()
            .any(|threshold| threshold.unit == Unit::PercentOfLimit)
    }

    /// The status. UNKNOWN only if nothing alerts for sure, and something could.
    fn judge(self, sockets: Measure, of_limit: Option<Measure>) -> Status {
        let alert = |threshold: Option<Threshold>| {
            let Some(threshold) = threshold else {
                return Alert::No;
            };
            match (threshold.unit, of_limit) {
                (Unit::Sockets, _) => threshold.alert(sockets),
                (Unit::PercentOfLimit, Some(measure)) => threshold.alert(measure),
                (Unit::PercentOfLimit, None) => Alert::Possible,
            }
        };
        match (alert(self.critical), alert(self.warning)) {
            (Alert::Yes, _) => Status::Critical,
            (_, Alert::Yes) => Status::Warning,
            (Alert::No, Alert::No) => Status::Ok,
            _ => Status::Unknown,
        }
    }

    /// Whether a percentage between `low` and `high` decides whether a threshold alerts.
    fn could_alert(self, low: Fraction, high: Fraction) -> bool {
        let measure = Measure {
            at_least: low,
            at_most: Some(high.max(low)),
        };
        let of_limit = |threshold: &Threshold| threshold.unit == Unit::PercentOfLimit;
        self.given()
            .filter(of_limit)
            .any(|threshold| threshold.alert(measure) == Alert::Possible)
    }

    /// The thresholds of one unit, as performance data write them.
    fn performance(self, unit: Unit) -> String {
        let text = |threshold: Option<Threshold>| {
            let threshold = threshold.filter(|threshold| threshold.unit == unit);
            threshold.map_or_else(String::new, |threshold| threshold.to_string())
        };
        format!("{};{}", text(self.warning), text(self.critical))
    }
}

#[derive(Clone, Debug)]
pub struct CheckConfig {
    pub scope: Scope,
    pub thresholds: Thresholds,
    /// The status is UNKNOWN if the check takes longer.
    pub timeout: Option<Duration>,
}

/// Scans and compares with the thresholds. Adds to `history` what the scan has seen.
///
/// # Errors
/// The same as for a listing.
pub fn run(
    config: &CheckConfig,
    proc: &ProcFs,
    history: &mut History,
) -> anyhow::Result<CheckResult> {
    let namespaces = finder::open_namespaces(&config.scope.netns, &config.scope.selectors, proc)?;
    let selectors = &config.scope.selectors;
    let scan = finder::find(&namespaces, proc, selectors, history)?;
    history.add(&scan, selectors);
    let left_out = left_out(&scan, selectors);
    if !config.thresholds.use_limits() {
        return Ok(result(&scan, config.thresholds, None, &left_out));
    }
    let (dead, failures) = diagnose::read_tables(&scan, selectors, proc);
    let mut unseen = failures;
    let is_unnamed = scan.coverage.unnamed.containers > 0;
    let is_partial =
        is_unnamed || dead.hidden || !dead.unreadable.is_empty() || !dead.leader_exited.is_empty();
    // Without root some processes are always unreadable, so this matters only if particular processes were selected.
    if selectors.selects_owners() && is_partial {
        unseen.push("the dead descriptors of the selected processes could not be read".to_owned());
    }
    // How long a dead socket has been dead is not known.
    let usages = usages(&scan, dead, &selectors.of_any_age(), &|process| {
        proc.status(process).limit
    });
    let limits = Limits {
        usages: &usages,
        unseen: &unseen,
    };
    Ok(result(&scan, config.thresholds, Some(limits), &left_out))
}

/// What was left out although it may match, and the selected owners that do not exist, in words.
fn left_out(scan: &Scan, selectors: &Selectors) -> String {
    let absent = scan.coverage.absent_owners.iter().map(ToString::to_string);
    let left_out = scan.left_out_with_used(selectors.min_age, selectors.min_idle);
    let parts = absent.chain(left_out);
    parts.map(|part| format!(", {part}")).collect()
}

/// The descriptors of a process that a leak takes from its limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptorUsage {
    pub process: Arc<Process>,
    /// Descriptors of matched sockets.
    pub held: u64,
    /// Descriptors of dead sockets. They stay open after cwkill has closed the socket from outside.
    pub dead: u64,
    /// Descriptors of sockets that may be dead.
    pub unknown: u64,
    /// Open descriptors of every kind; `None` if unreadable.
    pub used: Option<u64>,
    /// The soft RLIMIT_NOFILE; `None` if unreadable.
    pub limit: Option<u64>,
}

impl DescriptorUsage {
    fn is_at_limit(&self) -> bool {
        diagnose::limit::is_reached(self.used, self.limit)
    }

    /// How much of its limit these descriptors of the leak are. With at most three free ones the leak has all that it can get.
    fn share(&self, leaked: u64) -> Option<Fraction> {
        let whole = self.limit?.max(1);
        let part = match self.is_at_limit() && leaked > 0 {
            true => whole,
            false => leaked,
        };
        Some(Fraction { part, whole })
    }
}

/// The processes with matched sockets, or with dead sockets that the selectors could match.
fn usages(
    scan: &Scan,
    dead: DeadScan,
    selectors: &Selectors,
    limit: &dyn Fn(&Process) -> Option<u64>,
) -> Vec<DescriptorUsage> {
    let new = |process: Arc<Process>| DescriptorUsage {
        process,
        held: 0,
        dead: 0,
        unknown: 0,
        used: None,
        limit: None,
    };
    let mut usages: BTreeMap<ProcessId, DescriptorUsage> = BTreeMap::new();
    let owners = scan.targets.iter().flat_map(|target| &target.owners);
    // A socket of a selected process may have other owners too.
    for owner in owners.filter(|owner| selectors.match_owner(&owner.process)) {
        let usage = usages.entry(owner.process.id);
        usage
            .or_insert_with(|| new(Arc::clone(&owner.process)))
            .held += 1;
    }
    for table in dead.tables {
        let usage = usages.entry(table.process.id);
        let usage = usage.or_insert_with(|| new(Arc::new(table.process)));
        usage.used = Some(table.used as u64);
        for suspect in table.suspects {
            match suspect.verdict {
                SuspectVerdict::Dead(DeadSocket {
                    local: Some(local), ..
                }) if selectors.could_match_dead(local) => usage.dead += 1,
                SuspectVerdict::Unknown(_) if selectors.could_match_some_dead() => {
                    usage.unknown += 1
                }
                _ => {}
            }
        }
    }
    let mut usages: Vec<DescriptorUsage> = usages.into_values().collect();
    usages.retain(|usage| usage.held + usage.dead + usage.unknown > 0);
    for usage in &mut usages {
        usage.limit = limit(&usage.process);
    }
    usages
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResult {
    pub status: Status,
    /// The line for the monitoring system, without a newline.
    pub line: String,
}

/// The result if an error, described by `why`, prevented the check.
pub fn unknown(why: &str) -> CheckResult {
    CheckResult {
        status: Status::Unknown,
        line: line(Status::Unknown, why, ""),
    }
}

/// The descriptors of the owners, for thresholds that are a percentage of a limit.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    pub usages: &'a [DescriptorUsage],
    /// A message for each reason why descriptors were not visible.
    pub unseen: &'a [String],
}

/// Compares the sockets, and with `limits` the descriptors of the owners, with the thresholds. `left_out` says what was not counted.
pub fn result(
    scan: &Scan,
    thresholds: Thresholds,
    limits: Option<Limits<'_>>,
    left_out: &str,
) -> CheckResult {
    let mut text = stuck_text(scan);
    let stuck = scan.targets.len();
    let coverage = &scan.coverage;
    // The true number is between `stuck` and this, because undecided sockets may belong to selected processes.
    let may_match = coverage.undecided + coverage.unlisted_subflows;
    let has_blind_spots =
        coverage.unseen_namespaces() + coverage.unplaced_sockets + coverage.unexamined_descriptors
            > 0;
    let sockets = Measure {
        at_least: Fraction::number(stuck as u64),
        at_most: (!has_blind_spots).then(|| Fraction::number((stuck + may_match) as u64)),
    };
    let stuck = format!("stuck={stuck};{};0;", thresholds.performance(Unit::Sockets));
    let (of_limit, first) = match limits {
        None => (None, stuck),
        Some(limits) => {
            let (measure, percent) = of_limit(scan, limits, thresholds, &mut text);
            let dead: u64 = limits.usages.iter().map(|owner| owner.dead).sum();
            let thresholds = thresholds.performance(Unit::PercentOfLimit);
            let first = format!("percent={percent:.1}%;{thresholds};0; dead={dead};;;0; {stuck}");
            (Some(measure), first)
        }
    };
    text.push_str(left_out);
    let status = thresholds.judge(sockets, of_limit);
    CheckResult {
        status,
        line: line(status, &text, &format!("{first} {}", causes(scan))),
    }
}

/// How much of its limit the owner nearest to it uses by descriptors of matched and dead sockets; also as a number for people.
/// Adds this owner to `text`, and what could not be seen.
fn of_limit(
    scan: &Scan,
    limits: Limits<'_>,
    thresholds: Thresholds,
    text: &mut String,
) -> (Measure, f64) {
    let Limits { usages, unseen } = limits;
    let known = |owner: &DescriptorUsage| owner.share(owner.held + owner.dead);
    let possible = |owner: &DescriptorUsage| owner.share(owner.held + owner.dead + owner.unknown);
    let nearest = usages
        .iter()
        .filter_map(|owner| Some((owner, known(owner)?)))
        .filter(|(_, used)| used.part > 0)
        .max_by(|a, b| a.1.cmp(&b.1));
    if let Some((owner, Fraction { whole, .. })) = nearest {
        let leaked = owner.held + owner.dead;
        let _ = write!(
            text,
            ", {} has lost {leaked} of {whole} descriptors",
            owner.process
        );
        if owner.dead > 0 {
            let _ = write!(text, " ({} of them dead)", owner.dead);
        }
        if owner.is_at_limit() {
            text.push_str(" and is at its limit");
        }
    }
    let mut unknown: Vec<String> = unseen.to_vec();
    // Sockets in flight have no owner. An ownerless socket may also belong to a process that cwkill could not read, or that
    // /proc does not show.
    let coverage = &scan.coverage;
    let ownerless = match coverage.has_hidden_owners() || coverage.other_pid_namespaces {
        true => scan.without_known_owner(),
        false => 0,
    };
    if ownerless > 0 {
        let sockets = counted(ownerless, "socket");
        unknown.push(format!("the owners of {sockets} could not be seen"));
    }
    if let Some(owner) = usages.iter().find(|owner| owner.limit.is_none()) {
        unknown.push(format!("the limit of {} could not be read", owner.process));
    }
    let unlimited = !unknown.is_empty() || coverage.may_have_missed();
    let used = nearest.map_or(Fraction::number(0), |(_, used)| used);
    let doubtful = usages.iter().filter(|owner| owner.unknown > 0);
    let doubtful = doubtful.filter_map(|owner| Some((owner, possible(owner)?)));
    let doubtful = doubtful.max_by(|a, b| a.1.cmp(&b.1));
    // Descriptors that may be dead are named only if they could change the status.
    if let Some((owner, most)) = doubtful
        && thresholds.could_alert(used, most)
    {
        unknown.push(format!(
            "{} of {} may be dead: not readable",
            counted(
                usize::try_from(owner.unknown).unwrap_or(usize::MAX),
                "descriptor"
            ),
            owner.process
        ));
    }
    for why in &unknown {
        let _ = write!(text, ", {why}");
    }
    let at_most = usages.iter().filter_map(possible).max().unwrap_or(used);
    let measure = Measure {
        at_least: used,
        at_most: (!unlimited).then_some(at_most),
    };
    (measure, percent(used.part, used.whole))
}

/// Rounds down to a tenth, so that a value below a threshold is not shown as equal to it.
fn percent(part: u64, whole: u64) -> f64 {
    let tenths = u128::from(part) * 1000 / u128::from(whole);
    f64::from(u32::try_from(tenths).unwrap_or(u32::MAX)) / 10.0
}

fn line(status: Status, text: &str, performance: &str) -> String {
    // In the plugin format a bar begins the performance data, and a second line begins the long output.
    let text: String = text
        .chars()
        .map(|c| if c == '|' { '/' } else { c })
        .collect();
    let text = escape(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    match performance {
        "" => format!("CWKILL {}: {text}", status.name()),
        _ => format!("CWKILL {}: {text} | {performance}", status.name()),
    }
}

/// The number of stuck sockets, the process with the most of them, and the age of the oldest.
fn stuck_text(scan: &Scan) -> String {
    let mut text = match scan.targets.len() {
        1 => "1 socket stuck".to_owned(),
        stuck => format!("{stuck} sockets stuck"),
    };
    let mut by_process: BTreeMap<ProcessId, (&Process, usize)> = BTreeMap::new();
    let mut by_kind: BTreeMap<ProcessKind<'_>, (usize, usize)> = BTreeMap::new();
    for process in scan
        .targets
        .iter()
        .filter_map(|target| scan.culprit(target))
    {
        let of_process = by_process.entry(process.id).or_insert((process, 0));
        of_process.1 += 1;
        let of_kind = by_kind.entry(process.kind()).or_default();
        of_kind.0 += usize::from(of_process.1 == 1);
        of_kind.1 += 1;
    }
    if let Some((process, count)) = by_process.into_values().max_by_key(|(_, count)| *count) {
        let most = by_kind.into_iter().max_by_key(|(_, (_, sockets))| *sockets);
        let _ = match most {
            // No process of the kind has most of its sockets.
            Some((kind, (processes, sockets))) if processes > 2 && sockets > 2 * count => {
                let comm = escape(kind.comm);
                write!(text, ", {sockets} in {processes} processes named {comm}")
            }
            _ => write!(text, ", {count} in {process}"),
        };
    }
    let ages = scan.targets.iter().filter_map(|target| target.socket.age);
    if let Some(oldest) = ages.max() {
        let _ = write!(text, ", oldest {}", age(oldest));
    }
    text
}

/// The causes as performance data. Causes without sockets are listed too, so that a graph has no gaps.
fn causes(scan: &Scan) -> String {
    let all = [
        Cause::NotAccepted,
        Cause::Unread,
        Cause::Drained,
        Cause::Sending,
    ];
    let one = |cause: Cause| {
        let sockets = scan.targets.iter().map(|target| &target.socket);
        let count = sockets.filter(|socket| socket.cause == cause).count();
        format!("{}={count};;;0;", cause.name().replace('-', "_"))
    };
    all.map(one).join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Coverage, Owner, Socket, Target};
    use crate::proc::RemoteFd;
    use crate::proc::testdata::process;
    use crate::sock_diag::testdata::stuck;

    /// The thresholds, `-` for one that is not given.
    fn thresholds(warning: &str, critical: &str) -> Thresholds {
        let threshold = |text: &str| (text != "-").then(|| text.parse().unwrap());
        Thresholds {
            warning: threshold(warning),
            critical: threshold(critical),
        }
    }

    fn by_count(scan: &Scan, warning: &str, critical: &str) -> CheckResult {
        result(scan, thresholds(warning, critical), None, "")
    }

    /// `counts[i]` sockets of process `100 + i`.
    fn scan(counts: &[usize]) -> Scan {
        let mut scan = Scan {
            owners_known: true,
            ..Scan::default()
        };
        for (count, pid) in counts.iter().zip(100..) {
            let process = process(pid, "a|b\nc");
            let owned = || {
                let message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
                let mut target = Target::new(Socket::from_message(&message));
                target.owners = vec![Owner::new(Arc::clone(&process), RemoteFd(3))];
                target
            };
            scan.targets.extend((0..*count).map(|_| owned()));
        }
        scan
    }

    #[test]
    fn a_threshold_alerts_above_its_value() {
        let status =
            |warning, critical| move |count| by_count(&scan(&[count]), warning, critical).status;
        use Status::{Critical, Ok, Warning};
        let counts = [0, 10, 11, 20, 21];
        let both = counts.map(status("10", "20"));
        assert_eq!(both, [Ok, Ok, Warning, Warning, Critical]);
        let warning = counts.map(status("10", "-"));
        assert_eq!(warning, [Ok, Ok, Warning, Warning, Warning]);
        let critical = counts.map(status("-", "20"));
        assert_eq!(critical, [Ok, Ok, Ok, Ok, Critical]);
        let few = counts.map(status("@11:20", "~:20"));
        assert_eq!(few, [Ok, Ok, Warning, Warning, Critical]);
    }

    #[test]
    fn the_result_is_one_line_with_one_bar_for_any_process_name() {
        let line = by_count(&scan(&[3, 12]), "10", "20:").line;
        let (text, performance) = line.split_once(" | ").unwrap();
        let expected = "CWKILL CRITICAL: 15 sockets stuck, 12 in a/b\\nc/101, oldest 1h00m";
        assert_eq!(text, expected);
        assert!(!performance.contains('|') && !line.contains('\n'), "{line}");
        let values: Vec<&str> = performance.split(' ').collect();
        assert_eq!(values[..2], ["stuck=15;10;20:;0;", "not_accepted=0;;;0;"]);
        assert!(values.contains(&"unread=15;;;0;"), "{values:?}");
    }

    #[test]
    fn many_processes_with_a_socket_each_are_counted_together() {
        let line = by_count(&scan(&[1; 12]), "10", "-").line;
        let expected = "12 sockets stuck, 12 in 12 processes named a/b\\nc, oldest 1h00m |";
        assert!(line.contains(expected), "{line}");
        let line = by_count(&scan(&[1, 9, 1]), "10", "-").line;
        assert!(line.contains("stuck, 9 in a/b\\nc/101,"), "{line}");
    }

    #[test]
    fn the_status_is_unknown_if_unseen_sockets_could_change_it() {
        let status = |change: fn(&mut Coverage), count| {
            let mut scan = scan(&[count]);
            change(&mut scan.coverage);
            by_count(&scan, "9", "19").status
        };
        use Status::{Critical, Ok, Unknown, Warning};
        assert_eq!(status(|f| f.unreachable_namespaces = 1, 1), Unknown);
        assert_eq!(status(|f| f.unknown_namespaces = 1, 1), Unknown);
        assert_eq!(status(|f| f.undecided = 9, 1), Unknown);
        // One less cannot reach the threshold.
        assert_eq!(status(|f| f.undecided = 8, 1), Ok);
        // The visible sockets alone reach a threshold.
        assert_eq!(status(|f| f.unreachable_namespaces = 1, 10), Warning);
        assert_eq!(status(|f| f.undecided = 99, 20), Critical);
        assert_eq!(status(|f| f.unlisted_subflows = 9, 1), Unknown);
    }

    /// The result by the limits of the owners, without dead descriptors.
    fn limited(scan: &Scan, limits: &[Option<u64>]) -> CheckResult {
        let limit = |process: &Process| limits[usize::try_from(process.id.pid - 100).unwrap()];
        let usages = usages(scan, DeadScan::default(), &Selectors::default(), &limit);
        by_limit(scan, &usages)
    }

    fn by_limit(scan: &Scan, usages: &[DescriptorUsage]) -> CheckResult {
        let unseen = &[];
        let limits = Limits { usages, unseen };
        result(scan, thresholds("10%", "20%"), Some(limits), "")
    }

    #[test]
    fn the_owner_nearest_to_its_limit_counts() {
        let result = limited(&scan(&[90, 7]), &[Some(1000), Some(50)]);
        assert_eq!(result.status, Status::Warning, "14 percent of 50");
        assert!(
            result.line.contains("c/101 has lost 7 of 50 descriptors |"),
            "{result:?}"
        );
        assert!(
            result
                .line
                .contains("percent=14.0%;10;20;0; dead=0;;;0; stuck=97;;;0;"),
            "{result:?}"
        );
        let exact = |count| limited(&scan(&[count]), &[Some(1000)]).status;
        assert_eq!([exact(100), exact(101)], [Status::Ok, Status::Warning]);
    }

    #[test]
    fn dead_descriptors_count_against_the_limit() {
        let owner = |held, dead, unknown| DescriptorUsage {
            process: process(100, "p"),
            held,
            dead,
            unknown,
            used: None,
            limit: Some(100),
        };
        let judged = |owner| by_limit(&Scan::default(), &[owner]);
        let dead = judged(owner(1, 20, 0));
        assert_eq!(dead.status, Status::Critical, "{dead:?}");
        assert!(
            dead.line
                .contains("has lost 21 of 100 descriptors (20 of them dead)"),
            "{dead:?}"
        );
        assert!(dead.line.contains(" dead=20;;;0; "), "{dead:?}");
        let few = judged(owner(1, 0, 9));
        assert_eq!(few.status, Status::Ok);
        assert!(!few.line.contains("descriptors of"), "{few:?}");
        let unknown = judged(owner(1, 0, 10));
        assert_eq!(unknown.status, Status::Unknown);
        assert!(unknown.line.contains("10 descriptors of"), "{unknown:?}");
    }

    #[test]
    fn at_its_limit_an_owner_has_lost_all_that_it_can() {
        let judged = |held, used| {
            let owner = DescriptorUsage {
                process: process(100, "p"),
                held,
                dead: 0,
                unknown: 0,
                used: Some(used),
                limit: Some(100),
            };
            by_limit(&Scan::default(), &[owner])
        };
        let full = judged(6, 100);
        assert_eq!(full.status, Status::Critical, "{full:?}");
        let text = "p/100 has lost 6 of 100 descriptors and is at its limit | percent=100.0%;";
        assert!(full.line.contains(text), "{full:?}");
        assert_eq!(judged(6, 96).status, Status::Ok, "four are free");
        assert_eq!(judged(0, 100).status, Status::Ok, "not by a leak");
    }

    #[test]
    fn an_unknown_limit_or_owner_is_unknown() {
        let status = |scan: &Scan, limits: &[_]| limited(scan, limits).status;
        let result = limited(&scan(&[1]), &[None]);
        assert_eq!(result.status, Status::Unknown);
        let why = "the limit of a/b\\nc/100 could not be read";
        assert!(result.line.contains(why), "{result:?}");
        let mut ownerless = scan(&[1]);
        ownerless.targets[0].owners.clear();
        assert_eq!(status(&ownerless, &[Some(100)]), Status::Ok, "in flight");
        ownerless.coverage.unreadable_processes = 1;
        assert_eq!(status(&ownerless, &[Some(100)]), Status::Unknown);
        assert_eq!(status(&Scan::default(), &[]), Status::Ok);
    }

    #[test]
    fn a_number_and_a_percentage_can_be_combined() {
        let usage = DescriptorUsage {
            process: process(100, "p"),
            held: 90,
            dead: 0,
            unknown: 0,
            used: None,
            limit: Some(100),
        };
        let of = |warning, critical| {
            let usages = std::slice::from_ref(&usage);
            let unseen = &[];
            let limits = Limits { usages, unseen };
            result(&scan(&[3]), thresholds(warning, critical), Some(limits), "")
        };
        let critical = of("2", "80%");
        assert_eq!(critical.status, Status::Critical);
        let values = "percent=90.0%;;80;0; dead=0;;;0; stuck=3;2;;0; ";
        assert!(critical.line.contains(values), "{critical:?}");
        assert_eq!(of("2", "95%").status, Status::Warning);
        assert_eq!(of("80%", "2").status, Status::Critical);
        assert_eq!(of("3", "90%").status, Status::Ok);
    }

    #[test]
    fn an_error_is_one_line_too() {
        let line = unknown("a|b\n  c").line;
        assert_eq!(line, "CWKILL UNKNOWN: a/b c");
    }
}
