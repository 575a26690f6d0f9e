//! Programs of cwkill that the kernel runs. [`descriptors`] reads the descriptors of all processes in one pass, [`destroyer`] destroys
//! sockets that are as cwkill has last seen them, and `tracer` notes who opens connections and who reads the end of streams.
//!
//! The first two are iterators, and run only while cwkill reads them. Those of the tracer run for every process of the host, at tracepoints,
//! functions and security hooks, and an iterator reads what they have kept. Nothing stays in the kernel when cwkill has ended. To load
//! them takes CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, of the first user namespace, and a kernel with BTF; cwkill gives these up then.
//! Without the iterators cwkill takes another way; without the tracer there is no `cwkill trace`. `cwkill doctor` tells why.

pub mod descriptors;
pub mod destroyer;
#[cfg(feature = "trace")]
pub mod tracer;
pub mod walk;

use std::cell::OnceCell;

pub use crate::sys::bpf::BpfError;
use crate::sys::bpf::Btf;

/// The types of the kernel for `descriptors` and `destroyer`; the tracer reads its own. They are read when a program first needs them: that takes 10 ms.
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

/// What a trace does not see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NotSeen {
    /// Why it is not seen where ends are read.
    pub reads: Option<String>,
    /// Why it is not seen who accepts.
    pub accepts: Option<String>,
    /// What programs at functions would have seen after `kernel.ftrace_enabled` became 0.
    pub later: bool,
}

/// The `L` bytes of a record at a place from its end: a program has the record on its stack, which grows downwards.
fn part<const N: usize, const L: usize>(record: &[u8; N], from_end: i16) -> [u8; L] {
    let at = N - usize::from(from_end.unsigned_abs());
    *record[at..].first_chunk().expect("a place in the record")
}
