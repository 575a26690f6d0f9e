//! Memory that belongs to a socket: a program puts it there, and it goes with the socket.

use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::maps::{MapAttr, NO_PREALLOC, create};
use super::{BTF_LOAD, BpfError, address, bpf_fd, length, number};

/// BPF_MAP_TYPE_SK_STORAGE
const SK_STORAGE: u32 = 24;

/// As many numbers of 64 bits as `WORDS`, of each socket that has them.
#[derive(Debug)]
pub struct SocketStorage<const WORDS: usize>(OwnedFd);

#[repr(C)]
#[derive(Default)]
struct BtfAttr {
    btf: u64,
    btf_log_buf: u64,
    btf_size: u32,
    btf_log_size: u32,
    btf_log_level: u32,
    padding: u32,
}

const _: () = assert!(mem::offset_of!(BtfAttr, btf_log_level) == 24);

impl<const WORDS: usize> SocketStorage<WORDS> {
    /// # Errors
    /// [`BpfError::Refused`].
    pub fn new() -> Result<Self, BpfError> {
        let blob = types(length(WORDS));
        let mut attr = BtfAttr {
            btf: address(blob.as_ptr()),
            btf_size: length(blob.len()),
            ..BtfAttr::default()
        };
        let types = bpf_fd(BTF_LOAD, &mut attr)
            .map_err(|error| BpfError::Refused("the types of a map", error))?;
        create(&mut MapAttr {
            map_type: SK_STORAGE,
            key_size: 4,
            value_size: length(8 * WORDS),
            // The kernel demands it of such a map.
            map_flags: NO_PREALLOC,
            btf_fd: number(types.as_raw_fd()),
            btf_key_type_id: KEY,
            btf_value_type_id: VALUE,
            ..MapAttr::default()
        })
        .map(SocketStorage)
    }

    /// For [`super::Asm::address_of_map`].
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The numbers of the types of the key and of the value.
const KEY: u32 = 1;
const VALUE: u32 = 3;

/// The kernel wants to know the types of key and value: `int`, and an array of `words` numbers of 64 bits. Source:
/// include/uapi/linux/btf.h; kernel/bpf/bpf_local_storage.c, bpf_local_storage_map_alloc_check.
fn types(words: u32) -> Vec<u8> {
    const STRINGS: &[u8] = b"\0int\0u64\0";
    const INT: u32 = 1 << 24;
    const ARRAY: u32 = 3 << 24;
    /// BTF_INT_SIGNED
    const SIGNED: u32 = 1 << 24;
    let types = [
        // 1: the name "int", 4 bytes, 32 bits.
        [1, INT, 4, SIGNED | 32].as_slice(),
        // 2: the name "u64", 8 bytes, 64 bits.
        &[5, INT, 8, 64],
        // 3: no name; elements of type 2, an index of type 1.
        &[0, ARRAY, 0, 2, 1, words],
    ]
    .concat();
    let types: Vec<u8> = types.into_iter().flat_map(u32::to_ne_bytes).collect();
    let (types_len, strings_len) = (length(types.len()), length(STRINGS.len()));
    // The number, version 1, no flags; the header's length, and the sections after it.
    let mut blob = 0xeb9f_u16.to_ne_bytes().to_vec();
    blob.extend([1, 0]);
    for number in [24, 0, types_len, types_len, strings_len] {
        blob.extend(number.to_ne_bytes());
    }
    blob.extend(types);
    blob.extend(STRINGS);
    blob
}
