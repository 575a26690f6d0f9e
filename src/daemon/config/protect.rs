//! What no policy may touch.

use std::collections::BTreeSet;

use strum::IntoStaticStr;
use toml::Value;

use super::error::{ConfigError, Source, near};
use super::raw::{Field, RawProtect};
use super::reader::{port, shown, text, user};
use crate::cli::values;
use crate::filter::selectors::Selectors;
use crate::proc::Process;
use crate::text::escape;

/// Remote access, the service manager, and the programs that run containers.
const UNITS: [&str; 10] = [
    "ssh.service",
    "sshd.service",
    "ssh@*.service",
    "sshd@*.service",
    "systemd-*.service",
    "kubelet.service",
    "containerd.service",
    "docker.service",
    "crio.service",
    "podman.service",
];
/// The same by name: the kernel keeps 15 characters. OpenSSH 9.8 has sshd-session and sshd-auth.
const PROCESSES: [&str; 13] = [
    "sshd",
    "sshd-*",
    "systemd",
    "systemd-*",
    "init",
    "kubelet",
    "containerd",
    "containerd-shim*",
    "dockerd",
    "docker-proxy",
    "crio",
    "conmon",
    "podman",
];
/// ssh.
const PORTS: [u16; 1] = [22];

/// What no policy may touch: the defaults without those that were taken out, and what was added.
#[derive(Clone, Debug)]
pub struct Protection {
    pub units: Vec<String>,
    pub processes: Vec<String>,
    /// Local ports.
    pub ports: BTreeSet<u16>,
    pub users: BTreeSet<u32>,
    by_unit: Selectors,
    by_process: Selectors,
}

/// Why a socket is protected. Its code is the variant in kebab case, and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Protected {
    Port,
    User,
    Unit,
    Process,
}

impl Default for Protection {
    fn default() -> Self {
        Protection::new(
            UNITS.map(str::to_owned).into(),
            PROCESSES.map(str::to_owned).into(),
            PORTS.into(),
            BTreeSet::new(),
        )
        .expect("the defaults are patterns")
    }
}

impl Protection {
    /// # Errors
    /// A unit or a process is not a pattern.
    fn new(
        units: Vec<String>,
        processes: Vec<String>,
        ports: BTreeSet<u16>,
        users: BTreeSet<u32>,
    ) -> Result<Self, String> {
        let names: Result<_, String> = units.iter().map(|name| values::unit(name)).collect();
        let by_unit = Selectors {
            units: names?,
            ..Selectors::default()
        };
        let globs: Result<_, String> = processes.iter().map(|name| values::glob(name)).collect();
        let by_process = Selectors {
            processes: globs?,
            ..Selectors::default()
        };
        Ok(Protection {
            units,
            processes,
            ports,
            users,
            by_unit,
            by_process,
        })
    }

    /// Why a socket with this local port and user, and these owners, must be left alone.
    pub fn of<'p>(
        &self,
        port: u16,
        uid: u32,
        owners: impl IntoIterator<Item = &'p Process>,
    ) -> Option<Protected> {
        if self.ports.contains(&port) {
            return Some(Protected::Port);
        }
        if self.users.contains(&uid) {
            return Some(Protected::User);
        }
        owners.into_iter().find_map(|owner| {
            // A selector without values matches everything.
            let is_of = |names: &[String], selectors: &Selectors| {
                !names.is_empty() && selectors.match_owner(owner)
            };
            if is_of(&self.units, &self.by_unit) {
                Some(Protected::Unit)
            } else if is_of(&self.processes, &self.by_process) {
                Some(Protected::Process)
            } else {
                None
            }
        })
    }

    /// Adds and removes what a file says.
    pub(super) fn with(self, source: Source<'_>, raw: &RawProtect) -> Result<Self, ConfigError> {
        let Protection {
            mut units,
            mut processes,
            mut ports,
            mut users,
            ..
        } = self;
        let remove = &raw.remove;
        take_out(source, "units", &remove.units, &mut units, text, &UNITS)?;
        take_out(
            source,
            "processes",
            &remove.processes,
            &mut processes,
            text,
            &PROCESSES,
        )?;
        let mut numbers: Vec<String> = ports.iter().map(u16::to_string).collect();
        let number = |value: &Value| port(value).map(|port| port.to_string());
        let known = PORTS.map(|port| port.to_string());
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        take_out(source, "ports", &remove.ports, &mut numbers, number, &known)?;
        ports.retain(|port| numbers.contains(&port.to_string()));

        let unit = |value: &Value| {
            let text = text(value)?;
            values::unit(&text).map(|_| text)
        };
        let process = |value: &Value| {
            let text = text(value)?;
            values::glob(&text).map(|_| text)
        };
        units.extend(source.read_list("units", &raw.units, unit)?);
        processes.extend(source.read_list("processes", &raw.processes, process)?);
        ports.extend(source.read_list("ports", &raw.ports, port)?);
        users.extend(source.read_list("users", &raw.users, user)?);
        let both = Protection::new(units, processes, ports, users);
        both.map_err(|why| source.error(&(0..0), why))
    }
}

/// Takes the named defaults out of `protected`.
fn take_out(
    source: Source<'_>,
    name: &str,
    field: &Field,
    protected: &mut Vec<String>,
    read: impl Fn(&Value) -> Result<String, String>,
    defaults: &[&str],
) -> Result<(), ConfigError> {
    let known = |value: &Value| {
        let text = read(value)?;
        match defaults.contains(&text.as_str()) {
            true => Ok(text),
            false => {
                let like = match near(&text, defaults.iter().copied()) {
                    Some(near) => format!("did you mean \"{}\"?", escape(near)),
                    None => format!("they are {}", defaults.join(", ")),
                };
                Err(format!(
                    "{} is not one of the defaults; {like}",
                    shown(value)
                ))
            }
        }
    };
    let named = source.read_list(name, field, known)?;
    protected.retain(|one| !named.contains(one));
    Ok(())
}
