//! What cwkill and a process that reads symbols say to each other, through pipes: a question for each sample, an answer to each, and at the
//! end of the questions the last words.

use std::collections::BTreeSet;
use std::io::{self, BufRead, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::problem::Problem;
use super::stack::Stack;
use crate::bpf::tracer::Thread;

/// The answer to a question, a line of JSON.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The number of the stack; `None` if nothing is known of it.
    pub number: Option<usize>,
    /// The stack, if this number was not used before, or if more is known of it now.
    pub stack: Option<Stack>,
    /// What keeps stacks of this process from telling more, as far as it was not said before.
    pub problems: BTreeSet<Problem>,
}

/// What comes after the last answer, each in a line of its own.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LastWord {
    /// A stack of which more is known now.
    Again(Answer),
    /// The last one.
    End(BTreeSet<Problem>),
}

/// The longest line in bytes. A stack has 128 KiB at most, see `worker`, and a byte of a name takes up to 6 here.
const MAX_LINE: u64 = 1 << 20;
/// The numbers before the stack.
const HEAD: usize = 6;

impl Answer {
    /// Nothing is known of the stack.
    pub fn unknown(problems: BTreeSet<Problem>) -> Self {
        Answer {
            number: None,
            stack: None,
            problems,
        }
    }
}

/// A question. In the pipe: the numbers and the length of the stack, each 8 bytes, and the stack.
impl Thread {
    /// # Errors
    /// As write(2).
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(8 * HEAD + self.stack.len());
        let len = self.stack.len() as u64;
        let is_own_call = self.is_own_call.into();
        for number in [self.ip, self.sp, self.fp, self.lr, is_own_call, len] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(&self.stack);
        to.write_all(&bytes)
    }

    /// The next question; `None` at the end of the input.
    ///
    /// # Errors
    /// As read(2), or the input ends in a question.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; 8 * HEAD];
        if from.read(&mut head[..1])? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut head[1..])?;
        let (words, _) = head.as_chunks::<8>();
        let [ip, sp, fp, lr, is_own_call, len] =
            std::array::from_fn(|at| u64::from_ne_bytes(words[at]));
        let mut stack = Vec::new();
        let read = from.by_ref().take(len).read_to_end(&mut stack)?;
        match read as u64 == len {
            true => Ok(Some(Thread {
                ip,
                sp,
                fp,
                lr,
                is_own_call: is_own_call != 0,
                stack,
            })),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Writes an answer, or a last word.
///
/// # Errors
/// As write(2).
pub fn write_line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// Reads an answer, or a last word. `None` at the end, and for a line that is too long or is none of the reader's.
pub fn read_line<T: DeserializeOwned>(input: &mut impl BufRead) -> Option<T> {
    let mut line = Vec::new();
    input.take(MAX_LINE).read_until(b'\n', &mut line).ok()?;
    serde_json::from_slice(&line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_read_as_it_was_written() {
        let question = Thread {
            ip: 1,
            sp: 2,
            fp: 3,
            lr: u64::MAX,
            is_own_call: true,
            stack: b"abcdefgh".to_vec(),
        };
        let mut bytes = Vec::new();
        question.write(&mut bytes).unwrap();
        question.write(&mut bytes).unwrap();
        let mut input = bytes.as_slice();
        for _ in 0..2 {
            assert_eq!(Thread::read(&mut input).unwrap(), Some(question.clone()));
        }
        assert_eq!(Thread::read(&mut input).unwrap(), None);
        // Cut in its registers, and in its stack.
        for len in [1, 20, 52] {
            assert!(Thread::read(&mut &bytes[..len]).is_err(), "{len}");
        }
    }
}
