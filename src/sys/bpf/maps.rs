//! Maps: memory that a program and cwkill share.

use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{
    BpfError, MAP_CREATE, MAP_DELETE_BATCH, MAP_UPDATE_BATCH, MAP_UPDATE_ELEM, address, bpf,
    bpf_fd, length, number,
};

// enum bpf_map_type
const HASH: u32 = 1;
const ARRAY: u32 = 2;

/// BPF_F_NO_PREALLOC
const NO_PREALLOC: u32 = 1;

#[repr(C)]
#[derive(Default)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

const _: () = assert!(mem::offset_of!(ElementAttr, flags) == 24);
const _: () = assert!(mem::offset_of!(BatchAttr, flags) == 48);

/// A number that programs read and that cwkill can change at any time.
#[derive(Debug)]
pub struct Variable(OwnedFd);

impl Variable {
    /// # Errors
    /// [`BpfError::Refused`].
    pub fn new() -> Result<Self, BpfError> {
        create(&mut MapAttr {
            map_type: ARRAY,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
            map_flags: 0,
        })
        .map(Variable)
    }

    /// # Errors
    /// [`BpfError::Refused`].
    pub fn set(&self, value: u64) -> Result<(), BpfError> {
        let key = 0_u32;
        let mut attr = ElementAttr {
            map_fd: number(self.0.as_raw_fd()),
            key: address(&raw const key),
            value: address(&raw const value),
            ..ElementAttr::default()
        };
        let set = bpf(MAP_UPDATE_ELEM, &mut attr);
        set.map(drop)
            .map_err(|error| BpfError::Refused("a value of a map", error))
    }

    /// For [`super::Asm::address_of_map_value`].
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A hash table that programs read, with keys of 64 bits and values of `N` bytes.
#[derive(Debug)]
pub struct Table<const N: usize>(OwnedFd);

impl<const N: usize> Table<N> {
    /// A table with room for `capacity` entries.
    ///
    /// # Errors
    /// [`BpfError::Refused`].
    pub fn new(capacity: u32) -> Result<Self, BpfError> {
        create(&mut MapAttr {
            map_type: HASH,
            key_size: 8,
            value_size: length(N),
            max_entries: capacity,
            // Memory for all entries at once would take many milliseconds.
            map_flags: NO_PREALLOC,
        })
        .map(Table)
    }

    /// Puts a value for each key.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: some may be in the table all the same.
    pub fn put(&self, keys: &[u64], values: &[[u8; N]]) -> Result<(), BpfError> {
        assert_eq!(keys.len(), values.len(), "one value for each key");
        self.batch(MAP_UPDATE_BATCH, keys, address(values.as_ptr()))
            .map_err(|error| BpfError::Refused("values of a map", error))
    }

    /// Removes these keys, which the table has.
    ///
    /// # Errors
    /// [`BpfError::Refused`]: some may still be in the table.
    pub fn remove(&self, keys: &[u64]) -> Result<(), BpfError> {
        self.batch(MAP_DELETE_BATCH, keys, 0)
            .map_err(|error| BpfError::Refused("to empty a map", error))
    }

    fn batch(&self, command: i32, keys: &[u64], values: u64) -> std::io::Result<()> {
        let mut attr = BatchAttr {
            keys: address(keys.as_ptr()),
            values,
            count: length(keys.len()),
            map_fd: number(self.0.as_raw_fd()),
            ..BatchAttr::default()
        };
        bpf(command, &mut attr).map(drop)
    }

    /// For [`super::Asm::address_of_map`].
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn create(attr: &mut MapAttr) -> Result<OwnedFd, BpfError> {
    bpf_fd(MAP_CREATE, attr).map_err(|error| BpfError::Refused("a map", error))
}
