//! Network namespaces that reproduce every stuck TCP state, for tests and for manual use.
//!
//! A [`Lab`] has one host for the leaking applications. Each application's peer has a host of its own, connected by a veth
//! pair. [`Lab::start`] brings sockets into the state of a [`scenario`] and waits until the kernel shows it:
//!
//! ```no_run
//! use netns_harness::{Family, Lab, Options};
//!
//! fn main() -> anyhow::Result<()> {
//!     netns_harness::init()?; // before any other thread exists
//!     let lab = Lab::new()?;
//!     let leak = lab.start("unread", Family::V6, Options { count: 3, ..Options::default() })?;
//!     let output = lab.app_host().command("cwkill").args(["--port", "8080"]).output()?;
//!     assert!(output.status.success() && leak.app().is_alive());
//!     Ok(())
//! }
//! ```
//!
//! It needs root or unprivileged user namespaces, and no other program. When the calling program ends, for whatever reason,
//! the kernel removes the lab.
//!
//! - `lab`: hosts, links, applications and peers; [`Routed`]: a client and a server with a router between them
//! - `scenario`: the stuck states, one per file
//! - `host`: a network namespace and the processes in it
//! - `agent`: the processes that own the sockets, and their handles
//! - `role`, `spawner`: start the processes of the lab by re-executing the calling program
//! - `privilege`: root, or root of a user namespace
//! - `rtnetlink`: links and addresses; `program`: finds programs
//! - `kernel`, `ss`: the sockets as the kernel and as `ss` show them; `verify`: compares them with a scenario
//! - `bench`: compares `cwkill` with similar tools; `gateway`: the same for `cwkill gateway` on a router
//! - [`owners`]: real programs that leak, and the effect of reclaiming on them
//! - [`chaos`]: bystander connections while `cwkill` runs
//! - `run`, `cli`: the program `netns-harness`

mod agent;
mod bench;
pub mod chaos;
pub mod cli;
mod gateway;
mod host;
mod kernel;
mod lab;
pub mod lost_bytes;
pub mod owners;
mod privilege;
mod program;
mod role;
mod router;
mod rtnetlink;
mod run;
pub mod scenario;
mod spawner;
mod ss;
mod trace_cost;
mod verify;

pub use agent::{
    Agent, AgentOptions, Dial, Drained, End, Endpoint, Fd, How, Readiness, Recv, SocketOption,
    pattern,
};
pub use caps::Capability;
pub use host::{Host, HostCommand, Rewrite, rewrite_commands};
pub use kernel::{KernelSocket, TcpState, canonical};
pub use lab::{Conn, Family, Lab, Leak, Listen, Options, Pair, wait_for};
pub use nix::sys::signal::Signal;
pub use privilege::{FORCE_USERNS, ensure_privileges};
pub use role::run_role;
pub use router::{Nat, Routed, Side, address};
pub use ss::{SsOwner, SsRow};
pub use verify::{check, verify};

/// Calls [`run_role`], then [`ensure_privileges`]. The first call in `main` of a program that builds labs.
///
/// # Errors
/// As [`ensure_privileges`].
pub fn init() -> anyhow::Result<()> {
    run_role();
    ensure_privileges()
}
