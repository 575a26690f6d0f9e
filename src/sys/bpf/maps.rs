//! Maps: memory that a program and cwkill share.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::AtomicU64;

use super::{
    BpfError, MAP_CREATE, MAP_DELETE_BATCH, MAP_UPDATE_BATCH, MAP_UPDATE_ELEM, address, bpf,
    bpf_fd, length, number,
};

// enum bpf_map_type
const HASH: u32 = 1;
const ARRAY: u32 = 2;

/// BPF_F_NO_PREALLOC
pub(super) const NO_PREALLOC: u32 = 1;
/// BPF_F_MMAPABLE
const MMAPABLE: u32 = 1 << 10;

#[repr(C)]
#[derive(Default)]
pub(super) struct MapAttr {
    pub map_type: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
    pub inner_map_fd: u32,
    pub numa_node: u32,
    pub map_name: [u8; 16],
    pub map_ifindex: u32,
    pub btf_fd: u32,
    pub btf_key_type_id: u32,
    pub btf_value_type_id: u32,
}

const _: () = assert!(mem::offset_of!(MapAttr, btf_value_type_id) == 56);

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
            ..MapAttr::default()
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

/// Numbers of 64 bits that programs and cwkill change at the same time, each at one instant.
#[derive(Debug)]
pub struct Shared {
    map: OwnedFd,
    first: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the memory belongs to this value alone, and is only reached as atomic numbers.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// `count` numbers, all 0. Each is an element of the map.
    ///
    /// # Errors
    /// [`BpfError::Refused`].
    pub fn new(count: usize) -> Result<Self, BpfError> {
        Self::groups(count, 1)
    }

    /// `count` elements, each with as many numbers as `of`, all 0.
    ///
    /// # Errors
    /// [`BpfError::Refused`].
    pub fn groups(count: usize, of: usize) -> Result<Self, BpfError> {
        let map = create(&mut MapAttr {
            map_type: ARRAY,
            key_size: 4,
            value_size: length(8 * of),
            max_entries: length(count),
            map_flags: MMAPABLE,
            ..MapAttr::default()
        })?;
        let count = count * of;
        // SAFETY: no address is asked for, so no other memory of cwkill changes. The kernel keeps the numbers one after the other from the
        // start of the map (kernel/bpf/arraymap.c, array_map_mmap), since the size of an element is a multiple of 8.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                count * mem::size_of::<AtomicU64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(mapped.cast()) {
            Some(first) if mapped != libc::MAP_FAILED => Ok(Shared { map, first, count }),
            _ => Err(BpfError::Refused(
                "the memory of a map",
                io::Error::last_os_error(),
            )),
        }
    }

    pub fn numbers(&self) -> &[AtomicU64] {
        // SAFETY: the memory is mapped until the drop of this value, has `count` numbers, and begins at a page, so it is aligned. Programs
        // change it by atomic instructions and by whole stores of 64 bits.
        unsafe { slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }

    /// For [`super::Asm::address_of_map`], and for [`super::Asm::address_of_map_value`] if it is one number.
    pub fn fd(&self) -> RawFd {
        self.map.as_raw_fd()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let length = self.count * mem::size_of::<AtomicU64>();
        // SAFETY: this is the mapping of `new`, and `numbers` cannot be borrowed any more.
        unsafe { libc::munmap(self.first.as_ptr().cast(), length) };
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
            ..MapAttr::default()
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

pub(super) fn create(attr: &mut MapAttr) -> Result<OwnedFd, BpfError> {
    bpf_fd(MAP_CREATE, attr).map_err(|error| BpfError::Refused("a map", error))
}
