//! The names of containers, from the files of their runtimes.
//!
//! A cgroup has the id of a container; the person on call knows its name. No runtime is asked, and no socket is opened. A file is read
//! only if its container is shown, or if a selector needs names, and at most once in a run. `parse` has the formats, `sources` the
//! paths, `files` reads below the root of the host.
//!
//! The files may be on a file system that hangs. So a thread of its own reads them. If it takes longer than [`PATIENCE`], cwkill goes
//! on without it, and reads no further file.

mod files;
mod parse;
mod sources;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use files::HostRoot;
use parse::Entry;
use sources::{Sources, Wanted};

use super::Process;
use super::cgroup::{Cgroup, Container, Facts, Runtime};
use crate::sys::caller::as_caller;
use crate::text::{counted, escape};

/// Processes in containers whose names could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unnamed {
    pub pids: Vec<i32>,
    /// The number of their containers.
    pub containers: usize,
    /// Why the name of the first one could not be read, and which that is.
    pub why: Option<String>,
}

impl Unnamed {
    pub(crate) fn of<'p>(processes: impl Iterator<Item = &'p Process>) -> Self {
        let mut unnamed = Unnamed::default();
        let mut containers = HashSet::new();
        for process in processes {
            unnamed.pids.push(process.id.pid);
            let Some(container) = &process.cgroup.container else {
                continue;
            };
            if containers.insert((container.runtime, &container.id)) {
                unnamed.why.get_or_insert_with(|| container.why_unnamed());
            }
        }
        unnamed.containers = containers.len();
        unnamed
    }

    /// Says which names are unknown, and why.
    pub fn note(&self) -> String {
        format!(
            "the names of {} could not be read ({})",
            counted(self.containers, "container"),
            escape(self.why.as_deref().unwrap_or_default())
        )
    }
}

/// A directory in which a runtime keeps files with the names of containers.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct NameDirectory {
    pub path: String,
    /// Why cwkill cannot read it.
    pub error: Option<String>,
}

/// How long the files of a container may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// The names of the containers of a host.
pub(crate) struct Names {
    host_root: PathBuf,
    proc: PathBuf,
    /// Whether processes are selected by the names of their containers.
    pub of_all: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: HashMap<(Runtime, String), Result<Entry, Arc<str>>>,
    reader: Option<Result<Reader, Arc<str>>>,
    /// A reader that has not answered in time.
    late: Option<JoinHandle<()>>,
}

/// The thread that reads.
struct Reader {
    requests: Sender<Wanted>,
    answers: Receiver<Result<Entry, String>>,
    reading: Arc<Mutex<PathBuf>>,
    thread: JoinHandle<()>,
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Names").field(&self.host_root).finish()
    }
}

impl Names {
    /// Those of the host whose root directory is `host_root`, and whose processes `proc` shows.
    pub fn of(host_root: &Path, proc: &Path, of_all: bool) -> Self {
        Names {
            host_root: host_root.to_owned(),
            proc: proc.to_owned(),
            of_all,
            state: Mutex::default(),
        }
    }

    /// Adds to the container of `cgroup` what the files say about it.
    pub fn complete(&self, cgroup: &mut Cgroup) {
        // Without an id, its name is in its cgroup.
        let is_new =
            |container: &Container| container.id.is_some() && container.facts == Facts::default();
        if !cgroup.container.as_ref().is_some_and(is_new) {
            return;
        }
        let user = cgroup.user();
        let Some(container) = &mut cgroup.container else {
            return;
        };
        let Some(id) = &container.id else {
            return;
        };
        let wanted = Wanted {
            runtime: container.runtime,
            id: id.clone(),
            pod_uid: container.pod_uid.clone(),
            user,
        };
        match self.look_up(wanted) {
            Ok(entry) => add(container, entry),
            Err(why) => container.facts.unread = Some(why),
        }
    }

    fn look_up(&self, wanted: Wanted) -> Result<Entry, Arc<str>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (wanted.runtime, wanted.id.clone());
        if let Some(known) = state.known.get(&key) {
            return known.clone();
        }
        let reader = state.reader.get_or_insert_with(|| self.start());
        let answer = match reader {
            Ok(started) => match started.ask(wanted) {
                Ok(answer) => answer.map_err(Arc::from),
                Err(why) => {
                    let failed = std::mem::replace(reader, Err(Arc::clone(&why)));
                    state.late = failed.ok().map(|reader| reader.thread);
                    Err(why)
                }
            },
            Err(why) => Err(Arc::clone(why)),
        };
        state.known.insert(key, answer.clone());
        answer
    }

    /// The same, without what was read so far. `None` while a file system does not answer: another reader would hang as well.
    pub fn renewed(&self) -> Option<Self> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let hangs = |thread: &JoinHandle<()>| !thread.is_finished();
        let is_new = !state.late.as_ref().is_some_and(hangs);
        is_new.then(|| Names::of(&self.host_root, &self.proc, self.of_all))
    }

    /// The directories with names that exist.
    ///
    /// # Errors
    /// The root cannot be opened, or a file system does not answer.
    pub fn directories(&self) -> Result<Vec<NameDirectory>, String> {
        let (found, directories) = mpsc::channel();
        let (path, proc) = (self.host_root.clone(), self.proc.clone());
        let work = move || {
            let root = as_caller(|| HostRoot::open(&path, Arc::default()));
            let listed = match root {
                Ok(root) => Ok(Sources::new(root, proc).existing_directories()),
                Err(error) => Err(format!("{}: {error}", path.display())),
            };
            // The other end goes away if it has waited for too long.
            let _ = found.send(listed);
        };
        let thread = Builder::new().spawn(work);
        thread.map_err(|error| format!("cannot start a thread that reads them: {error}"))?;
        let answer = directories.recv_timeout(PATIENCE);
        answer.unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs())))
    }

    /// Starts the thread.
    fn start(&self) -> Result<Reader, Arc<str>> {
        let (requests, wanted) = mpsc::channel::<Wanted>();
        let (answer, answers) = mpsc::channel();
        let reading = Arc::new(Mutex::new(self.host_root.clone()));
        let (path, proc) = (self.host_root.clone(), self.proc.clone());
        let for_root = Arc::clone(&reading);
        let work = move || {
            let mut sources = match as_caller(|| HostRoot::open(&path, for_root)) {
                Ok(root) => Ok(Sources::new(root, proc)),
                Err(error) => Err(format!("{}: {error}", path.display())),
            };
            for wanted in wanted {
                let found = match &mut sources {
                    Ok(sources) => sources.look_up(&wanted),
                    Err(why) => Err(why.clone()),
                };
                // The other end goes away if it has waited for too long.
                if answer.send(found).is_err() {
                    return;
                }
            }
        };
        let thread = Builder::new().spawn(work);
        let thread =
            thread.map_err(|error| format!("cannot start a thread that reads it: {error}"))?;
        Ok(Reader {
            requests,
            answers,
            reading,
            thread,
        })
    }
}

impl Reader {
    /// # Errors
    /// The thread does not answer. The text says what it reads.
    fn ask(&self, wanted: Wanted) -> Result<Result<Entry, String>, Arc<str>> {
        let sent = self.requests.send(wanted).is_ok();
        let answer = match sent {
            true => self.answers.recv_timeout(PATIENCE),
            false => Err(RecvTimeoutError::Disconnected),
        };
        answer.map_err(|error| {
            let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
            let path = reading.display();
            match error {
                RecvTimeoutError::Timeout => {
                    format!("{path}: no answer within {} s", PATIENCE.as_secs()).into()
                }
                RecvTimeoutError::Disconnected => format!("{path}: its reader has ended").into(),
            }
        })
    }
}

/// Adds `entry` to what the cgroup says.
fn add(container: &mut Container, entry: Entry) {
    let Entry {
        name,
        image,
        pod,
        namespace,
        pod_uid,
        compose_service,
        is_complete,
    } = entry;
    container.name = container.name.take().or(name);
    container.pod_uid = container.pod_uid.take().or(pod_uid);
    container.facts = Facts {
        image,
        pod,
        namespace,
        compose_service,
        // Podman keeps labels and pods in a database.
        was_read: is_complete && container.runtime != Runtime::Podman,
        unread: None,
    };
}
