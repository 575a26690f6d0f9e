//! Sends segments below netfilter and captures the answers.

use std::hash::{BuildHasher, RandomState};
use std::io;

use super::Network;
use crate::control::Control;
use crate::packet::capture::{Capture, Seen};
use crate::packet::link::LinkSender;
use crate::routes::{Flow, NoPath, Paths};
use crate::sys::link::LinkDestination;
use crate::tcp::{Segment, Seq, Tuple};

/// The network namespace of the thread that opened it.
pub struct LinkNetwork {
    sender: LinkSender,
    capture: Capture,
    paths: Paths,
    /// Keyed with random bits of the kernel.
    random: RandomState,
    drawn: u64,
}

impl LinkNetwork {
    /// Opens the sockets.
    ///
    /// # Errors
    /// EPERM: needs CAP_NET_RAW over the network namespace.
    pub fn open() -> io::Result<Self> {
        Ok(LinkNetwork {
            sender: LinkSender::open()?,
            capture: Capture::open()?,
            paths: Paths::open()?,
            random: RandomState::new(),
            drawn: 0,
        })
    }
}

impl Network for LinkNetwork {
    fn find_paths(
        &mut self,
        flows: &[Flow],
        control: &dyn Control,
    ) -> Vec<Result<[LinkDestination; 2], NoPath>> {
        self.paths.find(flows, &|| control.interrupted())
    }

    fn listen(&mut self, views: &[Tuple]) -> io::Result<()> {
        self.capture.filter_for(Seen::Arriving, views)
    }

    fn send(&mut self, segment: &Segment, to: LinkDestination) -> io::Result<()> {
        self.sender.send(segment, to)
    }

    fn drain(&mut self, handle: &mut dyn FnMut(Segment)) -> io::Result<()> {
        self.capture.drain(handle)
    }

    fn has_lost(&mut self) -> bool {
        self.capture.has_lost()
    }

    #[expect(clippy::cast_possible_truncation, reason = "32 random bits are enough")]
    fn random(&mut self) -> Seq {
        self.drawn += 1;
        Seq(self.random.hash_one(self.drawn) as u32)
    }
}
