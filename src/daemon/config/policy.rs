//! One policy: what it selects, when it may act, and how much.

use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;

use super::error::{ConfigError, Place, Source};
use super::raw::{RawBreaker, RawPolicy};
use super::{Expiry, Level, Percent, Window, reader, selectors};
use crate::filter::selectors::{IN_USE_WITHIN, Selectors};
use crate::history::fnv_1a;
use crate::model::Method;
use crate::proc::netns::NetnsScope;

/// A policy that acts says that a socket must have been stuck or idle for so long, or longer.
const LEAST_WAIT: Duration = Duration::from_secs(60);

/// As many sockets a half-open breaker lets through in a sweep.
pub const HALF_OPEN: usize = 10;

/// One policy.
#[derive(Clone, Debug)]
pub struct Policy {
    pub name: String,
    /// Why the operator has it.
    pub reason: Option<String>,
    pub mode: Mode,
    /// From then on it only observes.
    pub expires: Option<Expiry>,
    /// With the minimum age and the minimum idle time.
    pub selectors: Selectors,
    /// The network namespace, if it names one: a name, a path or a pid.
    pub netns: Option<String>,
    /// Options of `cwkill` that select the same sockets.
    pub words: Vec<String>,
    /// In how many sweeps in a row it must match a socket before it acts on it.
    pub confirm: u32,
    /// It acts on the sockets of an owner that has more than this, if it is given.
    pub start_above: Option<Level>,
    /// And then until it has fewer than this.
    pub stop_below: Option<Level>,
    pub methods: Vec<Method>,
    pub kills_per_sweep: u32,
    pub kills_per_hour: u32,
    /// How much of the stuck sockets of an owner it acts on in one sweep.
    pub share: Percent,
    /// Whether to close the descriptors of the closed sockets too.
    pub reclaim: bool,
    /// The parts of the day in which it acts; empty for the whole day.
    pub windows: Vec<Window>,
    pub breaker: BreakerRules,
    /// Another number for another policy.
    pub fingerprint: u64,
    /// Where it is.
    pub file: PathBuf,
    pub place: Place,
}

impl Policy {
    /// The namespaces that it selects from. `all_netns`: whether the daemon looks into all.
    pub fn scope(&self, all_netns: bool) -> NetnsScope {
        match &self.netns {
            Some(name) => NetnsScope::Named(name.clone()),
            None if all_netns => NetnsScope::All,
            None => NetnsScope::Current,
        }
    }
}

/// Whether a policy may act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It only counts what it would do.
    Observe,
    Act,
}

/// When the circuit breaker of a policy opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerRules {
    /// Over so many sweeps, what comes back and what fails is added up.
    pub sweeps: u32,
    /// It opens if more than this part of the acts fails.
    pub failures: Percent,
    /// It opens if so many times as many sockets match as in the median sweep of the last hour.
    pub surge: u32,
    /// It opens if so many owners end within these sweeps after an act.
    pub restarts: u32,
    /// After this time, the policy may try again with few sockets.
    pub cooldown: Duration,
}

impl Default for BreakerRules {
    fn default() -> Self {
        BreakerRules {
            sweeps: 3,
            failures: Percent(50),
            surge: 10,
            restarts: 1,
            cooldown: Duration::from_secs(60 * 60),
        }
    }
}

/// Reads a policy.
pub(super) fn read(source: Source<'_>, raw: &Spanned<RawPolicy>) -> Result<Policy, ConfigError> {
    let (span, raw) = (raw.span(), raw.get_ref());
    let name = reader::name(raw.name.get_ref())
        .map_err(|why| source.error(&raw.name.span(), format!("`name`: {why}")))?;
    let mode = source
        .read("mode", &raw.mode, mode)?
        .unwrap_or(Mode::Observe);
    let expires = source.read("expires", &raw.expires, reader::expiry)?;
    let matched = selectors::read(source, &raw.selectors)?;
    let min_age = source.read("min_age", &raw.min_age, reader::duration)?;
    let min_idle = source.read("min_idle", &raw.min_idle, reader::duration)?;
    if mode == Mode::Act {
        let place = raw.mode.as_ref().map_or(span, Spanned::span);
        let refuse = |message: &str| {
            Err(source.error(&place, format!("the policy `{name}` acts, {message}")))
        };
        if expires.is_none() {
            return refuse(
                "and does not say until when: give `expires`, for example expires = 2027-01-31",
            );
        }
        if [min_age, min_idle].into_iter().flatten().max() < Some(LEAST_WAIT) {
            return refuse(
                "and does not say how long a socket must have been stuck or idle: give `min_age` or `min_idle` of a minute or \
                 more, for example min_age = \"10m\"",
            );
        }
        if !matched.names_targets {
            return refuse(
                "and `match` only narrows: name the sockets as well, for example match = { port = 8080 }, or every stuck socket \
                 with all = true",
            );
        }
    }
    let start_above = source.read("start_above", &raw.start_above, reader::level)?;
    let stop_below = source.read("stop_below", &raw.stop_below, reader::level)?;
    if let Some(field) = &raw.stop_below
        && let Some(why) = levels_disagree(start_above, stop_below)
    {
        return Err(source.error(&field.span(), format!("`stop_below`: {why}")));
    }
    let count = |name, field, default| -> Result<u32, ConfigError> {
        Ok(source.read(name, field, reader::count)?.unwrap_or(default))
    };
    let netns = match &matched.scope.netns {
        NetnsScope::Named(name) => Some(name.clone()),
        NetnsScope::Current | NetnsScope::All => None,
    };
    let mut policy = Policy {
        mode,
        expires,
        reason: source.read("reason", &raw.reason, reader::text)?,
        netns,
        words: matched.words,
        confirm: count("confirm", &raw.confirm, 2)?,
        start_above,
        stop_below,
        methods: source
            .read("methods", &raw.methods, selectors::read_methods)?
            .unwrap_or(Method::AUTO.to_vec()),
        kills_per_sweep: count("kills_per_sweep", &raw.kills_per_sweep, 100)?,
        kills_per_hour: count("kills_per_hour", &raw.kills_per_hour, 1000)?,
        share: source
            .read("share", &raw.share, reader::percent)?
            .unwrap_or(Percent(50)),
        reclaim: source
            .read("reclaim", &raw.reclaim, reader::flag)?
            .unwrap_or(false),
        windows: source.read_list("window", &raw.window, reader::window)?,
        breaker: breaker(source, &raw.breaker)?,
        selectors: Selectors {
            min_age: min_age.unwrap_or_default(),
            min_idle: min_idle.unwrap_or(IN_USE_WITHIN),
            ..matched.scope.selectors
        },
        fingerprint: 0,
        file: source.path.to_owned(),
        place: source.place(&raw.name.span()),
        name,
    };
    policy.fingerprint = fingerprint(&policy);
    Ok(policy)
}

fn mode(value: &toml::Value) -> Result<Mode, String> {
    match value {
        toml::Value::String(text) if text == "observe" => Ok(Mode::Observe),
        toml::Value::String(text) if text == "act" => Ok(Mode::Act),
        other => Err(format!(
            "{} is not a mode: write \"observe\" or \"act\"",
            reader::shown(other)
        )),
    }
}

/// Why both levels make no sense together.
fn levels_disagree(start_above: Option<Level>, stop_below: Option<Level>) -> Option<String> {
    let (Some(start), Some(stop)) = (start_above, stop_below) else {
        return (start_above.is_none() && stop_below.is_some()).then(|| {
            "says when to stop, and `start_above` is missing; for example start_above = 500 and stop_below = 300".to_owned()
        });
    };
    match (start, stop) {
        (Level::Sockets(start), Level::Sockets(stop))
        | (Level::OfLimit(Percent(start)), Level::OfLimit(Percent(stop)))
            if stop > start =>
        {
            Some(format!(
                "{stop} is more than `start_above`, {start}, so it would stop before it starts; for example start_above = 500 and \
                 stop_below = 300"
            ))
        }
        (Level::Sockets(_), Level::OfLimit(_)) | (Level::OfLimit(_), Level::Sockets(_)) => Some(
            "one level is a number and the other a percentage: give both in the same way, for example start_above = \"50%\" and \
             stop_below = \"30%\""
                .to_owned(),
        ),
        _ => None,
    }
}

fn breaker(source: Source<'_>, raw: &RawBreaker) -> Result<BreakerRules, ConfigError> {
    let default = BreakerRules::default();
    let surge = |value: &toml::Value| match reader::count(value)? {
        1 => Err(
            "must be at least 2: with 1 it would open in every second sweep; for example 10"
                .to_owned(),
        ),
        times => Ok(times),
    };
    let cooldown = |value: &toml::Value| match reader::duration(value)? {
        Duration::ZERO => Err("must be greater than zero; for example \"1h\"".to_owned()),
        time => Ok(time),
    };
    let sweeps = |value: &toml::Value| match reader::count(value)? {
        sweeps @ 2.. => Ok(sweeps),
        _ => Err("must be at least 2: one sweep proves nothing; for example 3".to_owned()),
    };
    Ok(BreakerRules {
        sweeps: source
            .read("sweeps", &raw.sweeps, sweeps)?
            .unwrap_or(default.sweeps),
        failures: source
            .read("failures", &raw.failures, reader::percent)?
            .unwrap_or(default.failures),
        surge: source
            .read("surge", &raw.surge, surge)?
            .unwrap_or(default.surge),
        restarts: source
            .read("restarts", &raw.restarts, reader::count)?
            .unwrap_or(default.restarts),
        cooldown: source
            .read("cooldown", &raw.cooldown, cooldown)?
            .unwrap_or(default.cooldown),
    })
}

/// A number that changes if the policy does; not if it stands elsewhere, or its reason is another.
fn fingerprint(policy: &Policy) -> u64 {
    let Policy {
        name: _,
        reason: _,
        mode,
        expires,
        selectors: Selectors {
            min_age, min_idle, ..
        },
        netns: _,
        words,
        confirm,
        start_above,
        stop_below,
        methods,
        kills_per_sweep,
        kills_per_hour,
        share,
        reclaim,
        windows,
        breaker,
        fingerprint: _,
        file: _,
        place: _,
    } = policy;
    let text = format!(
        "{mode:?} {expires:?} {min_age:?} {min_idle:?} {words:?} {confirm} {start_above:?} {stop_below:?} {methods:?} \
         {kills_per_sweep} {kills_per_hour} {share:?} {reclaim} {windows:?} {breaker:?}"
    );
    fnv_1a(text.bytes().map(u64::from))
}
