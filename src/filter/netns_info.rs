//! The facts about a network namespace that an expression needs: interfaces, cgroups, ephemeral ports.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::net::if_::if_nametoindex;

use super::Namespace;
use crate::proc::{ProcFs, mounts};
use crate::sys::caller::as_caller;

/// The network namespace of the calling thread.
pub struct ThisNamespace {
    /// cwkill scans several namespaces. Then an interface that this one lacks is not an error: it may be in another namespace, and
    /// no socket here is bound to it.
    pub one_of_several: bool,
}

/// An index that no interface has: the kernel gives out indexes from 1 on (net/core/dev.c, dev_index_reserve).
const NO_INTERFACE: u32 = u32::MAX;

impl Namespace for ThisNamespace {
    fn ephemeral_ports(&self) -> io::Result<RangeInclusive<u16>> {
        // The file is valid for IPv6 too.
        let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
        let mut ports = text.split_whitespace().map(str::parse);
        match (ports.next(), ports.next()) {
            (Some(Ok(first)), Some(Ok(last))) => Ok(first..=last),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn interface(&self, name: &str) -> Option<u32> {
        let absent = self.one_of_several.then_some(NO_INTERFACE);
        if_nametoindex(name).ok().or(absent)
    }

    fn cgroup(&self, path: &str) -> Option<u64> {
        let root = mounts::cgroup2(&ProcFs::default().mounts().ok()?)?;
        let device = fs::metadata(&root).ok()?.dev();
        // As in ss: a directory, or a path below the mount point.
        let below = root.join(path.trim_start_matches('/'));
        [Path::new(path), &below].into_iter().find_map(|path| {
            let found = as_caller(|| fs::metadata(path)).ok()?;
            (found.dev() == device && found.is_dir()).then(|| found.ino())
        })
    }
}
