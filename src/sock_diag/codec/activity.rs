//! When data last moved on a connection, and how much.

use std::time::Duration;

/// The three times in `struct tcp_info` that show how long a socket has been quiet, in milliseconds on the wire. The numbers on
/// the wire have 32 bits, so each time starts again at 0 after 49 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quiet {
    /// Time since the socket sent data, also for the second time. Before the first data it is the time since the handshake. A
    /// keepalive or a window probe does not update it.
    pub last_data_sent: Duration,
    /// Time since new data arrived. Before the first data it is the time since the handshake (before Linux 4.11: since boot). A
    /// FIN does not update it.
    pub last_data_recv: Duration,
    /// Time since the last acceptable ACK arrived, also with a FIN. An answer to the socket's own keepalive or window probe is
    /// such an ACK. A keepalive of the peer is not acceptable, because its sequence number is too low.
    pub last_ack_recv: Duration,
}

/// The bytes that a connection has moved since its handshake. As long as they stay the same, no data has moved between the
/// application and the peer, except data that the application reads from the receive queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteCounters {
    /// Bytes that arrived in order. A FIN counts as one.
    pub received: u64,
    /// Bytes that the peer has acknowledged.
    pub acked: u64,
    /// Bytes that the application has written. A retransmission does not change it.
    pub written: u64,
}
