//! `netns-harness gateway`: `cwkill gateway` on a router between a client and a server.
//!
//! - `cut`: how long it takes to end very many connections, and what is left of them
//! - `tools`: what tcpkill, cutter, `conntrack -D` and cwkill do to the same connections

mod cut;
mod tools;

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use clap::Subcommand;

use crate::host::Host;
use crate::{TcpState, privilege};

/// The command line of `netns-harness gateway`.
#[derive(Debug, Subcommand)]
pub(crate) enum Gateway {
    /// Measure how long `cwkill gateway --cut` takes for very many idle connections, and count what is left of them
    Cut(cut::Cut),
    /// Run tcpkill, cutter, `conntrack -D` and `cwkill gateway --cut` on the same connections, and print a table
    ///
    /// Each tool gets a connection of its own, and a second one that it must leave alone. Tools that are not installed are left out.
    Tools(tools::Tools),
}

impl Gateway {
    /// Runs it and prints the table.
    ///
    /// # Errors
    /// A lab cannot be built, or `cwkill` does not do what it should.
    pub(crate) fn run(&self) -> Result<()> {
        privilege::ensure_privileges()?;
        match self {
            Gateway::Cut(cut) => cut.run(),
            Gateway::Tools(tools) => tools.run(),
        }
    }
}

/// The connections that `ss` shows on a host: the addresses of both ends.
fn connections(host: &Host) -> Result<Vec<(SocketAddr, SocketAddr)>> {
    let rows = host.ss(&["state", "connected"])?;
    let rows = rows.iter().filter(|row| row.state != TcpState::TimeWait);
    Ok(rows.map(|row| (row.local, row.peer)).collect())
}

/// The entries of conntrack in the network namespace of a host, of all protocols.
fn entries(host: &Host) -> Result<usize> {
    host.within(|| {
        let path = "/proc/sys/net/netfilter/nf_conntrack_count";
        let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
        text.trim()
            .parse()
            .with_context(|| format!("{path}: {text}"))
    })
}
