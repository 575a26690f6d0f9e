//! Single TCP segments: [`raw`] sends them, [`capture`] sees the segments that leave this host.

pub mod capture;
pub mod raw;
