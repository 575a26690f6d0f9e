//! The things that cwkill talks about: data only.

pub mod cause;
