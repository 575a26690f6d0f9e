//! Network namespaces that reproduce every stuck TCP state, for tests and for people.
//!
//! A [`Lab`] is a host with a leaking application and, for each application, a host with its peer, joined by a veth pair.
//! [`Lab::start`] brings sockets into the state that a [`scenario`] names and waits until the kernel shows it:
//!
//! ```no_run
//! use netns_harness::{Family, Lab, Options};
//!
//! fn main() -> anyhow::Result<()> {
//!     netns_harness::init()?; // first thing, single-threaded
//!     let lab = Lab::new()?;
//!     let leak = lab.start("unread", Family::V6, Options { count: 3, ..Options::default() })?;
//!     let output = lab.app_host().command("cwkill").args(["--port", "8080"]).output()?;
//!     assert!(output.status.success() && leak.app().is_alive());
//!     Ok(())
//! }
//! ```
//!
//! Needs root or unprivileged user namespaces, and no program but the one that calls it. Whatever happens to that program, all
//! of the lab goes with it.
//!
//! - `lab`: hosts, links, applications and peers put together
//! - `scenario`: the stuck states, one file each
//! - `host`: a network namespace and what runs in it
//! - `agent`: the processes that own the sockets, and the handle that drives them
//! - `role`, `spawner`: how processes of the lab are started, by re-executing ourselves
//! - `privilege`: root, or root of a user namespace
//! - `rtnetlink`: links and addresses
//! - `kernel`, `ss`, `verify`: what the kernel shows, what `ss` shows, and whether a scenario keeps its word
//! - `bench`: `cwkill` beside its peers
//! - [`owners`]: real programs that leak, and what reclaiming does to them
//! - [`chaos`]: bystander connections under fire
//! - `run`, `cli`: the program `netns-harness`

mod agent;
mod bench;
pub mod chaos;
pub mod cli;
mod host;
mod kernel;
mod lab;
pub mod owners;
mod privilege;
mod role;
mod rtnetlink;
mod run;
pub mod scenario;
mod spawner;
mod ss;
mod verify;

pub use agent::{
    Agent, AgentOptions, Dial, Drained, End, Endpoint, Fd, How, Readiness, Recv, SocketOption,
    pattern,
};
pub use caps::Capability;
pub use host::{Host, HostCommand};
pub use kernel::{KernelSocket, TcpState, canonical};
pub use lab::{Conn, Family, Lab, Leak, Listen, Options, Pair};
pub use nix::sys::signal::Signal;
pub use privilege::{FORCE_USERNS, ensure_privileges};
pub use role::run_role;
pub use ss::{SsOwner, SsRow};
pub use verify::{check, verify};

/// What the `main` of a program that builds labs calls first thing: [`run_role`], then [`ensure_privileges`].
///
/// # Errors
/// As [`ensure_privileges`].
pub fn init() -> anyhow::Result<()> {
    run_role();
    ensure_privileges()
}
