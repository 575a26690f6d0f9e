//! `cwkill check`: compares the number of stuck sockets with thresholds, for a monitoring system.
//!
//! The result has the format of monitoring plugins: one line of text, performance data after a bar, and the exit
//! status. [`by_count`] and [`by_limit`] compute it; both are pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use crate::diagnose;
use crate::filter::Scope;
use crate::filter::selectors::Selectors;
use crate::finder;
use crate::finder::dead::{DeadScan, DeadSocket, SuspectVerdict};
use crate::history::History;
use crate::model::{Cause, Scan};
use crate::proc::{ProcFs, Process, ProcessId, ProcessKind};
use crate::text::{age, escape};

/// The status of a monitoring plugin; the number is the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Below both thresholds.
    Ok = 0,
    /// At or above the warning threshold.
    Warning = 1,
    /// At or above the critical threshold.
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

/// A threshold is reached at this value and above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    pub warning: u64,
    /// Not below `warning`.
    pub critical: u64,
}

impl Thresholds {
    /// The status if the thresholds are percent and the value is `part` of `whole`. With a `whole` of 100 the
    /// thresholds are plain numbers.
    fn judge(self, part: u64, whole: u64) -> Status {
        let reached =
            |threshold: u64| u128::from(part) * 100 >= u128::from(threshold) * u128::from(whole);
        match (reached(self.critical), reached(self.warning)) {
            (true, _) => Status::Critical,
            (_, true) => Status::Warning,
            _ => Status::Ok,
        }
    }
}

#[derive(Clone, Debug)]
pub struct CheckConfig {
    pub scope: Scope,
    pub thresholds: Thresholds,
    /// Whether the thresholds are percent of the owner's RLIMIT_NOFILE.
    pub percent_of_limit: bool,
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
    let namespaces = finder::open_namespaces(&config.scope.netns, proc)?;
    let selectors = &config.scope.selectors;
    let scan = finder::find(&namespaces, proc, selectors, history)?;
    history.add(&scan, selectors);
    if !config.percent_of_limit {
        return Ok(by_count(&scan, config.thresholds));
    }
    let (dead, failures) = diagnose::read_tables(&scan, selectors, proc);
    let mut unseen = failures;
    // Without root some processes are always unreadable, so this matters only if particular processes were selected.
    if selectors.selects_owners() && (dead.hidden || !dead.unreadable.is_empty()) {
        unseen.push("the dead descriptors of the selected processes could not be read".to_owned());
    }
    let usages = usages(&scan, dead, selectors, &|process| {
        proc.status(process).limit
    });
    Ok(by_limit(&scan, config.thresholds, &usages, &unseen))
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
    /// The soft RLIMIT_NOFILE; `None` if unreadable.
    pub limit: Option<u64>,
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

/// Compares the number of sockets with the thresholds.
pub fn by_count(scan: &Scan, thresholds: Thresholds) -> CheckResult {
    let stuck = scan.targets.len() as u64;
    let mut status = thresholds.judge(stuck, 100);
    let mut text = counted(scan);
    // The true number is between `stuck` and this, because undecided sockets may belong to selected processes.
    let hidden = scan.coverage.undecided + scan.coverage.unlisted_subflows;
    let upper_bound = stuck + hidden as u64;
    if status == Status::Ok
        && (scan.coverage.unseen_namespaces() > 0
            || scan.coverage.unplaced_sockets + scan.coverage.unexamined_descriptors > 0
            || thresholds.judge(upper_bound, 100) != Status::Ok)
    {
        status = Status::Unknown;
    }
    text.push_str(&unseen(scan));
    let Thresholds { warning, critical } = thresholds;
    let first = format!("stuck={stuck};{warning};{critical};0;");
    CheckResult {
        status,
        line: line(status, &text, &format!("{first} {}", causes(scan))),
    }
}

/// Compares the descriptors of matched and dead sockets with the thresholds, in percent of the owner's limit. The owner
/// nearest to its limit decides. `unseen_descriptors` has a message for each reason why descriptors were not visible.
pub fn by_limit(
    scan: &Scan,
    thresholds: Thresholds,
    usages: &[DescriptorUsage],
    unseen_descriptors: &[String],
) -> CheckResult {
    let mut text = counted(scan);
    let known = usages.iter().filter_map(|owner| {
        let open = owner.held + owner.dead;
        Some((owner, open, owner.limit?.max(1)))
    });
    // Compares the quotients by cross-multiplication, which is exact.
    let nearest = known
        .clone()
        .filter(|(_, open, _)| *open > 0)
        .max_by(|a, b| {
            (u128::from(a.1) * u128::from(b.2)).cmp(&(u128::from(b.1) * u128::from(a.2)))
        });
    let (mut status, percent) = match nearest {
        None => (Status::Ok, 0.0),
        Some((owner, open, limit)) => {
            let _ = write!(text, ", {} holds {open} of {limit}", owner.process);
            if owner.dead > 0 {
                let _ = write!(text, " ({} of them dead)", owner.dead);
            }
            (thresholds.judge(open, limit), percent(open, limit))
        }
    };
    let mut unknown: Vec<String> = unseen_descriptors.to_vec();
    // Sockets in flight have no owner. An ownerless socket may also belong to a process that cwkill could not read, or that
    // /proc does not show.
    let coverage = &scan.coverage;
    let ownerless = match coverage.has_hidden_owners() || coverage.other_pid_namespaces {
        true => scan.without_known_owner(),
        false => 0,
    };
    if ownerless > 0 {
        unknown.push(format!("the owners of {ownerless} could not be seen"));
    }
    if let Some(owner) = usages.iter().find(|owner| owner.limit.is_none()) {
        unknown.push(format!("the limit of {} could not be read", owner.process));
    }
    // Possibly dead descriptors matter only if they could reach a threshold.
    let could_reach = known.clone().find(|(owner, open, limit)| {
        owner.unknown > 0 && thresholds.judge(open + owner.unknown, *limit) != Status::Ok
    });
    if let Some((owner, ..)) = could_reach {
        unknown.push(format!(
            "{} descriptors of {} may be dead ones (not readable)",
            owner.unknown, owner.process
        ));
    }
    if status == Status::Ok && (!unknown.is_empty() || scan.coverage.may_have_missed()) {
        status = Status::Unknown;
    }
    for why in &unknown {
        let _ = write!(text, ", {why}");
    }
    text.push_str(&unseen(scan));
    let Thresholds { warning, critical } = thresholds;
    let dead: u64 = usages.iter().map(|owner| owner.dead).sum();
    let performance = format!(
        "percent={percent:.1}%;{warning};{critical};0; dead={dead};;;0; stuck={};;;0; {}",
        scan.targets.len(),
        causes(scan)
    );
    CheckResult {
        status,
        line: line(status, &text, &performance),
    }
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
fn counted(scan: &Scan) -> String {
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

/// The limits of the scan, in words.
fn unseen(scan: &Scan) -> String {
    let mut text = String::new();
    if scan.coverage.undecided > 0 {
        let _ = write!(
            text,
            ", {} more may match (owners not seen)",
            scan.coverage.undecided
        );
    }
    if scan.coverage.unlisted_subflows > 0 {
        let _ = write!(
            text,
            ", {} of MPTCP in an unknown state",
            scan.coverage.unlisted_subflows
        );
    }
    let unplaced = scan.coverage.unplaced_sockets + scan.coverage.unexamined_descriptors;
    if scan.coverage.unseen_namespaces() + unplaced > 0 {
        text.push_str(", not every network namespace could be seen");
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

    const AT: Thresholds = Thresholds {
        warning: 10,
        critical: 20,
    };

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
    fn a_threshold_is_reached_at_its_value() {
        let status = |count| by_count(&scan(&[count]), AT).status;
        let reached = [0, 9, 10, 19, 20, 21].map(status);
        use Status::{Critical, Ok, Warning};
        assert_eq!(reached, [Ok, Ok, Warning, Warning, Critical, Critical]);
    }

    #[test]
    fn the_result_is_one_line_with_one_bar_for_any_process_name() {
        let line = by_count(&scan(&[3, 12]), AT).line;
        let (text, performance) = line.split_once(" | ").unwrap();
        let expected = "CWKILL WARNING: 15 sockets stuck, 12 in a/b\\nc/101, oldest 1h00m";
        assert_eq!(text, expected);
        assert!(!performance.contains('|') && !line.contains('\n'), "{line}");
        let values: Vec<&str> = performance.split(' ').collect();
        assert_eq!(values[..2], ["stuck=15;10;20;0;", "not_accepted=0;;;0;"]);
        assert!(values.contains(&"unread=15;;;0;"), "{values:?}");
    }

    #[test]
    fn many_processes_with_a_socket_each_are_counted_together() {
        let line = by_count(&scan(&[1; 12]), AT).line;
        let expected = "12 sockets stuck, 12 in 12 processes named a/b\\nc, oldest 1h00m |";
        assert!(line.contains(expected), "{line}");
        let line = by_count(&scan(&[1, 9, 1]), AT).line;
        assert!(line.contains("stuck, 9 in a/b\\nc/101,"), "{line}");
    }

    #[test]
    fn the_status_is_unknown_if_unseen_sockets_could_change_it() {
        let status = |change: fn(&mut Coverage), count| {
            let mut scan = scan(&[count]);
            change(&mut scan.coverage);
            by_count(&scan, AT).status
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
        by_limit(scan, AT, &usages, &[])
    }

    #[test]
    fn the_owner_nearest_to_its_limit_counts() {
        let result = limited(&scan(&[90, 7]), &[Some(1000), Some(50)]);
        assert_eq!(result.status, Status::Warning, "14 percent of 50");
        assert!(result.line.contains("c/101 holds 7 of 50 |"), "{result:?}");
        assert!(
            result
                .line
                .contains("percent=14.0%;10;20;0; dead=0;;;0; stuck=97;"),
            "{result:?}"
        );
        let exact = |count| limited(&scan(&[count]), &[Some(1000)]).status;
        assert_eq!([exact(99), exact(100)], [Status::Ok, Status::Warning]);
    }

    #[test]
    fn dead_descriptors_count_against_the_limit() {
        let owner = |held, dead, unknown| DescriptorUsage {
            process: process(100, "p"),
            held,
            dead,
            unknown,
            limit: Some(100),
        };
        let judged = |owner| by_limit(&Scan::default(), AT, &[owner], &[]);
        let dead = judged(owner(1, 19, 0));
        assert_eq!(dead.status, Status::Critical, "{dead:?}");
        assert!(
            dead.line.contains("holds 20 of 100 (19 of them dead)"),
            "{dead:?}"
        );
        assert!(dead.line.contains(" dead=19;;;0; "), "{dead:?}");
        assert_eq!(judged(owner(1, 0, 8)).status, Status::Ok);
        let unknown = judged(owner(1, 0, 9));
        assert_eq!(unknown.status, Status::Unknown);
        assert!(unknown.line.contains("9 descriptors of"), "{unknown:?}");
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
    fn an_error_is_one_line_too() {
        let line = unknown("a|b\n  c").line;
        assert_eq!(line, "CWKILL UNKNOWN: a/b c");
    }
}
