//! Why stacks of a process tell less than they could.

use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

/// Why stacks of a process are not as good as they could be. The codes are stable.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    thiserror::Error,
    IntoStaticStr,
)]
#[strum(serialize_all = "kebab-case")]
pub enum Problem {
    /// It had ended before its files were read.
    #[error("it ended before its symbols could be read")]
    Ended,
    #[error("its files may not be read: that takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH")]
    Refused,
    /// The process that reads symbols did not answer, for example because of a file system that hangs.
    #[error("its symbols could not be read in time, perhaps because a file system hangs")]
    TooSlow,
    /// A file is not what it says, or the process that reads symbols ended, for example because of such a file.
    #[error(
        "not all of its symbols could be read: a file of it is damaged, is compressed by zstd, or takes too much memory or processor time"
    )]
    Damaged,
    #[error("some of its stacks were not read: cwkill reads those of 32 processes at a time")]
    TooManyProcesses,
    /// With io_uring, for example.
    #[error("some of its reads were asynchronous, so no stack belongs to them")]
    Asynchronous,
    #[error("no process could be started to read its symbols")]
    NotStarted,
    /// Further stacks of it have no names.
    #[error("it has more than 10,000 different stacks")]
    TooManyStacks,
    #[error("what it has mapped cannot be read")]
    Unreadable,
    #[error("it is a 32-bit program, whose stack cwkill does not read")]
    ThirtyTwoBits,
    #[error("a file that it runs was deleted or replaced, and may not be read any more")]
    FileGone,
    #[error("its files have no symbols: install its debug symbols")]
    NoSymbols,
    #[error(
        "a Java VM names its methods on request: start it with -XX:+PreserveFramePointer, and run `jcmd PID Compiler.perfmap` during the trace"
    )]
    NoPerfMap,
    #[error(
        "Python before 3.12 does not export the names of its functions: the frames are those of the interpreter"
    )]
    OldPython,
    #[error("Python exports the names of its functions if it is started with `python3 -X perf`")]
    PythonWithoutPerf,
    #[error("Node reads sockets in its event loop, so no JavaScript is on the stack")]
    Node,
}

impl Problem {
    /// The stable name for programs.
    pub fn code(self) -> &'static str {
        self.into()
    }
}
