//! The sinks of the log. Each record is one line or one datagram.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::journal::Journal;
use crate::text::escape;

/// The time after which a sink that accepts no data is given up. A reader that hangs must not delay the report to the operator.
pub(super) const SINK_TIMEOUT: Duration = Duration::from_secs(5);

/// A record in the forms that the sinks need.
pub(super) struct Rendered<'a> {
    /// The whole record, a JSON object.
    pub json: &'a str,
    /// The sentence for people.
    pub message: &'a str,
    /// The fields of the journal.
    pub fields: &'a [(&'a str, &'a str)],
    /// It is about an intended act on one socket or descriptor.
    pub intent: bool,
}

/// The lost records: their number, and the sink and error of the first.
#[derive(Default)]
pub(super) struct Losses(Option<(usize, String)>);

impl Losses {
    fn note(&mut self, name: &str, error: &io::Error) {
        self.0
            .get_or_insert_with(|| (0, format!("{name}: {error}")))
            .0 += 1;
    }

    /// A sentence for the operator; `None` if nothing was lost.
    pub fn sentence(&self) -> Option<String> {
        let (count, why) = self.0.as_ref()?;
        let records = if *count == 1 { "record" } else { "records" };
        Some(format!(
            "{count} {records} of the audit log could not be written to {why}"
        ))
    }
}

/// A destination of records, and its state.
pub(super) struct Sink {
    to: To,
    /// The last line was written only in part.
    torn: bool,
    /// It accepted no data for [`SINK_TIMEOUT`].
    given_up: bool,
}

pub(super) enum To {
    Journal(Journal),
    /// The whole record as one line; the second field is the name of the file.
    File(File, String),
    /// The sentence as one line.
    Stderr {
        /// The operator asked for it or systemd needs it: a lost record is an error.
        required: bool,
    },
}

impl Sink {
    pub fn new(to: To) -> Self {
        Sink {
            to,
            torn: false,
            given_up: false,
        }
    }

    /// Writes a record. If that fails, adds it to `losses`.
    pub fn put(&mut self, record: &Rendered<'_>, losses: &mut Losses) {
        if matches!(self.to, To::Stderr { required: false }) && record.intent {
            // With -v alone the operator only wants the outcomes.
            return;
        }
        let result = match self.given_up {
            true => Err(Errno::ETIMEDOUT.into()),
            false => self.write(record),
        };
        let Err(error) = result else {
            return;
        };
        self.given_up = self.given_up || is_timeout(&error);
        match &self.to {
            To::Journal(_) => losses.note("the journal", &error),
            To::File(_, name) => losses.note(name, &error),
            To::Stderr { required: true } => losses.note("standard error", &error),
            To::Stderr { required: false } => {}
        }
    }

    fn write(&mut self, record: &Rendered<'_>) -> io::Result<()> {
        match &self.to {
            To::Journal(journal) => journal.send(record.fields),
            To::File(file, _) => {
                let mut file = file;
                line(&mut self.torn, record.json, |bytes| file.write(bytes))
            }
            To::Stderr { .. } => {
                let text = format!("cwkill: audit: {}", escape(record.message));
                let stderr = io::stderr();
                line(&mut self.torn, &text, |bytes| {
                    write_in_time(stderr.as_fd(), bytes, SINK_TIMEOUT)
                })
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}

/// Writes `text` as one line, with one call if the sink accepts it. If the last line was written only in part (`torn`), a
/// newline comes first.
fn line(
    torn: &mut bool,
    text: &str,
    mut write: impl FnMut(&[u8]) -> io::Result<usize>,
) -> io::Result<()> {
    let line = format!("{}{text}\n", if *torn { "\n" } else { "" });
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        match write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                rest = &rest[written..];
                *torn = !rest.is_empty();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until `to` accepts data, and writes a part of `bytes`.
///
/// # Errors
/// ETIMEDOUT: it accepted no data in time. As write(2).
fn write_in_time(to: BorrowedFd<'_>, bytes: &[u8], patience: Duration) -> io::Result<usize> {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(to, PollFlags::POLLOUT)];
        match poll(
            &mut polled,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(0) => return Err(Errno::ETIMEDOUT.into()),
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // A pipe that poll(2) reports as writable has room for PIPE_BUF bytes, so this write does not block (pipe(7)).
    let bytes = &bytes[..bytes.len().min(libc::PIPE_BUF)];
    Ok(nix::unistd::write(to, bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_after_a_broken_one_stands_alone() {
        let (mut torn, mut disk, mut room) = (false, Vec::new(), 8);
        for (text, more, works) in [("{1234}", 0, true), ("{5}", 0, false), ("{6}", 9, true)] {
            room += more;
            let result = line(&mut torn, text, |bytes| {
                let taken = bytes.len().min(room);
                room -= taken;
                disk.extend_from_slice(&bytes[..taken]);
                match taken {
                    0 => Err(Errno::ENOSPC.into()),
                    _ => Ok(taken),
                }
            });
            assert_eq!(result.is_ok(), works, "{text}");
        }
        assert_eq!(String::from_utf8(disk).unwrap(), "{1234}\n{\n{6}\n");
    }

    #[test]
    fn a_pipe_without_a_reader_does_not_block() {
        let (reader, writer) = io::pipe().unwrap();
        let text = "x".repeat(10_000);
        let failed = (0..100).find_map(|_| {
            let write =
                |bytes: &[u8]| write_in_time(writer.as_fd(), bytes, Duration::from_millis(20));
            line(&mut false, &text, write).err()
        });
        assert!(is_timeout(&failed.unwrap()));
        drop(reader);
    }
}
