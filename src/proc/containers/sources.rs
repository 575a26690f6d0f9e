//! Which files name the containers of a runtime.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::NameDirectory;
use super::files::{HostRoot, MAX_FILE, MAX_TABLE, ReadError, Why};
use super::parse::{self, Entry};
use crate::proc::cgroup::Runtime;

/// Where runtimes keep their bundles.
const TASKS: [&str; 4] = [
    "/run/containerd",
    "/run/k3s/containerd",
    "/run/docker/containerd/daemon",
    "/var/snap/microk8s/common/run/containerd",
];
const DOCKER_ROOTS: [&str; 2] = ["/var/lib/docker", "/var/snap/docker/common/var-lib-docker"];
const STORAGE_ROOT: &str = "/var/lib/containers/storage";
/// The storage drivers, each of which has a table of its own.
const LOGS_OF_CONTAINERS: &str = "/var/log/containers";
const LOGS_OF_PODS: &str = "/var/log/pods";
/// Of containers/storage, for what does not outlive a boot.
const VOLATILE_STORAGE: &str = "/run/containers/storage";
const DRIVERS: [&str; 4] = ["overlay", "vfs", "btrfs", "zfs"];
/// The second one is of containers that do not outlive a boot.
const TABLES: [&str; 2] = ["containers.json", "volatile-containers.json"];

/// The directory with the bundles of a containerd.
fn tasks_below(base: &str) -> String {
    format!("{base}/io.containerd.runtime.v2.task")
}

/// A container, as its cgroup shows it.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub runtime: Runtime,
    pub id: String,
    pub pod_uid: Option<String>,
    /// The user whose systemd runs it; `None` for root.
    pub user: Option<u32>,
}

/// Reads the files, each one at most once if it is about more than one container.
pub(super) struct Sources {
    root: HostRoot,
    /// The directory with the processes, in which a running dockerd is found.
    proc: PathBuf,
    docker_roots: Option<Vec<String>>,
    roots_of_running: Option<Vec<String>>,
    storage_root: Option<String>,
    tables: HashMap<String, Result<HashMap<String, Entry>, String>>,
    directories: HashMap<String, Result<Vec<String>, String>>,
}

/// The entry of a container; `Ok(None)` if no file is about it.
type Found = Result<Option<Entry>, ReadError>;

/// A search in several places. A place that cannot be read does not keep it from the others.
#[derive(Default)]
struct Search {
    entry: Option<Entry>,
    failure: Option<ReadError>,
}

impl Search {
    /// Adds what a place has. Whether it has the entry.
    fn has_found(&mut self, found: Found) -> bool {
        match found {
            Ok(entry) => self.entry = entry,
            Err(error) => {
                self.failure.get_or_insert(error);
            }
        }
        self.entry.is_some()
    }

    /// The entry; or why it may be in a place that could not be read.
    fn end(self) -> Found {
        match (self.entry, self.failure) {
            (None, Some(failure)) => Err(failure),
            (entry, _) => Ok(entry),
        }
    }
}

impl Sources {
    pub fn new(root: HostRoot, proc: PathBuf) -> Self {
        Sources {
            root,
            proc,
            docker_roots: None,
            roots_of_running: None,
            storage_root: None,
            tables: HashMap::new(),
            directories: HashMap::new(),
        }
    }

    /// What the files say about a container.
    ///
    /// # Errors
    /// Why its name is unknown.
    pub fn look_up(&mut self, wanted: &Wanted) -> Result<Entry, String> {
        let mut failure = None;
        let mut partial = None;
        for source in sources(wanted.runtime) {
            match source(self, wanted) {
                Ok(Some(entry)) if entry.name.is_some() => return Ok(entry),
                Ok(Some(entry)) => {
                    partial.get_or_insert(entry);
                }
                Ok(None) => {}
                Err(error) => {
                    failure.get_or_insert(error.to_string());
                }
            }
        }
        match (partial, failure) {
            (Some(entry), _) => Ok(entry),
            (None, Some(failure)) => Err(failure),
            (None, None) => Err(format!(
                "no file about it, for example {}",
                self.root.path(&example(wanted)).display()
            )),
        }
    }

    /// The directories with names that exist.
    pub fn existing_directories(&mut self) -> Vec<NameDirectory> {
        let mut paths: Vec<String> = Vec::new();
        for root in self
            .docker_roots()
            .into_iter()
            .chain(self.roots_of_running())
        {
            paths.push(format!("{root}/containers"));
        }
        let storage = self.storage_root();
        for root in [storage.as_str(), VOLATILE_STORAGE] {
            paths.extend(DRIVERS.map(|driver| format!("{root}/{driver}-containers")));
        }
        paths.extend(TASKS.map(tasks_below));
        paths.extend([LOGS_OF_CONTAINERS, LOGS_OF_PODS].map(str::to_owned));
        let mut found: Vec<NameDirectory> = Vec::new();
        for path in paths {
            let error = match self.root.names(&path) {
                Ok(_) => None,
                Err(error) if error.is_missing() => continue,
                Err(error) => Some(error.why.to_string()),
            };
            let path = self.root.path(&path).display().to_string();
            if found.iter().all(|known| known.path != path) {
                found.push(NameDirectory { path, error });
            }
        }
        found
    }

    fn docker(&mut self, wanted: &Wanted) -> Found {
        let mut roots = self.docker_roots();
        if let Some(home) = self.home(wanted) {
            roots.insert(0, format!("{home}/.local/share/docker"));
        }
        let mut search = Search::default();
        for root in &roots {
            let found = self.docker_below(root, wanted);
            if search.has_found(found) {
                return search.end();
            }
        }
        for root in self.roots_of_running() {
            let found = self.docker_below(&root, wanted);
            if search.has_found(found) {
                break;
            }
        }
        search.end()
    }

    fn docker_below(&mut self, root: &str, wanted: &Wanted) -> Found {
        if let Some(entry) = self.docker_in(root, wanted)? {
            return Ok(Some(entry));
        }
        // With users of its own (userns-remap), a daemon has its files one directory below.
        let is_of_users = |name: &&String| {
            let ids = name.split_once('.');
            ids.is_some_and(|(uid, gid)| uid.parse::<u32>().is_ok() && gid.parse::<u32>().is_ok())
        };
        let names = self.names(root)?;
        for name in names.iter().filter(is_of_users) {
            if let Some(entry) = self.docker_in(&format!("{root}/{name}"), wanted)? {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    fn docker_in(&self, root: &str, wanted: &Wanted) -> Found {
        let id = &wanted.id;
        let path = format!("{root}/containers/{id}/config.v2.json");
        match self.read_if_there(&path, MAX_FILE)? {
            Some(text) => self.parsed(&path, parse::docker(&text, id)).map(Some),
            None => Ok(None),
        }
    }

    /// The data roots of the usual configuration.
    fn docker_roots(&mut self) -> Vec<String> {
        if self.docker_roots.is_none() {
            let configured = self.docker_root_in("/etc/docker/daemon.json");
            let roots = configured
                .into_iter()
                .chain(DOCKER_ROOTS.map(str::to_owned));
            self.docker_roots = Some(roots.collect());
        }
        self.docker_roots.clone().unwrap_or_default()
    }

    fn docker_root_in(&self, config: &str) -> Option<String> {
        let text = self.root.read(config, MAX_FILE).ok()?;
        parse::docker_data_root(&text)
    }

    /// The data roots in the arguments of running daemons. They are searched only if the usual roots do not have a container.
    fn roots_of_running(&mut self) -> Vec<String> {
        if self.roots_of_running.is_none() {
            let mut roots = Vec::new();
            let processes = fs::read_dir(&self.proc).into_iter().flatten().flatten();
            for process in processes {
                let directory = process.path();
                if fs::read(directory.join("comm")).is_ok_and(|comm| comm == b"dockerd\n")
                    && self.is_trusted(&directory)
                {
                    let arguments = fs::read(directory.join("cmdline")).unwrap_or_default();
                    let (root, config) = parse::dockerd_arguments(&arguments);
                    let configured = || self.docker_root_in(&config?);
                    roots.extend(root.or_else(configured));
                }
            }
            self.roots_of_running = Some(roots);
        }
        self.roots_of_running.clone().unwrap_or_default()
    }

    /// Whether a process of this name can be the daemon of the host: everybody may give a process of his own that name, and so may the
    /// root of a container.
    fn is_trusted(&self, process: &Path) -> bool {
        let uid = fs::metadata(process).map(|process| process.uid());
        let is_ours = uid.is_ok_and(|uid| uid == 0 || uid == geteuid().as_raw());
        let mounts = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
        let of_host = mounts(&self.proc.join("1"));
        is_ours && (of_host.is_none() || of_host == mounts(process))
    }

    fn storage(&mut self, wanted: &Wanted) -> Found {
        let root = match (wanted.user, self.home(wanted)) {
            (Some(uid), Some(home)) => self.storage_root_of(uid, &home),
            (Some(_), None) => return Ok(None),
            (None, _) => self.storage_root(),
        };
        let mut search = Search::default();
        for driver in DRIVERS {
            for table in TABLES {
                let path = format!("{root}/{driver}-containers/{table}");
                let found = self.table(&path);
                let found = found.map(|table| table.get(&wanted.id).cloned());
                if search.has_found(found) {
                    return search.end();
                }
            }
        }
        search.end()
    }

    /// The table at `path`; empty if there is none.
    fn table(&mut self, path: &str) -> Result<&HashMap<String, Entry>, ReadError> {
        if !self.tables.contains_key(path) {
            let table = match self.read_if_there(path, MAX_TABLE) {
                Ok(Some(text)) => parse::storage(&text),
                Ok(None) => Ok(HashMap::new()),
                // Kept, so that it is not read again for each container.
                Err(error) => Err(error.why.to_string()),
            };
            self.tables.insert(path.to_owned(), table);
        }
        let table = self.tables[path].as_ref();
        table.map_err(|why| self.root.error(path, Why::Content(why.clone())))
    }

    fn storage_root(&mut self) -> String {
        if self.storage_root.is_none() {
            let configured = || {
                let text = self
                    .root
                    .read("/etc/containers/storage.conf", MAX_FILE)
                    .ok()?;
                let value = parse::storage_setting(&String::from_utf8_lossy(&text), "graphroot")?;
                parse::with_variables(&value, "/root", 0)
            };
            self.storage_root = Some(configured().unwrap_or_else(|| STORAGE_ROOT.to_owned()));
        }
        self.storage_root.clone().unwrap_or_default()
    }

    /// The storage of a user: that of his own configuration, or of the configuration for all users, or the usual one.
    fn storage_root_of(&self, uid: u32, home: &str) -> String {
        let setting = |path: &str, key: &str| {
            let text = self.root.read(path, MAX_FILE).ok()?;
            let value = parse::storage_setting(&String::from_utf8_lossy(&text), key)?;
            parse::with_variables(&value, home, uid)
        };
        let own = format!("{home}/.config/containers/storage.conf");
        setting(&own, "graphroot")
            .or_else(|| setting(&own, "rootless_storage_path"))
            .or_else(|| setting("/etc/containers/storage.conf", "rootless_storage_path"))
            .unwrap_or_else(|| format!("{home}/.local/share/containers/storage"))
    }

    /// The bundle of containerd.
    fn task(&mut self, wanted: &Wanted) -> Found {
        let mut search = Search::default();
        for base in TASKS {
            let tasks = tasks_below(base);
            let found = self.task_below(&tasks, wanted);
            if search.has_found(found) {
                break;
            }
        }
        search.end()
    }

    /// Below the directory with one for each of containerd's namespaces: `k8s.io`, `default`, `moby`, or whatever nerdctl is told.
    fn task_below(&mut self, tasks: &str, wanted: &Wanted) -> Found {
        for namespace in self.names(tasks)? {
            let path = format!("{tasks}/{namespace}/{}/config.json", wanted.id);
            if let Some(text) = self.read_if_there(&path, MAX_FILE)? {
                return self.parsed(&path, parse::oci(&text)).map(Some);
            }
        }
        Ok(None)
    }

    /// The bundle of CRI-O.
    fn userdata(&mut self, wanted: &Wanted) -> Found {
        let mut search = Search::default();
        for root in [VOLATILE_STORAGE.to_owned(), self.storage_root()] {
            for driver in DRIVERS {
                let id = &wanted.id;
                let path = format!("{root}/{driver}-containers/{id}/userdata/config.json");
                let found = self.read_if_there(&path, MAX_FILE).and_then(|text| {
                    let parsed = |text: Vec<u8>| self.parsed(&path, parse::oci(&text));
                    text.map(parsed).transpose()
                });
                if search.has_found(found) {
                    return search.end();
                }
            }
        }
        search.end()
    }

    /// The names that the kubelet gives to logs.
    fn logs(&mut self, wanted: &Wanted) -> Found {
        let mut search = Search::default();
        let names = self
            .names(LOGS_OF_CONTAINERS)
            .map(|names| parse::log_of_container(names.iter().map(String::as_str), &wanted.id));
        if search.has_found(names) {
            return search.end();
        }
        if let Some(uid) = &wanted.pod_uid {
            let names = self
                .names(LOGS_OF_PODS)
                .map(|names| parse::log_of_pod(names.iter().map(String::as_str), uid));
            search.has_found(names);
        }
        search.end()
    }

    /// The names in a directory; none if there is no such directory.
    fn names(&mut self, path: &str) -> Result<Vec<String>, ReadError> {
        if !self.directories.contains_key(path) {
            let names = match self.root.names(path) {
                Ok(names) => Ok(names),
                Err(error) if error.is_missing() => Ok(Vec::new()),
                // Kept, so that it is not read again for each container.
                Err(error) => Err(error.why.to_string()),
            };
            self.directories.insert(path.to_owned(), names);
        }
        let names = self.directories[path].clone();
        names.map_err(|why| self.root.error(path, Why::Content(why)))
    }

    /// The home directory of the user who runs a container.
    fn home(&self, wanted: &Wanted) -> Option<String> {
        let uid = wanted.user?;
        let text = self.root.read("/etc/passwd", MAX_FILE).ok()?;
        parse::home_of(&String::from_utf8_lossy(&text), uid)
    }

    fn read_if_there(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, ReadError> {
        match self.root.read(path, limit) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn parsed(&self, path: &str, entry: Result<Entry, String>) -> Result<Entry, ReadError> {
        entry.map_err(|why| self.root.error(path, Why::Content(why)))
    }
}

type Source = fn(&mut Sources, &Wanted) -> Found;

/// The sources for the containers of a runtime, the best first.
fn sources(runtime: Runtime) -> &'static [Source] {
    match runtime {
        Runtime::Docker => &[Sources::docker, Sources::logs],
        Runtime::Podman => &[Sources::storage],
        Runtime::CriO => &[Sources::userdata, Sources::storage, Sources::logs],
        Runtime::Containerd => &[Sources::task, Sources::logs],
        Runtime::Kubernetes => &[
            Sources::task,
            Sources::userdata,
            Sources::docker,
            Sources::logs,
        ],
        // Their cgroups have the names.
        Runtime::Nspawn | Runtime::Lxc => &[],
    }
}

/// A file that would have the name.
fn example(wanted: &Wanted) -> String {
    let id = &wanted.id;
    match wanted.runtime {
        Runtime::Docker => format!("{}/containers/{id}/config.v2.json", DOCKER_ROOTS[0]),
        Runtime::Podman if wanted.user.is_some() => {
            "~/.local/share/containers/storage/overlay-containers/containers.json".to_owned()
        }
        Runtime::Podman | Runtime::CriO => {
            format!("{STORAGE_ROOT}/overlay-containers/containers.json")
        }
        _ => format!("{}/k8s.io/{id}/config.json", tasks_below(TASKS[0])),
    }
}

#[cfg(test)]
#[path = "sources_tests.rs"]
mod tests;
