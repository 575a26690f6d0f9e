//! The result of a run: counters, losses and faults.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::client::ClientStats;
use super::server::ServerStats;
use super::{KillStats, Loss, Options};

/// How many losses are printed one by one.
const LOSSES_SHOWN: usize = 50;

/// On a very busy machine a client may get no processor time for seconds, and a packet may overtake another. A bystander that the killer
/// ends then is no loss, but more than this many of a kind are a fault, however long the run.
const MOST_EXCUSED: u64 = 3;

/// Listeners of the server.
const LISTENERS: usize = 2;

/// The result of a run.
#[derive(Debug, Clone)]
pub struct Report {
    pub(super) options: Options,
    pub(super) duration: Duration,
    /// One entry per killer.
    pub kill_stats: Vec<KillStats>,
    pub(super) clients: ClientStats,
    pub(super) server: ServerStats,
    /// Bystanders whose bytes did not all arrive.
    pub losses: Vec<Loss>,
    /// Listeners that the kernel shows at the end; there were two at the start.
    pub listeners: usize,
    /// Whether the server's process still runs at the end.
    pub server_alive: bool,
}

impl Report {
    /// Opened connections.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.clients.opened
    }

    /// Connections whose 4-tuple had another connection until at most `limit` before.
    #[must_use]
    pub fn reused_within(&self, limit: Duration) -> usize {
        let gaps = self.clients.gaps_us.iter();
        gaps.filter(|&&gap_us| Duration::from_micros(gap_us.into()) <= limit)
            .count()
    }

    /// Bystanders that carried every byte to the end.
    #[must_use]
    pub fn finished(&self) -> u64 {
        self.clients.finished
    }

    /// Half-closed streams that carried every byte to the end.
    #[must_use]
    pub fn streams(&self) -> u64 {
        self.clients.streams
    }

    /// Failed handshakes.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.clients.refused.values().sum()
    }

    /// The median time from the end of a connection to the next handshake on its 4-tuple.
    #[must_use]
    fn median_gap(&self) -> Duration {
        let mut gaps = self.clients.gaps_us.clone();
        let middle = gaps.len() / 2;
        if gaps.is_empty() {
            return Duration::ZERO;
        }
        let (_, median, _) = gaps.select_nth_unstable(middle);
        Duration::from_micros((*median).into())
    }

    /// Everything that went wrong, in words. Empty if the killers did no harm and enough work.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !self.losses.is_empty() {
            faults.push(format!("{} bystanders were lost", self.losses.len()));
        }
        if self.listeners != LISTENERS {
            faults.push(format!(
                "{} of {LISTENERS} listeners are left",
                self.listeners
            ));
        }
        if !self.server_alive {
            faults.push("the server's process is gone".to_owned());
        }
        let wanted = self.options.acts.unwrap_or(1);
        for stats in self.kill_stats.iter().filter(|stats| stats.reports) {
            if stats.acts < wanted {
                faults.push(format!(
                    "{} acted on {} sockets, fewer than {wanted}",
                    stats.name, stats.acts
                ));
            }
        }
        if let Some(wanted) = self.options.streams
            && self.streams() < wanted
        {
            faults.push(format!(
                "{} half-closed streams finished, fewer than {wanted}",
                self.streams()
            ));
        }
        // The remains of a stuck connection on the 4-tuple could make a handshake fail [measured: none in 300,000].
        // Without its listener, every handshake fails.
        let tolerated = 1 + self.opened() / 10_000;
        if self.refused() > tolerated {
            faults.push(format!(
                "{} handshakes failed, more than {tolerated}",
                self.refused()
            ));
        }
        for (count, what) in [
            (
                self.clients.overslept,
                "idle for as long as those that the killer ends",
            ),
            (
                self.clients.reset_at_end,
                "reset between their last byte and their FIN",
            ),
        ] {
            if count > MOST_EXCUSED {
                faults.push(format!(
                    "{count} bystanders were {what}, more than {MOST_EXCUSED}"
                ));
            }
        }
        if self.finished() == 0 {
            faults.push("no bystander finished".to_owned());
        }
        faults
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            clients, server, ..
        } = self;
        writeln!(
            f,
            "{:.1} s, {}, {} clients, seed {}",
            self.duration.as_secs_f64(),
            self.options.family.name(),
            self.options.connections,
            self.options.seed
        )?;
        writeln!(f, "{}", KillStats::COLUMNS)?;
        for stats in &self.kill_stats {
            writeln!(f, "{stats}")?;
        }
        let stuck = clients.stuck_fin
            + clients.stuck_reset
            + clients.stuck_silent
            + clients.stuck_forgotten;
        writeln!(
            f,
            "connections opened   {} ({} on a 4-tuple used before; median gap {:.2} ms)",
            clients.opened,
            clients.reused,
            self.median_gap().as_secs_f64() * 1000.0
        )?;
        writeln!(
            f,
            "bystanders finished  {} ({} MiB, every byte right; {} as long as the run, {} half-closed streams)",
            clients.finished,
            clients.bytes >> 20,
            clients.long_lived,
            clients.streams
        )?;
        writeln!(f, "bystanders lost      {}", self.losses.len())?;
        if self.options.gateway.is_some() {
            writeln!(
                f,
                "bystanders excused   {} got no processor time for as long as an idle connection lasts, {} were reset between their last \
                 byte and their FIN; at most {MOST_EXCUSED} of each",
                clients.overslept, clients.reset_at_end
            )?;
        }
        let mut errors = BTreeMap::new();
        for loss in &self.losses {
            *errors.entry(loss.error.to_string()).or_insert(0) += 1;
        }
        for (error, count) in errors {
            writeln!(f, "             {count} {error}")?;
        }
        writeln!(
            f,
            "stuck connections    {stuck} (the client read FIN {}, RST {}, nothing {}; it forgot {})",
            clients.stuck_fin, clients.stuck_reset, clients.stuck_silent, clients.stuck_forgotten
        )?;
        if self.options.gateway.is_some() {
            writeln!(
                f,
                "idle connections     {} (ended {}, left {})",
                clients.idle_ended + clients.idle_left,
                clients.idle_ended,
                clients.idle_left
            )?;
        }
        writeln!(
            f,
            "handshakes           {} failed {:?}, {} took more than 500 ms, longest {} ms; {} waited for their 4-tuple",
            self.refused(),
            clients.refused,
            clients.slow,
            clients.longest_handshake_us / 1000,
            clients.waited_for_tuple
        )?;
        writeln!(
            f,
            "server               accepted {}, {} of them already dead, served {}, leaked {}",
            server.accepted, server.dead_on_arrival, server.served, server.leaked
        )?;
        writeln!(f, "listeners alive      {} of {LISTENERS}", self.listeners)?;
        write!(
            f,
            "server process       {}",
            if self.server_alive { "alive" } else { "GONE" }
        )?;
        for loss in self.losses.iter().take(LOSSES_SHOWN) {
            write!(f, "\nLOST {loss}")?;
        }
        if self.losses.len() > LOSSES_SHOWN {
            write!(f, "\n… and {} more", self.losses.len() - LOSSES_SHOWN)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run without harm in which many bystanders have finished.
    fn harmless() -> Report {
        Report {
            options: Options::default(),
            duration: Duration::from_secs(1),
            kill_stats: Vec::new(),
            clients: ClientStats {
                opened: 100_000,
                finished: 100_000,
                ..ClientStats::default()
            },
            server: ServerStats::default(),
            losses: Vec::new(),
            listeners: LISTENERS,
            server_alive: true,
        }
    }

    #[test]
    fn what_is_excused_does_not_grow_with_the_run() {
        let mut report = harmless();
        report.clients.overslept = MOST_EXCUSED;
        report.clients.reset_at_end = MOST_EXCUSED;
        assert!(report.faults().is_empty(), "{:?}", report.faults());
        report.clients.overslept += 1;
        assert_eq!(report.faults().len(), 1, "{:?}", report.faults());
        report.clients.reset_at_end += 1;
        assert_eq!(report.faults().len(), 2, "{:?}", report.faults());
    }
}
