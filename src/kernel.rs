//! The version of the running kernel, for the few decisions that depend on it and cannot be probed.

use nix::sys::utsname::uname;

/// The first two numbers of a kernel release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion(pub u32, pub u32);

impl KernelVersion {
    /// From this version on, an aborted orphan always goes away.
    ///
    /// Before commit bac76cf89816b ("tcp: fix forever orphan socket caused by tcp_abort"), tcp_abort stopped the timer of an orphan
    /// in FIN-WAIT-1 without removing the socket. An older kernel of a distribution may have the fix. cwkill cannot see that, and
    /// treats it as a kernel without the fix.
    pub const ABORTS_ORPHANS: KernelVersion = KernelVersion(6, 11);

    /// From this version on, bpf(2) needs no capability for what is loaded already.
    pub const FREES_LOADED_ITERATORS: KernelVersion = KernelVersion(5, 19);

    /// The version of the running kernel; 0.0 if it cannot be read.
    pub fn running() -> Self {
        uname()
            .ok()
            .and_then(|name| Self::parse(name.release().to_str()?))
            .unwrap_or(KernelVersion(0, 0))
    }

    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        let mut number = || numbers.next()?.parse().ok();
        Some(KernelVersion(number()?, number()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions() {
        let parse = KernelVersion::parse;
        assert_eq!(parse("6.11.0-8-generic"), Some(KernelVersion(6, 11)));
        assert_eq!(parse("5.14.0-427.el9.x86_64"), Some(KernelVersion(5, 14)));
        assert_eq!(parse("6.12-rc3"), Some(KernelVersion(6, 12)));
        assert_eq!(parse("linux"), None);
        assert!(KernelVersion(6, 9) < KernelVersion::ABORTS_ORPHANS);
        assert!(KernelVersion(7, 0) > KernelVersion::ABORTS_ORPHANS);
    }

    #[test]
    fn the_running_kernel_has_a_version() {
        assert!(KernelVersion::running() > KernelVersion(2, 6));
    }
}
