//! The states that conntrack gives to a TCP connection. They differ from those of a socket: conntrack sees both directions, and one
//! state stands for both ends.

use strum::{EnumString, IntoStaticStr, VariantArray};

/// A state of conntrack for TCP, with the kernel's numbers (include/uapi/linux/netfilter/nf_conntrack_tcp.h, enum tcp_conntrack).
///
/// Its name in `--conntrack-state` and in JSON is the variant in lower case with dashes.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "kebab-case")]
#[repr(u8)]
pub enum ConntrackState {
    None = 0,
    SynSent = 1,
    SynRecv = 2,
    Established = 3,
    /// One end has sent its FIN.
    FinWait = 4,
    /// The other end has acknowledged it.
    CloseWait = 5,
    LastAck = 6,
    TimeWait = 7,
    /// An end has sent RST.
    Close = 8,
    /// Both ends have opened at the same time.
    #[strum(serialize = "syn-sent2")]
    SynSent2 = 9,
}

impl ConntrackState {
    /// The state with the kernel's number.
    pub fn from_kernel(number: u8) -> Option<Self> {
        let mut all = Self::VARIANTS.iter().copied();
        all.find(|state| *state as u8 == number)
    }

    /// The names of all states.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::VARIANTS.iter().map(|state| state.name())
    }

    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether the connection is being opened.
    pub fn is_being_opened(self) -> bool {
        matches!(self, Self::SynSent | Self::SynRecv | Self::SynSent2)
    }

    /// The name of the sysctl with its timeout, without its prefix; `None`: the kernel has none for it.
    pub(super) fn timeout_name(self) -> Option<&'static str> {
        Some(match self {
            Self::SynSent => "syn_sent",
            Self::SynRecv => "syn_recv",
            Self::Established => "established",
            Self::FinWait => "fin_wait",
            Self::CloseWait => "close_wait",
            Self::LastAck => "last_ack",
            Self::TimeWait => "time_wait",
            Self::Close => "close",
            Self::None | Self::SynSent2 => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_round_trip() {
        for state in ConntrackState::VARIANTS {
            assert_eq!(state.name().parse(), Ok(*state));
            assert_eq!(ConntrackState::from_kernel(*state as u8), Some(*state));
        }
        assert_eq!(ConntrackState::from_kernel(10), None);
        assert_eq!(ConntrackState::SynSent2.name(), "syn-sent2");
        assert_eq!(ConntrackState::CloseWait.name(), "close-wait");
    }
}
