//! The report of `cwkill gateway --watch`: rows as they come, and the sum of all.

use std::io::{self, Write};
use std::time::Duration;

use super::text::{Column, row};
use super::{ForwardedCounts, ForwardedRun};
use crate::config::GatewayConfig;
use crate::model::{ForwardedAct, ForwardedOutcome, ForwardedSkip};
use crate::report::ExitStatus;
use crate::text::{counted, seconds};

/// What became of all connections of a watch. It keeps none of them.
#[derive(Debug)]
pub struct Watched {
    act: Option<ForwardedAct>,
    acts: bool,
    pub counts: ForwardedCounts,
    ends_here: usize,
    entries_kept: usize,
    /// Those that have changed between two looks, so that they no longer match.
    changed: usize,
    /// The number of connections that matched, and that were not reached before the end.
    pub not_reached: usize,
    /// How often events were lost.
    pub losses: usize,
}

impl Watched {
    pub fn new(act: Option<ForwardedAct>, acts: bool) -> Self {
        Watched {
            act,
            acts,
            counts: ForwardedCounts::default(),
            ends_here: 0,
            entries_kept: 0,
            changed: 0,
            not_reached: 0,
            losses: 0,
        }
    }

    /// Adds the connections of `run`, which came together.
    pub fn add(&mut self, run: &ForwardedRun) {
        self.counts.add(run.counts());
        self.ends_here += run.scan.ends_here;
        self.entries_kept += run.entries_kept();
        let changed = ForwardedOutcome::Skipped(ForwardedSkip::NoLongerSelected);
        let connections = run.scan.connections.iter();
        self.changed += connections
            .filter(|one| one.outcome.as_ref() == Some(&changed))
            .count();
    }

    /// The line at the end.
    pub fn summary(&self, watched: Duration) -> String {
        let mut line = self.counts.sentence();
        line += &format!("; watched for {}", seconds(watched));
        if self.not_reached > 0 {
            line += &format!("; {} more not reached", self.not_reached);
        }
        if self.ends_here > 0 {
            let ends_here = self.ends_here;
            line +=
                &format!("; {ends_here} more that end on this host, which are left to `cwkill`");
        }
        if self.losses > 0 {
            let times = counted(self.losses, "time");
            line += &format!("; events were lost {times}, and the table was listed again");
        }
        if self.act.is_some() && !self.acts {
            line += "; dry run, nothing was sent";
        }
        line
    }

    /// As for a run that acts once. One that has changed is looked at again, so that its skip is not its end.
    pub fn exit_status(&self) -> ExitStatus {
        let not_reached = if self.acts { self.not_reached } else { 0 };
        let counts = ForwardedCounts {
            matched: self.counts.matched + not_reached,
            skipped: self.counts.skipped - self.changed + not_reached,
            ..self.counts
        };
        counts.exit_status(self.act, self.entries_kept)
    }
}

/// The rows of a watch. They come one by one, so a column is as wide as its widest text so far.
pub struct Rows {
    columns: Vec<Column>,
    widths: Vec<usize>,
    has_header: bool,
}

/// The width of an IPv4 address with its port, and of the longest name of a state.
const ADDRESS: usize = 21;
const STATE: usize = 11;

impl Rows {
    pub fn new(config: &GatewayConfig, acts: bool) -> Self {
        let mut columns = vec![
            Column::Source,
            Column::Destination,
            Column::NatSource,
            Column::NatDestination,
            Column::State,
        ];
        if !config.selectors.marks.is_empty() {
            columns.push(Column::Mark);
        }
        if config.verbose {
            columns.extend([Column::Left, Column::Status, Column::Zone, Column::Id]);
        }
        columns.extend(match (config.act, acts) {
            (None, _) => None,
            (Some(_), false) => Some(Column::Plan),
            (Some(_), true) => Some(Column::Result),
        });
        let width = |column: &Column| match column {
            Column::Source | Column::Destination | Column::NatSource | Column::NatDestination => {
                ADDRESS
            }
            Column::State => STATE,
            other => other.header().len(),
        };
        Rows {
            widths: columns.iter().map(width).collect(),
            columns,
            has_header: !config.no_header,
        }
    }

    /// Writes the connections of `run`, with the header before the first.
    pub fn write(
        &mut self,
        run: &ForwardedRun,
        verbose: bool,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let rows = &run.scan.connections;
        if self.has_header && !rows.is_empty() {
            self.has_header = false;
            let header = row(&self.columns, &self.widths, &|column| {
                column.header().to_owned()
            });
            writeln!(out, "{header}")?;
        }
        for connection in rows {
            let text = |column: Column| column.text(connection, run, verbose);
            for (column, width) in self.columns.iter().zip(&mut self.widths) {
                *width = text(*column).len().max(*width);
            }
            writeln!(out, "{}", row(&self.columns, &self.widths, &text))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{acted, config};
    use super::*;

    fn run(outcomes: &[ForwardedOutcome]) -> ForwardedRun {
        let mut run = acted(ForwardedAct::Cut, outcomes);
        run.scan.ends_here = 1;
        run
    }

    #[test]
    fn all_connections_of_a_watch_are_summed() {
        use ForwardedOutcome::{Alive, Cut, Gone};
        let cut = Some(ForwardedAct::Cut);
        let mut watched = Watched::new(cut, true);
        assert_eq!(watched.exit_status(), ExitStatus::NothingMatched);
        watched.add(&run(&[Cut, Gone]));
        watched.add(&run(&[Cut]));
        assert_eq!(watched.exit_status(), ExitStatus::Done);
        watched.losses = 2;
        assert_eq!(
            watched.summary(Duration::from_secs(60)),
            "3 forwarded connections: 2 cut, 1 gone; watched for 60 s; 2 more that end on this host, which are left to `cwkill`; \
             events were lost 2 times, and the table was listed again"
        );
        watched.not_reached = 4;
        assert!(
            watched
                .summary(Duration::ZERO)
                .contains("; 4 more not reached")
        );
        assert_eq!(watched.exit_status(), ExitStatus::NotAllClosed);
        watched.not_reached = 0;
        watched.add(&run(&[ForwardedOutcome::Skipped(
            ForwardedSkip::NoLongerSelected,
        )]));
        assert_eq!(watched.exit_status(), ExitStatus::Done);
        watched.add(&run(&[Alive]));
        assert_eq!(watched.exit_status(), ExitStatus::NotAllClosed);
        let dry = Watched::new(cut, false);
        assert!(
            dry.summary(Duration::ZERO)
                .ends_with("; dry run, nothing was sent")
        );
    }

    #[test]
    fn rows_have_one_header() {
        let config = config("--host 10.0.0.1 --cut --active --watch");
        let mut rows = Rows::new(&config, true);
        let mut out = Vec::new();
        rows.write(&run(&[]), false, &mut out).unwrap();
        assert!(out.is_empty());
        for _ in 0..2 {
            rows.write(&run(&[ForwardedOutcome::Cut]), false, &mut out)
                .unwrap();
        }
        let text = String::from_utf8(out).unwrap();
        let words: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let header = "SOURCE DESTINATION NAT-SRC NAT-DST STATE RESULT";
        assert_eq!(words[0], header.split(' ').collect::<Vec<_>>());
        let row = ["10.0.0.1:5", "10.0.0.2:80", "-", "-", "ESTABLISHED", "cut"];
        assert_eq!((&words[1][..], &words[2][..]), (&row[..], &row[..]));
        assert_eq!(words.len(), 3);
    }
}
