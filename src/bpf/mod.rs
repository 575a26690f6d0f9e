//! Programs of cwkill that the kernel runs: [`descriptors`] reads the descriptors of all processes in one pass, and [`destroyer`] destroys
//! sockets that are as cwkill has last seen them.
//!
//! The programs are iterators, so they run only while cwkill reads them, and nothing of them stays in the kernel. They need CAP_BPF and
//! CAP_PERFMON, or CAP_SYS_ADMIN, of the first user namespace, and a kernel with BTF. cwkill loads them first and gives up these
//! capabilities then. Where they do not work, cwkill takes the other way, and `cwkill doctor` tells why.

pub mod descriptors;
pub mod destroyer;

pub use crate::sys::bpf::BpfError;
