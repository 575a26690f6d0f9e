//! Puts the datagrams of a dump together, and finds out whether it is complete. Pure.

use std::io;

use super::codec::{self, Frame, Malformed, Protocol, SocketMessage};

/// The maximum number of attempts at a dump. An attempt fails if the kernel flags it as interrupted, or if it overruns the receive
/// queue.
pub(super) const DUMP_ATTEMPTS: u32 = 10;

/// Why a dump failed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// Every attempt was incomplete: the tables changed, or answers did not fit the receive queue.
    #[error(
        "each of {DUMP_ATTEMPTS} dumps was incomplete: the socket tables changed, or answers were lost; try again"
    )]
    Incomplete,
    /// The answer is not a sock_diag message.
    #[error("sock_diag: {}", .0.0)]
    Malformed(Malformed),
    /// The kernel refused, or the socket failed.
    #[error("sock_diag: {0}")]
    Io(io::Error),
}

impl From<io::Error> for DumpError {
    fn from(error: io::Error) -> Self {
        DumpError::Io(error)
    }
}

/// Repeats a dump until it is complete, up to [`DUMP_ATTEMPTS`] times.
pub(super) fn repeat<T>(
    mut once: impl FnMut() -> Result<Option<Vec<T>>, DumpError>,
) -> Result<Vec<T>, DumpError> {
    for _ in 0..DUMP_ATTEMPTS {
        if let Some(complete) = once()? {
            return Ok(complete);
        }
    }
    Err(DumpError::Incomplete)
}

/// The state of a dump after a datagram.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DumpState {
    More,
    Complete,
    Repeat,
}

/// Collects the datagrams of one dump. Pure, so that tests can feed it interrupted dumps.
pub(super) struct Assembly<T> {
    pub(super) sequence: u32,
    pub(super) protocol: Protocol,
    pub(super) interrupted: bool,
    pub(super) kept: Vec<T>,
}

impl<T> Assembly<T> {
    pub(super) fn new(sequence: u32, protocol: Protocol) -> Self {
        Assembly {
            sequence,
            protocol,
            interrupted: false,
            kept: Vec::new(),
        }
    }

    pub(super) fn feed(
        &mut self,
        datagram: &[u8],
        keep: &mut impl FnMut(SocketMessage) -> Option<T>,
    ) -> Result<DumpState, DumpError> {
        for framed in codec::frames(datagram, self.protocol) {
            let framed = framed.map_err(DumpError::Malformed)?;
            if framed.sequence != self.sequence {
                continue;
            }
            self.interrupted |= framed.interrupted;
            match framed.frame {
                Frame::Socket(message) => self.kept.extend(keep(message)),
                Frame::Done(0) if self.interrupted => return Ok(DumpState::Repeat),
                Frame::Done(0) => return Ok(DumpState::Complete),
                Frame::Done(errno) | Frame::Error(errno) => {
                    return Err(io::Error::from_raw_os_error(errno).into());
                }
                Frame::Ack | Frame::Other => {}
            }
        }
        Ok(DumpState::More)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testdata;
    use super::*;

    const NLM_F_DUMP_INTR: u16 = 0x10;

    /// A real dump, with this sequence number and these flags in each message.
    fn dump(sequence: u32, flags: u16) -> Vec<u8> {
        let mut bytes = testdata::bytes(testdata::DUMP_V4);
        let mut start = 0;
        while start < bytes.len() {
            let length = u32::from_ne_bytes(bytes[start..start + 4].try_into().unwrap());
            bytes[start + 6..start + 8].copy_from_slice(&flags.to_ne_bytes());
            bytes[start + 8..start + 12].copy_from_slice(&sequence.to_ne_bytes());
            start += usize::try_from(length).unwrap().next_multiple_of(4);
        }
        bytes
    }

    fn feed(assembly: &mut Assembly<SocketMessage>, datagram: &[u8]) -> DumpState {
        assembly.feed(datagram, &mut Some).unwrap()
    }

    #[test]
    fn a_whole_dump_is_complete() {
        let mut assembly = Assembly::new(5, Protocol::Tcp);
        assert_eq!(feed(&mut assembly, &dump(5, 2)), DumpState::Complete);
        assert_eq!(assembly.kept.len(), 2);
    }

    #[test]
    fn an_interrupted_dump_is_repeated() {
        let mut assembly = Assembly::new(5, Protocol::Tcp);
        let datagram = dump(5, 2 | NLM_F_DUMP_INTR);
        assert_eq!(feed(&mut assembly, &datagram), DumpState::Repeat);
    }

    #[test]
    fn an_interruption_in_an_early_datagram_is_not_forgotten() {
        let whole = dump(5, 2);
        let first = usize::try_from(u32::from_ne_bytes(whole[..4].try_into().unwrap())).unwrap();
        let mut early = whole[..first].to_vec();
        early[6] |= 0x10;
        let mut assembly = Assembly::new(5, Protocol::Tcp);
        assert_eq!(feed(&mut assembly, &early), DumpState::More);
        assert_eq!(feed(&mut assembly, &whole[first..]), DumpState::Repeat);
    }

    #[test]
    fn a_dump_that_is_interrupted_again_and_again_ends_in_an_error() {
        let mut attempts = 0;
        let never: Result<Vec<u8>, _> = repeat(|| {
            attempts += 1;
            Ok(None)
        });
        assert!(matches!(never, Err(DumpError::Incomplete)));
        assert_eq!(attempts, DUMP_ATTEMPTS);

        let mut attempts = 0;
        let third = repeat(|| {
            attempts += 1;
            Ok((attempts == 3).then(|| vec![1]))
        });
        assert_eq!(third.unwrap(), [1]);

        let refused: Result<Vec<u8>, _> = repeat(|| Err(DumpError::Malformed(Malformed("x"))));
        assert!(matches!(refused, Err(DumpError::Malformed(_))));
    }

    #[test]
    fn answers_to_another_request_are_ignored() {
        let mut assembly = Assembly::new(6, Protocol::Tcp);
        assert_eq!(feed(&mut assembly, &dump(5, 2)), DumpState::More);
        assert!(assembly.kept.is_empty());
    }

    #[test]
    fn a_refused_dump_keeps_its_errno() {
        let mut refusal = Vec::new();
        refusal.extend_from_slice(&20u32.to_ne_bytes());
        refusal.extend_from_slice(&2u16.to_ne_bytes());
        refusal.extend_from_slice(&0u16.to_ne_bytes());
        refusal.extend_from_slice(&5u32.to_ne_bytes());
        refusal.extend_from_slice(&0u32.to_ne_bytes());
        refusal.extend_from_slice(&(-libc::EPERM).to_ne_bytes());
        let mut assembly: Assembly<SocketMessage> = Assembly::new(5, Protocol::Tcp);
        let Err(DumpError::Io(error)) = assembly.feed(&refusal, &mut Some) else {
            panic!("an error");
        };
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
