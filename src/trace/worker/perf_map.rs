//! The names of code that was made at run time: `/tmp/perf-PID.map`, which virtual machines write for perf(1).
//!
//! Source: tools/perf/Documentation/jit-interface.txt. JDK 17 writes `0x` before the addresses, which that document does not have.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;

/// A larger file is not read to its end.
const MAX_BYTES: u64 = 64 << 20;

#[derive(Debug, Default)]
pub struct PerfMap {
    text: String,
    /// The start and the end of the code, and the place of its name in `text`; sorted by the start.
    entries: Vec<(u64, u64, std::ops::Range<usize>)>,
}

impl PerfMap {
    /// Reads the file. `user`: whose it must be, unless it is root's. Anybody may write into /tmp.
    ///
    /// # Errors
    /// It is not a file of that user, or as read(2).
    pub fn read(file: &File, user: u32) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if metadata.uid() != user && metadata.uid() != 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(Self::parse(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// A line that is not understood is left out: the last one may be half written.
    pub fn parse(text: String) -> Self {
        let mut entries = Vec::new();
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            let whole = line.strip_suffix('\n');
            if let Some((start, size, name)) = whole.and_then(entry)
                && let Some(end) = start.checked_add(size)
            {
                let name = at + name..at + line.len() - 1;
                entries.push((start, end, name));
            }
            at += line.len();
        }
        // Code is moved and thrown away: the later line is the one that holds.
        entries.sort_by_key(|(start, ..)| *start);
        PerfMap { text, entries }
    }

    /// The name of the code at this address.
    pub fn name(&self, address: u64) -> Option<&str> {
        let after = self
            .entries
            .partition_point(|(start, ..)| *start <= address);
        let (_, end, name) = self.entries.get(after.checked_sub(1)?)?;
        (address < *end).then(|| &self.text[name.clone()])
    }
}

/// The start, the size, and the place of the name in a line.
fn entry(line: &str) -> Option<(u64, u64, usize)> {
    let mut words = line.splitn(3, ' ');
    let mut number = || {
        let word = words.next()?;
        u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok()
    };
    let (start, size) = (number()?, number()?);
    let name = words.next()?;
    (!name.is_empty()).then(|| (start, size, line.len() - name.len()))
}

/// The parts of a name of Python's: `py::FUNCTION:FILE`.
pub fn python(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("py::")?.split_once(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_with_and_without_a_prefix() {
        let map = PerfMap::parse(
            "0x00007f0010 0x10 void Leak.run()\n7f0100 20 py::f:/srv/a.py\nhalf a li".into(),
        );
        assert_eq!(map.name(0x7f_0010), Some("void Leak.run()"));
        assert_eq!(map.name(0x7f_001f), Some("void Leak.run()"));
        assert_eq!(map.name(0x7f_0020), None);
        assert_eq!(map.name(0), None);
        let name = map.name(0x7f_0110).unwrap();
        assert_eq!(python(name), Some(("f", "/srv/a.py")));
        assert_eq!(map.entries.len(), 2);
    }

    #[test]
    fn of_two_lines_the_later_one_holds() {
        let map = PerfMap::parse("10 10 old\n10 8 new\n".into());
        assert_eq!(map.name(0x12), Some("new"));
    }

    #[test]
    fn damaged_lines_are_left_out() {
        let map = PerfMap::parse("\n \nx 1 a\n1 x a\n1 1\n1 1 \nffffffffffffffff 2 a\n".into());
        assert_eq!(map.entries.len(), 0);
    }
}
