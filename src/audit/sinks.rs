//! Where records go, one line or one datagram each.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::journal::Journal;

/// How long a place may take none of a record before it is given up: whoever does not read must not keep the report from the
/// operator.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A record, ready to be written.
pub(super) struct Rendered<'a> {
    /// The whole of it, a JSON object.
    pub json: &'a str,
    /// The sentence for people.
    pub message: &'a str,
    /// What the journal can be searched by.
    pub fields: &'a [(&'a str, &'a str)],
    /// It is about what is only intended.
    pub intent: bool,
}

/// What could not be written: how many records, and why the first of them.
#[derive(Default)]
pub(super) struct Losses(Option<(usize, String)>);

impl Losses {
    fn note(&mut self, name: &str, error: &io::Error) {
        self.0
            .get_or_insert_with(|| (0, format!("{name}: {error}")))
            .0 += 1;
    }

    /// For the operator.
    pub fn sentence(&self) -> Option<String> {
        let (count, why) = self.0.as_ref()?;
        let records = if *count == 1 { "record" } else { "records" };
        Some(format!(
            "{count} {records} of the audit log could not be written to {why}"
        ))
    }
}

/// One place.
pub(super) struct Sink {
    to: To,
    /// A part of a line has been written.
    torn: bool,
    /// It did not take anything for too long.
    given_up: bool,
}

pub(super) enum To {
    Journal(Journal),
    /// The whole record, a line each.
    File(File, String),
    /// The sentence, a line each.
    Stderr {
        /// Somebody counts on it.
        counts: bool,
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

    /// Writes a record, or notes that it is lost.
    pub fn put(&mut self, record: &Rendered<'_>, losses: &mut Losses) {
        if matches!(self.to, To::Stderr { counts: false }) && record.intent {
            // Who watches sees the outcome at once.
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
            To::Stderr { counts: true } => losses.note("standard error", &error),
            // There is nobody to tell.
            To::Stderr { counts: false } => {}
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
                let line_of = format!("cwkill: audit: {}", record.message);
                let stderr = io::stderr();
                line(&mut self.torn, &line_of, |bytes| {
                    write_in_time(stderr.as_fd(), bytes, PATIENCE)
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

/// Writes `text` as one line, in one call where the place takes it. After a line that broke off (`torn`) it begins with the end of
/// that one, so that it is no part of it.
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

/// Writes some of `bytes`, once there is room for them.
///
/// # Errors
/// ETIMEDOUT: there was none in time. Those of write(2).
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
    // A pipe that can be written has room for so many bytes, so this does not wait (pipe(7)).
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
    fn a_pipe_nobody_reads_does_not_hold_us() {
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
