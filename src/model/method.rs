//! The methods that close a socket, and the needs and limits of each, for the plan, the privileges and the report.

use std::fmt;

use caps::Capability;
use strum::{Display, EnumString, IntoStaticStr};

use crate::kernel::KernelVersion;
use crate::model::Socket;
use crate::model::socket::is_sending_orphan;
use crate::tcp::TcpState;

/// A way to close a socket, gentlest first.
///
/// Its name in `--method`, in JSON and in the table is the variant in lower case.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, EnumString, IntoStaticStr,
)]
#[strum(serialize_all = "lowercase")]
pub enum Method {
    /// A segment that the peer must answer. A peer without the connection answers with RST, and the kernel closes the socket.
    Probe,
    /// shutdown(2) on a duplicate of an owner's descriptor.
    Shutdown,
    /// SOCK_DESTROY over sock_diag.
    Destroy,
    /// RSTs by raw socket, at the exact sequence numbers.
    Rst,
}

/// Why an orphan is not aborted; see [`KernelVersion::ABORTS_ORPHANS`].
pub(crate) const ORPHANS: &str = "kernels before 6.11 can keep an aborted orphan for ever";

impl Method {
    pub const ALL: [Method; 4] = [
        Method::Probe,
        Method::Shutdown,
        Method::Destroy,
        Method::Rst,
    ];

    /// The methods of `auto`, in order.
    pub const AUTO: [Method; 3] = [Method::Shutdown, Method::Destroy, Method::Rst];

    /// The name in `--method`, in JSON and in the table.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether the method needs a descriptor of an owner.
    pub fn needs_descriptor(self) -> bool {
        self == Method::Shutdown
    }

    /// Whether the method closes an MPTCP socket. The kernel has no SOCK_DESTROY for MPTCP (net/mptcp/mptcp_diag.c), and a segment of
    /// TCP concerns one subflow, whose answers the MPTCP socket hides.
    pub fn closes_mptcp(self) -> bool {
        self == Method::Shutdown
    }

    /// Whether the method loses the bytes that are queued to the peer.
    pub fn discards_unsent(self) -> bool {
        matches!(self, Method::Destroy | Method::Rst)
    }

    /// The capability that the method always needs, for a socket with or without an owner. The right to attach to an owner is not
    /// among them: it depends on the owner and on security modules.
    pub fn privilege(self, owned: bool) -> Option<Privilege> {
        match self {
            Method::Shutdown => None,
            Method::Probe => (!owned).then_some(Privilege::NetRaw),
            Method::Rst => Some(Privilege::NetRaw),
            Method::Destroy => Some(Privilege::NetAdmin),
        }
    }

    /// Whether the method must not be used on an orphan in `state`, because this kernel can keep an aborted one for ever
    /// ([`KernelVersion::ABORTS_ORPHANS`]). In FIN-WAIT-1 that excludes every method.
    pub fn can_leave_orphan(self, state: TcpState, kernel: KernelVersion) -> bool {
        let is_affected = self == Method::Destroy || state == TcpState::FinWait1;
        is_affected && kernel < KernelVersion::ABORTS_ORPHANS
    }

    /// Why the state of `socket` forbids the method on this kernel. `has_min_time`: the operator gave a minimum age, a minimum
    /// idle time or `--active`, or watches for open connections. cwkill never closes one without.
    pub fn forbidden_by_state(
        self,
        socket: &Socket,
        has_min_time: bool,
        kernel: KernelVersion,
    ) -> Option<&'static str> {
        match socket.state {
            TcpState::CloseWait => None,
            TcpState::Established if has_min_time => None,
            TcpState::Established => {
                Some("an open connection is only closed with --min-idle, --min-age or --active")
            }
            // The FIN of this host is already sent, and shutdown(2) sends no second one (net/ipv4/af_inet.c, inet_shutdown;
            // net/ipv4/tcp.c, tcp_shutdown).
            TcpState::FinWait1
            | TcpState::FinWait2
            | TcpState::LastAck
            | TcpState::Closing
            | TcpState::TimeWait
                if self == Method::Shutdown =>
            {
                Some("our side is shut down already")
            }
            // In TIME-WAIT the kernel does not keep the time of the last ACK, so an answer would not be seen.
            TcpState::TimeWait if self == Method::Probe => Some("there is no one left to ask"),
            // The listener answers an ACK with RST (net/ipv4/tcp_minisocks.c, tcp_check_req).
            TcpState::SynRecv if matches!(self, Method::Probe | Method::Rst) => {
                Some("a half-open request does not tell its sequence numbers")
            }
            state
                if is_sending_orphan(state, socket.inode.unwrap_or(0))
                    && self.can_leave_orphan(state, kernel) =>
            {
                Some(ORPHANS)
            }
            TcpState::FinWait1
            | TcpState::FinWait2
            | TcpState::LastAck
            | TcpState::Closing
            | TcpState::TimeWait
            | TcpState::SynRecv => None,
            TcpState::Listen => Some("closing a listener takes its service down; stop the service"),
            TcpState::SynSent => Some("its application is still opening it"),
            TcpState::Close | TcpState::Unknown(_) => Some("it is not a connection"),
        }
    }
}

/// A privilege that a method needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Privilege {
    /// CAP_NET_ADMIN over the network namespace: SOCK_DESTROY (net/core/sock_diag.c, sock_diag_rcv_msg).
    NetAdmin,
    /// CAP_NET_RAW over the network namespace: raw and packet sockets (net/ipv4/af_inet.c, inet_create;
    /// net/packet/af_packet.c, packet_create).
    NetRaw,
    /// The right to attach to the owner: pidfd_getfd (kernel/pid.c, __pidfd_fget).
    Ptrace,
}

impl Privilege {
    /// The capability that stands for it.
    pub fn capability(self) -> Capability {
        match self {
            Privilege::NetAdmin => Capability::CAP_NET_ADMIN,
            Privilege::NetRaw => Capability::CAP_NET_RAW,
            Privilege::Ptrace => Capability::CAP_SYS_PTRACE,
        }
    }

    /// What to say if the kernel refuses something although cwkill has the capability.
    pub(crate) fn refused(self) -> String {
        refused(self.capability())
    }
}

/// What to say if the kernel refuses something although cwkill has `capability`.
pub(crate) fn refused(capability: Capability) -> String {
    format!(
        "the kernel refuses it although cwkill has {capability}: a security module, a seccomp filter or another user namespace, \
         see `cwkill doctor`"
    )
}

impl fmt::Display for Privilege {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Privilege::NetAdmin => "CAP_NET_ADMIN",
            Privilege::NetRaw => "CAP_NET_RAW",
            Privilege::Ptrace => "the owner's uid or CAP_SYS_PTRACE",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sock_diag::testdata::stuck;

    #[test]
    fn names_round_trip() {
        for method in Method::ALL {
            assert_eq!(method.name().parse(), Ok(method));
            assert_eq!(method.to_string(), method.name());
        }
        assert!("RST".parse::<Method>().is_err());
    }

    /// A socket in `state`, with or without a descriptor.
    fn socket(state: TcpState, orphan: bool) -> Socket {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        message.state = state;
        if orphan {
            message.inode = 0;
        }
        Socket::from_message(&message)
    }

    /// For each of [`Method::ALL`]: whether the state of `socket` allows it.
    fn allowed(socket: &Socket, has_min_time: bool, kernel: KernelVersion) -> [bool; 4] {
        Method::ALL.map(|method| {
            method
                .forbidden_by_state(socket, has_min_time, kernel)
                .is_none()
        })
    }

    #[test]
    fn each_state_allows_its_methods() {
        use TcpState::{
            Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv,
            SynSent, TimeWait, Unknown,
        };
        let (yes, no) = (true, false);
        //                  probe shutdown destroy rst
        for (state, methods) in [
            (CloseWait, [yes, yes, yes, yes]),
            (Established, [no, no, no, no]),
            (FinWait1, [yes, no, yes, yes]),
            (FinWait2, [yes, no, yes, yes]),
            (LastAck, [yes, no, yes, yes]),
            (Closing, [yes, no, yes, yes]),
            (TimeWait, [no, no, yes, yes]),
            (SynRecv, [no, yes, yes, no]),
            (SynSent, [no, no, no, no]),
            (Listen, [no, no, no, no]),
            (Close, [no, no, no, no]),
            (Unknown(99), [no, no, no, no]),
        ] {
            let kernel = KernelVersion::ABORTS_ORPHANS;
            for orphan in [false, true] {
                let socket = socket(state, orphan);
                assert_eq!(allowed(&socket, false, kernel), methods, "{state}");
                let idle = match state {
                    Established => [yes; 4],
                    _ => methods,
                };
                assert_eq!(allowed(&socket, true, kernel), idle, "{state}, idle");
            }
        }
    }

    #[test]
    fn old_kernels_do_not_abort_orphans() {
        use TcpState::{Closing, FinWait1, FinWait2, LastAck, TimeWait};
        let old = KernelVersion(6, 10);
        let (yes, no) = (true, false);
        for (state, methods) in [
            (FinWait1, [no, no, no, no]),
            (FinWait2, [yes, no, yes, yes]),
            (LastAck, [yes, no, no, yes]),
            (Closing, [yes, no, no, yes]),
            (TimeWait, [no, no, yes, yes]),
        ] {
            assert_eq!(
                allowed(&socket(state, true), false, old),
                methods,
                "{state}"
            );
            let owned = socket(state, false);
            let new = allowed(&owned, false, KernelVersion::ABORTS_ORPHANS);
            assert_eq!(allowed(&owned, false, old), new, "{state} with an owner");
        }
    }
}
