//! The states of a TCP socket, and sets of states.

use std::fmt;
use std::str::FromStr;

/// A TCP state, with the numbers of sock_diag.
///
/// Source: include/net/tcp_states.h. A request socket (TCP_NEW_SYN_RECV) is dumped as SYN-RECV
/// (net/ipv4/inet_diag.c, inet_req_diag_fill), so it has no variant here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TcpState {
    /// Both directions are open.
    Established,
    /// This host has sent a SYN.
    SynSent,
    /// A SYN has arrived. The peer has not acknowledged the answer.
    SynRecv,
    /// The application has closed. The peer has not acknowledged the FIN of this host.
    FinWait1,
    /// The application has closed, and the peer has acknowledged the FIN. The peer has not closed.
    FinWait2,
    /// Both ends have closed. The kernel reserves the address pair for a while.
    TimeWait,
    /// There is no connection.
    Close,
    /// The peer has closed. The application on this host has not.
    CloseWait,
    /// The peer has closed, and then the application. The peer has not acknowledged the FIN of this host.
    LastAck,
    /// The socket waits for connections.
    Listen,
    /// Both ends have closed at the same time. The peer has not acknowledged the FIN of this host.
    Closing,
    /// A number that cwkill does not know.
    Unknown(u8),
}

/// Every named state with its number, and its name in output and in `--state`.
const TABLE: [(TcpState, u8, &str); 11] = [
    (TcpState::Established, 1, "established"),
    (TcpState::SynSent, 2, "syn-sent"),
    (TcpState::SynRecv, 3, "syn-recv"),
    (TcpState::FinWait1, 4, "fin-wait-1"),
    (TcpState::FinWait2, 5, "fin-wait-2"),
    (TcpState::TimeWait, 6, "time-wait"),
    (TcpState::Close, 7, "close"),
    (TcpState::CloseWait, 8, "close-wait"),
    (TcpState::LastAck, 9, "last-ack"),
    (TcpState::Listen, 10, "listen"),
    (TcpState::Closing, 11, "closing"),
];

impl TcpState {
    /// The state with the kernel's number; [`TcpState::Unknown`] keeps a number without a name.
    pub fn from_kernel(number: u8) -> Self {
        TABLE
            .iter()
            .find(|row| row.1 == number)
            .map_or(TcpState::Unknown(number), |row| row.0)
    }

    /// The kernel's number.
    pub fn number(self) -> u8 {
        match self {
            TcpState::Unknown(number) => number,
            named => {
                TABLE
                    .iter()
                    .find(|row| row.0 == named)
                    .expect("every named state is in TABLE")
                    .1
            }
        }
    }

    /// The name of each state.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().map(|row| row.2)
    }

    /// The name in JSON and in `--state`, in lower case with dashes.
    pub fn name(self) -> &'static str {
        TABLE
            .iter()
            .find(|row| row.0 == self)
            .map_or("unknown", |row| row.2)
    }
}

impl fmt::Display for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TcpState::Unknown(number) => write!(f, "STATE-{number}"),
            named => f.write_str(&named.name().to_ascii_uppercase()),
        }
    }
}

impl FromStr for TcpState {
    type Err = ();

    /// Parses a name in any case, with `-`, `_` or nothing between its words. It also accepts the names of ss(8) that differ.
    fn from_str(text: &str) -> Result<Self, ()> {
        let plain = |name: &str| name.to_ascii_lowercase().replace(['_', '-'], "");
        let name = match plain(text).as_str() {
            "closed" => "close".to_owned(),
            "listening" => "listen".to_owned(),
            "synrcv" => "synrecv".to_owned(),
            name => name.to_owned(),
        };
        TABLE
            .iter()
            .find(|row| plain(row.2) == name)
            .map(|row| row.0)
            .ok_or(())
    }
}

/// A set of states, with the layout of `idiag_states`: bit *n* for state number *n*.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct StateSet(u32);

impl StateSet {
    pub const EMPTY: StateSet = StateSet(0);
    /// Every named state.
    pub const ALL: StateSet = StateSet(0xffe);

    /// The mask for `idiag_states`.
    pub fn mask(self) -> u32 {
        self.0
    }

    pub fn contains(self, state: TcpState) -> bool {
        self.0 & Self::from(state).0 != 0
    }

    #[must_use]
    pub fn union(self, other: StateSet) -> StateSet {
        StateSet(self.0 | other.0)
    }

    #[must_use]
    pub fn intersection(self, other: StateSet) -> StateSet {
        StateSet(self.0 & other.0)
    }

    /// The states of this set that are not in `other`.
    #[must_use]
    pub fn without(self, other: StateSet) -> StateSet {
        StateSet(self.0 & !other.0)
    }
}

impl From<TcpState> for StateSet {
    fn from(state: TcpState) -> Self {
        StateSet(1u32.checked_shl(u32::from(state.number())).unwrap_or(0))
    }
}

impl FromIterator<TcpState> for StateSet {
    fn from_iter<I: IntoIterator<Item = TcpState>>(states: I) -> Self {
        states
            .into_iter()
            .fold(StateSet::EMPTY, |set, state| set.union(state.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        // include/net/tcp_states.h
        assert_eq!(TcpState::from_kernel(8), TcpState::CloseWait);
        assert_eq!(TcpState::from_kernel(9), TcpState::LastAck);
        assert_eq!(TcpState::from_kernel(77), TcpState::Unknown(77));
        for number in 0..=255 {
            assert_eq!(TcpState::from_kernel(number).number(), number);
        }
    }

    #[test]
    fn names_round_trip_in_any_spelling() {
        for (state, _, name) in TABLE {
            assert_eq!(name.parse(), Ok(state));
        }
        assert_eq!("CLOSE_WAIT".parse(), Ok(TcpState::CloseWait));
        assert_eq!("listening".parse(), Ok(TcpState::Listen));
        assert_eq!("Closed".parse(), Ok(TcpState::Close));
        assert_eq!("closewait".parse(), Ok(TcpState::CloseWait));
        assert_eq!("closed-wait".parse::<TcpState>(), Err(()));
    }

    #[test]
    fn a_set_is_the_kernels_mask() {
        let set = StateSet::from_iter([TcpState::CloseWait, TcpState::LastAck]);
        assert_eq!(set.mask(), (1 << 8) | (1 << 9));
        assert!(set.contains(TcpState::LastAck));
        assert!(!set.contains(TcpState::Established));
        assert!(!set.contains(TcpState::Unknown(200)));
        assert_eq!(
            TABLE.iter().map(|row| row.0).collect::<StateSet>(),
            StateSet::ALL
        );
    }
}
