//! A connection that is routed through this host, the result of a search for them, and what became of each.

use std::net::SocketAddr;
use std::time::Duration;

use strum::IntoStaticStr;

use crate::conntrack::{Entry, Timeouts};
use crate::tcp::Tuple;

/// A connection of other hosts that passes through this one.
#[derive(Clone, Debug)]
pub struct Forwarded {
    /// Its entry in conntrack. One that the operator names with `--connection` may have none: then this has only its addresses.
    pub entry: Entry,
    /// For how long conntrack has seen no packet of it, at least; `None` if the entry does not say it.
    pub quiet: Option<Duration>,
    /// Why it is left alone; `None` if it is planned to be asked.
    pub skip: Option<ForwardedSkip>,
    /// What its ends have said: the one that has opened it, and the other.
    pub ends: [EndReport; 2],
    /// `None` in a listing or a dry run.
    pub outcome: Option<ForwardedOutcome>,
    /// What became of its entry; `None` if cwkill did not try to delete it.
    pub deleted: Option<EntryDeletion>,
}

impl Forwarded {
    pub fn new(entry: Entry, quiet: Option<Duration>) -> Self {
        Forwarded {
            entry,
            quiet,
            skip: None,
            ends: [EndReport::default(); 2],
            outcome: None,
            deleted: None,
        }
    }

    /// What each end sees. `local` is the end itself.
    pub fn views(&self) -> [Tuple; 2] {
        [self.entry.original, self.entry.reply]
    }

    /// Whether both ends had forgotten it before cwkill asked. Of one that is `Gone` this tells the reason: otherwise its entry had vanished,
    /// or a new connection has its addresses.
    pub fn both_had_forgotten(&self) -> bool {
        self.ends.iter().all(|end| end.first == EndState::Gone)
    }

    /// The addresses of the ends.
    pub fn end_addresses(&self) -> [SocketAddr; 2] {
        self.views().map(|view| view.local)
    }
}

/// What cwkill does to the connections that match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum ForwardedAct {
    /// Ask both ends, and end the connections that one of them has forgotten.
    Probe,
    /// End them.
    Cut,
}

impl ForwardedAct {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// What an end has answered, last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum EndState {
    #[default]
    NotAsked,
    /// No answer has passed this host.
    Silent,
    /// It has the connection.
    Alive,
    /// It has answered RST: it has no such connection.
    Gone,
    /// It had the connection, and answers nothing any more.
    Quiet,
}

impl EndState {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndReport {
    /// What it answered to the first question.
    pub first: EndState,
    /// What is known of it now.
    pub now: EndState,
    /// The RSTs that it was sent.
    pub resets: u8,
}

impl EndReport {
    /// Whether its connection is over. Silence shows it only after an RST.
    pub fn is_over(self) -> bool {
        match self.now {
            EndState::Gone => true,
            EndState::Quiet => self.resets > 0,
            EndState::NotAsked | EndState::Silent | EndState::Alive => false,
        }
    }
}

/// What became of a connection.
#[derive(Clone, Debug, PartialEq, Eq, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum ForwardedOutcome {
    /// cwkill ended it: both ends have lost it.
    Cut,
    /// One end had forgotten it, and now both have lost it.
    Healed,
    /// One end has lost it, and the other was silent, or in a probe still has it.
    Half,
    /// An end still has it.
    Alive,
    /// It ended on its own: both ends had forgotten it ([`Forwarded::both_had_forgotten`]), its entry has vanished, or a new connection has
    /// its addresses.
    Gone,
    /// cwkill left it alone.
    Skipped(ForwardedSkip),
    Failed(ForwardedFailure),
}

impl ForwardedOutcome {
    /// The word for it in JSON and in the log.
    pub fn name(&self) -> &'static str {
        self.into()
    }
}

/// Why a connection is left alone. Its code in JSON and in the log is the variant in kebab case, and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum ForwardedSkip {
    #[error("over --max-kills")]
    OverMaxKills,
    /// Its mark, its state or its age has changed.
    #[error("no longer matches: its state, its mark or its age has changed")]
    NoLongerSelected,
    #[error("not reached: the run was interrupted")]
    Interrupted,
    /// It has no numbers yet that its ends agree on.
    #[error("being opened: name its state with --conntrack-state")]
    BeingOpened,
    /// Zones can have the same addresses with other routes. cwkill asks the routes of the main table.
    #[error("not in the default zone: for a cut name its zone with --zone")]
    OtherZone,
    /// Policy routing or a VRF: the right path depends on what an entry of conntrack does not say.
    #[error(
        "the routes of this host have several paths for it, by interface of arrival or by mark"
    )]
    AmbiguousPath,
    /// A packet socket sends below them, so a segment would leave in plain text.
    #[error("a policy of IPsec (xfrm) encrypts or drops its packets")]
    IpsecPolicy,
    #[error("the routes of this host lead to this host itself")]
    PathEndsHere,
    /// A transparent proxy is recognized by its sockets only.
    #[error(
        "this kernel cannot list sockets (module tcp_diag): it may be of a transparent proxy on this host"
    )]
    SocketsUnknown,
}

impl ForwardedSkip {
    pub fn code(self) -> &'static str {
        self.into()
    }
}

/// Why a connection could not be ended. As [`ForwardedSkip`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum ForwardedFailure {
    #[error(
        "neither end has answered on a path through this host (another path back, a filter, TCP-MD5 or TCP-AO, or both are gone)"
    )]
    NoAnswer,
    #[error("{0}")]
    NoPath(String),
    #[error("{0}")]
    RoutesUnreadable(String),
    #[error("cannot send: {0}")]
    NotSent(String),
    #[error("conntrack: {0}")]
    Conntrack(String),
    /// The queue of the packet socket has overflowed.
    #[error("answers were lost: more packets came than this host could read")]
    AnswersLost,
}

impl ForwardedFailure {
    pub fn code(&self) -> &'static str {
        self.into()
    }
}

/// What became of an entry that cwkill tried to delete.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum EntryDeletion {
    #[error("deleted")]
    Deleted,
    /// The kernel had removed it before, or another one has its addresses.
    #[error("gone before")]
    Gone,
    /// EBUSY: a flow table has the connection. The kernel removes the entry after the flow.
    #[error("kept by a flow table (EBUSY): it stays until the flow times out")]
    Offloaded,
    #[error("not deleted: {0}")]
    Failed(String),
}

impl EntryDeletion {
    pub fn code(&self) -> &'static str {
        self.into()
    }
}

/// The outcome of a connection whose ends were asked.
pub fn forwarded_outcome(act: ForwardedAct, ends: [EndReport; 2]) -> ForwardedOutcome {
    let was_reset = ends.iter().any(|end| end.resets > 0);
    let is_alive = ends.iter().any(|end| end.now == EndState::Alive);
    let had_forgotten = ends.iter().all(|end| end.first == EndState::Gone);
    match ends.map(EndReport::is_over).into() {
        (true, false) | (false, true) if act == ForwardedAct::Probe => ForwardedOutcome::Half,
        _ if is_alive => ForwardedOutcome::Alive,
        (true, true) if act == ForwardedAct::Cut && was_reset => ForwardedOutcome::Cut,
        (true, true) if had_forgotten => ForwardedOutcome::Gone,
        (true, true) => ForwardedOutcome::Healed,
        (false, false) => ForwardedOutcome::Failed(ForwardedFailure::NoAnswer),
        _ => ForwardedOutcome::Half,
    }
}

/// The connections that were found.
#[derive(Clone, Debug, Default)]
pub struct ForwardedScan {
    /// The connections that match, longest quiet first.
    pub connections: Vec<Forwarded>,
    /// The number of those that match and have an end on this host.
    pub ends_here: usize,
    /// Whether this kernel cannot list sockets, so that those of a transparent proxy are not known.
    pub are_sockets_unknown: bool,
    /// The number of those that match, except that their last packet is younger than `--min-age`.
    pub younger: usize,
    /// The same, where the time of the last packet is unknown.
    pub of_unknown_age: usize,
    /// How many entries the table has, and how many it may have. `None` if conntrack is not loaded.
    pub table_use: Option<(u64, u64)>,
    /// The timeouts of the namespace.
    pub timeouts: Timeouts,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outcome_follows_from_what_both_ends_have_said() {
        use EndState::{Alive, Gone, Quiet, Silent};
        let end = |now, resets| EndReport {
            first: Alive,
            now,
            resets,
        };
        let (probe, cut) = (ForwardedAct::Probe, ForwardedAct::Cut);
        let name = |act, one, other| forwarded_outcome(act, [one, other]).name();
        for (one, other, expected) in [
            (end(Gone, 1), end(Gone, 1), "cut"),
            (end(Gone, 0), end(Quiet, 1), "cut"),
            (end(Gone, 0), end(Gone, 0), "healed"),
            (end(Gone, 1), end(Silent, 0), "half"),
            (end(Silent, 0), end(Quiet, 2), "half"),
            (end(Alive, 3), end(Gone, 1), "alive"),
            (end(Alive, 3), end(Silent, 0), "alive"),
            (end(Silent, 0), end(Silent, 0), "failed"),
        ] {
            assert_eq!(name(cut, one, other), expected, "{one:?} {other:?}");
            assert_eq!(name(cut, other, one), expected, "{one:?} {other:?}");
        }
        assert_eq!(name(probe, end(Gone, 0), end(Gone, 0)), "healed");
        let forgetful = EndReport {
            first: Gone,
            ..end(Gone, 0)
        };
        for act in [probe, cut] {
            assert_eq!(name(act, forgetful, end(Gone, 0)), "healed");
            assert_eq!(name(act, forgetful, forgetful), "gone");
        }
        assert_eq!(name(probe, end(Gone, 0), end(Alive, 0)), "half");
        assert_eq!(name(probe, end(Gone, 0), end(Quiet, 0)), "half");
        assert_eq!(name(probe, end(Silent, 0), end(Alive, 0)), "alive");
        assert_eq!(name(probe, end(Alive, 0), end(Alive, 0)), "alive");
        assert_eq!(name(probe, end(Gone, 0), end(Silent, 0)), "half");
    }

    /// Programs compare them.
    #[test]
    fn the_man_page_lists_every_code() {
        use strum::VariantNames;
        let page = include_str!("../../man/cwkill-gateway.8").replace("\\-", "-");
        let skips = ForwardedSkip::VARIANTS.iter();
        let codes = skips.chain(ForwardedFailure::VARIANTS);
        for code in codes {
            assert!(page.contains(&format!(".B {code}\n")), "{code}");
        }
        for code in ForwardedOutcome::VARIANTS {
            assert!(page.contains(&format!("\"{code}\"")), "{code}");
            assert!(page.contains(&format!(".B {code}\n")), "{code}");
        }
        for code in EntryDeletion::VARIANTS {
            assert!(page.contains(&format!("\"{code}\"")), "{code}");
        }
    }
}
