use super::*;
use crate::bpf::NotSeen;
use crate::model::{Owner, Socket};
use crate::proc::RemoteFd;
use crate::proc::cgroup::Cgroup;
use crate::proc::testdata::process;
use crate::sock_diag::testdata::stuck;
use crate::trace::protocol::Answer;
use crate::trace::symbols::Symbols;
use crate::trace::symbols::tests::{APP, answer, stack};

const OTHER: Traced = Traced { pid: 8, ..APP };

/// When the trace ended.
const ENDED: Duration = Duration::from_secs(100);

/// A trace without samples, at whose end there are sockets whose cookies are from 1 on. Each has been read by `APP`.
struct Case {
    trace: Trace,
    scan: Scan,
}

impl Case {
    fn new(sockets: u64) -> Self {
        let target = |cookie| {
            let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", cookie);
            message.recv_q = 0;
            let mut target = Target::new(Socket::from_message(&message));
            target.owners = vec![Owner::new(process(APP.pid, "app"), RemoteFd(3))];
            target
        };
        let life = |cookie| Life {
            cookie,
            stuck_since: Some(Duration::from_secs(cookie)),
            opened: None,
            weight: 1,
        };
        Case {
            trace: Trace {
                symbols: Symbols::default(),
                before: Default::default(),
                lives: (1..=sockets).map(life).collect(),
                incomplete: None,
                at_end: None,
                is_sampled: false,
                counts: Default::default(),
                ended: ENDED,
                lasted: ENDED,
                not_seen: NotSeen::default(),
            },
            scan: Scan {
                targets: (1..=sockets).map(target).collect(),
                owners_known: true,
                ..Scan::default()
            },
        }
    }

    fn life(&mut self, cookie: usize) -> &mut Life {
        &mut self.trace.lives[cookie - 1]
    }

    fn target(&mut self, cookie: usize) -> &mut Target {
        &mut self.scan.targets[cookie - 1]
    }

    /// The end of a socket is not read.
    fn leave_unread(&mut self, cookie: usize) {
        self.target(cookie).socket.recv_q = 1;
        self.target(cookie).socket.cause = Cause::Unread;
    }

    fn owned_by(&mut self, cookie: usize, owner: Arc<Process>) {
        self.target(cookie).owners = vec![Owner::new(owner, RemoteFd(3))];
    }

    /// These sockets are read by a function.
    fn read(&mut self, process: Traced, function: &str, cookies: impl IntoIterator<Item = u64>) {
        self.sampled(process, function, false, cookies);
    }

    fn sampled(
        &mut self,
        process: Traced,
        function: &str,
        opens: bool,
        cookies: impl IntoIterator<Item = u64>,
    ) {
        for cookie in cookies {
            let number = usize::try_from(cookie).unwrap() * 2 + usize::from(opens);
            let told = answer(number, Some(stack(&[function, "main"])));
            self.trace.symbols.learn(process, cookie, opens, told);
        }
    }

    fn find(&self) -> Places<'_> {
        find(&self.trace, &self.scan)
    }
}

/// The innermost function, the number of sockets, and the percent of a place.
fn summary(found: &Places<'_>) -> Vec<(&'static str, usize, u32)> {
    let names = ["leak", "other", "open"];
    let summary = |place: &Place<'_>| {
        let opened = place.opened.map(|(_, stack)| stack);
        let stack = match place.end {
            End::ReadAt(stack) => Some(stack),
            End::Read | End::NotRead => opened,
        };
        let function = stack.unwrap().frames[0].function.as_deref();
        let name = names.into_iter().find(|name| Some(*name) == function);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a percentage"
        )]
        let percent = (place.share * 100.0).round() as u32;
        (name.unwrap(), place.sockets.len(), percent)
    };
    found.places.iter().map(summary).collect()
}

#[test]
fn a_socket_stands_for_as_many_as_its_sample() {
    let mut case = Case::new(10);
    case.read(APP, "other", [1, 2, 3, 4]);
    case.read(APP, "leak", [5, 6]);
    for cookie in [5, 6] {
        case.life(cookie).weight = 16;
    }
    // It was not sampled.
    case.life(4).weight = 0;
    // Of these it is not known where they were read.
    let found = case.find();
    assert_eq!((found.new, found.read, found.unknown), (10, 10, 4));
    assert_eq!(found.known(), 6);
    // Its two samples stand for 30 others, the four for none. Four others are there.
    assert_eq!(summary(&found), [("leak", 2, 60), ("other", 4, 40)]);
    // With no other one, the numbers are exact.
    for cookie in [7, 8, 9, 10] {
        case.leave_unread(cookie);
        case.life(cookie).opened = Some(Opened::Accepted);
    }
    case.sampled(APP, "open", true, 7..=10);
    let found = case.find();
    assert_eq!((found.new, found.read, found.unknown), (10, 6, 0));
    let shares = [("other", 4, 40), ("open", 4, 40), ("leak", 2, 20)];
    assert_eq!(summary(&found)[..], shares);
    assert_eq!(found.end_not_read(), 4);
}

#[test]
fn what_was_stuck_before_or_comes_later_has_no_place() {
    let mut case = Case::new(5);
    case.read(APP, "leak", 1..=5);
    case.trace.before = [1, 2].into();
    // Its FIN came before. That of the other one was seen: the list of those before was a moment later.
    case.life(1).stuck_since = None;
    case.life(3).stuck_since = Some(ENDED);
    case.life(4).stuck_since = Some(ENDED + Duration::from_nanos(1));
    // Its FIN was not sampled.
    case.life(5).stuck_since = None;
    let found = case.find();
    assert_eq!((found.before, found.new, found.read), (1, 3, 3));
    assert_eq!(summary(&found), [("leak", 3, 100)]);
    let sockets = &found.places[0].sockets;
    let cookies = sockets.iter().map(|it| it.target.socket.cookie().0);
    assert_eq!(cookies.collect::<Vec<_>>(), [5, 2, 3], "the oldest first");
    assert_eq!(
        found.places[0].times(),
        Some((Duration::from_secs(2), ENDED))
    );
}

#[test]
fn sockets_that_nobody_reads_are_counted_by_process_and_cause() {
    let mut case = Case::new(6);
    for cookie in 1..=6 {
        case.leave_unread(cookie);
    }
    for cookie in [4, 5] {
        case.target(cookie).socket.cause = Cause::NotAccepted;
    }
    case.owned_by(3, process(OTHER.pid, "other"));
    case.target(6).owners.clear();
    let found = case.find();
    assert_eq!((found.new, found.read, found.unknown), (6, 0, 0));
    assert!(found.places.is_empty());
    let unread = |pid, not_accepted, count| Unread {
        process: match pid {
            7 => Some(process(7, "app")),
            8 => Some(process(8, "other")),
            _ => None,
        },
        not_accepted,
        count,
    };
    let expected = [
        unread(7, false, 2),
        unread(7, true, 2),
        unread(0, false, 1),
        unread(8, false, 1),
    ];
    assert_eq!(found.unread, expected);
    assert_eq!(found.end_not_read(), 6);
}

#[test]
fn connections_whose_end_nobody_reads_belong_to_who_opens_them() {
    let mut case = Case::new(2);
    case.leave_unread(1);
    case.life(1).opened = Some(Opened::Connected);
    case.sampled(APP, "open", true, [1, 2]);
    // How it was opened tells nothing if its end was read, and is a part of the report then.
    case.read(APP, "leak", [2]);
    case.life(2).opened = Some(Opened::Accepted);
    let found = case.find();
    let opened = stack(&["open", "main"]);
    let [connects, reads] = &found.places[..] else {
        panic!("{:?}", found.places);
    };
    assert!(matches!(connects.end, End::NotRead));
    let leak = stack(&["leak", "main"]);
    assert!(matches!(reads.end, End::ReadAt(stack) if *stack == leak));
    assert_eq!(connects.opened, Some((Opened::Connected, &opened)));
    assert_eq!(reads.opened, Some((Opened::Accepted, &opened)));
    assert_eq!(found.end_not_read(), 1);
}

#[test]
fn workers_with_the_same_code_are_one_place() {
    let mut case = Case::new(3);
    case.read(APP, "leak", [1, 2]);
    case.read(OTHER, "leak", [3]);
    case.owned_by(3, process(OTHER.pid, "app"));
    // It reads, and another process has the descriptor.
    let reads = Traced { pid: 6, ..APP };
    case.read(reads, "leak", [2]);
    let found = case.find();
    assert_eq!(summary(&found), [("leak", 3, 100)]);
    let place = &found.places[0];
    let pids = place
        .processes
        .iter()
        .map(|(it, known)| (it.pid, known.is_some()));
    let pids: Vec<_> = pids.collect();
    assert_eq!(pids, [(6, false), (7, true), (8, true)]);
    let (first, known) = place.process();
    assert_eq!((first, known.map(|it| it.id.pid)), (APP, Some(7)));
}

#[test]
fn the_same_code_in_two_containers_is_two_places() {
    let mut case = Case::new(3);
    case.read(APP, "leak", [1]);
    case.read(OTHER, "leak", [2, 3]);
    let contained = |pid, digit: &str| {
        let mut process = Process::clone(&process(pid, "app"));
        let path = format!("0::/system.slice/docker-{}.scope\n", digit.repeat(64));
        process.cgroup = Cgroup::parse(&path);
        assert!(process.cgroup.container.is_some());
        Arc::new(process)
    };
    for (cookie, digit) in [(1, "a"), (2, "b"), (3, "b")] {
        let pid = if cookie == 1 { APP.pid } else { OTHER.pid };
        case.owned_by(cookie, contained(pid, digit));
    }
    assert_eq!(summary(&case.find()), [("leak", 2, 67), ("leak", 1, 33)]);
    // In one container they are one.
    case.owned_by(1, contained(APP.pid, "b"));
    assert_eq!(summary(&case.find()), [("leak", 3, 100)]);
}

#[test]
fn only_problems_of_processes_with_stuck_sockets_are_told() {
    let mut case = Case::new(1);
    for process in [APP, OTHER] {
        case.trace
            .symbols
            .learn_problem(process, Problem::NoSymbols);
    }
    let problems = |case: &Case| {
        let problems = case.find().problems;
        let problems = problems
            .iter()
            .map(|(it, known, _)| (it.pid, known.is_some()));
        problems.collect::<Vec<_>>()
    };
    assert_eq!(problems(&case), [(7, true)]);
    // A process that reads, without a descriptor of its own.
    case.read(OTHER, "leak", [1]);
    assert_eq!(problems(&case), [(7, true), (8, false)]);
}

#[test]
fn without_lines_calls_are_told_apart_by_their_address() {
    let mut case = Case::new(4);
    for (cookie, address, module) in [
        (1, 0x10, Some("/srv/app")),
        (2, 0x20, Some("/srv/app")),
        // Code that is made at run time is made again elsewhere.
        (3, 0x30, None),
        (4, 0x40, None),
    ] {
        let mut stack = stack(&["leak"]);
        let frame = &mut stack.frames[0];
        (frame.line, frame.file, frame.address) = (None, None, address);
        frame.module = module.map(Into::into);
        let told: Answer = answer(usize::try_from(cookie).unwrap(), Some(stack));
        case.trace.symbols.learn(APP, cookie, false, told);
    }
    let places = [("leak", 2, 50), ("leak", 1, 25), ("leak", 1, 25)];
    assert_eq!(summary(&case.find()), places);
}
