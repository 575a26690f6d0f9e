//! Programs of cwkill that the kernel runs: [`descriptors`] reads the descriptors of all processes in one pass, and [`destroyer`] destroys
//! sockets that are as cwkill has last seen them. `tracer` sees who reads the end of streams.
//!
//! The programs of the first two are iterators, so they run only while cwkill reads them. Those of the third run at tracepoints, for each event of
//! the host. Nothing stays in the kernel when cwkill has ended. They need CAP_BPF and
//! CAP_PERFMON, or CAP_SYS_ADMIN, of the first user namespace, and a kernel with BTF. cwkill loads them first and gives up these
//! capabilities then. Where they do not work, cwkill takes the other way, and `cwkill doctor` tells why.

pub mod descriptors;
pub mod destroyer;
#[cfg(feature = "trace")]
pub mod tracer;
pub mod walk;

use std::cell::OnceCell;

pub use crate::sys::bpf::BpfError;
use crate::sys::bpf::Btf;

/// The kernel's types, as far as the programs name them. They are read when a program first needs them: that takes 10 ms.
#[derive(Debug, Default)]
pub struct KernelTypes(OnceCell<Btf>);

impl KernelTypes {
    fn get(&self) -> Result<&Btf, BpfError> {
        if let Some(types) = self.0.get() {
            return Ok(types);
        }
        let names = [&descriptors::NAMES[..], &destroyer::NAMES[..]].concat();
        let types = Btf::of_kernel(&names)?;
        Ok(self.0.get_or_init(|| types))
    }
}

/// What a trace does not see, each with the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NotSeen {
    /// Where the end of a stream is read.
    pub reads: Option<String>,
    /// Where a connection is accepted.
    pub accepts: Option<String>,
    /// What programs at functions would have seen after `kernel.ftrace_enabled` became 0.
    pub later: bool,
}

/// The `L` bytes of a record at a place from its end: a program has the record on its stack, which grows downwards.
fn part<const N: usize, const L: usize>(record: &[u8; N], from_end: i16) -> [u8; L] {
    let at = N - usize::from(from_end.unsigned_abs());
    *record[at..].first_chunk().expect("a place in the record")
}
