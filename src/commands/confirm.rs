//! The question before sockets of several processes are closed. cwkill asks only if a person is at the terminal.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::Arc;

use crate::config::Config;
use crate::model::{Backlog, Target};
use crate::proc::{Process, ProcessId};
use crate::report::Run;
use crate::text::counted;

/// The maximum number of processes that the question names, so that it stays on one line.
const MAX_NAMED: usize = 3;

/// Whether a person can be asked: a question on stderr is seen, and an answer can be typed.
pub(super) fn is_possible() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// The processes of a plan. `None`: sockets without a known owner.
pub(super) type Asked = BTreeSet<Option<ProcessId>>;

/// The processes of what is planned.
pub(super) fn processes(run: &Run) -> Asked {
    let process = |target| run.scan.culprit(target).map(|process| process.id);
    planned(run).map(process).collect()
}

fn planned(run: &Run) -> impl Iterator<Item = &Target> {
    run.scan
        .targets
        .iter()
        .filter(|target| target.outcome.is_none() && target.plan.skip.is_none())
}

/// The question, if the plan is about more than one process, together with those of earlier plans of this run. Sockets without a known
/// owner count as one process.
pub(super) fn question(run: &Run, config: &Config, earlier: &Asked) -> Option<String> {
    let scan = &run.scan;
    let mut sockets = 0;
    let mut unowned = 0;
    let mut by_process: BTreeMap<ProcessId, (&Arc<Process>, usize)> = BTreeMap::new();
    for target in planned(run) {
        sockets += 1;
        match scan.culprit(target) {
            Some(process) => by_process.entry(process.id).or_insert((process, 0)).1 += 1,
            None => unowned += 1,
        }
    }
    let backlogs = run.backlogs.iter().flatten();
    let backlogs: Vec<&Backlog> = backlogs.filter(|it| it.result.is_none()).collect();
    for owner in backlogs.iter().filter_map(|it| it.owners.first()) {
        by_process
            .entry(owner.process.id)
            .or_insert((&owner.process, 0));
    }
    let of_plan = by_process.keys().copied().map(Some);
    let of_plan = of_plan.chain((unowned > 0).then_some(None));
    let of_plan: Asked = of_plan.collect();
    if of_plan.is_empty() || of_plan.union(earlier).count() < 2 {
        return None;
    }
    let mut processes: Vec<(&Arc<Process>, usize)> = by_process.into_values().collect();
    processes.sort_by_key(|(process, count)| (usize::MAX - count, process.id));
    let mut names: Vec<String> = processes
        .iter()
        .take(MAX_NAMED)
        .map(|(process, count)| match count {
            // Only its backlog is drained.
            0 => process.to_string(),
            _ => format!("{process} ({count})"),
        })
        .collect();
    if processes.len() > MAX_NAMED {
        names.push(counted(processes.len() - MAX_NAMED, "other process"));
    }
    let without_owner = match unowned {
        0 => String::new(),
        _ => format!(", and {unowned} without a known owner"),
    };
    let reclaim = match config.reclaim {
        Some(_) => ", with their descriptors",
        None => "",
    };
    let drain = match backlogs[..] {
        [] => String::new(),
        [one] => format!("the backlog of {}", one.local),
        _ => format!("{} backlogs", backlogs.len()),
    };
    let who = names.join(", ");
    let closed = counted(sockets, "socket");
    let closes = format!("this closes {closed} of {who}{without_owner}{reclaim}");
    let what = match (sockets, drain.is_empty()) {
        (0, _) => format!("this drains {drain} of {who}"),
        (_, true) => closes,
        (_, false) => format!("{closes}, and drains {drain}"),
    };
    Some(format!("{what}. Continue? [y/N] "))
}

/// Asks, and reads the answer. Only `y` and `yes` agree; the end of the input does not.
pub(super) fn agrees(question: &str) -> bool {
    let mut stderr = io::stderr();
    let asked = write!(stderr, "cwkill: {question}").and_then(|()| stderr.flush());
    let mut answer = String::new();
    let read = asked.and_then(|()| io::stdin().lock().read_line(&mut answer));
    read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;
    use crate::model::{DrainResult, ListeningSocket, Owner, Scan, SkipReason, Socket};
    use crate::proc::RemoteFd;
    use crate::proc::testdata::process;
    use crate::sock_diag::testdata::stuck;

    /// A run for sockets of these processes; 0 is a socket without a known owner.
    fn run(pids: &[i32]) -> Run {
        let target = |pid: &i32| {
            let message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
            let mut target = Target::new(Socket::from_message(&message));
            if *pid != 0 {
                target.owners = vec![Owner::new(process(*pid, "app"), RemoteFd(3))];
            }
            target
        };
        Run::new(Scan {
            targets: pids.iter().map(target).collect(),
            ..Scan::default()
        })
    }

    fn asked(run: &Run, line: &str) -> Option<String> {
        let cli = Cli::try_parse_from(line.split(' ')).expect("a command line");
        let config = Config::from_args(cli.args).expect("a configuration");
        question(run, &config, &Asked::new())
    }

    #[test]
    fn one_process_needs_no_question() {
        let of = |pids: &[i32]| asked(&run(pids), "cwkill --all");
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[7, 7, 7]), None);
        assert_eq!(of(&[0, 0]), None);
        let mut skipped = run(&[7, 8]);
        skipped.scan.targets[1].plan.skip = Some(SkipReason::OverMaxKills);
        assert_eq!(asked(&skipped, "cwkill --all"), None);
    }

    #[test]
    fn the_processes_of_all_rounds_of_a_watch_count() {
        let cli = Cli::try_parse_from(["cwkill", "--all", "--watch"]).unwrap();
        let config = Config::from_args(cli.args).unwrap();
        let first = processes(&run(&[7, 7]));
        let asked = |pids: &[i32]| question(&run(pids), &config, &first).is_some();
        assert!(!asked(&[7]) && !asked(&[]));
        assert!(asked(&[8]) && asked(&[0]) && asked(&[7, 8]));
    }

    #[test]
    fn the_question_names_the_largest() {
        assert_eq!(
            asked(&run(&[7, 8, 8]), "cwkill --all").unwrap(),
            "this closes 3 sockets of app/8 (2), app/7 (1). Continue? [y/N] "
        );
        assert_eq!(
            asked(&run(&[1, 2, 3, 4, 5, 5, 0]), "cwkill --all").unwrap(),
            "this closes 7 sockets of app/5 (2), app/1 (1), app/2 (1), 2 other processes, and 1 without a known owner. \
             Continue? [y/N] "
        );
    }

    #[test]
    fn the_question_names_what_is_done_inside_the_processes() {
        assert_eq!(
            asked(&run(&[7, 8]), "cwkill --all --reclaim").unwrap(),
            "this closes 2 sockets of app/7 (1), app/8 (1), with their descriptors. Continue? [y/N] "
        );
        let mut drains = run(&[7]);
        let mut backlog = Backlog {
            netns: 0,
            local: "10.0.0.1:80".parse().unwrap(),
            socket: ListeningSocket {
                id: stuck("10.0.0.1:80", "0.0.0.0:0", 2).id,
                inode: 5,
                waiting: 5,
                backlog: 4,
                cgroup: None,
            },
            group_size: 1,
            owners: vec![Owner::new(process(9, "app"), RemoteFd(4))],
            waiting_before: 5,
            dead: 5,
            result: None,
        };
        drains.backlogs = Some(vec![backlog.clone()]);
        assert_eq!(
            asked(&drains, "cwkill --all --drain-backlog").unwrap(),
            "this closes 1 socket of app/7 (1), app/9, and drains the backlog of 10.0.0.1:80. Continue? [y/N] "
        );
        backlog.result = Some(DrainResult::default());
        drains.backlogs = Some(vec![backlog]);
        assert_eq!(asked(&drains, "cwkill --all --drain-backlog"), None);
    }
}
