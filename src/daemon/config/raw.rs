//! The files as they are written. The values are read by [`super::reader`].

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::{Spanned, Value};

/// A value with its place in the file; `None` if it is not given.
pub(super) type Field = Option<Spanned<Value>>;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawFile {
    pub daemon: RawDaemon,
    pub limits: RawLimits,
    pub protect: RawProtect,
    pub policy: Vec<Spanned<RawPolicy>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table, for example [daemon]"
)]
pub(super) struct RawDaemon {
    pub interval: Field,
    pub listen: Field,
    pub all_netns: Field,
    pub textfile: Field,
    pub host_root: Field,
    pub log_file: Field,
}

#[derive(Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table, for example [limits]"
)]
pub(super) struct RawLimits {
    pub kills_per_sweep: Field,
    pub kills_per_hour: Field,
}

#[derive(Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table, for example [protect]"
)]
pub(super) struct RawProtect {
    pub units: Field,
    pub ports: Field,
    pub processes: Field,
    pub users: Field,
    /// Defaults that are taken out.
    pub remove: RawRemove,
}

#[derive(Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table, for example remove = { ports = [22] }"
)]
pub(super) struct RawRemove {
    pub units: Field,
    pub ports: Field,
    pub processes: Field,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table, for example [[policy]]")]
pub(super) struct RawPolicy {
    pub name: Spanned<Value>,
    pub reason: Field,
    pub expires: Field,
    pub mode: Field,
    #[serde(rename = "match")]
    pub selectors: Spanned<MatchTable>,
    pub min_age: Field,
    pub min_idle: Field,
    pub confirm: Field,
    pub start_above: Field,
    pub stop_below: Field,
    pub methods: Field,
    pub kills_per_sweep: Field,
    pub kills_per_hour: Field,
    pub share: Field,
    pub reclaim: Field,
    pub window: Field,
    #[serde(default)]
    pub breaker: RawBreaker,
}

/// Selectors by name.
pub(super) type MatchTable = BTreeMap<Spanned<String>, Spanned<Value>>;

#[derive(Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table, for example breaker = { cooldown = \"1h\" }"
)]
pub(super) struct RawBreaker {
    pub sweeps: Field,
    pub failures: Field,
    pub surge: Field,
    pub restarts: Field,
    pub cooldown: Field,
}
