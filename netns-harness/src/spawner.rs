//! The thread that starts all processes.
//!
//! PR_SET_PDEATHSIG acts when the *thread* that spawned a child ends, and tests start labs from threads that end before the
//! process. Therefore one thread spawns all children and lives as long as the process.

use std::io;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

type Order = (Command, Sender<io::Result<Child>>);

/// Spawns `command` from the spawner thread.
///
/// # Errors
/// As [`Command::spawn`].
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                // Fails only if the caller has panicked; the child then lives until this process ends.
                let _ = reply.send(command.spawn());
            }
        });
        orders
    });
    let (reply, answer) = channel();
    let gone = |_| io::Error::other("the spawner thread is gone");
    spawner.send((command, reply)).map_err(|_| gone(()))?;
    answer.recv().map_err(|_| gone(()))?
}
