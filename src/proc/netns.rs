//! Network namespaces: how to find them, their names, and how to run work in one.
//!
//! The device and inode of its file in nsfs identify a namespace. A name or a process does not: each can move to another namespace.
//! An open file keeps the namespace alive.
//!
//! A path from the command line may name anything, and with file capabilities cwkill may open what its caller may not. So a file is
//! opened only as a place (O_PATH) until it has proved to be one of nsfs: to open a FIFO or a device has effects. And a path is
//! followed with the rights of the caller. Names and pids are not: they stand for namespaces that cwkill shows to its caller anyway.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use rayon::prelude::*;

use super::mounts::network_namespaces;
use super::{AbsentOwner, ProcFs, Unnamed, is_missing};
use crate::sys;
use crate::sys::caller::as_caller;

/// The directories in which ip-netns(8) and docker keep the names of namespaces.
const NAME_DIRECTORIES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// A thread reads the namespaces of so many processes or more, about 2 µs each.
const PIDS_AT_ONCE: usize = 64;

/// The sockets of at most so many namespaces are counted, about 70 µs each.
const COUNTED_NAMESPACES: usize = 256;

/// The device and inode of a namespace in nsfs.
pub(crate) type NetnsId = (u64, u64);

/// A network namespace, kept alive by an open file.
#[derive(Debug)]
pub struct Netns {
    id: NetnsId,
    /// Its name in ip-netns(8) or docker, if it has one.
    pub name: Option<String>,
    /// `None` for the current namespace, which need not be entered.
    file: Option<File>,
}

/// The network namespaces that the operator selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetnsScope {
    /// The namespace that cwkill runs in.
    Current,
    /// A name, a path, or the pid of a process in it.
    Named(String),
    /// Every namespace that cwkill can find.
    All,
}

/// The namespaces that cwkill found.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// The namespaces that cwkill can work in, the current one first.
    pub open: Vec<Arc<Netns>>,
    /// The number of namespaces that cwkill cannot open.
    pub unreachable: usize,
    /// Why the first of them cannot be opened.
    pub failure: Option<io::Error>,
    /// The number of processes whose namespace is unknown.
    pub unknown: usize,
    /// Why the namespace of the first of them is unknown.
    pub unknown_because: Option<io::Error>,
    /// Names without a namespace: it is gone, or mounted only in another mount namespace.
    pub stale_names: Vec<String>,
    /// Whether every namespace is in scope.
    pub everywhere: bool,
    /// Whether the namespaces of the sockets of the selected owners are in scope.
    pub follows_owners: bool,
    /// The number of namespaces that cwkill can see and that are not in scope, because the operator named none.
    pub left_out: usize,
    /// The number of TCP sockets in these; `None` if it is not known of each.
    pub left_out_sockets: Option<usize>,
    /// The selected owners that do not exist.
    pub absent: Vec<AbsentOwner>,
    /// Processes that may be selected: the name of their container could not be read.
    pub unnamed: Unnamed,
    /// Notes on the selected owners.
    pub notes: Vec<String>,
    /// Whether no process is selected, so that no socket can match.
    pub nobody: bool,
}

impl Namespaces {
    /// Adds the namespaces that these processes are in.
    pub(crate) fn add_of_processes(&mut self, proc: &ProcFs, pids: &[i32]) {
        let mut seen: HashSet<NetnsId> = self.open.iter().map(|netns| netns.id()).collect();
        let names = names();
        for pid in pids {
            let path = netns_path(proc, *pid);
            match fs::metadata(&path).map(|metadata| id(&metadata)) {
                Ok(id) if seen.contains(&id) => {}
                // Also of a zombie and of a kernel thread.
                Err(error) if is_missing(&error) => {}
                Err(error) => {
                    self.unknown += 1;
                    self.unknown_because.get_or_insert(error);
                }
                Ok(_) => match Netns::at(&path) {
                    Ok(netns) if seen.insert(netns.id) => {
                        self.open.push(Arc::new(netns.with_name_of(&names)));
                    }
                    Ok(_) => {}
                    Err(error) if is_missing(&error) => {}
                    Err(error) => {
                        self.unreachable += 1;
                        self.failure.get_or_insert(error);
                    }
                },
            }
        }
    }

    /// Counts the namespaces that are not open, and the sockets in them.
    pub(crate) fn count_left_out(&mut self, proc: &ProcFs) {
        let mut left_out = seen(proc).unwrap_or_default();
        for netns in &self.open {
            left_out.remove(&netns.id());
        }
        self.left_out = left_out.len();
        let is_known = left_out.len() <= COUNTED_NAMESPACES;
        self.left_out_sockets = match is_known {
            true => {
                let each = left_out.into_par_iter();
                each.map(|(id, pid)| tcp_sockets(proc, id, pid?)).sum()
            }
            false => None,
        };
    }
}

impl NetnsScope {
    /// Opens the selected namespaces.
    ///
    /// # Errors
    /// /proc is not mounted, or the named namespace cannot be opened.
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
    /// The inode that `ls -L -i /proc/PID/ns/net` shows.
    pub fn inode(&self) -> u64 {
        self.id.1
    }

    /// The device and inode in nsfs, which identify the namespace.
    pub(crate) fn id(&self) -> NetnsId {
        self.id
    }

    /// The namespace of a socket.
    ///
    /// # Errors
    /// As [`sys::socket_netns`].
    pub(crate) fn of_socket(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let file = File::from(sys::socket_netns(socket)?);
        Ok(Netns {
            id: id(&file.metadata()?),
            name: None,
            file: Some(file),
        })
    }

    /// The same, with the name that `ip netns` or docker gives it.
    pub(crate) fn named_if_known(self) -> Self {
        self.with_name_of(&names())
    }

    fn with_name_of(self, names: &HashMap<NetnsId, String>) -> Self {
        let name = names.get(&self.id).cloned();
        Netns { name, ..self }
    }

    /// The name, or the inode if it has no name.
    pub fn label(&self) -> String {
        match &self.name {
            Some(name) => name.clone(),
            None => self.inode().to_string(),
        }
    }

    /// Runs `work` in the namespace, on a new thread that ends with the work.
    ///
    /// # Errors
    /// EAGAIN: no thread can be started. EPERM: needs CAP_SYS_ADMIN in the own user namespace and in that of the namespace.
    /// Source: net/core/net_namespace.c, netns_install.
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

    fn current(names: &HashMap<NetnsId, String>) -> io::Result<Self> {
        let id = id(&fs::metadata("/proc/thread-self/ns/net")?);
        Ok(Netns {
            id,
            name: names.get(&id).cloned(),
            file: None,
        })
    }

    /// Opens the namespace that `text` names: a path, otherwise a name, otherwise a pid.
    fn named(text: &str, proc: &ProcFs) -> io::Result<Self> {
        let netns = match Named::of(text) {
            Named::Path(path) => as_caller(|| Self::at(&path)),
            Named::Pid(pid) => {
                let netns = Self::at(&proc.path(&format!("{pid}/ns/net")));
                netns.map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => io::Error::new(
                        error.kind(),
                        format!(
                            "there is no process {pid}; give a process number, a name that `ip netns` lists, or a path"
                        ),
                    ),
                    _ => error,
                })
            }
            Named::Name => Self::with_name(text).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::NotFound,
                    "/run/netns has no such name; give a name that `ip netns` lists, a path, or a process number",
                )
            }),
        }?;
        let names = names();
        let current = Self::current(&names)?;
        if netns.id == current.id {
            return Ok(current);
        }
        Ok(netns.with_name_of(&names))
    }

    /// Opens the namespace with this name. `None` if there is none, or if the file of the name is something else: the
    /// caller may not be permitted to know of that file.
    fn with_name(name: &str) -> Option<Self> {
        named_files()
            .into_iter()
            .filter(|path| path.file_name().is_some_and(|file| file == name))
            .find_map(|path| Self::at(&path).ok())
    }

    fn at(path: &Path) -> io::Result<Self> {
        let place = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)?;
        let not_a_namespace = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a network namespace; give a name that `ip netns` lists, a process number, or /proc/PID/ns/net",
            )
        };
        if fstatfs(&place)?.filesystem_type() != NSFS_MAGIC {
            return Err(not_a_namespace());
        }
        // This opens the file that was checked, even if its path leads to another by now.
        let file = File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
        // Kernels before 4.11 do not tell, and refuse another type only when cwkill wants to enter it.
        if sys::namespace_type(file.as_fd()).is_ok_and(|kind| kind != libc::CLONE_NEWNET) {
            return Err(not_a_namespace());
        }
        Ok(Netns {
            id: id(&file.metadata()?),
            name: None,
            file: Some(file),
        })
    }
}

/// What `--netns` names.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Path(PathBuf),
    /// A process, by its pid or as `/proc/PID/ns/net`.
    Pid(u32),
    /// A file in one of [`NAME_DIRECTORIES`].
    Name,
}

impl Named {
    fn of(text: &str) -> Self {
        let pid = |text: &str| text.parse().ok();
        let of_process = |text: &str| pid(text.strip_prefix("/proc/")?.strip_suffix("/ns/net")?);
        match (of_process(text), text.contains('/'), pid(text)) {
            (Some(pid), ..) => Named::Pid(pid),
            (None, true, _) => Named::Path(text.into()),
            // A name may be a number.
            (None, false, Some(pid)) if Netns::with_name(text).is_none() => Named::Pid(pid),
            (None, false, _) => Named::Name,
        }
    }
}

fn id(metadata: &fs::Metadata) -> NetnsId {
    (metadata.dev(), metadata.ino())
}

/// The names of namespaces, by device and inode.
fn names() -> HashMap<NetnsId, String> {
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

/// Opens every namespace that has a process, a name or a mount, each once.
fn all(proc: &ProcFs) -> io::Result<Namespaces> {
    let names = names();
    let current = Netns::current(&names)?;
    let mut seen = HashSet::from([current.id]);
    let mut found = Namespaces {
        open: vec![Arc::new(current)],
        everywhere: true,
        ..Namespaces::default()
    };
    let processes = proc.pids()?;
    let processes = processes.into_iter().map(|pid| netns_path(proc, pid));
    let mounted: Vec<PathBuf> = network_namespaces(&proc.mounts()?).collect();
    let named = named_files();
    let is_name = |path: &Path| named.iter().any(|name| name == path);
    let stale = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    for path in processes.chain(named.iter().cloned()).chain(mounted) {
        let known = match fs::metadata(&path) {
            Ok(metadata) => seen.contains(&id(&metadata)),
            // Also for a zombie and for a kernel thread.
            Err(error) if is_missing(&error) => true,
            // For example a loop of symbolic links.
            Err(_) if is_name(&path) => {
                found.stale_names.push(stale(&path));
                true
            }
            Err(error) => {
                found.unknown += 1;
                found.unknown_because.get_or_insert(error);
                true
            }
        };
        if known {
            continue;
        }
        match Netns::at(&path) {
            // The opened file decides: a later process may have taken the pid since the check above.
            Ok(netns) if seen.insert(netns.id) => {
                found.open.push(Arc::new(netns.with_name_of(&names)));
            }
            Ok(_) => {}
            // Another process of the same namespace may still exist.
            Err(error) if is_missing(&error) => {}
            // A plain file, on which a namespace was mounted once, or is in another mount namespace.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && is_name(&path) => {
                found.stale_names.push(stale(&path));
            }
            Err(error) => {
                found.unreachable += 1;
                found.failure.get_or_insert(error);
            }
        }
    }
    Ok(found)
}

fn netns_path(proc: &ProcFs, pid: i32) -> PathBuf {
    proc.path(&format!("{pid}/ns/net"))
}

/// The namespaces that have a process, a name or a mount, except those of processes that cwkill may not read.
///
/// # Errors
/// /proc cannot be read.
pub(crate) fn ids(proc: &ProcFs) -> io::Result<HashSet<NetnsId>> {
    Ok(seen(proc)?.into_keys().collect())
}

/// The same namespaces, each with a process that is in it, if there is one.
fn seen(proc: &ProcFs) -> io::Result<HashMap<NetnsId, Option<i32>>> {
    let id_of = |path: PathBuf| Some(id(&fs::metadata(path).ok()?));
    let pids = proc.pids()?.into_par_iter().with_min_len(PIDS_AT_ONCE);
    let of_processes = pids.filter_map(|pid| Some((id_of(netns_path(proc, pid))?, Some(pid))));
    let mut seen: HashMap<NetnsId, Option<i32>> = of_processes.collect();
    // A file of a name that is left over is none of nsfs, and has another device.
    let nsfs: HashSet<u64> = seen.keys().map(|(device, _)| *device).collect();
    let mounted: Vec<PathBuf> = network_namespaces(&proc.mounts()?).collect();
    let named = named_files().into_iter().chain(mounted).filter_map(id_of);
    for id in named.filter(|(device, _)| nsfs.contains(device)) {
        seen.entry(id).or_default();
    }
    Ok(seen)
}

/// The number of TCP sockets in a namespace; `None` if it cannot be read, or if the process is not in that namespace any more.
fn tcp_sockets(proc: &ProcFs, netns: NetnsId, pid: i32) -> Option<usize> {
    let sockets = proc.tcp_sockets_around(pid)?;
    let is_in_it = id_of_process(proc, pid).is_ok_and(|id| id == netns);
    is_in_it.then_some(sockets)
}

/// The namespace that process `pid` is in.
///
/// # Errors
/// The process is gone, or cwkill is not permitted to read its namespace.
pub(crate) fn id_of_process(proc: &ProcFs, pid: i32) -> io::Result<NetnsId> {
    Ok(id(&fs::metadata(netns_path(proc, pid))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inode_of_nsfs_identifies_the_current_namespace() {
        let current = NetnsScope::Current.open(&ProcFs::default()).unwrap();
        let link = fs::read_link("/proc/thread-self/ns/net").unwrap();
        let text = format!("net:[{}]", current.open[0].inode());
        assert_eq!(link.to_string_lossy(), text);
        assert!(
            current.open[0].within(|| true).unwrap(),
            "needs no privilege"
        );
    }

    #[test]
    fn any_name_of_the_current_namespace_opens_it() {
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
    fn only_a_network_namespace_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo = fifo.to_str().unwrap();
        for text in [fifo, "/dev/null", "/", "/proc/self/ns/mnt", "/proc/self/fd"] {
            let opened = NetnsScope::Named(text.into()).open(&ProcFs::default());
            let error = opened.unwrap_err().to_string();
            assert!(error.contains("not a network namespace"), "{text}: {error}");
        }
    }

    #[test]
    fn the_path_of_a_process_is_its_pid() {
        assert_eq!(Named::of("/proc/4711/ns/net"), Named::Pid(4711));
        assert_eq!(Named::of("4711"), Named::Pid(4711));
        assert_eq!(Named::of("blue"), Named::Name);
        for path in [
            "/proc/self/ns/net",
            "/proc/4711/ns/mnt",
            "/proc/../ns/net",
            "/proc/4711/cwd/ns/net",
            "./blue",
        ] {
            assert_eq!(Named::of(path), Named::Path(path.into()), "{path}");
        }
    }

    #[test]
    fn every_namespace_is_found_once() {
        let found = all(&ProcFs::default()).unwrap();
        let ids: std::collections::HashSet<_> = found.open.iter().map(|n| n.id).collect();
        assert_eq!(ids.len(), found.open.len());
    }
}
