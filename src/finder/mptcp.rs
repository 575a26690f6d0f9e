//! MPTCP sockets. In the table of TCP the kernel lists their subflows, with the inode of the MPTCP socket and a cookie of their own.
//!
//! The state of a subflow says little about the connection. The peer can close one subflow and go on with another. And if the
//! connection is over, its subflows can still be in ESTABLISHED, or gone. So cwkill lists the MPTCP sockets themselves, and leaves
//! out their subflows. After a fallback to TCP there is one subflow; it and its MPTCP socket are one target.

use crate::proc::Inodes;
use std::collections::HashSet;
use std::sync::OnceLock;

use super::FindError;
use crate::model::{Socket, Target};
use crate::sock_diag::{SockDiag, SocketMessage};
use crate::tcp::{StateSet, TcpState, Tuple};

/// Removes the subflows from `targets`, which the kernel has just listed. Returns the MPTCP sockets in `states`, and the number of
/// removed subflows whose MPTCP sockets the kernel cannot list.
///
/// An MPTCP socket exists at least as long as its subflows, except for orphans. So it is listed after them.
///
/// # Errors
/// The MPTCP sockets cannot be listed, although the kernel has them.
pub(super) fn replace(
    diag: &mut SockDiag,
    targets: &mut Vec<Target>,
    states: StateSet,
) -> Result<(Vec<SocketMessage>, usize), FindError> {
    let listed = connections(diag)?;
    let unlisted = remove_subflows(targets, listed.as_deref());
    let mut rows = listed.unwrap_or_default();
    rows.retain(|row| states.contains(row.state));
    diag.add_subflows(&mut rows).map_err(FindError::Lookup)?;
    Ok((rows, unlisted))
}

/// The MPTCP sockets that have a connection. `None`: the kernel cannot list them.
pub(super) fn connections(diag: &mut SockDiag) -> Result<Option<Vec<SocketMessage>>, FindError> {
    match has_mptcp() {
        true => Ok(diag.mptcp_connections()?),
        false => Ok(Some(Vec::new())),
    }
}

/// Whether this kernel has MPTCP. Without it, a request for MPTCP sockets makes the kernel start modprobe(8).
fn has_mptcp() -> bool {
    static HAS_MPTCP: OnceLock<bool> = OnceLock::new();
    *HAS_MPTCP.get_or_init(|| {
        let protocols = std::fs::read_to_string("/proc/thread-self/net/protocols");
        // If the file is hidden, the kernel is asked.
        protocols.map_or(true, |text| {
            text.lines().any(|line| line.starts_with("MPTCP"))
        })
    })
}

/// Removes the subflows of `listed` MPTCP sockets from `targets`. `None`: the kernel cannot list them. Returns the number of removed
/// subflows whose MPTCP socket is unknown for that reason.
fn remove_subflows(targets: &mut Vec<Target>, listed: Option<&[SocketMessage]>) -> usize {
    let rows = listed.unwrap_or_default();
    let tokens: HashSet<u32> = rows
        .iter()
        .filter_map(|row| Some(row.mptcp?.token))
        .collect();
    let inodes: Inodes = rows
        .iter()
        .map(|row| row.inode)
        .filter(|&inode| inode != 0)
        .collect();
    let tuples: HashSet<Tuple> = rows.iter().map(|row| row.id.tuple()).collect();
    let is_represented = |socket: &Socket| match (socket.subflow_of, socket.inode) {
        (Some(token), _) if token != 0 => tokens.contains(&token),
        (_, Some(inode)) => inodes.contains(&inode),
        // It was not accepted yet, or is an orphan.
        (_, None) => tuples.contains(&socket.tuple()),
    };
    let mut unlisted = 0;
    targets.retain(|target| {
        let socket = &target.socket;
        match socket.state {
            // An MPTCP listener has one subflow, which listens for it.
            TcpState::Listen => true,
            _ if is_represented(socket) => false,
            // The MPTCP socket may have closed since, and another subflow may have outlived it.
            TcpState::CloseWait | TcpState::Established | TcpState::SynSent | TcpState::SynRecv
                if socket.subflow_of.is_some() =>
            {
                unlisted += usize::from(listed.is_none());
                false
            }
            // What is left of a closed MPTCP socket is plain TCP.
            _ => true,
        }
    });
    unlisted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sock_diag::codec::MptcpSocket;
    use crate::sock_diag::testdata::stuck;

    fn mptcp(inode: u32, peer: &str, token: u32) -> SocketMessage {
        let mut row = stuck("10.0.0.1:80", peer, u64::from(token));
        row.inode = inode;
        row.id = row.id.with_token(token);
        row.mptcp = Some(MptcpSocket {
            token,
            is_fallback: false,
        });
        row
    }

    fn tcp(state: TcpState, inode: u32, peer: &str, subflow_of: Option<u32>) -> Target {
        let mut row = stuck("10.0.0.1:80", peer, 99);
        (row.state, row.inode, row.subflow_of) = (state, inode, subflow_of);
        Target::new(Socket::from_message(&row))
    }

    /// Whether the target is kept, and the number of unlisted subflows.
    fn kept(target: Target, listed: Option<&[SocketMessage]>) -> (bool, usize) {
        let mut targets = vec![target];
        let unlisted = remove_subflows(&mut targets, listed);
        (!targets.is_empty(), unlisted)
    }

    #[test]
    fn a_subflow_of_a_listed_socket_is_left_out() {
        use TcpState::{CloseWait, LastAck, Listen};
        let (ours, other) = ("10.0.0.2:5", "10.0.0.3:5");
        let rows = [mptcp(7, ours, 70), mptcp(0, "10.0.0.2:6", 71)];
        let kept = |target| kept(target, Some(&rows));
        // By the token, also of a subflow with other addresses.
        assert!(!kept(tcp(CloseWait, 7, other, Some(70))).0);
        assert!(!kept(tcp(CloseWait, 0, other, Some(71))).0);
        assert!(!kept(tcp(LastAck, 7, other, Some(70))).0);
        // Before Linux 6.15, without CAP_NET_ADMIN: by the inode, or by the addresses.
        assert!(!kept(tcp(CloseWait, 7, other, None)).0);
        assert!(!kept(tcp(CloseWait, 0, "10.0.0.2:6", None)).0);
        // Plain TCP sockets, also with the addresses of an MPTCP socket that is over.
        assert!(kept(tcp(CloseWait, 8, ours, None)).0);
        assert!(kept(tcp(CloseWait, 0, other, None)).0);
        assert!(kept(tcp(Listen, 7, ours, Some(70))).0);
        // The socket has closed meanwhile.
        assert_eq!(kept(tcp(CloseWait, 9, other, Some(72))), (false, 0));
        assert!(kept(tcp(LastAck, 9, other, Some(72))).0);
    }

    #[test]
    fn subflows_are_counted_if_the_kernel_cannot_list_mptcp() {
        use TcpState::{CloseWait, LastAck};
        let peer = "10.0.0.2:5";
        assert_eq!(kept(tcp(CloseWait, 7, peer, Some(0)), None), (false, 1));
        assert_eq!(kept(tcp(CloseWait, 7, peer, None), None), (true, 0));
        assert_eq!(kept(tcp(LastAck, 7, peer, Some(70)), None), (true, 0));
    }
}
