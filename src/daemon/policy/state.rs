//! The file in which budgets, breakers and intents outlive the daemon.
//!
//! It is JSON with a checksum, so that an operator can read it and nobody believes a damaged one. A new file is complete and on the disk
//! before it gets the name of the old one.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::breaker::Breaker;
use super::engine::{Acted, Kept, Known};
use super::ledger::Ledger;
use crate::history::fnv_1a;
use crate::model::{NetnsKey, SocketKey};
use crate::sock_diag::Cookie;

const NAME: &str = "policies.json";
/// A file that is not complete yet.
const NEW: &str = "policies.json.new";
/// The name of a file with which the operator orders a reset begins so; the policy follows.
const RESET: &str = "reset-";
const VERSION: u32 = 1;
/// More than 100,000 acts take.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// The file of this directory.
#[derive(Clone, Debug)]
pub struct StateFile {
    directory: PathBuf,
    /// The boot, and the clock of the times since boot.
    clock: String,
}

/// Why it is not known what was done before.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("cannot read {}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    #[error(
        "{} is of another version ({version}, and this cwkill has {VERSION}): move it away once no policy acted within the last hour",
        path.display()
    )]
    OtherVersion { path: PathBuf, version: u64 },
    #[error(
        "{} is damaged ({why}): move it away once no policy acted within the last hour",
        path.display()
    )]
    Damaged { path: PathBuf, why: String },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    clock: String,
    sweep: u64,
    host: Ledger,
    policies: BTreeMap<String, StoredPolicy>,
    acted: Vec<StoredAct>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredPolicy {
    fingerprint: Option<u64>,
    acts: Ledger,
    breaker: Breaker,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredAct {
    netns: u64,
    netns_cookie: u64,
    cookie: u64,
    policy: String,
    seen_ms: u64,
}

impl StateFile {
    /// `clock`: as [`crate::history::clock`].
    pub fn new(directory: PathBuf, clock: String) -> Self {
        StateFile { directory, clock }
    }

    /// What an earlier daemon has kept; nothing if there is no file.
    ///
    /// # Errors
    /// There is a file, and it cannot be used. Then nothing may be done, and the file must stay.
    pub fn read(&self, now: Duration) -> Result<Kept, StateError> {
        let path = self.directory.join(NAME);
        let text = match read_text(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Kept::default()),
            Err(error) => return Err(StateError::Unreadable { path, error }),
            Ok(text) => text,
        };
        let (clock, kept) = decode(&text).map_err(|why| match why {
            Unusable::OtherVersion(version) => StateError::OtherVersion {
                path: path.clone(),
                version,
            },
            Unusable::Damaged(why) => StateError::Damaged {
                path: path.clone(),
                why,
            },
        })?;
        let boot = |clock: &str| clock.split('-').next().map(str::to_owned);
        Ok(if clock == self.clock {
            kept.restarted(now)
        } else if boot(&clock) == boot(&self.clock) {
            kept.with_other_clock(now)
        } else {
            kept.rebooted(now)
        })
    }

    /// Replaces the file. When this returns, it is on the disk.
    ///
    /// # Errors
    /// It cannot be written; the old file stays.
    pub fn write(&self, kept: &Kept) -> io::Result<()> {
        let (new, path) = (self.directory.join(NEW), self.directory.join(NAME));
        let written = write_new(&new, &encode(kept, &self.clock));
        if let Err(error) = written.and_then(|()| fs::rename(&new, &path)) {
            // It may be half of a file on a full disk.
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        File::open(&self.directory)?.sync_all()
    }

    /// The policies whose breakers the operator has ordered to close.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn resets(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            names.extend(
                name.to_str()
                    .and_then(|name| name.strip_prefix(RESET))
                    .map(str::to_owned),
            );
        }
        names.sort();
        Ok(names)
    }

    /// The order was carried out, and written.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove_reset(&self, policy: &str) -> io::Result<()> {
        fs::remove_file(self.directory.join(format!("{RESET}{policy}")))
    }
}

/// Orders the daemon of this directory to close the breaker of a policy, at its next sweep.
///
/// # Errors
/// The order cannot be written.
pub fn order_reset(directory: &Path, policy: &str) -> io::Result<()> {
    File::create(directory.join(format!("{RESET}{policy}"))).map(drop)
}

fn read_text(path: &Path) -> io::Result<String> {
    // A FIFO would wait for a writer.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a file of this daemon",
        ));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    // Bytes that are not text make the checksum wrong.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Why a file is not used.
#[derive(Debug, PartialEq, Eq)]
enum Unusable {
    OtherVersion(u64),
    Damaged(String),
}

fn checksum(text: &str) -> String {
    format!("{:016x}", fnv_1a(text.bytes().map(u64::from)))
}

fn encode(kept: &Kept, clock: &str) -> String {
    let mut acted: Vec<StoredAct> = kept
        .acted
        .iter()
        .map(|(key, acted)| StoredAct {
            netns: key.netns.inode,
            netns_cookie: key.netns.cookie,
            cookie: key.cookie.0,
            policy: acted.policy.clone(),
            seen_ms: acted.seen_ms,
        })
        .collect();
    acted.sort_by_key(|act| (act.netns, act.cookie));
    let policy = |known: &Known| StoredPolicy {
        fingerprint: known.fingerprint,
        acts: known.ledger.clone(),
        breaker: known.breaker.clone(),
    };
    let stored = Stored {
        version: VERSION,
        clock: clock.to_owned(),
        sweep: kept.sweep,
        host: kept.host.clone(),
        policies: kept
            .known
            .iter()
            .map(|(name, known)| (name.clone(), policy(known)))
            .collect(),
        acted,
    };
    let json = serde_json::to_string(&stored).expect("numbers and text are JSON");
    format!("{json}\n{}\n", checksum(&json))
}

/// The clock, and what was kept.
fn decode(text: &str) -> Result<(String, Kept), Unusable> {
    let damaged = |why: &str| Unusable::Damaged(why.to_owned());
    let (json, rest) = text
        .split_once('\n')
        .ok_or_else(|| damaged("it is not complete"))?;
    // Another version may have another checksum.
    let version = serde_json::from_str::<serde_json::Value>(json);
    let version = version
        .ok()
        .and_then(|value| value.get("version")?.as_u64());
    if let Some(version) = version.filter(|version| *version != u64::from(VERSION)) {
        return Err(Unusable::OtherVersion(version));
    }
    if rest != format!("{}\n", checksum(json)) {
        return Err(damaged("its checksum is wrong"));
    }
    let stored: Stored = serde_json::from_str(json).map_err(|error| damaged(&error.to_string()))?;
    let known = |policy: StoredPolicy| Known {
        fingerprint: policy.fingerprint,
        ledger: policy.acts,
        breaker: policy.breaker,
    };
    let acted = stored.acted.into_iter().map(|act| {
        let netns = NetnsKey {
            inode: act.netns,
            cookie: act.netns_cookie,
        };
        let cookie = Cookie(act.cookie);
        let acted = Acted {
            policy: act.policy,
            seen_ms: act.seen_ms,
        };
        (SocketKey { netns, cookie }, acted)
    });
    let kept = Kept {
        sweep: stored.sweep,
        host: stored.host,
        known: stored
            .policies
            .into_iter()
            .map(|(name, policy)| (name, known(policy)))
            .collect(),
        acted: acted.collect(),
    };
    Ok((stored.clock, kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(5000);

    fn key(cookie: u64) -> SocketKey {
        SocketKey {
            netns: NetnsKey {
                inode: 4026531840,
                cookie: 0,
            },
            cookie: Cookie(cookie),
        }
    }

    /// Acts of which one batch is over and another is not.
    fn kept() -> Kept {
        let mut ledger = Ledger::default();
        ledger.reserve(NOW, 7);
        ledger.settle(NOW, 0);
        ledger.reserve(NOW, 2);
        let known = Known {
            fingerprint: Some(u64::MAX),
            ledger: ledger.clone(),
            breaker: Breaker::default(),
        };
        let acted = Acted {
            policy: "a".to_owned(),
            seen_ms: 5,
        };
        Kept {
            sweep: 12,
            host: ledger,
            known: [("a".to_owned(), known)].into(),
            acted: [(key(u64::MAX), acted.clone()), (key(1), acted)].into(),
        }
    }

    fn in_directory() -> (tempfile::TempDir, StateFile) {
        let place = tempfile::tempdir().unwrap();
        let file = StateFile::new(place.path().to_owned(), "boot-1".to_owned());
        (place, file)
    }

    #[test]
    fn what_is_written_is_read() {
        let (place, file) = in_directory();
        assert_eq!(file.read(NOW).unwrap(), Kept::default(), "there is no file");
        file.write(&kept()).unwrap();
        file.write(&kept()).unwrap();
        assert_eq!(file.read(NOW).unwrap(), kept().restarted(NOW));
        let after_boot = StateFile::new(place.path().to_owned(), "other-1".to_owned());
        let now = Duration::from_secs(3);
        let read = after_boot.read(now).unwrap();
        assert_eq!(read, kept().rebooted(now));
        assert!(read.acted.is_empty(), "no socket is the same");
        assert_eq!(read.host.used(now), 9);
        let other_clock = StateFile::new(place.path().to_owned(), "boot-2".to_owned());
        let read = other_clock.read(now).unwrap();
        assert_eq!(read.acted.len(), 2, "the sockets are the same");
        assert_eq!(read.host.used(now), 9);
        let names: Vec<_> = fs::read_dir(place.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_damaged_file_is_not_believed_and_stays() {
        let (place, file) = in_directory();
        file.write(&kept()).unwrap();
        let path = place.path().join(NAME);
        let good = fs::read(&path).unwrap();
        for end in 0..good.len() {
            fs::write(&path, &good[..end]).unwrap();
            assert!(file.read(NOW).is_err(), "cut at {end}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(file.read(NOW).is_err(), "changed at {at}");
        }
        assert_eq!(fs::read(&path).unwrap().len(), good.len());
        fs::write(&path, &good).unwrap();
        assert!(file.read(NOW).is_ok());
    }

    #[test]
    fn another_version_is_named() {
        let (place, file) = in_directory();
        fs::write(place.path().join(NAME), "{\"version\":2,\"new\":1}\nx\n").unwrap();
        let error = file.read(NOW).unwrap_err();
        assert!(
            matches!(error, StateError::OtherVersion { version: 2, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("move it away"), "{error}");
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        let (place, file) = in_directory();
        let fifo = place.path().join(NAME);
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(file.read(NOW), Err(StateError::Unreadable { .. })));
    }

    #[test]
    fn a_file_that_cannot_be_written_stays_as_it_was() {
        let (place, file) = in_directory();
        file.write(&kept()).unwrap();
        // Nobody can make a file there.
        fs::create_dir(place.path().join(NEW)).unwrap();
        fs::create_dir(place.path().join(NEW).join("x")).unwrap();
        assert!(file.write(&Kept::default()).is_err());
        assert_eq!(file.read(NOW).unwrap(), kept().restarted(NOW));
    }

    #[test]
    fn an_order_stays_until_it_is_carried_out() {
        let (place, file) = in_directory();
        assert!(file.resets().unwrap().is_empty());
        order_reset(place.path(), "b").unwrap();
        order_reset(place.path(), "a").unwrap();
        order_reset(place.path(), "a").unwrap();
        assert_eq!(file.resets().unwrap(), ["a", "b"]);
        file.remove_reset("a").unwrap();
        assert_eq!(file.resets().unwrap(), ["b"]);
    }
}
