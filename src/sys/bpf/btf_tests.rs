use super::*;
use proptest::prelude::*;

/// Data in the format of BTF, built type by type.
struct Builder {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl Builder {
    fn new() -> Self {
        Builder {
            types: Vec::new(),
            strings: vec![0],
            count: 0,
        }
    }

    fn name(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let offset = u32::try_from(self.strings.len()).unwrap();
        self.strings.extend(text.as_bytes());
        self.strings.push(0);
        offset
    }

    fn push(&mut self, numbers: &[u32]) {
        self.types
            .extend(numbers.iter().flat_map(|it| it.to_ne_bytes()));
    }

    /// Adds a type; `more` follows it. Returns its number.
    fn add(&mut self, name: &str, info: u32, size_or_type: u32, more: &[u32]) -> u32 {
        let name = self.name(name);
        self.push(&[name, info, size_or_type]);
        self.push(more);
        self.count += 1;
        self.count
    }

    fn int(&mut self, size: u32) -> u32 {
        self.add("", INT << 24, size, &[size * 8])
    }

    fn pointer(&mut self, to: u32) -> u32 {
        self.add("", POINTER << 24, to, &[])
    }

    fn array(&mut self, element: u32, index: u32, len: u32) -> u32 {
        self.add("", ARRAY << 24, 0, &[element, index, len])
    }

    /// A struct with fields of name, type and offset in bits.
    fn structure(&mut self, name: &str, size: u32, fields: &[(&str, u32, u32)]) -> u32 {
        self.compound(STRUCT << 24, name, size, fields)
    }

    fn compound(&mut self, info: u32, name: &str, size: u32, fields: &[(&str, u32, u32)]) -> u32 {
        let mut more = Vec::new();
        for (name, type_id, bits) in fields {
            more.extend([self.name(name), *type_id, *bits]);
        }
        let count = u32::try_from(fields.len()).unwrap();
        self.add(name, info | count, size, &more)
    }

    fn finish(&self) -> Vec<u8> {
        let types = u32::try_from(self.types.len()).unwrap();
        let strings = u32::try_from(self.strings.len()).unwrap();
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        for number in [24, 0, types, types, strings] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(&self.types);
        bytes.extend(&self.strings);
        bytes
    }
}

const NAMES: [Name; 4] = [
    Name::Struct("sock"),
    Name::Struct("file"),
    Name::Function("bpf_iter_task_file"),
    Name::Struct("nowhere"),
];

/// The number of struct sock in [`small`], which refers to itself.
const SOCK: u32 = 14;
/// The number of the function in [`small`].
const TASK_FILE: u32 = 16;

/// ```c
/// struct inner { u32 nr; void *ns; };
/// struct file { struct sock *owner; const volatile u8 mode; u32 flag : 1; };
/// struct sock { u16 port; union { u32 hash; struct { u16 low, high; }; }; struct file file; char name[8]; struct inner numbers[]; };
/// ```
fn small() -> Vec<u8> {
    let mut it = Builder::new();
    let (u8_, u16_, u32_) = (it.int(1), it.int(2), it.int(4));
    let void = it.pointer(0);
    let owner = it.pointer(SOCK);
    let volatile = it.add("", 9 << 24, u8_, &[]);
    let mode = it.add("", 10 << 24, volatile, &[]);
    // In a struct with bit fields, an offset has the width of a bit field in its upper byte.
    let fields = [
        ("owner", owner, 0),
        ("mode", mode, 64),
        ("flag", u32_, 1 << 24 | 96),
    ];
    let file = it.compound(1 << 31 | STRUCT << 24, "file", 16, &fields);
    let halves = it.structure("", 4, &[("low", u16_, 0), ("high", u16_, 16)]);
    let hash = it.compound(UNION << 24, "", 4, &[("hash", u32_, 0), ("", halves, 0)]);
    let inner = it.structure("inner", 16, &[("nr", u32_, 0), ("ns", void, 64)]);
    let chars = it.array(u8_, u32_, 8);
    let numbers = it.array(inner, u32_, 0);
    let fields = [
        ("port", u16_, 0),
        ("", hash, 32),
        ("file", file, 64),
        ("name", chars, 192),
        ("numbers", numbers, 256),
    ];
    assert_eq!(it.structure("sock", 32, &fields), SOCK);
    let prototype = it.add("", 13 << 24, 0, &[]);
    let function = it.add("bpf_iter_task_file", FUNCTION << 24, prototype, &[]);
    assert_eq!(function, TASK_FILE);
    it.finish()
}

fn parsed() -> Btf {
    Btf::parse(small(), &NAMES).unwrap()
}

#[test]
fn fields_are_found_by_name_and_size() {
    let btf = parsed();
    let sock = btf.structure("sock").unwrap();
    let offset = |path: &str, size| sock.number(path, size).map(|field| field.offset);
    assert_eq!(offset("port", Size::U16).unwrap(), 0);
    // In a union and a struct without a name.
    assert_eq!(offset("hash", Size::U32).unwrap(), 4);
    assert_eq!(offset("high", Size::U16).unwrap(), 6);
    // In a struct in it, through two qualifiers.
    assert_eq!(offset("file.mode", Size::U8).unwrap(), 16);
    assert_eq!(btf.function("bpf_iter_task_file").unwrap(), TASK_FILE);
}

#[test]
fn pointers_lead_to_their_struct() {
    let btf = parsed();
    let file = btf.structure("file").unwrap();
    let owner = file.pointer("owner").unwrap();
    assert_eq!(owner.offset, 0);
    assert_eq!(owner.to.number("port", Size::U16).unwrap().offset, 0);
    let inner = btf.structure("sock").unwrap().pointer("file.owner");
    assert_eq!(inner.unwrap().offset, 8);
}

#[test]
fn arrays_have_a_length() {
    let btf = parsed();
    let sock = btf.structure("sock").unwrap();
    let name = sock.chars("name").unwrap();
    assert_eq!((name.offset, name.len), (24, 8));
    let numbers = sock.elements("numbers", "nr", Size::U32, 3).unwrap();
    let offsets: Vec<i16> = numbers.iter().map(|field| field.offset).collect();
    assert_eq!(offsets, [32, 48, 64]);
}

#[test]
fn what_is_missing_is_named() {
    let btf = parsed();
    let sock = btf.structure("sock").unwrap();
    let says = |error: BtfError| error.to_string();
    for (error, text) in [
        (
            says(sock.number("prot", Size::U16).unwrap_err()),
            "this kernel has no field sock.prot",
        ),
        (
            says(sock.number("port", Size::U32).unwrap_err()),
            "this kernel has no field sock.port, a number of 4 bytes",
        ),
        (
            says(sock.pointer("port").unwrap_err()),
            "this kernel has no field sock.port, a pointer to a struct",
        ),
        (
            says(sock.pointer("file").unwrap_err()),
            "this kernel has no field sock.file, a pointer to a struct",
        ),
        (
            says(sock.number("file.flag", Size::U32).unwrap_err()),
            "this kernel has no field sock.file.flag, a number of 4 bytes",
        ),
        (
            says(sock.chars("numbers").unwrap_err()),
            "this kernel has no field sock.numbers, an array of bytes",
        ),
        (
            says(btf.structure("nowhere").unwrap_err()),
            "this kernel has no struct nowhere",
        ),
        (
            says(btf.function("nowhere").unwrap_err()),
            "this kernel has no function nowhere",
        ),
    ] {
        assert_eq!(error, text);
    }
}

#[test]
fn cut_data_is_refused() {
    let whole = small();
    for length in 0..whole.len() {
        let cut = Btf::parse(whole[..length].to_vec(), &NAMES);
        assert!(matches!(cut, Err(BtfError::Malformed(_))), "{length}");
    }
}

/// Everything that the reader can be asked about [`small`].
fn ask_all(btf: &Btf) -> Vec<Result<i16, BtfError>> {
    let paths = [
        "port",
        "hash",
        "low",
        "high",
        "file.mode",
        "file.flag",
        "file.owner",
        "name",
        "numbers",
    ];
    let mut answers = Vec::new();
    for name in ["sock", "file"] {
        let ask = |get: &dyn Fn(Struct) -> Result<i16, BtfError>| btf.structure(name).and_then(get);
        for path in paths {
            for size in [Size::U8, Size::U16, Size::U32, Size::U64] {
                answers.push(ask(&|it| it.number(path, size).map(|field| field.offset)));
                answers.push(ask(&|it| {
                    let elements = it.elements(path, "nr", size, 3)?;
                    Ok(elements.last().map_or(0, |field| field.offset))
                }));
            }
            answers.push(ask(&|it| it.pointer(path).map(|it| it.offset)));
            answers.push(ask(&|it| it.chars(path).map(|it| it.offset)));
        }
    }
    answers
}

/// Circles, far offsets and wrong numbers end as errors: no panic, no endless loop. An offset that is not the true one is taken only if the
/// altered struct is as good as the true one.
#[test]
fn altered_data_gives_errors_and_no_wrong_offsets() {
    let whole = small();
    let truth = ask_all(&parsed());
    let mut wrong = Vec::new();
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut altered = whole.clone();
            altered[at] ^= 1 << bit;
            let Ok(btf) = Btf::parse(altered, &NAMES) else {
                continue;
            };
            for (answer, right) in ask_all(&btf).iter().zip(&truth) {
                match (answer, right) {
                    (Ok(answer), Ok(right)) if answer != right => wrong.push((*right, *answer)),
                    (Ok(answer), Err(_)) => assert!(*answer >= 0, "bit {bit} of {at}: {answer}"),
                    _ => {}
                }
            }
        }
    }
    wrong.sort_unstable();
    wrong.dedup();
    let in_a_gap_beside_it = [(0, 2), (16, 17), (16, 18), (64, 68)];
    assert_eq!(wrong, in_a_gap_beside_it);
}

/// The same for the structs of the running kernel that the programs read, with their fields altered one after the other.
#[test]
fn altered_types_of_the_kernel_give_no_wrong_offsets() {
    const ASKED: [(&str, &str, Size); 6] = [
        ("sock", "__sk_common.skc_family", Size::U16),
        ("sock", "__sk_common.skc_state", Size::U8),
        ("sock", "sk_protocol", Size::U16),
        ("tcp_sock", "write_seq", Size::U32),
        ("task_struct", "start_boottime", Size::U64),
        ("inode", "i_ino", Size::U64),
    ];
    let names = ASKED.map(|(name, ..)| Name::Struct(name));
    // Not every kernel has its types, and not every user may read them. The test above needs none.
    let Ok(mut btf) = Btf::of_kernel(&names) else {
        return;
    };
    for (name, path, size) in ASKED {
        let id = btf.structure(name).unwrap().id;
        let right = btf.structure(name).unwrap().number(path, size).unwrap();
        let outer = btf.type_at(id).unwrap();
        let fields = outer.at + TYPE..outer.at + TYPE + MEMBER * outer.count;
        let (mut refused, mut moved) = (0, Vec::new());
        for at in fields {
            let original = btf.bytes[at];
            for bit in 0..8 {
                btf.bytes[at] = original ^ 1 << bit;
                match btf.structure(name).unwrap().number(path, size) {
                    Ok(field) if field == right => {}
                    Ok(field) => moved.push(field.offset),
                    Err(_) => refused += 1,
                }
            }
            btf.bytes[at] = original;
        }
        // A field may have a gap of a few bytes beside it.
        assert!(refused > 32, "{name}.{path}: {refused}");
        assert!(
            moved.len() < 4,
            "{name}.{path} is at {}: {moved:?}",
            right.offset
        );
    }
}

proptest! {
    #[test]
    fn any_data_is_survived(noise: Vec<u8>, altered in prop::collection::vec((0_usize..700, any::<u8>()), 1..20)) {
        let _ = Btf::parse(noise.clone(), &NAMES);
        let mut bytes = small();
        for (at, value) in altered {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(btf) = Btf::parse(bytes, &NAMES) {
            ask_all(&btf);
        }
    }
}
