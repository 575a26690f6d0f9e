//! The report of `cwkill gateway`: [`text`] for people, [`json`] for programs, [`watch`] for `--watch`, the notes, and the exit status.

pub mod json;
pub mod text;
pub mod watch;

use serde::Serialize;

use super::ExitStatus;
use crate::config::GatewayConfig;
use crate::model::{EntryDeletion, ForwardedAct, ForwardedOutcome, ForwardedScan, ForwardedSkip};
use crate::text::{age, counted};

/// A run of `cwkill gateway`.
#[derive(Debug)]
pub struct ForwardedRun {
    pub scan: ForwardedScan,
    /// What is done to the connections, or planned; `None` in a listing.
    pub act: Option<ForwardedAct>,
    /// Whether it was done. Then each connection has an outcome.
    pub acted: bool,
}

/// The number of connections with each outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ForwardedCounts {
    pub matched: usize,
    pub cut: usize,
    pub healed: usize,
    pub half: usize,
    pub alive: usize,
    pub gone: usize,
    pub skipped: usize,
    /// Those of `skipped` that `--max-kills` leaves for a later run.
    pub over_max_kills: usize,
    pub failed: usize,
}

impl ForwardedRun {
    pub fn counts(&self) -> ForwardedCounts {
        let mut counts = ForwardedCounts {
            matched: self.scan.connections.len(),
            ..ForwardedCounts::default()
        };
        let connections = self.scan.connections.iter();
        for outcome in connections.filter_map(|connection| connection.outcome.as_ref()) {
            let over = ForwardedOutcome::Skipped(ForwardedSkip::OverMaxKills);
            counts.over_max_kills += usize::from(*outcome == over);
            *match outcome {
                ForwardedOutcome::Cut => &mut counts.cut,
                ForwardedOutcome::Healed => &mut counts.healed,
                ForwardedOutcome::Half => &mut counts.half,
                ForwardedOutcome::Alive => &mut counts.alive,
                ForwardedOutcome::Gone => &mut counts.gone,
                ForwardedOutcome::Skipped(_) => &mut counts.skipped,
                ForwardedOutcome::Failed(_) => &mut counts.failed,
            } += 1;
        }
        counts
    }

    /// The number of entries that could not be deleted, for another reason than a flow table.
    fn entries_kept(&self) -> usize {
        let is_kept = |deleted: &&EntryDeletion| matches!(deleted, EntryDeletion::Failed(_));
        let connections = self.scan.connections.iter();
        let deletions = connections.filter_map(|connection| connection.deleted.as_ref());
        deletions.filter(is_kept).count()
    }
}

impl ForwardedCounts {
    fn add(&mut self, more: ForwardedCounts) {
        self.matched += more.matched;
        self.cut += more.cut;
        self.healed += more.healed;
        self.half += more.half;
        self.alive += more.alive;
        self.gone += more.gone;
        self.skipped += more.skipped;
        self.over_max_kills += more.over_max_kills;
        self.failed += more.failed;
    }

    /// `entries_kept`: the number of entries that could not be deleted.
    fn exit_status(self, act: Option<ForwardedAct>, entries_kept: usize) -> ExitStatus {
        let alive = match act {
            Some(ForwardedAct::Cut) => self.alive,
            Some(ForwardedAct::Probe) | None => 0,
        };
        let skipped = self.skipped - self.over_max_kills;
        match self.half + skipped + self.failed + alive + entries_kept {
            _ if self.matched == 0 => ExitStatus::NothingMatched,
            0 => ExitStatus::Done,
            _ => ExitStatus::NotAllClosed,
        }
    }

    /// One line for people.
    pub fn sentence(&self) -> String {
        let named = [
            (self.cut, "cut"),
            (self.healed, "healed"),
            (self.half, "half"),
            (self.alive, "alive"),
            (self.gone, "gone"),
            (self.skipped - self.over_max_kills, "skipped"),
            (self.over_max_kills, "over --max-kills"),
            (self.failed, "failed"),
        ];
        let named = named.into_iter().filter(|(count, _)| *count > 0);
        let named: Vec<String> = named
            .map(|(count, name)| format!("{count} {name}"))
            .collect();
        let matched = counted(self.matched, "forwarded connection");
        match named.is_empty() {
            true => matched,
            false => format!("{matched}: {}", named.join(", ")),
        }
    }
}

/// A run is not complete if a connection may still be there. A probe leaves alone what is alive: that is its job.
pub fn exit_status(run: &ForwardedRun) -> ExitStatus {
    let opening = ForwardedOutcome::Skipped(ForwardedSkip::BeingOpened);
    // Nobody has forgotten what is being opened.
    let is_fine = |outcome: Option<&ForwardedOutcome>| {
        run.act == Some(ForwardedAct::Probe) && outcome == Some(&opening)
    };
    let connections = run.scan.connections.iter();
    let fine = connections.filter(|connection| is_fine(connection.outcome.as_ref()));
    let mut counts = run.counts();
    counts.skipped -= fine.count();
    counts.exit_status(run.act, run.entries_kept())
}

/// The line after the table.
pub fn summary(run: &ForwardedRun, config: &GatewayConfig) -> String {
    let scan = &run.scan;
    let mut line = run.counts().sentence();
    let min_age = age(config.selectors.original.min_age);
    for (count, text) in [
        (scan.younger, format!("with a packet within {min_age}")),
        (scan.of_unknown_age, "of unknown age".to_owned()),
        (
            scan.ends_here,
            "that end on this host, which are left to `cwkill`".to_owned(),
        ),
    ] {
        if count > 0 {
            line += &format!("; {count} more {text}");
        }
    }
    if run.act.is_some() && !run.acted {
        line += "; dry run, nothing was sent";
    }
    line
}

/// The note where conntrack is not loaded.
pub fn without_conntrack() -> Option<String> {
    Some(
        "conntrack tracks nothing in this network namespace: it begins where a rule of nftables or iptables needs it (NAT, ct \
         state)"
            .to_owned(),
    )
}

/// The notes beside the results, one per line.
pub fn notes(run: &ForwardedRun, config: &GatewayConfig) -> Vec<String> {
    let mut notes = Vec::new();
    let scan = &run.scan;
    let is_empty = scan.connections.is_empty();
    match scan.table_use {
        Some((0, _)) => notes.push(
            "conntrack has no entries in this network namespace now".to_owned(),
        ),
        None => notes.extend(without_conntrack()),
        Some((used, most)) if used >= most => notes.push(format!(
            "the table of conntrack is full ({used} entries, net.netfilter.nf_conntrack_max is {most}): the kernel drops \
             the packets of connections without an entry, so these are not listed"
        )),
        Some(_) => {}
    }
    if scan.are_sockets_unknown {
        notes.push(
            "this kernel cannot list sockets (module tcp_diag): connections of a transparent proxy on this host are not recognized, \
             and none is probed or cut"
                .to_owned(),
        );
    }
    if scan.timeouts.by_policy {
        notes.push(
            "rules can give connections timeouts of their own here (`ct timeout`), and an entry does not tell which it has: the \
             ages are unknown"
                .to_owned(),
        );
    }
    if scan.timeouts.has_flow_tables {
        notes.push(
            "there are flow tables here, and an entry that has left one does not tell when its last packet passed: the ages are unknown"
                .to_owned(),
        );
    }
    let selected = &config.selectors.original;
    if is_empty && !selected.ports.is_empty() && selected.peer_ports.is_empty() {
        notes.push(
            "--sport is the port of the end that has opened the connection; that of its server is --dport"
                .to_owned(),
        );
    }
    notes
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::conntrack::{Entry, Timeouts};
    use crate::model::{EndReport, EndState, Forwarded, ForwardedFailure};
    use clap::Parser;

    pub(super) fn config(line: &str) -> GatewayConfig {
        let words = format!("cwkill gateway {line}");
        let cli = Cli::try_parse_from(words.split_whitespace()).expect("a command line");
        match cli.command {
            Some(Command::Gateway(args)) => GatewayConfig::from_args(args).expect("valid"),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn run(scan: ForwardedScan) -> ForwardedRun {
        ForwardedRun {
            scan,
            act: None,
            acted: false,
        }
    }

    #[test]
    fn what_was_left_out_is_counted() {
        let scan = ForwardedScan {
            ends_here: 3,
            younger: 2,
            of_unknown_age: 1,
            table_use: Some((6, 1000)),
            ..ForwardedScan::default()
        };
        let run = run(scan);
        assert_eq!(
            summary(&run, &config("--min-age 10m")),
            "0 forwarded connections; 2 more with a packet within 10m00s; 1 more of unknown age; 3 more that end on this host, \
             which are left to `cwkill`"
        );
        assert_eq!(exit_status(&run), ExitStatus::NothingMatched);
        assert!(notes(&run, &config("")).is_empty());
    }

    #[test]
    fn a_note_says_why_connections_may_be_missing() {
        let of = |table_use| ForwardedScan {
            table_use,
            ..ForwardedScan::default()
        };
        let said = |table_use, line| notes(&run(of(table_use)), &config(line)).join("\n");
        assert!(said(Some((0, 100)), "").contains("has no entries"));
        assert!(said(None, "").contains("tracks nothing"));
        assert!(said(Some((100, 100)), "").contains("is full (100 entries"));
        assert!(said(Some((9, 100)), "--sport 443").contains("--dport"));
        assert_eq!(said(Some((9, 100)), "--sport 1024-65535 --dport 443"), "");
        let policies = ForwardedScan {
            timeouts: Timeouts {
                by_policy: true,
                ..Timeouts::default()
            },
            ..of(Some((9, 100)))
        };
        assert!(notes(&run(policies), &config(""))[0].contains("ct timeout"));
        assert_eq!(
            config("--min-age 1s").selectors.original.min_age,
            Duration::from_secs(1)
        );
    }

    /// A run that has acted, with these outcomes.
    pub(super) fn acted(act: ForwardedAct, outcomes: &[ForwardedOutcome]) -> ForwardedRun {
        let connection = |outcome: &ForwardedOutcome| {
            let mut connection = Forwarded::new(Entry::example("10.0.0.1:5", "10.0.0.2:80"), None);
            connection.outcome = Some(outcome.clone());
            connection
        };
        ForwardedRun {
            scan: ForwardedScan {
                connections: outcomes.iter().map(connection).collect(),
                ..ForwardedScan::default()
            },
            act: Some(act),
            acted: true,
        }
    }

    #[test]
    fn a_run_is_complete_if_nothing_is_left() {
        use ForwardedOutcome::{Alive, Cut, Failed, Gone, Half, Healed, Skipped};
        let over = Skipped(ForwardedSkip::OverMaxKills);
        let status = |act, outcomes: &[ForwardedOutcome]| exit_status(&acted(act, outcomes));
        let cut = ForwardedAct::Cut;
        assert_eq!(status(cut, &[]), ExitStatus::NothingMatched);
        assert_eq!(
            status(cut, &[Cut, Healed, Gone, over.clone()]),
            ExitStatus::Done
        );
        for left in [
            Half,
            Alive,
            Failed(ForwardedFailure::NoAnswer),
            Skipped(ForwardedSkip::NoLongerSelected),
        ] {
            assert_eq!(
                status(cut, &[Cut, left.clone()]),
                ExitStatus::NotAllClosed,
                "{left:?}"
            );
        }
        assert_eq!(
            status(ForwardedAct::Probe, &[Alive, Healed]),
            ExitStatus::Done
        );
        let opening = Skipped(ForwardedSkip::BeingOpened);
        let probe = ForwardedAct::Probe;
        assert_eq!(status(probe, &[Alive, opening.clone()]), ExitStatus::Done);
        assert_eq!(status(cut, &[Cut, opening]), ExitStatus::NotAllClosed);
        assert_eq!(status(probe, &[Half]), ExitStatus::NotAllClosed);
        let run = acted(cut, &[Cut, Cut, over, Alive]);
        assert_eq!(
            run.counts().sentence(),
            "4 forwarded connections: 2 cut, 1 alive, 1 over --max-kills"
        );
        let mut run = acted(cut, &[Cut]);
        run.scan.connections[0].deleted = Some(EntryDeletion::Offloaded);
        assert_eq!(exit_status(&run), ExitStatus::Done);
        run.scan.connections[0].deleted = Some(EntryDeletion::Failed("x".into()));
        assert_eq!(exit_status(&run), ExitStatus::NotAllClosed);
    }

    #[test]
    fn a_result_says_what_each_end_has_said() {
        let end = |first, now, resets| EndReport { first, now, resets };
        let result = |outcome: &ForwardedOutcome, ends| {
            let mut connection = Forwarded::new(Entry::example("10.0.0.1:5", "10.0.0.2:80"), None);
            (connection.outcome, connection.ends) = (Some(outcome.clone()), ends);
            text::result(&connection, false)
        };
        use EndState::{Alive, Gone, Silent};
        let cut = end(Alive, Gone, 1);
        assert_eq!(result(&ForwardedOutcome::Cut, [cut, cut]), "cut");
        assert_eq!(
            result(
                &ForwardedOutcome::Healed,
                [end(Gone, Gone, 0), end(Alive, Gone, 0)]
            ),
            "healed: the source had forgotten it"
        );
        assert_eq!(
            result(&ForwardedOutcome::Half, [cut, end(Silent, Silent, 0)]),
            "half: source gone, destination silent"
        );
        assert_eq!(
            result(&ForwardedOutcome::Alive, [end(Alive, Alive, 3), cut]),
            "alive: source alive after 3 RSTs, destination gone"
        );
    }
}
