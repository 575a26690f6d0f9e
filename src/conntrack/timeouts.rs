//! How long ago conntrack saw the last packet of a connection: the timeout of its state minus what is left of it. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use super::codec::{Entry, Status};
use super::state::ConntrackState;

/// The timeouts of a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// That of each state.
    pub of_state: BTreeMap<ConntrackState, Duration>,
    /// The shorter ones that the kernel may give to a connection in place of that of its state: after retransmissions or a closed window
    /// (max_retrans), while data is not acknowledged or no reply was seen (unacknowledged), and after an RST that it does not trust
    /// (close).
    pub shorter: Vec<Duration>,
    /// A rule may give connections other timeouts (`ct timeout` of nft(8), the CT target of iptables). An entry does not tell which.
    pub by_policy: bool,
    /// A flow table may have had a connection, so that what is left of its timeout is what was left long ago.
    pub has_flow_tables: bool,
}

impl Timeouts {
    /// For how long conntrack has seen no packet of the connection of `entry`, at least; `None` where the entry does not say it.
    ///
    /// The kernel reports the seconds that are left, and not the timeout that it has set. If a shorter timeout than that of the state may
    /// be the one, the time is unknown (net/netfilter/nf_conntrack_proto_tcp.c, nf_conntrack_tcp_packet).
    pub fn quiet(&self, entry: &Entry) -> Option<Duration> {
        let fixed = Status::FIXED_TIMEOUT | Status::OFFLOAD | Status::HW_OFFLOAD;
        if self.by_policy || self.has_flow_tables || entry.status.has_any(fixed) {
            return None;
        }
        let (whole, left) = (*self.of_state.get(&entry.state?)?, entry.left?);
        let mut shorter = self.shorter.iter().filter(|shorter| **shorter < whole);
        if left > whole || shorter.any(|shorter| left <= *shorter) {
            return None;
        }
        // The kernel cuts the fraction of what is left.
        Some((whole - left).saturating_sub(Duration::from_secs(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeouts() -> Timeouts {
        let seconds = Duration::from_secs;
        Timeouts {
            of_state: [
                (ConntrackState::Established, seconds(432_000)),
                (ConntrackState::CloseWait, seconds(60)),
            ]
            .into(),
            shorter: vec![seconds(300), seconds(300), seconds(10)],
            by_policy: false,
            has_flow_tables: false,
        }
    }

    fn entry(state: ConntrackState, left: u64) -> Entry {
        Entry {
            state: Some(state),
            left: Some(Duration::from_secs(left)),
            ..Entry::example("10.0.0.1:5", "10.0.0.2:80")
        }
    }

    fn quiet(timeouts: &Timeouts, entry: &Entry) -> Option<u64> {
        timeouts.quiet(entry).map(|quiet| quiet.as_secs())
    }

    #[test]
    fn what_has_passed_of_the_timeout_is_the_time_without_packets() {
        let all = timeouts();
        let established = |left| quiet(&all, &entry(ConntrackState::Established, left));
        assert_eq!(established(432_000), Some(0));
        assert_eq!(established(431_999), Some(0));
        assert_eq!(established(431_939), Some(60));
        assert_eq!(established(301), Some(431_698));
        let close_wait = |left| quiet(&all, &entry(ConntrackState::CloseWait, left));
        assert_eq!(close_wait(50), Some(9));
    }

    #[test]
    fn where_another_timeout_may_be_the_one_it_is_unknown() {
        let all = timeouts();
        // Perhaps bytes are not acknowledged since a moment, perhaps nothing has moved for days.
        assert_eq!(quiet(&all, &entry(ConntrackState::Established, 300)), None);
        assert_eq!(quiet(&all, &entry(ConntrackState::Established, 7)), None);
        assert_eq!(quiet(&all, &entry(ConntrackState::CloseWait, 10)), None);
        // The timeout was longer when it was set.
        assert_eq!(
            quiet(&all, &entry(ConntrackState::Established, 432_001)),
            None
        );
        // A state without a timeout of its own, and none at all.
        assert_eq!(quiet(&all, &entry(ConntrackState::SynSent2, 5)), None);
        let long = entry(ConntrackState::Established, 400_000);
        for status in [Status::FIXED_TIMEOUT, Status::OFFLOAD, Status::HW_OFFLOAD] {
            let fixed = Entry {
                status,
                ..long.clone()
            };
            assert_eq!(quiet(&all, &fixed), None);
        }
        assert_eq!(
            quiet(
                &all,
                &Entry {
                    left: None,
                    ..long.clone()
                }
            ),
            None
        );
        assert_eq!(
            quiet(
                &all,
                &Entry {
                    state: None,
                    ..long.clone()
                }
            ),
            None
        );
        for (by_policy, has_flow_tables) in [(true, false), (false, true)] {
            let timeouts = Timeouts {
                by_policy,
                has_flow_tables,
                ..all.clone()
            };
            assert_eq!(quiet(&timeouts, &long), None);
        }
    }
}
