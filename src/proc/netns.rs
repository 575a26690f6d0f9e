//! Network namespaces: which there are, what they are called, and how to work in one.
//!
//! A namespace is known by the device and inode of its file in nsfs, never by a name or a process:
//! both can be given to another. An open file keeps it alive.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::ProcFs;
use super::mounts::network_namespaces;

/// Where ip-netns(8) and docker keep names of namespaces.
const NAME_DIRECTORIES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// A network namespace that is kept alive.
#[derive(Debug)]
pub struct Netns {
    /// Its device and inode in nsfs.
    id: (u64, u64),
    /// Its name for ip-netns(8) or docker, if it has one.
    pub name: Option<String>,
    /// `None` for the one we are in, which needs no entering.
    file: Option<File>,
}

/// Which network namespaces to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetnsScope {
    /// The one we are in.
    Current,
    /// A name, a path, or the number of a process in it.
    Named(String),
    /// Every one that can be found.
    All,
}

/// The namespaces that were found.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// Those that can be worked in, ours first.
    pub open: Vec<Arc<Netns>>,
    /// How many others there are that cannot be opened.
    pub unreachable: usize,
    /// Why the first of them cannot.
    pub failure: Option<io::Error>,
    /// Processes whose namespace is unknown.
    pub unknown: usize,
}

impl NetnsScope {
    /// Opens the namespaces that are meant.
    ///
    /// # Errors
    /// /proc is not mounted, or the one that was named cannot be opened.
    pub fn open(&self, proc: &ProcFs) -> io::Result<Namespaces> {
        match self {
            NetnsScope::Current => Ok(Namespaces {
                open: vec![Arc::new(Netns::current(&names())?)],
                ..Namespaces::default()
            }),
            NetnsScope::Named(text) => Ok(Namespaces {
                open: vec![Arc::new(Netns::named(text, proc)?)],
                ..Namespaces::default()
            }),
            NetnsScope::All => all(proc),
        }
    }
}

impl Netns {
    /// The inode of the namespace, as `ls -L -i /proc/PID/ns/net` shows it.
    pub fn inode(&self) -> u64 {
        self.id.1
    }

    /// Its name, or its inode if it has none.
    pub fn label(&self) -> String {
        match &self.name {
            Some(name) => name.clone(),
            None => self.inode().to_string(),
        }
    }

    /// Runs `work` in the namespace, on a thread of its own that ends with it.
    ///
    /// # Errors
    /// EAGAIN: no thread can be started. EPERM: needs CAP_SYS_ADMIN, here and over the namespace. Source: net/core/net_namespace.c,
    /// netns_install.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let Some(file) = &self.file else {
            return Ok(work());
        };
        std::thread::scope(|scope| {
            let worker = std::thread::Builder::new().spawn_scoped(scope, || {
                setns(file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A namespace that cannot be entered, for tests without a kernel.
    #[cfg(test)]
    pub(crate) fn example(inode: u64, name: Option<&str>) -> Self {
        Netns {
            id: (4, inode),
            name: name.map(str::to_owned),
            file: None,
        }
    }

    fn current(names: &HashMap<(u64, u64), String>) -> io::Result<Self> {
        let id = id(&fs::metadata("/proc/thread-self/ns/net")?);
        Ok(Netns {
            id,
            name: names.get(&id).cloned(),
            file: None,
        })
    }

    /// The namespace that `text` names: a path, else a name, else a process.
    fn named(text: &str, proc: &ProcFs) -> io::Result<Self> {
        let named = NAME_DIRECTORIES.map(|directory| Path::new(directory).join(text));
        let path = if text.contains('/') {
            PathBuf::from(text)
        } else if let Some(path) = named.into_iter().find(|path| path.exists()) {
            path
        } else if let Ok(pid) = text.parse::<u32>() {
            proc.path(&format!("{pid}/ns/net"))
        } else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "/run/netns has no such name; give a name that `ip netns` lists, a path, or a process number",
            ));
        };
        let netns = Self::at(&path)?;
        let names = names();
        let current = Self::current(&names)?;
        if netns.id == current.id {
            return Ok(current);
        }
        let name = names.get(&netns.id).cloned();
        Ok(Netns { name, ..netns })
    }

    fn at(path: &Path) -> io::Result<Self> {
        // Should it be a FIFO, opening it would wait for a writer.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a network namespace; give a name that `ip netns` lists, a process number, or /proc/PID/ns/net",
            ));
        }
        Ok(Netns {
            id: id(&file.metadata()?),
            name: None,
            file: Some(file),
        })
    }
}

fn id(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The names of namespaces.
fn names() -> HashMap<(u64, u64), String> {
    let mut names = HashMap::new();
    for entry in named_files() {
        if let Ok(metadata) = fs::metadata(&entry)
            && let Some(name) = entry.file_name()
        {
            let name = name.to_string_lossy().into_owned();
            names.entry(id(&metadata)).or_insert(name);
        }
    }
    names
}

/// The files of named namespaces.
fn named_files() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = NAME_DIRECTORIES
        .iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
}

/// Every namespace that a process is in, that has a name, or that is mounted somewhere; each once.
fn all(proc: &ProcFs) -> io::Result<Namespaces> {
    let names = names();
    let current = Netns::current(&names)?;
    let mut seen = HashSet::from([current.id]);
    let mut found = Namespaces {
        open: vec![Arc::new(current)],
        ..Namespaces::default()
    };
    let processes = proc.pids()?;
    let processes = processes
        .into_iter()
        .map(|pid| proc.path(&format!("{pid}/ns/net")));
    let mounted: Vec<PathBuf> = network_namespaces(&proc.mounts()?).collect();
    for path in processes.chain(named_files()).chain(mounted) {
        let known = match fs::metadata(&path) {
            Ok(metadata) => seen.contains(&id(&metadata)),
            Err(error) if is_gone(&error) => true,
            Err(_) => {
                found.unknown += 1;
                true
            }
        };
        if known {
            continue;
        }
        match Netns::at(&path) {
            // By the file that was opened: the process may have made way for another since.
            Ok(netns) if seen.insert(netns.id) => {
                let name = names.get(&netns.id).cloned();
                found.open.push(Arc::new(Netns { name, ..netns }));
            }
            Ok(_) => {}
            // Another process of the same namespace may still be there.
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                found.unreachable += 1;
                found.failure.get_or_insert(error);
            }
        }
    }
    Ok(found)
}

/// The process is gone, or is a kernel thread or a zombie; a name that is no longer there.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_known_by_the_inode_of_nsfs() {
        let ours = NetnsScope::Current.open(&ProcFs::default()).unwrap();
        let link = fs::read_link("/proc/thread-self/ns/net").unwrap();
        let text = format!("net:[{}]", ours.open[0].inode());
        assert_eq!(link.to_string_lossy(), text);
        assert!(ours.open[0].within(|| true).unwrap(), "needs no privilege");
    }

    #[test]
    fn our_own_by_any_name_is_ours() {
        let pid = std::process::id().to_string();
        for text in [pid.as_str(), "/proc/self/ns/net"] {
            let found = NetnsScope::Named(text.into())
                .open(&ProcFs::default())
                .unwrap();
            assert!(found.open[0].file.is_none(), "{text}");
        }
        let unknown = NetnsScope::Named("no-such-name".into()).open(&ProcFs::default());
        assert!(unknown.unwrap_err().to_string().contains("/run/netns"));
    }

    #[test]
    fn every_namespace_is_found_once() {
        let found = all(&ProcFs::default()).unwrap();
        let ids: std::collections::HashSet<_> = found.open.iter().map(|n| n.id).collect();
        assert_eq!(ids.len(), found.open.len());
    }
}
