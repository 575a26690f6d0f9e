//! A stack with names.

use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

use super::origin::Origin;

/// The functions that called each other, the innermost first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stack {
    pub frames: Vec<Frame>,
    pub end: End,
}

/// Why a stack ends where it does.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, IntoStaticStr,
)]
#[strum(serialize_all = "kebab-case")]
pub enum End {
    /// At its first function.
    #[default]
    Whole,
    /// It goes on beyond the part that was copied, or has too many frames.
    Cut,
    /// At a function that does not say who called it.
    Lost,
}

/// A function on a stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Frame {
    /// `None`: the file has no symbol for it.
    pub function: Option<String>,
    /// The source file, as the compiler wrote it down.
    pub file: Option<String>,
    pub line: Option<u32>,
    /// The file that has the code, as the process sees it; `None` for code that was made at run time.
    pub module: Option<String>,
    /// The address of the code: in `module`, or in memory.
    pub address: u64,
    /// The compiler has put it into the function after it.
    pub inlined: bool,
    pub origin: Origin,
}

impl End {
    /// The stable name for programs.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl Stack {
    /// What it takes in memory.
    pub fn bytes(&self) -> usize {
        self.frames.iter().map(Frame::bytes).sum()
    }

    /// The first frame of the program's own.
    pub fn first_own(&self) -> Option<usize> {
        let mut frames = self.frames.iter();
        frames.position(|frame| frame.origin == Origin::Own)
    }

    /// The frames that make a place: those of the program's own, or all if none is. Two stacks with the same ones are one place. Library
    /// frames in between differ, and nobody who reads the report can mend them.
    pub fn place(&self) -> Vec<&Frame> {
        let own = |frame: &&Frame| frame.origin == Origin::Own;
        let any_own = self.first_own().is_some();
        let frames = self.frames.iter();
        frames.filter(|frame| !any_own || own(frame)).collect()
    }
}

impl Frame {
    /// What it takes in memory.
    pub fn bytes(&self) -> usize {
        let names = [&self.function, &self.file, &self.module];
        let names = names.into_iter().flatten().map(String::len);
        size_of::<Frame>() + names.sum::<usize>()
    }
}
