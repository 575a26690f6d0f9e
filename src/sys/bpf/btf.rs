//! What the running kernel says about its own types (BTF): the offsets of fields, and the numbers of functions.
//!
//! A field that the kernel lacks, or has in another size, is [`BtfError::NotHere`] with its name. Every length and number in the data is
//! checked before it is used: cut or altered data gives an error, and never an access outside of the struct. A field must also lie between
//! its neighbours, and no other may have its name.
//!
//! Source: include/uapi/linux/btf.h, Documentation/bpf/btf.rst.

use std::fmt;
use std::io;
use std::ops::Range;

/// The types of a kernel.
pub struct Btf {
    bytes: Vec<u8>,
    strings: Range<usize>,
    /// The place of each type in `bytes`, by its number. Number 0 is void, which has none.
    types: Vec<usize>,
    /// The numbers of the names that were asked for; those of the first type of each name.
    named: Vec<(Name, u32)>,
}

impl fmt::Debug for Btf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Btf").field("named", &self.named).finish()
    }
}

/// A type of the kernel, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    Struct(&'static str),
    Function(&'static str),
    /// A tracepoint: the type `btf_trace_NAME`.
    Tracepoint(&'static str),
}

impl Name {
    fn text(self) -> &'static str {
        match self {
            Name::Struct(text) | Name::Function(text) | Name::Tracepoint(text) => text,
        }
    }

    fn kind(self) -> u32 {
        match self {
            Name::Struct(_) => STRUCT,
            Name::Function(_) => FUNCTION,
            Name::Tracepoint(_) => TYPEDEF,
        }
    }

    /// What stands before the name in the kernel's types.
    fn prefix(self) -> &'static str {
        match self {
            Name::Tracepoint(_) => "btf_trace_",
            Name::Struct(_) | Name::Function(_) => "",
        }
    }
}

/// The size of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    U8,
    U16,
    U32,
    U64,
}

impl Size {
    pub fn bytes(self) -> u32 {
        match self {
            Size::U8 => 1,
            Size::U16 => 2,
            Size::U32 => 4,
            Size::U64 => 8,
        }
    }
}

/// A field that is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    pub offset: i16,
    pub size: Size,
}

/// A field that points to a struct.
#[derive(Clone, Copy, Debug)]
pub struct Pointer<'b> {
    pub offset: i16,
    pub to: Struct<'b>,
}

/// A field that is an array of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Array {
    pub offset: i16,
    /// Its length.
    pub len: u32,
}

/// A struct of the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Struct<'b> {
    btf: &'b Btf,
    id: u32,
}

/// Why an offset is unknown.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("cannot read the kernel's types from {PATH} (CONFIG_DEBUG_INFO_BTF)")]
    Unreadable(#[source] io::Error),
    #[error("the kernel's types in {PATH} are malformed: {0}")]
    Malformed(&'static str),
    #[error("this kernel has no {0}")]
    NotHere(String),
}

const PATH: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
/// The size of `struct btf_header`, without what later versions append.
const HEADER: usize = 24;
/// The size of `struct btf_type`.
const TYPE: usize = 12;
/// The size of `struct btf_member`.
const MEMBER: usize = 12;

// BTF_KIND_*
const INT: u32 = 1;
const POINTER: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const FUNCTION: u32 = 12;
const PROTOTYPE: u32 = 13;
const ENUM64: u32 = 19;

/// Typedefs, qualifiers and tags lead to the type that they stand for. More of them in a row than this are a loop.
const MAX_MODIFIERS: usize = 16;
/// Structs without a name in each other. More of them are a loop.
const MAX_DEPTH: usize = 16;

impl Btf {
    /// The types of the running kernel. `names` are those that will be asked for.
    ///
    /// # Errors
    /// [`BtfError::Unreadable`], [`BtfError::Malformed`].
    pub fn of_kernel(names: &[Name]) -> Result<Self, BtfError> {
        Self::parse(std::fs::read(PATH).map_err(BtfError::Unreadable)?, names)
    }

    /// # Errors
    /// [`BtfError::Malformed`].
    pub fn parse(bytes: Vec<u8>, names: &[Name]) -> Result<Self, BtfError> {
        let magic = bytes.get(..2).ok_or(CUT)?;
        if magic != MAGIC.to_ne_bytes() {
            return Err(BtfError::Malformed("they begin with another number"));
        }
        let header = u32_at(&bytes, 4)? as usize;
        if header < HEADER {
            return Err(BtfError::Malformed("the header is too short"));
        }
        let section = |at: usize| -> Result<Range<usize>, BtfError> {
            let start = header
                .checked_add(u32_at(&bytes, at)? as usize)
                .ok_or(CUT)?;
            let end = start
                .checked_add(u32_at(&bytes, at + 4)? as usize)
                .ok_or(CUT)?;
            (end <= bytes.len()).then_some(start..end).ok_or(CUT)
        };
        let (types, strings) = (section(8)?, section(16)?);
        let mut btf = Btf {
            types: Vec::new(),
            strings,
            bytes,
            named: Vec::new(),
        };
        btf.index(types, names)?;
        Ok(btf)
    }

    /// Notes where each type begins, and the types with one of `names`.
    fn index(&mut self, section: Range<usize>, names: &[Name]) -> Result<(), BtfError> {
        // A vmlinux has about 30 bytes per type.
        self.types.reserve(section.len() / 24);
        self.types.push(0);
        let mut at = section.start;
        while at < section.end {
            let name = u32_at(&self.bytes, at)?;
            let info = u32_at(&self.bytes, at + 4)?;
            let (kind, count) = (kind(info), count(info));
            let id = u32::try_from(self.types.len()).map_err(|_| CUT)?;
            if kind == STRUCT || kind == FUNCTION || kind == TYPEDEF {
                let is_it = |it: &&Name| it.kind() == kind && self.is_called(name, **it);
                if let Some(found) = names.iter().find(is_it)
                    && self.named.iter().all(|(known, _)| known != found)
                {
                    self.named.push((*found, id));
                }
            }
            self.types.push(at);
            at += TYPE
                + match kind {
                    // A variable, a tag of a declaration.
                    INT | 14 | 17 => 4,
                    ARRAY => 12,
                    // A section of data.
                    STRUCT | UNION | 15 | ENUM64 => 12 * count,
                    // The parameters of a function.
                    ENUM | PROTOTYPE => 8 * count,
                    // A forward declaration, a typedef, a qualifier, a floating-point number, a tag of a type.
                    POINTER | 7..=11 | FUNCTION | 16 | 18 => 0,
                    _ => return Err(BtfError::Malformed("a type of an unknown kind")),
                };
        }
        match at == section.end {
            true => Ok(()),
            false => Err(CUT),
        }
    }

    /// The struct with this name, which [`Btf::of_kernel`] was told.
    ///
    /// # Errors
    /// [`BtfError::NotHere`].
    pub fn structure(&self, name: &'static str) -> Result<Struct<'_>, BtfError> {
        let id = self.id(Name::Struct(name))?;
        Ok(Struct { btf: self, id })
    }

    /// The number of the function with this name, which [`Btf::of_kernel`] was told.
    ///
    /// # Errors
    /// [`BtfError::NotHere`].
    pub fn function(&self, name: &'static str) -> Result<u32, BtfError> {
        self.id(Name::Function(name))
    }

    /// The number of parameters of the function with this name, which [`Btf::of_kernel`] was told.
    ///
    /// # Errors
    /// [`BtfError::NotHere`], [`BtfError::Malformed`].
    pub fn parameters(&self, name: &'static str) -> Result<usize, BtfError> {
        let function = self.type_at(self.function(name)?)?;
        let prototype = self.type_at(function.size_or_type)?;
        match prototype.kind {
            PROTOTYPE => Ok(prototype.count),
            _ => Err(BtfError::Malformed("a function without parameters")),
        }
    }

    /// The number of the tracepoint with this name, which [`Btf::of_kernel`] was told.
    ///
    /// # Errors
    /// [`BtfError::NotHere`].
    pub fn tracepoint(&self, name: &'static str) -> Result<u32, BtfError> {
        self.id(Name::Tracepoint(name))
    }

    fn id(&self, name: Name) -> Result<u32, BtfError> {
        let found = self.named.iter().find(|(known, _)| *known == name);
        found.map(|(_, id)| *id).ok_or_else(|| {
            BtfError::NotHere(match name {
                Name::Struct(text) => format!("struct {text}"),
                Name::Function(text) => format!("function {text}"),
                Name::Tracepoint(text) => format!("tracepoint {text}"),
            })
        })
    }

    fn type_at(&self, id: u32) -> Result<Type, BtfError> {
        let at = match self.types.get(id as usize) {
            Some(&at) if id > 0 => at,
            _ => return Err(BtfError::Malformed("a type with an unknown number")),
        };
        let info = u32_at(&self.bytes, at + 4)?;
        Ok(Type {
            at,
            name: u32_at(&self.bytes, at)?,
            kind: kind(info),
            count: count(info),
            has_bit_fields: info >> 31 == 1,
            size_or_type: u32_at(&self.bytes, at + 8)?,
        })
    }

    /// The type, without typedefs, qualifiers and tags.
    fn plain(&self, id: u32) -> Result<(u32, Type), BtfError> {
        let mut id = id;
        for _ in 0..MAX_MODIFIERS {
            let found = self.type_at(id)?;
            match found.kind {
                8..=11 | 18 => id = found.size_or_type,
                _ => return Ok((id, found)),
            }
        }
        Err(BtfError::Malformed("typedefs in a circle"))
    }

    /// The size of a type in bytes.
    fn size(&self, id: u32) -> Result<u32, BtfError> {
        let (_, found) = self.plain(id)?;
        match found.kind {
            POINTER => Ok(8),
            INT | STRUCT | UNION | ENUM | ENUM64 => Ok(found.size_or_type),
            ARRAY => {
                let element = self.plain(u32_at(&self.bytes, found.at + TYPE)?)?.1;
                let len = u32_at(&self.bytes, found.at + TYPE + 8)?;
                let size = match element.kind {
                    POINTER => 8,
                    INT | STRUCT | UNION | ENUM | ENUM64 => element.size_or_type,
                    _ => return Err(BtfError::Malformed("an array of arrays")),
                };
                size.checked_mul(len)
                    .ok_or(BtfError::Malformed("a huge array"))
            }
            _ => Err(BtfError::Malformed("a field without a size")),
        }
    }

    /// The field of struct `id` with this name, also in a struct or union in it that has no name.
    fn member(&self, id: u32, name: &str, depth: usize) -> Result<Option<Member>, BtfError> {
        if depth == MAX_DEPTH {
            return Err(BtfError::Malformed("structs in a circle"));
        }
        let (_, outer) = self.plain(id)?;
        if outer.kind != STRUCT && outer.kind != UNION {
            return Ok(None);
        }
        let mut only = None;
        for index in 0..outer.count {
            let (field, own) = self.nth_member(&outer, index)?;
            let found = if self.is_named(field, name) {
                Some(own)
            } else if field == 0 && !own.is_bit_field {
                let inner = self.member(own.type_id, name, depth + 1)?;
                inner.map(|inner| Member {
                    bits: own.bits.saturating_add(inner.bits),
                    ..inner
                })
            } else {
                None
            };
            let Some(found) = found else {
                continue;
            };
            if only.is_some() {
                return Err(BtfError::Malformed("two fields with one name"));
            }
            self.check_place(&outer, index, &own)?;
            only = Some(found);
        }
        Ok(only)
    }

    /// The offset of its name and the field with this index of a struct or union.
    fn nth_member(&self, outer: &Type, index: usize) -> Result<(u32, Member), BtfError> {
        let at = outer.at + TYPE + MEMBER * index;
        let place = u32_at(&self.bytes, at + 8)?;
        let (bits, is_bit_field) = match outer.has_bit_fields {
            true => (place & 0xff_ffff, place >> 24 != 0),
            false => (place, false),
        };
        let type_id = u32_at(&self.bytes, at + 4)?;
        let member = Member {
            bits,
            is_bit_field,
            type_id,
        };
        Ok((u32_at(&self.bytes, at)?, member))
    }

    /// Checks that a field lies in its struct, and in a struct between its neighbours. So an offset that is wrong by more than the gap
    /// beside the field is not taken for a right one.
    fn check_place(&self, outer: &Type, index: usize, own: &Member) -> Result<(), BtfError> {
        if own.is_bit_field {
            return Ok(());
        }
        // A flexible array has size 0 and begins at the end of its struct at most.
        let end = self.end(own)?;
        if end > 8 * u64::from(outer.size_or_type) {
            return Err(BtfError::Malformed("a field outside of its struct"));
        }
        if outer.kind == UNION {
            return match own.bits {
                0 => Ok(()),
                _ => Err(BtfError::Malformed("a field of a union behind its start")),
            };
        }
        let before = match index.checked_sub(1) {
            Some(before) => {
                let (_, before) = self.nth_member(outer, before)?;
                // The size of some types is not known here, and a bit field ends anywhere behind its start.
                match before.is_bit_field {
                    true => before.bits.into(),
                    false => self.end(&before).unwrap_or(before.bits.into()),
                }
            }
            None => 0,
        };
        let after = match index + 1 < outer.count {
            true => u64::from(self.nth_member(outer, index + 1)?.1.bits),
            false => u64::MAX,
        };
        match before <= u64::from(own.bits) && end <= after {
            true => Ok(()),
            false => Err(BtfError::Malformed("fields that overlap")),
        }
    }

    /// The end of a field that is no bit field, in bits.
    fn end(&self, member: &Member) -> Result<u64, BtfError> {
        Ok(u64::from(member.bits) + 8 * u64::from(self.size(member.type_id)?))
    }

    /// The end of the last field of a struct, in bytes.
    fn end_of_fields(&self, outer: &Type) -> Result<u64, BtfError> {
        let Some(last) = outer.count.checked_sub(1) else {
            return Ok(0);
        };
        let (_, last) = self.nth_member(outer, last)?;
        Ok(self.end(&last)? / 8)
    }

    /// Whether the name at this offset is `text`.
    fn is_named(&self, offset: u32, text: &str) -> bool {
        let names = &self.bytes[self.strings.clone()];
        let name = names.get(offset as usize..).unwrap_or_default();
        is_whole(name, text)
    }

    /// Whether this is the whole name at this offset.
    fn is_called(&self, offset: u32, name: Name) -> bool {
        let prefix = name.prefix();
        let names = &self.bytes[self.strings.clone()];
        let found = names.get(offset as usize..).unwrap_or_default();
        let rest = found.strip_prefix(prefix.as_bytes()).unwrap_or_default();
        is_whole(rest, name.text())
    }

    /// The name at this offset, for messages.
    fn name(&self, offset: u32) -> String {
        let names = &self.bytes[self.strings.clone()];
        let name = names.get(offset as usize..).unwrap_or_default();
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(0);
        String::from_utf8_lossy(&name[..end]).into_owned()
    }
}

impl<'b> Struct<'b> {
    /// The field at `path`, a number of this size. `path` is the name of a field, or several through structs in structs: `a.b.c`.
    ///
    /// # Errors
    /// [`BtfError::NotHere`]: there is no such number, or it has another size.
    pub fn number(self, path: &str, size: Size) -> Result<Field, BtfError> {
        let member = self.member(path)?;
        let (_, found) = self.btf.plain(member.type_id)?;
        let is_number = matches!(found.kind, INT | ENUM | ENUM64);
        if member.is_bit_field || !is_number || found.size_or_type != size.bytes() {
            let bytes = size.bytes();
            return Err(self.not_here(path, &format!(", a number of {bytes} bytes")));
        }
        let offset = self.offset(&member, path, size.bytes())?;
        Ok(Field { offset, size })
    }

    /// The field at `path`, a pointer to a struct.
    ///
    /// # Errors
    /// [`BtfError::NotHere`]: there is no such pointer.
    pub fn pointer(self, path: &str) -> Result<Pointer<'b>, BtfError> {
        let member = self.member(path)?;
        let (_, found) = self.btf.plain(member.type_id)?;
        let to = match found.kind {
            POINTER if !member.is_bit_field => self.btf.plain(found.size_or_type).ok(),
            _ => None,
        };
        match to {
            Some((id, target)) if target.kind == STRUCT => Ok(Pointer {
                offset: self.offset(&member, path, 8)?,
                to: Struct { btf: self.btf, id },
            }),
            _ => Err(self.not_here(path, ", a pointer to a struct")),
        }
    }

    /// The field at `path`, an array of bytes.
    ///
    /// # Errors
    /// [`BtfError::NotHere`]: there is no such array.
    pub fn chars(self, path: &str) -> Result<Array, BtfError> {
        self.numbers(path, Size::U8)
    }

    /// The element with this index of the array of numbers at `path`.
    ///
    /// # Errors
    /// [`BtfError::NotHere`]: there is no such element.
    pub fn element(self, path: &str, index: u32, size: Size) -> Result<Field, BtfError> {
        let array = self.numbers(path, size)?;
        let skipped = index.checked_mul(size.bytes());
        let skipped = skipped.and_then(|skipped| i16::try_from(skipped).ok());
        let offset = skipped.and_then(|skipped| array.offset.checked_add(skipped));
        match offset.filter(|_| index < array.len) {
            Some(offset) => Ok(Field { offset, size }),
            None => Err(self.not_here(path, &format!(" with {} elements", index + 1))),
        }
    }

    fn numbers(self, path: &str, size: Size) -> Result<Array, BtfError> {
        let (member, element, len) = self.array(path)?;
        let (_, element) = self.btf.plain(element)?;
        match element.kind == INT && element.size_or_type == size.bytes() {
            true => Ok(Array {
                offset: self.offset(&member, path, size.bytes())?,
                len,
            }),
            false if size == Size::U8 => Err(self.not_here(path, ", an array of bytes")),
            false => {
                let bytes = size.bytes();
                Err(self.not_here(path, &format!(", an array of numbers of {bytes} bytes")))
            }
        }
    }

    /// The field `inner`, a number of this size, of the first elements of the array of structs at `path`: at most `max`, and as many
    /// as the array has if it has a fixed length.
    ///
    /// # Errors
    /// [`BtfError::NotHere`]: there is no such array, or its structs have no such number.
    pub fn elements(
        self,
        path: &str,
        inner: &str,
        size: Size,
        max: u32,
    ) -> Result<Vec<Field>, BtfError> {
        let (member, element, len) = self.array(path)?;
        let (id, found) = self.btf.plain(element)?;
        if found.kind != STRUCT {
            return Err(self.not_here(path, ", an array of structs"));
        }
        if self.btf.end_of_fields(&found)?.next_multiple_of(8) != u64::from(found.size_or_type) {
            return Err(BtfError::Malformed(
                "a struct that is not as long as its fields",
            ));
        }
        let element = Struct { btf: self.btf, id };
        let first = element.number(inner, size)?.offset;
        let base = self.offset(&member, path, 4)?;
        // Length 0 is a flexible array.
        let count = if len == 0 { max } else { len.min(max) };
        let field = |index: u32| {
            let skipped = index.checked_mul(found.size_or_type);
            let skipped = skipped.and_then(|skipped| i16::try_from(skipped).ok());
            let offset = skipped.and_then(|skipped| base.checked_add(first)?.checked_add(skipped));
            let offset = offset.ok_or(BtfError::Malformed("a field at a great distance"))?;
            Ok(Field { offset, size })
        };
        (0..count).map(field).collect()
    }

    fn array(self, path: &str) -> Result<(Member, u32, u32), BtfError> {
        let member = self.member(path)?;
        let (_, found) = self.btf.plain(member.type_id)?;
        match found.kind == ARRAY && !member.is_bit_field {
            true => {
                let element = u32_at(&self.btf.bytes, found.at + TYPE)?;
                let len = u32_at(&self.btf.bytes, found.at + TYPE + 8)?;
                Ok((member, element, len))
            }
            false => Err(self.not_here(path, ", an array")),
        }
    }

    fn member(self, path: &str) -> Result<Member, BtfError> {
        let mut found = Member {
            bits: 0,
            is_bit_field: false,
            type_id: self.id,
        };
        for name in path.split('.') {
            let inner = self.btf.member(found.type_id, name, 0)?;
            let inner = inner.ok_or_else(|| self.not_here(path, ""))?;
            found = Member {
                bits: found.bits.saturating_add(inner.bits),
                ..inner
            };
        }
        Ok(found)
    }

    /// The offset in bytes of a field that is aligned to `align` bytes.
    fn offset(self, member: &Member, path: &str, align: u32) -> Result<i16, BtfError> {
        match i16::try_from(member.bits / 8) {
            Ok(offset) if member.bits.is_multiple_of(8 * align) => Ok(offset),
            _ => Err(self.not_here(path, " at a usable offset")),
        }
    }

    fn not_here(self, path: &str, what: &str) -> BtfError {
        let name = self.btf.type_at(self.id).map(|it| self.btf.name(it.name));
        let name = name.unwrap_or_default();
        BtfError::NotHere(format!("field {name}.{path}{what}"))
    }
}

/// `struct btf_type`.
struct Type {
    /// Its place in the data.
    at: usize,
    name: u32,
    kind: u32,
    count: usize,
    has_bit_fields: bool,
    /// The size in bytes, or for a pointer, a typedef and the like the type that it stands for.
    size_or_type: u32,
}

/// A field.
#[derive(Clone, Copy)]
struct Member {
    /// Its offset in bits.
    bits: u32,
    is_bit_field: bool,
    type_id: u32,
}

const CUT: BtfError = BtfError::Malformed("they are incomplete");

/// Whether the string that begins here is `text`.
fn is_whole(string: &[u8], text: &str) -> bool {
    string.starts_with(text.as_bytes()) && string.get(text.len()) == Some(&0)
}

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

fn count(info: u32) -> usize {
    (info & 0xffff) as usize
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    let end = at.checked_add(4).ok_or(CUT)?;
    let number = bytes.get(at..end).ok_or(CUT)?;
    Ok(u32::from_ne_bytes(number.try_into().map_err(|_| CUT)?))
}

#[cfg(test)]
#[path = "btf_tests.rs"]
mod tests;
