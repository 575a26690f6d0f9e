//! The one thread that starts processes.
//!
//! PR_SET_PDEATHSIG fires when the *thread* that spawned a child ends, and tests start labs from threads that end before
//! the process does. So all children are spawned by one thread that never ends before the process.

use std::io;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

type Order = (Command, Sender<io::Result<Child>>);

/// Starts `command` as a child of the process's spawner thread.
///
/// # Errors
/// What [`Command::spawn`] says.
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                // The one who asked may have given up; the child is then unobserved but still ours.
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
