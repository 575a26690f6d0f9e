//! Where records go: layers of `tracing` that write one line an event. The journal has a layer of its own crate.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// What could not be written: how many records, and why the first of them.
#[derive(Clone, Default)]
pub struct Losses(Arc<Mutex<Option<(usize, String)>>>);

impl Losses {
    fn note(&self, name: &str, error: &io::Error) {
        let mut lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lost.get_or_insert_with(|| (0, format!("{name}: {error}")))
            .0 += 1;
    }

    /// For the operator.
    pub fn sentence(&self) -> Option<String> {
        let lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, why) = lost.as_ref()?;
        let records = if *count == 1 { "record" } else { "records" };
        Some(format!(
            "{count} {records} of the audit log could not be written to {why}"
        ))
    }
}

/// Writes one of the fields of every event, a line each, in one system call.
pub struct Lines {
    field: &'static str,
    before: &'static str,
    to: To,
}

enum To {
    File {
        file: File,
        name: String,
        losses: Losses,
    },
    Stderr,
}

impl Lines {
    /// The whole record, to a file.
    pub fn json(file: File, name: String, losses: Losses) -> Self {
        Lines {
            field: "record",
            before: "",
            to: To::File { file, name, losses },
        }
    }

    /// The sentence for people, to standard error.
    pub fn stderr() -> Self {
        Lines {
            field: "message",
            before: "cwkill: audit: ",
            to: To::Stderr,
        }
    }
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut wanted = Wanted {
            name: self.field,
            line: self.before.to_owned(),
        };
        event.record(&mut wanted);
        let mut line = wanted.line;
        line.push('\n');
        match &self.to {
            // O_APPEND: lines of several runs do not mix.
            To::File { file, name, losses } => {
                let mut file = file;
                if let Err(error) = file.write_all(line.as_bytes()) {
                    losses.note(name, &error);
                }
            }
            // There is nobody to tell.
            To::Stderr => {
                let _ = io::stderr().write_all(line.as_bytes());
            }
        }
    }
}

/// The value of one field.
struct Wanted {
    name: &'static str,
    line: String,
}

impl Visit for Wanted {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == self.name {
            self.line.push_str(value);
        }
    }

    // All of ours are texts.
    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}
