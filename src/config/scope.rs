//! The scope of a command: its selectors and network namespaces.

use crate::cli::{OwnerSelection, Selection};
use crate::filter::selectors::{IpVersion, Selectors};
use crate::filter::{self, Expression, Scope, Services, States};
use crate::proc::netns::NetnsScope;
use crate::tcp::{StateSet, TcpState};

use super::{invalid, usage};

impl Scope {
    /// Validates the combination of the selectors.
    ///
    /// # Errors
    /// It is not valid. The message names the selectors and gives a valid example.
    pub fn from_args(selection: Selection) -> Result<Self, clap::Error> {
        let mut notes = Vec::new();
        let (expression, states) = expression(&selection, &mut notes)?;
        Ok(Scope {
            netns: match (selection.netns, selection.all_netns) {
                (Some(name), _) => NetnsScope::Named(name),
                (None, true) => NetnsScope::All,
                (None, false) => NetnsScope::Current,
            },
            selectors: Selectors {
                ports: selection.port,
                peer_ports: selection.peer_port,
                local: selection.local,
                peer: selection.peer,
                ip_version: match (selection.ipv4, selection.ipv6) {
                    (true, _) => Some(IpVersion::V4),
                    (_, true) => Some(IpVersion::V6),
                    _ => None,
                },
                users: selection.user.into_iter().collect(),
                states,
                min_age: selection.min_age.unwrap_or_default(),
                min_idle: selection.min_idle.unwrap_or_default(),
                causes: selection.cause.into_iter().collect(),
                address_gone: selection.address_gone,
                expression,
                ..Selectors::of_owners(selection.owners)
            },
            notes,
        })
    }
}

impl Selectors {
    /// Selectors by owner only.
    pub(super) fn of_owners(owners: OwnerSelection) -> Self {
        Selectors {
            pids: owners.pid.into_iter().collect(),
            processes: owners.process,
            units: owners.unit,
            containers: owners.container,
            cgroups: owners.cgroup,
            ..Selectors::default()
        }
    }
}

impl Selection {
    /// Whether any selector was given.
    pub(super) fn selects(&self) -> bool {
        self.owners.all
            || self.ipv4
            || self.ipv6
            || self.address_gone
            || self.min_age.is_some()
            || !(self.expression.is_empty()
                && self.port.is_empty()
                && self.peer_port.is_empty()
                && self.local.is_empty()
                && self.peer.is_empty()
                && self.owners.pid.is_empty()
                && self.owners.process.is_empty()
                && self.owners.unit.is_empty()
                && self.owners.container.is_empty()
                && self.owners.cgroup.is_empty()
                && self.user.is_empty()
                && self.state.is_empty()
                && self.cause.is_empty())
    }
}

/// The expression, and the states to select: those in the expression, or those of `--state`, or CLOSE-WAIT.
fn expression(
    args: &Selection,
    notes: &mut Vec<String>,
) -> Result<(Expression, StateSet), clap::Error> {
    let named = match args.state.as_slice() {
        [] => None,
        states => Some(states.iter().copied().collect()),
    };
    let default = || named.unwrap_or(StateSet::from(TcpState::CloseWait));
    if args.expression.is_empty() {
        return Ok((Expression::TRUE, default()));
    }
    let text = args.expression.join(" ");
    let parsed = filter::parse(&text, &Services::of_this_host())
        .map_err(|error| invalid(&format!("the expression is wrong at {error}")))?;
    let states = match (parsed.expression.states(), named) {
        (States::Unmentioned, _) => default(),
        (_, Some(_)) => {
            return Err(usage(
                "--state and `state` in the expression both name states: give one of them",
            ));
        }
        (States::Within(states), None) => states,
        (States::Partly, None) => {
            return Err(invalid(
                "a part of the expression names states and an alternative to it names none, which \
                 would mean every state: give each its state, or put it first for all, for example \
                 'state close-wait sport = :80 or sport = :443'",
            ));
        }
    };
    notes.extend(parsed.warning);
    Ok((parsed.expression, states))
}
