//! The rows of an MPTCP socket: its own, and that of its subflow with the same address pair, as one description.

use std::io;

use super::codec::{
    ByteCounters, Detail, DiagId, DumpRequest, Family, Protocol, Quiet, SocketMessage,
};
use super::{DumpError, LookupError, SockDiag};
use crate::tcp::{StateSet, TcpState};

/// The result of one lookup.
type Answer = Result<SocketMessage, LookupError>;

impl SockDiag {
    /// Lists the MPTCP sockets that have a connection. `None` if the kernel has no table of them: it was built without
    /// CONFIG_INET_MPTCP_DIAG, or is older than 5.10.
    ///
    /// # Errors
    /// As [`SockDiag::dump`].
    pub fn mptcp_connections(&mut self) -> Result<Option<Vec<SocketMessage>>, DumpError> {
        let mut rows = Vec::new();
        for family in Family::ALL {
            let request = DumpRequest {
                protocol: Protocol::Mptcp,
                family,
                states: connections(),
                info: true,
                bytecode: &[],
            };
            match self.dump(&request, |row| row.mptcp.is_some().then_some(row)) {
                Ok(mut dumped) => rows.append(&mut dumped),
                Err(DumpError::Io(error)) if is_missing(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(rows))
    }

    /// Adds the facts to each of `rows`, from the table of MPTCP, that only its subflow with the same address pair has.
    ///
    /// # Errors
    /// The netlink socket itself failed.
    pub fn add_subflows(&mut self, rows: &mut [SocketMessage]) -> io::Result<()> {
        let ids: Vec<DiagId> = rows.iter().map(|row| row.id.any_tcp()).collect();
        let subflows = self.lookup_in(Protocol::Tcp, &ids, Detail::TcpInfo)?;
        for (row, subflow) in rows.iter_mut().zip(subflows) {
            if let Ok(subflow) = subflow
                && is_subflow(row, &subflow)
            {
                add_subflow(row, &subflow);
            }
        }
        Ok(())
    }

    /// Looks up `ids` of both protocols; one result per id, in order.
    pub(super) fn lookup_each_protocol(
        &mut self,
        ids: &[DiagId],
        detail: Detail,
    ) -> io::Result<Vec<Answer>> {
        let (of_mptcp, of_tcp): (Vec<DiagId>, Vec<DiagId>) =
            ids.iter().partition(|id| id.protocol() == Protocol::Mptcp);
        let mut mptcp = self.lookup_mptcp(&of_mptcp)?.into_iter();
        let mut tcp = self.lookup_in(Protocol::Tcp, &of_tcp, detail)?.into_iter();
        let answer = |id: &DiagId| {
            let answers = match id.protocol() {
                Protocol::Mptcp => &mut mptcp,
                Protocol::Tcp => &mut tcp,
            };
            answers.next().unwrap_or(Err(LookupError::NotFound))
        };
        Ok(ids.iter().map(answer).collect())
    }

    fn lookup_mptcp(&mut self, ids: &[DiagId]) -> io::Result<Vec<Answer>> {
        let found = self.lookup_in(Protocol::Mptcp, ids, Detail::TcpInfo)?;
        let tcp_ids: Vec<DiagId> = ids.iter().map(|id| id.any_tcp()).collect();
        let subflows = self.lookup_in(Protocol::Tcp, &tcp_ids, Detail::TcpInfo)?;
        let answers = ids.iter().zip(found).zip(subflows);
        Ok(answers
            .map(|((id, found), subflow)| joined(id, found, subflow))
            .collect())
    }
}

/// The states of an MPTCP socket that has a connection. In CLOSE it is over: the kernel still lists the socket while a descriptor of it
/// is open.
fn connections() -> StateSet {
    StateSet::ALL
        .without(TcpState::Close.into())
        .without(TcpState::Listen.into())
}

/// Whether the kernel has no table of MPTCP sockets.
fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)
    )
}

/// The description of the MPTCP socket `id`, from its own row and from the TCP connection with its address pair.
fn joined(id: &DiagId, found: Answer, subflow: Answer) -> Answer {
    // A later socket can have the same token.
    let own = |row: &SocketMessage| row.id.cookie() == id.cookie() && row.mptcp.is_some();
    let mut row = match found {
        Ok(row) if own(&row) => row,
        Ok(_) => return Err(LookupError::NotFound),
        Err(error) => return Err(error),
    };
    let subflow = subflow.ok().filter(|subflow| is_subflow(&row, subflow));
    match (row.state, subflow) {
        (TcpState::Close, Some(subflow)) if is_closing(subflow.state) => {
            // After a fallback the MPTCP socket is in CLOSE as soon as the FIN is queued. The connection is over when the peer
            // has acknowledged it.
            row.state = subflow.state;
            add_subflow(&mut row, &subflow);
            Ok(row)
        }
        (TcpState::Close, _) => Err(LookupError::NotFound),
        (_, Some(subflow)) => {
            add_subflow(&mut row, &subflow);
            Ok(row)
        }
        (_, None) => Ok(row),
    }
}

/// Whether this TCP row is a subflow of the MPTCP socket `row`. Without a subflow the kernel returns the listener, and another
/// connection can have got the address pair.
fn is_subflow(row: &SocketMessage, tcp: &SocketMessage) -> bool {
    let is_of_row = match tcp.subflow_of {
        Some(token) if token != 0 => row.mptcp.is_some_and(|mptcp| mptcp.token == token),
        _ => tcp.inode == row.inode,
    };
    is_of_row && tcp.id.tuple() == row.id.tuple() && tcp.state != TcpState::TimeWait
}

/// A state after the FIN of this host.
fn is_closing(state: TcpState) -> bool {
    matches!(
        state,
        TcpState::FinWait1 | TcpState::FinWait2 | TcpState::Closing | TcpState::LastAck
    )
}

fn add_subflow(row: &mut SocketMessage, subflow: &SocketMessage) {
    let is_fallback = row.mptcp.is_some_and(|mptcp| mptcp.is_fallback);
    if is_fallback {
        row.send_q = row.send_q.saturating_add(subflow.send_q);
        // The sums only show whether data has moved.
        row.counters = match (row.counters, subflow.counters) {
            (Some(own), Some(other)) => Some(ByteCounters {
                received: own.received.wrapping_add(other.received),
                acked: own.acked.wrapping_add(other.acked),
                written: own.written.wrapping_add(other.written),
            }),
            _ => None,
        };
    }
    row.quiet = match (row.quiet, subflow.quiet) {
        (Some(own), Some(other)) => Some(Quiet {
            last_data_sent: own.last_data_sent.min(other.last_data_sent),
            last_data_recv: own.last_data_recv.min(other.last_data_recv),
            last_ack_recv: own.last_ack_recv.min(other.last_ack_recv),
        }),
        // Before Linux 6.10. After a fallback there is no other subflow.
        (None, other) if is_fallback => other,
        // Data may move in another subflow.
        (own, _) => own,
    };
    row.cgroup = row.cgroup.or(subflow.cgroup);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::codec::MptcpSocket;
    use super::super::testdata::stuck;
    use super::*;

    const LOCAL: &str = "10.0.0.1:80";
    const PEER: &str = "10.0.0.2:5";

    fn mptcp(is_fallback: bool) -> SocketMessage {
        let mut row = stuck(LOCAL, PEER, 1);
        row.id = row.id.with_token(7);
        row.mptcp = Some(MptcpSocket {
            token: 7,
            is_fallback,
        });
        row
    }

    fn subflow(state: TcpState) -> SocketMessage {
        let mut row = stuck(LOCAL, PEER, 2);
        row.state = state;
        row.send_q = 9;
        row.quiet.as_mut().unwrap().last_ack_recv = Duration::from_secs(5);
        row.subflow_of = Some(7);
        row
    }

    #[test]
    fn the_subflow_of_a_fallback_has_bytes_to_send() {
        for (is_fallback, send_q) in [(true, 9), (false, 0)] {
            let row = mptcp(is_fallback);
            let id = row.id;
            let joined = joined(&id, Ok(row), Ok(subflow(TcpState::CloseWait))).unwrap();
            assert_eq!(joined.send_q, send_q);
            assert_eq!(joined.state, TcpState::CloseWait);
            let quiet = joined.quiet.unwrap();
            assert_eq!(quiet.last_ack_recv, Duration::from_secs(5));
            assert_eq!(quiet.last_data_recv, Duration::from_secs(3600));
        }
    }

    #[test]
    fn the_times_of_one_subflow_say_nothing_about_another() {
        for is_fallback in [true, false] {
            let mut row = mptcp(is_fallback);
            row.quiet = None;
            let id = row.id;
            let other = subflow(TcpState::CloseWait);
            let joined = joined(&id, Ok(row), Ok(other.clone())).unwrap();
            let expected = other.quiet.filter(|_| is_fallback);
            assert_eq!(joined.quiet, expected);
        }
    }

    #[test]
    fn a_closed_socket_is_gone_once_its_subflow_is() {
        let mut row = mptcp(true);
        row.state = TcpState::Close;
        let id = row.id;
        let state = |subflow| joined(&id, Ok(row.clone()), subflow).map(|row| row.state);
        assert_eq!(state(Ok(subflow(TcpState::LastAck))), Ok(TcpState::LastAck));
        assert_eq!(
            state(Err(LookupError::NotFound)),
            Err(LookupError::NotFound)
        );
        for over in [TcpState::TimeWait, TcpState::Listen, TcpState::Established] {
            assert_eq!(
                state(Ok(subflow(over))),
                Err(LookupError::NotFound),
                "{over}"
            );
        }
        let mut other = subflow(TcpState::LastAck);
        other.subflow_of = Some(8);
        assert_eq!(state(Ok(other)), Err(LookupError::NotFound));
    }

    #[test]
    fn a_later_socket_with_the_token_is_another() {
        let row = mptcp(false);
        let mut id = row.id;
        assert!(joined(&id, Ok(row.clone()), Err(LookupError::NotFound)).is_ok());
        id = stuck(LOCAL, PEER, 3).id.with_token(7);
        let answer = joined(&id, Ok(row), Err(LookupError::NotFound));
        assert_eq!(answer, Err(LookupError::NotFound));
    }

    /// Otherwise cwkill could destroy MPTCP sockets.
    #[test]
    fn the_kernel_destroys_no_mptcp_socket() {
        use socket2::{Domain, Socket, Type};
        let socket = || Socket::new(Domain::IPV4, Type::STREAM, Some(MPTCP)).unwrap();
        const MPTCP: socket2::Protocol = socket2::Protocol::MPTCP;
        let (listener, client) = (socket(), socket());
        let address: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
        listener.bind(&address.into()).unwrap();
        listener.listen(1).unwrap();
        client.connect(&listener.local_addr().unwrap()).unwrap();
        let _accepted = listener.accept().unwrap();
        let port = client.local_addr().unwrap().as_socket().unwrap().port();
        let mut diag = SockDiag::open().unwrap();
        let rows = diag.mptcp_connections().unwrap().expect("a table of MPTCP");
        let of_client = |row: &&SocketMessage| row.id.tuple().local.port() == port;
        let id = rows.iter().find(of_client).expect("its row").id;
        let answers = diag.destroy_mptcp(&[id]).unwrap();
        assert_eq!(answers, [Err(super::super::DestroyError::NotSupported)]);
    }
}
