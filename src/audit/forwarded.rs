//! The records of `cwkill gateway`. Pure.

use serde::Serialize;

use crate::model::{Forwarded, ForwardedAct, ForwardedOutcome};
use crate::report::gateway::json::{JsonForwarded, json_forwarded};
use crate::report::gateway::{ForwardedCounts, ForwardedRun, text};

/// One record of a run on forwarded connections.
#[derive(Serialize)]
#[serde(untagged)]
pub enum ForwardedRecord<'a> {
    Begin {
        act: Option<&'static str>,
        matched: usize,
        to_act_on: usize,
        /// The caller in words.
        #[serde(skip)]
        caller: String,
    },
    /// A watch, which has not found its connections yet.
    Watch {
        act: &'static str,
        watch: bool,
        #[serde(skip)]
        caller: String,
    },
    Intent {
        connection: Box<JsonForwarded<'a>>,
        /// The addresses in words.
        #[serde(skip)]
        named: &'a Forwarded,
    },
    Outcome {
        connection: Box<JsonForwarded<'a>>,
        #[serde(skip)]
        named: &'a Forwarded,
    },
    End {
        summary: ForwardedCounts,
    },
}

impl<'a> ForwardedRecord<'a> {
    /// The first record of a run. `caller`: the caller in words.
    pub fn begin(run: &ForwardedRun, caller: String) -> Self {
        let connections = &run.scan.connections;
        ForwardedRecord::Begin {
            act: run.act.map(|act| act.name()),
            matched: connections.len(),
            to_act_on: connections.iter().filter(|one| one.skip.is_none()).count(),
            caller,
        }
    }

    /// The first record of a watch.
    pub fn begin_watch(act: ForwardedAct, caller: String) -> Self {
        ForwardedRecord::Watch {
            act: act.name(),
            watch: true,
            caller,
        }
    }

    /// One record for each connection that `run` is about to act on.
    pub fn intents(run: &'a ForwardedRun) -> impl Iterator<Item = Self> {
        let connections = run.scan.connections.iter();
        let planned = connections.filter(|connection| connection.skip.is_none());
        planned.map(|named| ForwardedRecord::Intent {
            connection: Box::new(json_forwarded(run, named)),
            named,
        })
    }

    /// One record for each connection of a run that is over.
    pub fn outcomes(run: &'a ForwardedRun) -> impl Iterator<Item = Self> {
        run.scan
            .connections
            .iter()
            .map(|named| ForwardedRecord::Outcome {
                connection: Box::new(json_forwarded(run, named)),
                named,
            })
    }

    /// The last record of a run.
    pub fn end(run: &ForwardedRun) -> Self {
        ForwardedRecord::End {
            summary: run.counts(),
        }
    }

    pub fn event(&self) -> &'static str {
        match self {
            ForwardedRecord::Begin { .. } | ForwardedRecord::Watch { .. } => "begin",
            ForwardedRecord::Intent { .. } => "intent",
            ForwardedRecord::Outcome { .. } => "outcome",
            ForwardedRecord::End { .. } => "end",
        }
    }

    /// The record in words.
    pub fn message(&self) -> String {
        match self {
            ForwardedRecord::Begin {
                act,
                matched,
                to_act_on,
                caller,
            } => format!(
                "{caller}: about to {} {to_act_on} of {matched} forwarded connections",
                act.unwrap_or("list")
            ),
            ForwardedRecord::Watch { act, caller, .. } => {
                format!("{caller}: about to {act} forwarded connections as they come")
            }
            ForwardedRecord::Intent { named, .. } => {
                format!("{}: to be asked", text::named(named))
            }
            ForwardedRecord::Outcome { named, .. } => {
                format!("{}: {}", text::named(named), text::result(named, true))
            }
            ForwardedRecord::End { summary } => summary.sentence(),
        }
    }

    pub fn outcome(&self) -> Option<&'static str> {
        Some(self.named()?.outcome.as_ref()?.name())
    }

    /// The source of the original direction.
    pub fn local(&self) -> Option<String> {
        Some(self.named()?.entry.original.local.to_string())
    }

    /// Its destination.
    pub fn peer(&self) -> Option<String> {
        Some(self.named()?.entry.original.peer.to_string())
    }

    pub fn is_failure(&self) -> bool {
        let outcome = self.named().and_then(|named| named.outcome.as_ref());
        matches!(outcome, Some(ForwardedOutcome::Failed(_)))
    }

    fn named(&self) -> Option<&'a Forwarded> {
        match self {
            ForwardedRecord::Intent { named, .. } | ForwardedRecord::Outcome { named, .. } => {
                Some(named)
            }
            ForwardedRecord::Begin { .. }
            | ForwardedRecord::Watch { .. }
            | ForwardedRecord::End { .. } => None,
        }
    }
}
