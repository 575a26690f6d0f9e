//! What a run amounts to.

use std::fmt;
use std::time::Duration;

use super::client::ClientStats;
use super::server::ServerStats;
use super::{KillStats, Loss, Options};

/// How many lost bystanders are printed one by one.
const LOSSES_SHOWN: usize = 50;

/// The listeners of the server.
const LISTENERS: usize = 2;

/// What a run amounts to.
#[derive(Debug, Clone)]
pub struct Report {
    pub(super) options: Options,
    pub(super) took: Duration,
    /// What the killers did, one each.
    pub stats: Vec<KillStats>,
    pub(super) seen: ClientStats,
    pub(super) served: ServerStats,
    /// Bystanders that did not carry their bytes to the end, one each.
    pub losses: Vec<Loss>,
    /// Listeners that the kernel shows in the end; there were two.
    pub listeners: usize,
    /// The server's process runs in the end.
    pub server_alive: bool,
}

impl Report {
    /// Connections that were opened.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.seen.opened
    }

    /// Connections on a 4-tuple that had one before.
    #[must_use]
    pub fn reused(&self) -> u64 {
        self.seen.reused
    }

    /// Bystanders that carried every byte to the end.
    #[must_use]
    pub fn finished(&self) -> u64 {
        self.seen.finished
    }

    /// Bystanders that were half-closed all the time and carried every byte to the end.
    #[must_use]
    pub fn streams(&self) -> u64 {
        self.seen.streams
    }

    /// Handshakes that failed.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.seen.refused.values().sum()
    }

    /// From the end of a connection to the handshake of the next one on its 4-tuple, the median.
    #[must_use]
    pub fn median_gap(&self) -> Duration {
        let mut gaps = self.seen.gaps_us.clone();
        let middle = gaps.len() / 2;
        if gaps.is_empty() {
            return Duration::ZERO;
        }
        let (_, median, _) = gaps.select_nth_unstable(middle);
        Duration::from_micros((*median).into())
    }

    /// Everything that must not be, in words. Empty means that the killers are cleared.
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
        for stats in self.stats.iter().filter(|stats| stats.reports) {
            if stats.acts < wanted {
                faults.push(format!(
                    "{} acted on {} sockets, fewer than {wanted}",
                    stats.name, stats.acts
                ));
            }
        }
        // What a stuck connection leaves on its 4-tuple might refuse a handshake, although no more has been seen to
        // [measured: none in 300,000]; a listener that is gone refuses all.
        let bearable = 1 + self.opened() / 10_000;
        if self.refused() > bearable {
            faults.push(format!(
                "{} handshakes failed, more than {bearable}",
                self.refused()
            ));
        }
        if self.finished() == 0 {
            faults.push("no bystander has finished".to_owned());
        }
        faults
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seen, served, .. } = self;
        writeln!(
            f,
            "{:.1} s, {}, {} clients, seed {}",
            self.took.as_secs_f64(),
            self.options.family.name(),
            self.options.connections,
            self.options.seed
        )?;
        writeln!(f, "{}", KillStats::COLUMNS)?;
        for stats in &self.stats {
            writeln!(f, "{stats}")?;
        }
        let stuck = seen.stuck_fin + seen.stuck_reset + seen.stuck_silent + seen.stuck_forgotten;
        writeln!(
            f,
            "connections opened   {} ({} on a 4-tuple used before; median gap {:.2} ms)",
            seen.opened,
            seen.reused,
            self.median_gap().as_secs_f64() * 1000.0
        )?;
        writeln!(
            f,
            "bystanders finished   {} (every byte right: {} MiB; {} as long as the run, {} half-closed streams)",
            seen.finished,
            seen.bytes >> 20,
            seen.long_lived,
            seen.streams
        )?;
        writeln!(f, "bystanders lost       {}", self.losses.len())?;
        writeln!(
            f,
            "stuck connections    {stuck} (the client saw FIN {}, RST {}, nothing {}; it forgot {})",
            seen.stuck_fin, seen.stuck_reset, seen.stuck_silent, seen.stuck_forgotten
        )?;
        writeln!(
            f,
            "handshakes           {} failed {:?}, {} took more than 500 ms, longest {} ms; {} waited for their 4-tuple",
            self.refused(),
            seen.refused,
            seen.slow,
            seen.longest_handshake_us / 1000,
            seen.waited_for_tuple
        )?;
        writeln!(
            f,
            "server               accepted {}, {} of them dead already, served {}, leaked {}",
            served.accepted, served.dead_on_arrival, served.served, served.leaked
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
