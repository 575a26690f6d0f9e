//! The scope of a command: its selectors and network namespaces.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::cli::{OwnerSelection, Selection, flat};
use crate::filter::containers::ContainerSelectors;
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
    pub fn from_args(mut selection: Selection) -> Result<Self, clap::Error> {
        let mut notes = Vec::new();
        let states = flat(std::mem::take(&mut selection.state));
        let (expression, states) = expression(&selection.expression, states, &mut notes)?;
        Ok(Scope {
            netns: match (selection.netns, selection.all_netns) {
                (Some(name), _) => NetnsScope::Named(name),
                (None, true) => NetnsScope::All,
                (None, false) => NetnsScope::Current,
            },
            selectors: Selectors {
                ports: flat(selection.port),
                peer_ports: flat(selection.peer_port),
                local: flat(selection.local),
                peer: flat(selection.peer),
                ip_version: match (selection.ipv4, selection.ipv6) {
                    (true, _) => Some(IpVersion::V4),
                    (_, true) => Some(IpVersion::V6),
                    _ => None,
                },
                users: flat(selection.user).into_iter().collect(),
                states,
                min_age: selection.min_age.unwrap_or_default(),
                min_idle: selection.min_idle.unwrap_or_default(),
                causes: flat(selection.cause).into_iter().collect(),
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
            pids: flat(owners.pid).into_iter().collect(),
            processes: flat(owners.process),
            units: flat(owners.unit),
            containers: ContainerSelectors {
                containers: flat(owners.container),
                pods: flat(owners.pod),
                namespaces: flat(owners.namespace),
                compose_services: flat(owners.compose_service),
            },
            cgroups: owners.cgroup,
            ..Selectors::default()
        }
    }
}

impl Selection {
    /// Whether an option names the sockets to act on: cwkill then acts on them. The expression is not considered; see
    /// [`Expression::says_more_than_states`].
    pub(crate) fn names_targets(&self) -> bool {
        self.owners.all || self.names_some()
    }

    /// Whether an option besides `--all` names them.
    pub(super) fn names_some(&self) -> bool {
        let owners = &self.owners;
        !(self.port.is_empty()
            && self.peer_port.is_empty()
            && self.local.is_empty()
            && self.peer.is_empty()
            && owners.pid.is_empty()
            && owners.process.is_empty()
            && owners.unit.is_empty()
            && owners.container.is_empty()
            && owners.pod.is_empty()
            && owners.namespace.is_empty()
            && owners.compose_service.is_empty()
            && owners.cgroup.is_empty())
    }

    /// The first given option that only narrows the selection. By itself it never makes cwkill act.
    pub(super) fn narrowing_option(&self) -> Option<&'static str> {
        [
            ("--state", !self.state.is_empty()),
            ("--min-age", self.min_age.is_some_and(|age| !age.is_zero())),
            (
                "--min-idle",
                self.min_idle.is_some_and(|idle| !idle.is_zero()),
            ),
            ("--address-gone", self.address_gone),
            ("--cause", !self.cause.is_empty()),
            ("--user", !self.user.is_empty()),
            ("-4", self.ipv4),
            ("-6", self.ipv6),
            ("the expression", !self.expression.is_empty()),
            ("--netns", self.netns.is_some()),
        ]
        .into_iter()
        .find_map(|(option, given)| given.then_some(option))
    }
}

/// What to write instead of an expression that is only one word and is wrong at `column`.
fn single_word(text: &str, column: usize) -> Option<String> {
    // As tables show it.
    if let Ok(address) = text.parse::<SocketAddr>() {
        let (ip, port) = (address.ip(), address.port());
        return Some(format!(
            "`{text}` alone can mean many things: for this host --local {ip} --port {port}, for the other end --peer {ip} --peer-port {port}"
        ));
    }
    if text.parse::<IpAddr>().is_ok() || text.parse::<IpNet>().is_ok() {
        return Some(format!(
            "`{text}` alone can mean many things: for the other end use --peer {text}, for this host --local {text}"
        ));
    }
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.*".contains(c);
    let is_word = !text.is_empty() && column == 1 && text.chars().all(is_name);
    is_word.then(|| {
        format!(
            "`{text}` does not begin a condition: for a process use --process {text}, for a unit --unit {text}; \
             `cwkill --help` lists the commands"
        )
    })
}

/// The expression, and the states to select: those in the expression, or those of `--state`, or CLOSE-WAIT.
fn expression(
    words: &[String],
    states: Vec<TcpState>,
    notes: &mut Vec<String>,
) -> Result<(Expression, StateSet), clap::Error> {
    let named = (!states.is_empty()).then(|| states.into_iter().collect());
    let default = || named.unwrap_or(StateSet::from(TcpState::CloseWait));
    if words.is_empty() {
        return Ok((Expression::TRUE, default()));
    }
    let text = words.join(" ");
    let port = text.strip_prefix(':').unwrap_or(&text);
    if let Ok(port) = port.parse::<u16>() {
        return Err(invalid(&format!(
            "`{text}` alone can mean many things: for a port use --port {port}, for a process --pid {port}"
        )));
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid(&format!(
            "`{text}` is not a port: for a process use --pid {text}"
        )));
    }
    let parsed = filter::parse(&text, &Services::of_this_host()).map_err(|error| {
        let advice = single_word(&text, error.column());
        invalid(&advice.unwrap_or_else(|| format!("the expression is wrong at {error}")))
    })?;
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
                "one side of `or` in the expression names states, and the other does not, so it would match every state: \
                 name the states on both sides, or once at the beginning, for example \
                 'state close-wait sport = :80 or sport = :443'",
            ));
        }
    };
    notes.extend(parsed.warning);
    Ok((parsed.expression, states))
}
