//! Network namespaces: which one we are in and what it is called.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    /// Its inode in nsfs, as `ls -L -i /proc/PID/ns/net` shows it.
    pub inode: u64,
    /// Its name for ip-netns(8), if it has one.
    pub name: Option<String>,
}

impl Netns {
    /// The namespace of the calling thread; `names` is the directory of named ones.
    ///
    /// # Errors
    /// /proc is not mounted.
    pub fn of_this_thread(names: &Path) -> io::Result<Self> {
        let this = fs::metadata("/proc/thread-self/ns/net")?;
        let same = |entry: &fs::DirEntry| {
            fs::metadata(entry.path())
                .is_ok_and(|named| (named.dev(), named.ino()) == (this.dev(), this.ino()))
        };
        let name = fs::read_dir(names)
            .into_iter()
            .flatten()
            .flatten()
            .find(same)
            .map(|entry| entry.file_name().to_string_lossy().into_owned());
        Ok(Netns {
            inode: this.ino(),
            name,
        })
    }
}
