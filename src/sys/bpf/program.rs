//! Loading a program.

use std::mem;
use std::os::fd::OwnedFd;

use super::{BpfError, Insn, PROG_LOAD, address, bpf_fd, length};

/// What a program is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// enum bpf_prog_type
    prog_type: u32,
    /// enum bpf_attach_type
    pub attach_type: u32,
}

impl Kind {
    /// BPF_PROG_TYPE_TRACING, BPF_TRACE_ITER
    pub const ITERATOR: Kind = Kind::new(26, 28);
    /// BPF_PROG_TYPE_TRACING, BPF_TRACE_RAW_TP
    pub const TRACEPOINT: Kind = Kind::new(26, 23);
    /// BPF_PROG_TYPE_TRACING, BPF_TRACE_FEXIT
    pub const RETURN: Kind = Kind::new(26, 25);
    /// BPF_PROG_TYPE_LSM, BPF_LSM_MAC
    pub const SECURITY_HOOK: Kind = Kind::new(29, 27);

    const fn new(prog_type: u32, attach_type: u32) -> Self {
        Kind {
            prog_type,
            attach_type,
        }
    }
}

/// The license of the programs. Some helpers are only for programs that are compatible with the GPL.
const LICENSE: &std::ffi::CStr = c"Dual MIT/GPL";

#[repr(C)]
#[derive(Default)]
struct ProgramAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

const _: () = assert!(mem::offset_of!(ProgramAttr, attach_btf_id) == 108);

/// The size of the verifier's log. It keeps the end of a longer one.
const LOG: usize = 1 << 16;

/// Loads a program. `name` has at most 15 letters. `target`: the number, in the kernel's types, of that to which it will be attached.
///
/// # Errors
/// [`BpfError::Refused`], or [`BpfError::Verifier`] with what the verifier says.
pub(super) fn load(
    name: &str,
    program: &[Insn],
    kind: Kind,
    target: u32,
) -> Result<OwnedFd, BpfError> {
    let mut prog_name = [0; 16];
    prog_name[..name.len()].copy_from_slice(name.as_bytes());
    let mut attr = ProgramAttr {
        prog_type: kind.prog_type,
        insn_cnt: length(program.len()),
        insns: address(program.as_ptr()),
        license: address(LICENSE.as_ptr()),
        prog_name,
        expected_attach_type: kind.attach_type,
        attach_btf_id: target,
        ..ProgramAttr::default()
    };
    bpf_fd(PROG_LOAD, &mut attr).map_err(|error| {
        // The log costs time, so the kernel writes it only for a second attempt.
        let mut log = vec![0_u8; LOG];
        (attr.log_level, attr.log_size) = (1, length(log.len()));
        attr.log_buf = address(log.as_mut_ptr());
        match bpf_fd(PROG_LOAD, &mut attr) {
            Err(_) if log[0] != 0 => {
                let end = log.iter().position(|&byte| byte == 0).unwrap_or(LOG);
                let log = String::from_utf8_lossy(&log[..end]).trim_end().to_owned();
                BpfError::Verifier { log, error }
            }
            _ => BpfError::Refused("to load a program", error),
        }
    })
}

/// The line of the verifier's log that gives the reason: the last one but for the statistics.
pub(super) fn reason(log: &str) -> &str {
    let mut lines = log.lines().rev();
    lines
        .find(|line| !line.starts_with("processed ") && !line.is_empty())
        .unwrap_or("it does not say why")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_the_verifier_stands_before_its_statistics() {
        let log = "44: (79) r1 = *(u64 *)(r9 +1824)\nR9 invalid mem access 'ptr_or_null_'\nprocessed 32 insns (limit 1000000)";
        assert_eq!(reason(log), "R9 invalid mem access 'ptr_or_null_'");
        assert_eq!(reason("processed 1 insns"), "it does not say why");
    }
}
