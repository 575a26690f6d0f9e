//! `destroy`: the kernel aborts the socket, sends RST and discards queued data. Where it can and where it pays, an iterator does
//! that (`by_iterator`). This file has SOCK_DESTROY, the other way.
//!
//! The request contains the cookie from the dump. Without it the kernel would search by address again. If the connection
//! is gone by then, that search finds the listener, and the kernel would close it (net/ipv4/tcp_diag.c, tcp_diag_destroy;
//! net/ipv4/inet_diag.c, inet_diag_find_one_icsk).
//!
//! The method needs no descriptor. If the socket has one that cwkill can duplicate, a keepalive probe goes first where connection
//! tracking may have forgotten the connection (`revive`), so that the RST reaches the peer.

use std::io;

use nix::errno::Errno;

use super::Executor;
use super::duplicate::Duplicator;
use super::engine::MethodRun;
use super::revive::{Revived, Reviver};
use crate::model::{Method, MethodError, Privilege, Target};
use crate::privileges;
use crate::proc::ProcFs;
use crate::sock_diag::{DestroyError, DiagId, SockDiag};
use crate::sys::errno_of;
use crate::tcp::TcpState;

/// Sockets per batch without keepalive probes.
const SOCKETS_PER_BATCH: usize = 64;

/// Makes the kernel abort sockets.
pub struct Destroy {
    diag: SockDiag,
    /// The kernel has answered that it cannot destroy any socket.
    unsupported: bool,
    reviver: Reviver,
    duplicator: Duplicator,
}

impl Destroy {
    /// Opens the netlink socket, in the network namespace of the calling thread. `proc` is used to identify owners by their start
    /// time.
    ///
    /// # Errors
    /// As [`SockDiag::open`].
    pub fn open(proc: ProcFs) -> io::Result<Self> {
        Ok(Destroy {
            diag: SockDiag::open()?,
            unsupported: false,
            reviver: Reviver::new(),
            duplicator: Duplicator::new(proc),
        })
    }

    fn request(&mut self, targets: Vec<&mut Target>) {
        if self.unsupported {
            for target in targets {
                target.record(Method::Destroy, Err(UNSUPPORTED));
            }
            return;
        }
        let ids: Vec<DiagId> = targets.iter().map(|target| target.socket.id).collect();
        match self.diag.destroy(&ids) {
            Ok(answers) => {
                for (target, answer) in targets.into_iter().zip(answers) {
                    let result = answer.map_err(|error| self.explain(error, target.socket.state));
                    target.record(Method::Destroy, result);
                }
            }
            // The netlink socket failed. The kernel may have aborted some of these sockets.
            Err(error) => {
                for target in targets {
                    let lost = MethodError::AnswerLost(errno_of(&error));
                    target.record(Method::Destroy, Err(lost));
                }
            }
        }
    }

    /// The meaning of the kernel's answer for a socket that was in `state`.
    fn explain(&mut self, error: DestroyError, state: TcpState) -> MethodError {
        match error {
            // Older kernels destroy only full sockets (net/ipv4/tcp.c, tcp_abort).
            DestroyError::NotSupported if !is_surely_full(state) => MethodError::NotSupported(
                "this kernel has no SOCK_DESTROY, or cannot destroy a socket in this state",
                Errno::EOPNOTSUPP,
            ),
            DestroyError::NotSupported => {
                self.unsupported = true;
                UNSUPPORTED
            }
            DestroyError::NotFound => MethodError::Gone,
            DestroyError::Denied => privileges::not_permitted(Privilege::NetAdmin, Errno::EPERM),
            DestroyError::AnswerLost => MethodError::AnswerLost(Errno::ENOBUFS),
            DestroyError::Errno(errno) => MethodError::SystemCall("SOCK_DESTROY", errno),
        }
    }
}

const UNSUPPORTED: MethodError = MethodError::NotSupported(
    "this kernel has no SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY)",
    Errno::EOPNOTSUPP,
);

impl Executor for Destroy {
    fn method(&self) -> Method {
        Method::Destroy
    }

    fn batch_size(&self) -> usize {
        self.reviver.batch_size(SOCKETS_PER_BATCH)
    }

    fn act_at_one_instant<'t>(
        &mut self,
        targets: Vec<&'t mut Target>,
        run: &mut MethodRun<'_>,
    ) -> Vec<&'t mut Target> {
        match run.rules().destroyer {
            Some(by_iterator) => {
                let size = self.batch_size();
                by_iterator.destroy(targets, run, &mut |targets, run| {
                    let duplicator = &mut self.duplicator;
                    self.reviver.revive_all(duplicator, targets, size, run)
                })
            }
            None => targets,
        }
    }

    fn act(&mut self, targets: Vec<&mut Target>, run: &mut MethodRun<'_>) {
        let is_small = targets.len() <= SOCKETS_PER_BATCH;
        let duplicator = &mut self.duplicator;
        let Revived { others, probed } = self.reviver.revive_unchecked(duplicator, targets, run);
        // A large batch was rechecked too long ago, and so was one that has waited for its probes: the owner may have written meanwhile.
        let mut is_fresh = is_small && probed.is_empty();
        for (mut targets, after_segment) in [(others, false), (probed, true)] {
            while !targets.is_empty() {
                let rest = targets.split_off(targets.len().min(SOCKETS_PER_BATCH));
                if !is_fresh {
                    targets = run.recheck(targets, after_segment);
                }
                self.request(targets);
                is_fresh = false;
                targets = rest;
            }
        }
    }
}

/// Whether a socket in this state is surely a full socket. In other states it can be a minisocket, for example an orphan in
/// FIN-WAIT-2 (net/ipv4/tcp_minisocks.c, tcp_time_wait).
fn is_surely_full(state: TcpState) -> bool {
    matches!(state, TcpState::CloseWait | TcpState::Established)
}
