//! What a scan leaves out although it may match, for the last line of a report. So no report says "nothing" when there is something.

use std::time::Duration;

use humantime::format_duration;

use crate::model::Scan;
use crate::text::counted;

impl Scan {
    /// All that was left out. `min_idle`: that of `--min-idle`.
    pub fn left_out_with_used(&self, min_age: Duration, min_idle: Duration) -> Vec<String> {
        let mut parts = self.left_out(min_age);
        parts.extend(self.namespaces_left_out());
        if self.in_use > 0 {
            let limit = format_duration(min_idle);
            let text = format!("{} in use: data moved in the last {limit}", self.in_use);
            parts.insert(usize::from(self.younger > 0), text);
        }
        parts
    }

    /// The number of network namespaces that were not looked into, if there are any, and what may be in them.
    pub fn namespaces_left_out(&self) -> Option<String> {
        let count = self.coverage.namespaces_not_looked_into;
        let text = || {
            let namespaces = counted(count, "network namespace");
            let sockets = match self.coverage.sockets_not_looked_into {
                None => String::new(),
                Some(0) => return format!("{namespaces} without TCP sockets not looked into"),
                Some(sockets) => format!(": at most {}", counted(sockets, "TCP socket")),
            };
            format!("{namespaces} not looked into (--all-netns){sockets}")
        };
        (count > 0).then(text)
    }

    /// What was left out, except for the sockets in use and whole namespaces. `min_age`: that of `--min-age`.
    pub fn left_out(&self, min_age: Duration) -> Vec<String> {
        let mut parts = Vec::new();
        match self.younger {
            0 => {}
            1 => parts.push(format!(
                "1 matches but is younger than {}",
                format_duration(min_age)
            )),
            count => parts.push(format!(
                "{count} match but are younger than {}",
                format_duration(min_age)
            )),
        }
        let coverage = &self.coverage;
        if coverage.undecided > 0 {
            let why = match coverage.has_hidden_owners() {
                _ if coverage.undecided == coverage.undecided_by_name => {
                    "the name of their container could not be read"
                }
                true if coverage.undecided_in_group == 0 => "of processes that could not be read",
                _ => "their owner is unknown",
            };
            parts.push(format!("{} more may match: {why}", coverage.undecided));
        }
        if coverage.unlisted_subflows > 0 {
            let count = coverage.unlisted_subflows;
            parts.push(format!(
                "{count} more may match: of MPTCP, in an unknown state"
            ));
        }
        if coverage.unplaced_sockets > 0 {
            let count = coverage.unplaced_sockets;
            parts.push(format!(
                "{count} more may match: in an unknown network namespace"
            ));
        }
        if coverage.unseen_namespaces() + coverage.unexamined_descriptors > 0 {
            parts.push("not every network namespace could be seen".to_owned());
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Coverage;

    fn of(younger: usize, coverage: Coverage) -> String {
        let scan = Scan {
            younger,
            coverage,
            ..Scan::default()
        };
        let idle = Duration::from_secs(5);
        let parts = scan.left_out_with_used(Duration::from_secs(600), idle);
        parts.join("; ")
    }

    #[test]
    fn everything_that_may_match_is_counted() {
        assert_eq!(of(0, Coverage::default()), "");
        assert_eq!(
            of(1, Coverage::default()),
            "1 matches but is younger than 10m"
        );
        let coverage = Coverage {
            undecided: 4,
            unreadable_processes: 1,
            namespaces_not_looked_into: 2,
            unreachable_namespaces: 1,
            unlisted_subflows: 5,
            unplaced_sockets: 6,
            ..Coverage::default()
        };
        assert_eq!(
            of(3, coverage),
            "3 match but are younger than 10m; 4 more may match: of processes that could not be read; \
             5 more may match: of MPTCP, in an unknown state; 6 more may match: in an unknown network namespace; \
             not every network namespace could be seen; 2 network namespaces not looked into (--all-netns)"
        );
        let coverage = Coverage {
            undecided: 1,
            namespaces_not_looked_into: 1,
            ..Coverage::default()
        };
        assert_eq!(
            of(0, coverage),
            "1 more may match: their owner is unknown; 1 network namespace not looked into (--all-netns)"
        );
    }

    #[test]
    fn sockets_that_were_not_looked_at_have_a_bound() {
        let of_sockets = |sockets| {
            let coverage = Coverage {
                namespaces_not_looked_into: 2,
                sockets_not_looked_into: sockets,
                ..Coverage::default()
            };
            of(0, coverage)
        };
        let before = "2 network namespaces not looked into";
        assert_eq!(of_sockets(None), format!("{before} (--all-netns)"));
        assert_eq!(
            of_sockets(Some(0)),
            "2 network namespaces without TCP sockets not looked into"
        );
        assert_eq!(
            of_sockets(Some(1)),
            format!("{before} (--all-netns): at most 1 TCP socket")
        );
        assert_eq!(
            of_sockets(Some(14)),
            format!("{before} (--all-netns): at most 14 TCP sockets")
        );
        assert_eq!(
            of(
                0,
                Coverage {
                    sockets_not_looked_into: Some(0),
                    ..Coverage::default()
                }
            ),
            ""
        );
    }
}
