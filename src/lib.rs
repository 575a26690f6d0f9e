//! Closes TCP sockets stuck in CLOSE-WAIT without killing the process that leaks them.

pub mod diagnosis;
pub mod finder;
pub mod selectors;
mod sys;
pub mod tcp;
