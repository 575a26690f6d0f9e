//! Sequence numbers.

use std::fmt;

/// A TCP sequence number. Arithmetic is modulo 2^32 (RFC 9293 §3.4).
///
/// It has no total order, so it is not `Ord`: [`Seq::before`] is meaningful only for numbers less than 2^31 apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seq(pub u32);

impl Seq {
    /// The number `bytes` later.
    #[must_use]
    pub fn plus(self, bytes: u32) -> Seq {
        Seq(self.0.wrapping_add(bytes))
    }

    /// The number `bytes` earlier.
    #[must_use]
    pub fn minus(self, bytes: u32) -> Seq {
        Seq(self.0.wrapping_sub(bytes))
    }

    /// Whether it is before `other`, as `before()` of the kernel (include/net/tcp.h).
    pub fn before(self, other: Seq) -> bool {
        self.0.wrapping_sub(other.0) > 1 << 31
    }

    /// The later of the two.
    #[must_use]
    pub fn later(self, other: Seq) -> Seq {
        if self.before(other) { other } else { self }
    }

    /// The number 2^31 away, which is outside of every window that contains `self`.
    #[must_use]
    pub fn opposite(self) -> Seq {
        self.plus(1 << 31)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_wraps() {
        assert!(Seq(1).before(Seq(2)));
        assert!(Seq(u32::MAX).before(Seq(0)));
        assert!(!Seq(0).before(Seq(u32::MAX)));
        assert!(!Seq(7).before(Seq(7)));
        assert_eq!(Seq(u32::MAX).later(Seq(3)), Seq(3));
        assert_eq!(Seq(3).later(Seq(u32::MAX)), Seq(3));
        assert_eq!(Seq(u32::MAX).plus(2), Seq(1));
        assert_eq!(Seq(1).minus(2), Seq(u32::MAX));
        assert_eq!(Seq(5).opposite().opposite(), Seq(5));
    }
}
