//! The question before sockets of several processes are closed. cwkill asks only if a person is at the terminal.

use std::collections::BTreeMap;
use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::Arc;

use crate::model::Scan;
use crate::proc::{Process, ProcessId};
use crate::text::counted;

/// The maximum number of processes that the question names, so that it stays on one line.
const MAX_NAMED: usize = 3;

/// Whether a person can be asked: a question on stderr is seen, and an answer can be typed.
pub(super) fn is_possible() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// The question, if the plan closes sockets of more than one process. Sockets without a known owner count as one process.
pub(super) fn question(scan: &Scan) -> Option<String> {
    let planned = scan
        .targets
        .iter()
        .filter(|target| target.outcome.is_none() && target.plan.skip.is_none());
    let mut sockets = 0;
    let mut unowned = 0;
    let mut by_process: BTreeMap<ProcessId, (&Arc<Process>, usize)> = BTreeMap::new();
    for target in planned {
        sockets += 1;
        match scan.culprit(target) {
            Some(process) => by_process.entry(process.id).or_insert((process, 0)).1 += 1,
            None => unowned += 1,
        }
    }
    if by_process.len() + usize::from(unowned > 0) < 2 {
        return None;
    }
    let mut processes: Vec<(&Arc<Process>, usize)> = by_process.into_values().collect();
    processes.sort_by_key(|(process, count)| (usize::MAX - count, process.id));
    let mut names: Vec<String> = processes
        .iter()
        .take(MAX_NAMED)
        .map(|(process, count)| format!("{process} ({count})"))
        .collect();
    if processes.len() > MAX_NAMED {
        names.push(counted(processes.len() - MAX_NAMED, "other process"));
    }
    let without_owner = match unowned {
        0 => String::new(),
        _ => format!(", and {unowned} without a known owner"),
    };
    Some(format!(
        "this closes {} of {}{without_owner}. Continue? [y/N] ",
        counted(sockets, "socket"),
        names.join(", ")
    ))
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
    use super::*;
    use crate::model::{Owner, SkipReason, Socket, Target};
    use crate::proc::RemoteFd;
    use crate::proc::testdata::process;
    use crate::sock_diag::testdata::stuck;

    /// Sockets of these processes; 0 is a socket without a known owner.
    fn scan(pids: &[i32]) -> Scan {
        let target = |pid: &i32| {
            let message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
            let mut target = Target::new(Socket::from_message(&message));
            if *pid != 0 {
                target.owners = vec![Owner::new(process(*pid, "app"), RemoteFd(3))];
            }
            target
        };
        Scan {
            targets: pids.iter().map(target).collect(),
            ..Scan::default()
        }
    }

    #[test]
    fn one_process_needs_no_question() {
        assert_eq!(question(&scan(&[])), None);
        assert_eq!(question(&scan(&[7, 7, 7])), None);
        assert_eq!(question(&scan(&[0, 0])), None);
        let mut skipped = scan(&[7, 8]);
        skipped.targets[1].plan.skip = Some(SkipReason::OverMaxKills);
        assert_eq!(question(&skipped), None);
    }

    #[test]
    fn the_question_names_the_largest() {
        assert_eq!(
            question(&scan(&[7, 8, 8])).unwrap(),
            "this closes 3 sockets of app/8 (2), app/7 (1). Continue? [y/N] "
        );
        assert_eq!(
            question(&scan(&[1, 2, 3, 4, 5, 5, 0])).unwrap(),
            "this closes 7 sockets of app/5 (2), app/1 (1), app/2 (1), 2 other processes, and 1 without a known owner. \
             Continue? [y/N] "
        );
    }
}
