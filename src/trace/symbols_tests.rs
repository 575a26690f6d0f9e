use super::*;
use crate::trace::origin::Origin;
use crate::trace::stack::Frame;

/// The first or second reader of a process.
fn reader(process: Traced, serial: u64) -> ReaderId {
    ReaderId { process, serial }
}

pub const APP: Traced = Traced {
    pid: 7,
    started: 1000,
};

impl Symbols {
    /// As if the first reader of this process had answered this about a sample.
    pub fn learn(&mut self, process: Traced, cookie: u64, opens: bool, answer: Answer) {
        self.note(Report::Stack {
            reader: reader(process, 1),
            cookie,
            opens,
            answer,
        });
    }

    /// As if a reader of this process had found it at its end.
    pub fn learn_problem(&mut self, process: Traced, problem: Problem) {
        self.note_end(reader(process, 1), [problem].into());
    }
}

/// A stack of own functions, the innermost first.
pub fn stack(functions: &[&str]) -> Stack {
    let frame = |function: &&str| Frame {
        function: Some(function.to_string()),
        file: Some("app.c".into()),
        line: Some(10),
        module: Some("/srv/app".into()),
        address: 0x1000,
        inlined: false,
        origin: Origin::Own,
    };
    Stack {
        frames: functions.iter().map(frame).collect(),
        ..Stack::default()
    }
}

/// The answer to the first sample with this stack, or to a later one.
pub fn answer(number: usize, stack: Option<Stack>) -> Answer {
    Answer {
        number: Some(number),
        stack,
        problems: BTreeSet::new(),
    }
}

fn read_at(symbols: &Symbols, cookie: u64) -> Option<&Stack> {
    let (_, stack) = symbols.read_at(cookie)?.ok()?;
    Some(stack)
}

#[test]
fn a_stack_is_told_once_and_found_by_its_number() {
    let mut symbols = Symbols::default();
    symbols.learn(APP, 1, false, answer(0, Some(stack(&["read"]))));
    symbols.learn(APP, 2, false, answer(0, None));
    symbols.learn(APP, 2, true, answer(1, Some(stack(&["accept"]))));
    assert_eq!(read_at(&symbols, 2), Some(&stack(&["read"])));
    assert_eq!(symbols.opened_at(2), Some((APP, &stack(&["accept"]))));
    assert_eq!(symbols.opened_at(1), None);
    // Another process has other numbers, and so has another reader of the same one.
    let other = Traced { pid: 8, ..APP };
    symbols.learn(other, 3, false, answer(0, None));
    assert_eq!(read_at(&symbols, 3), None);
    symbols.note(Report::Stack {
        reader: reader(APP, 2),
        cookie: 4,
        opens: false,
        answer: answer(0, Some(stack(&["other"]))),
    });
    assert_eq!(read_at(&symbols, 4), Some(&stack(&["other"])));
    assert_eq!(read_at(&symbols, 1), Some(&stack(&["read"])));
    assert_eq!(symbols.missed, 1, "the one of the other process");
}

/// The same end is read again by io_uring, or while the reader has too many stacks.
#[test]
fn a_stack_is_not_forgotten_for_none() {
    let mut symbols = Symbols::default();
    symbols.learn(APP, 1, false, answer(0, Some(stack(&["read"]))));
    symbols.learn(APP, 1, false, Answer::unknown(BTreeSet::new()));
    assert_eq!(read_at(&symbols, 1), Some(&stack(&["read"])));
}

#[test]
fn what_a_reader_does_not_know_is_missed() {
    let mut symbols = Symbols::default();
    symbols.learn(APP, 1, false, Answer::unknown([Problem::Ended].into()));
    // A number that was never told, and a stack without a function.
    symbols.learn(APP, 2, false, answer(5, None));
    symbols.learn(APP, 3, false, answer(6, Some(Stack::default())));
    assert_eq!(symbols.missed, 2);
    for cookie in 1..=3 {
        assert_eq!(symbols.read_at(cookie), Some(Err(APP)), "{cookie}");
    }
    assert_eq!(symbols.read_at(4), None);
}

#[test]
fn last_words_name_stacks_again_and_say_what_is_wrong() {
    let mut symbols = Symbols::default();
    symbols.learn(APP, 1, false, answer(0, Some(stack(&["?"]))));
    let reader = reader(APP, 1);
    let again = answer(0, Some(stack(&["Leak.run"])));
    symbols.note(Report::Again {
        reader,
        answer: again,
    });
    let problems = Some([Problem::Node].into());
    symbols.note(Report::Ended { reader, problems });
    assert_eq!(read_at(&symbols, 1), Some(&stack(&["Leak.run"])));
    let bytes = stack(&["Leak.run"]).bytes();
    assert_eq!(symbols.bytes, bytes, "the first one is forgotten");
    symbols.note(Report::Ended {
        reader,
        problems: None,
    });
    let refused = Traced { pid: 8, ..APP };
    symbols.refused.insert(refused, Problem::TooManyProcesses);
    let problems = symbols.problems();
    let problems = problems.iter().map(|(process, it)| (process.pid, *it));
    let expected = [
        (7, Problem::Damaged),
        (7, Problem::Node),
        (8, Problem::TooManyProcesses),
    ];
    assert!(problems.eq(expected), "{:?}", symbols.problems());
}

/// It may be killed before it says its last words.
#[test]
fn what_is_wrong_is_known_with_the_answer() {
    let mut symbols = Symbols::default();
    let first = Answer {
        problems: [Problem::FileGone].into(),
        ..answer(0, Some(stack(&["read"])))
    };
    symbols.learn(APP, 1, false, first);
    assert_eq!(symbols.problems(), [(APP, Problem::FileGone)].into());
}

#[test]
fn the_oldest_opened_connections_are_forgotten() {
    let mut symbols = Symbols::default();
    symbols.learn(APP, 0, false, answer(0, Some(stack(&["read"]))));
    for cookie in 0..=MAX_OPENED as u64 {
        symbols.learn(APP, cookie, true, answer(0, None));
    }
    assert_eq!(symbols.opened_at(0), None);
    assert!(symbols.opened_at(1).is_some());
    assert!(read_at(&symbols, 0).is_some(), "a read is kept");
}

#[test]
fn of_many_processes_those_with_a_place_are_remembered() {
    let mut symbols = Symbols::default();
    symbols.learn(APP, 1, false, answer(0, Some(stack(&["read"]))));
    for pid in 0..i32::try_from(MAX_REMEMBERED).unwrap() {
        let reader = reader(Traced { pid, started: 1 }, 1);
        let problems = Some(BTreeSet::new());
        symbols.note(Report::Ended { reader, problems });
    }
    assert_eq!(symbols.told.len(), 1);
    assert_eq!(read_at(&symbols, 1), Some(&stack(&["read"])));
}

#[test]
fn hostile_names_do_not_take_all_memory() {
    let mut symbols = Symbols::default();
    let name = "x".repeat(1 << 20);
    for number in 0..300 {
        let cookie = number as u64;
        symbols.learn(APP, cookie, false, answer(number, Some(stack(&[&name]))));
    }
    assert!(symbols.bytes < MAX_BYTES + (2 << 20), "{}", symbols.bytes);
    assert!(read_at(&symbols, 0).is_some());
    assert!(read_at(&symbols, 299).is_none());
    // What was forgotten makes room.
    symbols.read.clear();
    for pid in 0..i32::try_from(MAX_REMEMBERED).unwrap() {
        symbols.note_end(reader(Traced { pid, started: 1 }, 1), BTreeSet::new());
    }
    assert_eq!(symbols.bytes, 0);
}

/// A long trace: most sockets are closed after all.
#[test]
fn what_belongs_to_closed_sockets_is_forgotten() {
    let mut symbols = Symbols::default();
    for cookie in 0..10 {
        let pid = i32::try_from(cookie).unwrap();
        let process = Traced { pid, ..APP };
        symbols.learn(process, cookie, false, answer(0, Some(stack(&["read"]))));
        symbols.learn(process, cookie, true, answer(0, None));
    }
    assert!(!symbols.is_nearly_full());
    symbols.forget_all_but(&[3, 4].into());
    let known = (0..10).filter(|cookie| read_at(&symbols, *cookie).is_some());
    assert!(known.eq([3, 4]));
    assert!(symbols.opened_at(5).is_some(), "it may be stuck later");
    let name = "x".repeat(1 << 20);
    for number in 1..=200 {
        let told = answer(number, Some(stack(&[&name])));
        symbols.learn(APP, 100, true, told);
    }
    symbols.forget_all_but(&[3, 4].into());
    assert_eq!(symbols.opened_at(5), None);
    assert_eq!(symbols.opened_order, [3, 4]);
    assert_eq!(symbols.bytes, 2 * stack(&["read"]).bytes());
}
