//! Single segments: [`raw`] sends them, [`capture`] sees those that leave this host.

pub mod capture;
pub mod raw;
