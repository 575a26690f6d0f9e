//! Runs of `cwkill reclaim` for the golden tests, built as in `builder`.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use nix::errno::Errno;

use super::builder::{Who, advice, stops};
use super::words::{judgement, reclaim_outcome};
use crate::audit::record::{Caller, Entry, reclaim_intents, reclaim_outcomes};
use crate::cli::{Cli, Command};
use crate::config::{Action, ReclaimConfig};
use crate::finder::dead::DeadSocket;
use crate::proc::Process;
use crate::report::reclaim::{DeadDescriptor, ReclaimRun};
use crate::sock_diag::{Cookie, Protocol};

/// A descriptor of a dead socket.
pub struct Dead {
    who: &'static Who,
    socket: DeadSocket,
    fd: i32,
    inode: u32,
    /// Of a run that acts, what became of it; else the word of what speaks against it.
    said: &'static str,
}

/// On 10.0.0.1:80 and quiet for two minutes.
pub fn dead(who: &'static Who, fd: i32, inode: u32, cookie: u64) -> Dead {
    let socket = DeadSocket {
        protocol: Protocol::Tcp,
        cookie: Cookie(cookie),
        local: Some(SocketAddr::from(([10, 0, 0, 1], 80))),
        quiet: Duration::from_secs(120),
        unread: 0,
        kernel_tls: false,
    };
    Dead {
        who,
        socket,
        fd,
        inode,
        said: "",
    }
}

impl Dead {
    pub fn local(mut self, local: Option<&str>) -> Self {
        self.socket.local = local.map(|local| local.parse().expect("an address"));
        self
    }

    pub fn quiet_ms(mut self, quiet: u64) -> Self {
        self.socket.quiet = Duration::from_millis(quiet);
        self
    }

    pub fn unread(mut self, bytes: u32) -> Self {
        self.socket.unread = bytes;
        self
    }

    pub fn said(mut self, words: &'static str) -> Self {
        self.said = words;
        self
    }
}

/// A run of `cwkill reclaim`.
pub struct DeadCase {
    pub name: &'static str,
    pub arguments: &'static str,
    pub colored: bool,
    descriptors: Vec<Dead>,
    stopped: Vec<(&'static Who, u64, usize)>,
    unknown: usize,
    unreadable: usize,
    leader_exited: Vec<&'static Who>,
    failed: Vec<i32>,
    hidden: bool,
}

/// A run of `cwkill reclaim` that could see all.
pub fn dead_case(name: &'static str, arguments: &'static str) -> DeadCase {
    DeadCase {
        name,
        arguments,
        colored: false,
        descriptors: Vec::new(),
        stopped: Vec::new(),
        unknown: 0,
        unreadable: 0,
        leader_exited: Vec::new(),
        failed: Vec::new(),
        hidden: false,
    }
}

impl DeadCase {
    pub fn descriptors(mut self, descriptors: impl IntoIterator<Item = Dead>) -> Self {
        self.descriptors.extend(descriptors);
        self
    }

    pub fn colored(mut self) -> Self {
        self.colored = true;
        self
    }

    pub fn stopped(mut self, who: &'static Who, micros: u64, freed: usize) -> Self {
        self.stopped.push((who, micros, freed));
        self
    }

    /// Descriptors that may be of dead sockets.
    pub fn unknown(mut self, count: usize) -> Self {
        self.unknown = count;
        self
    }

    pub fn unreadable_processes(mut self, count: usize) -> Self {
        self.unreadable = count;
        self
    }

    /// The first thread of this process has ended.
    pub fn leader_ended(mut self, who: &'static Who) -> Self {
        self.leader_exited.push(who);
        self
    }

    /// The files of this process could not be read.
    pub fn failed_process(mut self, pid: i32) -> Self {
        self.failed.push(pid);
        self
    }

    pub fn hidden_processes(mut self) -> Self {
        self.hidden = true;
        self
    }

    pub fn config(&self, verbose: bool) -> ReclaimConfig {
        let words = ["cwkill", "reclaim"].into_iter();
        let words = words.chain(self.arguments.split_whitespace());
        let config = Cli::try_parse_from(words).and_then(|cli| match cli.command {
            Some(Command::Reclaim(args)) => ReclaimConfig::from_args(args),
            other => panic!("{other:?}"),
        });
        let config = config.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        ReclaimConfig { verbose, ..config }
    }

    /// The run: before anything is judged or done, or at its end.
    pub fn run(&self, done: bool) -> ReclaimRun {
        let acted = done && self.config(false).action == Action::Act;
        let descriptor = |dead: &Dead| {
            let mut owner = dead.who.owner(dead.fd);
            owner.reclaim = match acted {
                true => Some(reclaim_outcome(dead.said)),
                false => done.then(|| judgement(dead.said)),
            };
            DeadDescriptor {
                owner,
                inode: dead.inode,
                socket: dead.socket,
            }
        };
        let processes = self.leader_exited.iter();
        let failure = |pid: &i32| (*pid, io::Error::from(Errno::EIO));
        let descriptors: Vec<DeadDescriptor> = self.descriptors.iter().map(descriptor).collect();
        ReclaimRun {
            advice: advice(
                descriptors.iter().map(|dead| &dead.owner),
                &self.config(false).rules,
                (false, !acted),
            ),
            descriptors,
            acted,
            stops: stops(&self.stopped),
            unknown: self.unknown,
            unreadable: self.unreadable,
            leader_exited: processes
                .map(|who| Process::clone(&who.process()))
                .collect(),
            failed: self.failed.iter().map(failure).collect(),
            hidden: self.hidden,
            ..ReclaimRun::default()
        }
    }
}

/// The audit records of `run`: before anything is done, or after all.
pub fn dead_records<'r>(run: &'r ReclaimRun, who: &Caller, done: bool) -> Vec<Entry<'r>> {
    match done {
        false => {
            let begin = Entry::begin_reclaim(run, who.sentence());
            [begin].into_iter().chain(reclaim_intents(run)).collect()
        }
        true => {
            let end = Entry::end_reclaim(run);
            reclaim_outcomes(run).chain([end]).collect()
        }
    }
}
