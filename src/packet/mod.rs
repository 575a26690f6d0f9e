//! Single TCP segments: [`raw`] sends them through the IP stack of this host, [`link`] to a neighbour below it; [`capture`] sees the
//! segments that leave this host or arrive at it.

pub mod capture;
pub mod link;
pub mod raw;
