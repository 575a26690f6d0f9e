//! The report of a trace that did not see everything, from parts made by hand.

use super::*;
use crate::bpf::NotSeen;
use crate::bpf::tracer::{Counts, Life, Opened, Traced};
use crate::model::TimeAndPlace;
use crate::report::golden_tests::builder::{Who, case, socket};
use crate::trace::origin::Origin;
use crate::trace::places;
use crate::trace::stack::{End, Frame, Stack};
use crate::trace::symbols::Symbols;
use crate::trace::symbols::tests::answer;

static CLIENT: Who = Who("client", 77, "0::/");
const PROCESS: Traced = Traced {
    pid: 77,
    started: 1,
};

/// Two sockets whose end was read, one whose end was not, all opened at the same line; and one whose end was read, and nothing else is known.
fn scan() -> Scan {
    let of_client = |port: u16, cookie, recv_q| {
        socket(&format!("10.0.0.1:{port}"), "10.0.0.2:80", cookie)
            .owner(&CLIENT, 7)
            .queues(recv_q, 0)
    };
    let sockets = [
        of_client(4001, 1, 0),
        of_client(4002, 2, 0),
        of_client(4003, 3, 1),
        of_client(4004, 4, 0),
    ];
    case("trace", "").sockets(sockets).run(false).scan
}

fn trace(not_seen: NotSeen) -> Trace {
    let stack = Stack {
        frames: vec![Frame {
            function: Some("ask".into()),
            file: Some("client.c".into()),
            line: Some(7),
            module: None,
            address: 1,
            inlined: false,
            origin: Origin::Own,
        }],
        end: End::Whole,
    };
    let mut symbols = Symbols::default();
    let life = |cookie| Life {
        cookie,
        stuck_since: Some(Duration::from_secs(1)),
        opened: (cookie != 4).then_some(Opened::Connected),
        weight: 1,
    };
    for cookie in 1..=3 {
        symbols.learn(PROCESS, cookie, true, answer(0, Some(stack.clone())));
    }
    Trace {
        symbols,
        before: [].into(),
        lives: (1..=4).map(life).collect(),
        incomplete: None,
        at_end: None,
        is_sampled: false,
        counts: Counts::default(),
        ended: Duration::MAX,
        lasted: Duration::from_secs(60),
        not_seen,
    }
}

fn without_reads() -> Trace {
    trace(NotSeen {
        reads: Some("the kernel refuses".into()),
        accepts: Some("it refuses this, too".into()),
        later: false,
    })
}

fn text_of(trace: &Trace, found: &Places<'_>) -> String {
    let style = text::Style {
        columns: None,
        color: false,
        verbose: false,
    };
    let mut out = Vec::new();
    text::write(trace, found, style, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn what_a_trace_could_not_see_is_told() {
    let scan = scan();
    let mut trace = trace(NotSeen {
        later: true,
        ..NotSeen::default()
    });
    trace.incomplete = Some("a process keeps the lock of a socket".into());
    trace.lives.clear();
    let found = places::find(&trace, &scan);
    assert_eq!(found.places[0].times(), None);
    let notes = notes(&trace, &scan, &found);
    for text in ["ftrace_enabled became 0", "keeps the lock of a socket"] {
        let is_told = notes.iter().any(|note| note.contains(text));
        assert!(is_told, "{text}: {notes:?}");
    }
    let text = text_of(&trace, &found);
    assert!(!text.contains("since"), "{text}");
}

#[test]
fn reads_that_are_not_seen_are_put_where_the_connections_were_opened() {
    let (scan, trace) = (scan(), without_reads());
    let found = places::find(&trace, &scan);
    let text = text_of(&trace, &found);
    // The time depends on the clock.
    let timeless = text.lines().map(|line| match line.split_once(" since ") {
        Some((before, _)) => before,
        None => line,
    });
    assert_eq!(
        timeless.collect::<Vec<_>>().join("\n"),
        "\
4 sockets became stuck in 60 s and stayed so; no stack is known of 1

1. client/77: 2 of 4 (50 %), stuck
   for example 10.0.0.1:4001 - 10.0.0.2:80 (fd 7), 10.0.0.1:4002 - 10.0.0.2:80 (fd 7)
   the end was read; where was not seen
   one of them was connected here:
   > ask  client.c:7

2. client/77: 1 of 4 (25 %), stuck
   for example 10.0.0.1:4003 - 10.0.0.2:80 (fd 7)
   nobody has read the end
   one of them was connected here:
   > ask  client.c:7"
    );
    assert_eq!(
        notes(&trace, &scan, &found),
        [
            "it is not known where the ends were read, so the places are where connections were opened: the kernel refuses",
            "it is not known where 1 socket was opened",
            "who accepted the connections is not known: it refuses this, too",
        ]
    );
    assert_eq!(exit_status(&scan, &found), ExitStatus::Done);
}

#[test]
fn programs_are_told_that_reads_are_not_seen() {
    let (scan, trace) = (scan(), without_reads());
    let found = places::find(&trace, &scan);
    let mut out = Vec::new();
    let time_and_place = TimeAndPlace {
        time: SystemTime::UNIX_EPOCH,
        host: "host".into(),
        boot_id: None,
    };
    json::write(&trace, &scan, &found, &time_and_place, &mut out).unwrap();
    let document: serde_json::Value = serde_json::from_slice(&out).unwrap();
    for (key, value) in [
        ("/reads_not_seen", serde_json::json!("the kernel refuses")),
        (
            "/accepts_not_seen",
            serde_json::json!("it refuses this, too"),
        ),
        ("/became_stuck", 4.into()),
        ("/end_not_read", 1.into()),
        ("/place_unknown", 1.into()),
        ("/places/0/count", 2.into()),
        ("/places/0/share", 0.5.into()),
        ("/places/0/end_was_read", true.into()),
        ("/places/0/read", serde_json::Value::Null),
        ("/places/0/opened_how", "connected".into()),
        ("/places/0/opened_example/frames/0/function", "ask".into()),
        ("/places/1/end_was_read", false.into()),
        ("/places/1/read", serde_json::Value::Null),
    ] {
        assert_eq!(document.pointer(key), Some(&value), "{key} in {document:#}");
    }
}

/// A read without a stack is put where the connection was opened, if that is known.
#[test]
fn a_read_without_a_stack_is_unknown_or_where_it_was_opened() {
    let (scan, mut trace) = (scan(), trace(NotSeen::default()));
    let found = places::find(&trace, &scan);
    assert_eq!((found.unknown, found.end_not_read()), (1, 1));
    let ends = found.places.iter().map(|place| place.end);
    let ends: Vec<_> = ends.collect();
    let is_expected = matches!(ends[..], [places::End::Read, places::End::NotRead]);
    assert!(is_expected, "{ends:?}");
    assert_eq!(
        notes(&trace, &scan, &found)[0],
        "no stack is known of 1 socket: the end was read in a way that is not seen, such as splice(2)"
    );
    trace.is_sampled = true;
    trace.counts.reads_without_slot = 1;
    trace.symbols.missed = 2;
    assert_eq!(
        notes(&trace, &scan, &places::find(&trace, &scan))[0],
        "no stack is known of 1 socket: the peers closed so many connections that only a part was sampled; 1 read found no free slot; 2 samples gave \
         no stack"
    );
}
