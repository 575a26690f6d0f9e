//! Sends records to the journal in its native protocol (systemd, JOURNAL_NATIVE_PROTOCOL.md): one datagram per record. A record
//! that is too long goes into a sealed memory file instead.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

const SOCKET: &str = "/run/systemd/journal/socket";

/// A socket for journald.
pub(super) struct Journal(UnixDatagram);

impl Journal {
    /// Opens the socket, and checks that journald listens. Every write fails if journald's queue stays full for `patience`.
    ///
    /// # Errors
    /// ENOENT, ECONNREFUSED: journald does not run. EAGAIN: it accepts no records.
    pub fn open(patience: Duration) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(patience))?;
        // journald ignores an empty message.
        socket.send_to(&[], SOCKET)?;
        Ok(Journal(socket))
    }

    /// # Errors
    /// As [`Journal::open`].
    pub fn send(&self, fields: &[(&str, &str)]) -> io::Result<()> {
        let record = encode(fields);
        match self.0.send_to(&record, SOCKET) {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => self.send_file(&record),
            other => other.map(drop),
        }
    }

    fn send_file(&self, record: &[u8]) -> io::Result<()> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create("cwkill", flags)?);
        file.write_all(record)?;
        let seals = SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_SEAL;
        let file = OwnedFd::from(file);
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let descriptors = [file.as_raw_fd()];
        sendmsg(
            self.0.as_raw_fd(),
            &[IoSlice::new(&[])],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::empty(),
            Some(&UnixAddr::new(SOCKET)?),
        )?;
        Ok(())
    }
}

/// Each field as name, newline, length (64 bits, little-endian), value, newline. In this form a value may contain any byte.
fn encode(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut record = Vec::with_capacity(2048);
    for (name, value) in fields {
        record.extend_from_slice(name.as_bytes());
        record.push(b'\n');
        record.extend_from_slice(&(value.len() as u64).to_le_bytes());
        record.extend_from_slice(value.as_bytes());
        record.push(b'\n');
    }
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_may_have_any_byte() {
        let record = encode(&[("A", "x\nB=y"), ("C", "")]);
        assert_eq!(
            record,
            b"A\n\x05\0\0\0\0\0\0\0x\nB=y\nC\n\0\0\0\0\0\0\0\0\n"
        );
    }
}
