//! `destroy`: SOCK_DESTROY. The kernel aborts the socket, sends RST and drops what was queued.
//!
//! The request carries the cookie of the dump. Without it the kernel would look the addresses up
//! afresh, and once the connection is gone it would find, and close, the listener
//! (net/ipv4/tcp_diag.c, tcp_diag_destroy; net/ipv4/inet_diag.c, inet_diag_find_one_icsk).

use std::io;

use super::{ActError, Method, MethodName, Scene, Target, same_errno};
use crate::privileges::Privilege;
use crate::sock_diag::{DestroyError, DiagId, SockDiag};
use crate::tcp::TcpState;

/// The method; it has a netlink socket of its own, so that nothing of a dump is in its way.
pub struct Destroy {
    diag: SockDiag,
    /// The kernel has said that it cannot destroy any socket.
    unsupported: bool,
}

impl Destroy {
    /// Opens the netlink socket, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// As [`SockDiag::open`].
    pub fn open() -> io::Result<Self> {
        Ok(Destroy {
            diag: SockDiag::open()?,
            unsupported: false,
        })
    }

    /// Has `targets` aborted with one answer for many ([`SockDiag::destroy_together`]); one result each, in order.
    pub fn order_together(&mut self, targets: &[Target]) -> Vec<Result<(), ActError>> {
        self.order(targets, SockDiag::destroy_together)
    }

    fn order(
        &mut self,
        targets: &[Target],
        destroy: impl FnOnce(&mut SockDiag, &[DiagId]) -> io::Result<Vec<Result<(), DestroyError>>>,
    ) -> Vec<Result<(), ActError>> {
        if self.unsupported {
            return targets.iter().map(|_| Err(unsupported())).collect();
        }
        let ids: Vec<DiagId> = targets.iter().map(|target| target.id).collect();
        let results = match destroy(&mut self.diag, &ids) {
            Ok(results) => results,
            // The netlink socket failed under the whole batch; a part of it may be done.
            Err(error) => {
                let failure = || ActError::Unanswered(same_errno(&error));
                return targets.iter().map(|_| Err(failure())).collect();
            }
        };
        let each = targets.iter().zip(results);
        each.map(|(target, result)| {
            result.map_err(|error| match error {
                // Older kernels can destroy every other state (net/ipv4/tcp.c, tcp_abort).
                DestroyError::NotSupported if !is_surely_full(target.state) => {
                    ActError::NotSupported(
                        "this kernel has no SOCK_DESTROY, or none for what is left of a connection",
                        io::Error::from_raw_os_error(libc::EOPNOTSUPP),
                    )
                }
                DestroyError::NotSupported => {
                    self.unsupported = true;
                    unsupported()
                }
                other => other.into(),
            })
        })
        .collect()
    }
}

impl Method for Destroy {
    fn name(&self) -> MethodName {
        MethodName::Destroy
    }

    fn act(&mut self, targets: &[Target], _: &mut dyn Scene) -> Vec<Result<(), ActError>> {
        self.order(targets, SockDiag::destroy)
    }
}

/// Whether a socket in this state is one with all its parts; in others it can be a minisocket, a FIN-WAIT-2
/// orphan for example (net/ipv4/tcp_minisocks.c, tcp_time_wait).
fn is_surely_full(state: TcpState) -> bool {
    matches!(state, TcpState::CloseWait | TcpState::Established)
}

fn unsupported() -> ActError {
    ActError::NotSupported(
        "this kernel has no SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY)",
        io::Error::from_raw_os_error(libc::EOPNOTSUPP),
    )
}

impl From<DestroyError> for ActError {
    fn from(error: DestroyError) -> Self {
        let errno = io::Error::from_raw_os_error;
        match error {
            DestroyError::Gone => ActError::Gone,
            DestroyError::Denied => ActError::Denied(Privilege::NetAdmin, errno(libc::EPERM)),
            DestroyError::NotSupported => unsupported(),
            DestroyError::AnswerLost => ActError::Unanswered(errno(libc::ENOBUFS)),
            DestroyError::Other(error) => ActError::Os("SOCK_DESTROY", error),
        }
    }
}
