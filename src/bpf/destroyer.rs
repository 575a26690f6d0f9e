//! Destroys chosen TCP sockets, each only if it is as cwkill has last seen it: an iterator over `tcp`.
//!
//! The kernel runs the program with the lock of each socket held. So the application can neither write nor read between the comparison and
//! the abort, and no segment of the peer is processed. SOCK_DESTROY cannot give that: its request only names the socket.
//!
//! Before the program destroys a socket, it puts its verdict into memory that it shares with cwkill, if no verdict is there: cwkill can put one
//! there, too, at one instant. So cwkill knows of each socket whether it was destroyed, whatever becomes of the walk, and can take the
//! sockets back that the walk has not reached.
//!
//! A child process makes the walk, see [`walk`].

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::KernelTypes;
use super::walk::{self, End};
use crate::sys::bpf::{Asm, BpfError, Btf, BtfError, Helper, Insn, Iterator, Name, Size};
use crate::sys::bpf::{Shared, Table, Variable, Walker};
use crate::tcp::{StateSet, TcpState};

/// The loaded programs. Threads can use them at the same time.
#[derive(Debug)]
pub struct Destroyer {
    programs: Vec<Mutex<Program>>,
    /// A walk was held up. Another one would be, too, until that one has come to its end.
    held_up: AtomicBool,
}

/// A program with its own maps and its own child process. Only one thread uses it at a time.
#[derive(Debug)]
struct Program {
    maps: Maps,
    iterator: Iterator,
    walker: Walker,
    passes: u32,
    /// The cookies that a walk has left in the map, because it was left itself.
    left: Vec<u64>,
}

/// The memory that a program shares with cwkill.
#[derive(Debug)]
struct Maps {
    /// The states of the chosen sockets.
    states: Variable,
    /// The chosen sockets by their cookies, each with the number of the pass for which it was chosen.
    chosen: Table<CHOSEN>,
    /// The number of this pass.
    pass: Variable,
    /// The verdict on each of the chosen sockets. The first one counts.
    verdicts: Shared,
    /// The number of sockets that the walk has shown.
    shown: Shared,
}

/// A socket to destroy, as it was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    pub cookie: u64,
    pub state: TcpState,
    /// Whether it has a descriptor.
    pub accepted: bool,
    /// The largest `write_seq - snd_una` with which it may be destroyed.
    pub max_send_q: u32,
    /// If data must not have moved since: what has moved until then.
    pub data: Option<Data>,
}

/// The data that has moved in a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// `rcv_nxt - copied_seq`
    pub unread: u32,
    /// The bytes received since the connection was made, and those that the peer has acknowledged. As in `struct tcp_info`.
    pub received: u64,
    pub acked: u64,
    /// The bytes that the application has written, see [`crate::sock_diag::ByteCounters`].
    pub written: u64,
}

/// What became of a chosen socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The program has not seen it in the state that was expected.
    NotSeen,
    /// The program has called bpf_sock_destroy, or was about to when the walk was left.
    Destroyed,
    /// It was left alone, because it has changed.
    Changed,
    /// It was left alone, because `write_seq - snd_una` was this.
    Unsent(u32),
    /// The kernel has not destroyed it.
    Refused(Errno),
    /// The walk was left before it reached the socket, and does not destroy it any more.
    NotReached,
}

/// The result of a walk.
#[derive(Debug)]
pub struct Walk {
    /// The verdict on each of the chosen sockets, in the same order.
    pub verdicts: Vec<Verdict>,
    pub end: End,
}

impl Walk {
    /// A walk that has not begun.
    fn none(chosen: &[Chosen], end: End) -> Self {
        let verdicts = vec![Verdict::NotReached; chosen.len()];
        Walk { verdicts, end }
    }
}

/// The number of sockets that one pass takes.
pub const CAPACITY: usize = 1 << 16;
/// The number of programs, for threads on several processors.
const PROGRAMS: usize = 2;

impl Destroyer {
    /// Loads the programs, and starts a process for each. To use them takes no capability, not even CAP_NET_ADMIN.
    ///
    /// # Errors
    /// The kernel lacks something that they need (Linux 6.5), or refuses them.
    pub fn load(types: &KernelTypes) -> Result<Self, BpfError> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let maps = (0..processors.min(PROGRAMS)).map(|_| Maps::new());
        // Before the types are read, which takes longer: without the capabilities it ends here.
        let maps = maps.collect::<Result<Vec<_>, _>>()?;
        let btf = types.get()?;
        let mut programs = Vec::new();
        for maps in maps {
            match Program::load(btf, maps) {
                Ok(program) => programs.push(Mutex::new(program)),
                // One is enough.
                Err(BpfError::Walker(_)) if !programs.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(Destroyer {
            programs,
            held_up: AtomicBool::new(false),
        })
    }

    /// Walks all TCP sockets of the network namespace of the calling thread once, and destroys those of `chosen`, of which there are at
    /// most [`CAPACITY`], that are as expected. Leaves the walk if `go_on` returns false, or if it is held up.
    pub fn destroy(&self, chosen: &[Chosen], go_on: impl Fn() -> bool) -> Walk {
        if self.is_held_up() {
            return Walk::none(chosen, End::HeldUp);
        }
        let walk = self.idle_program().destroy(chosen, go_on);
        if matches!(walk.end, End::HeldUp) {
            self.held_up.store(true, Ordering::Relaxed);
        }
        walk
    }

    /// Forgets that a walk was held up, if every walk that was left has come to its end since: then the lock is free.
    pub fn begin_again(&self) {
        let ended = |program: &Mutex<Program>| {
            let mut program = program.lock().unwrap_or_else(PoisonError::into_inner);
            program.is_idle()
        };
        if self.programs.iter().all(ended) {
            self.held_up.store(false, Ordering::Relaxed);
        }
    }

    /// Whether a walk was held up by the lock of a socket.
    pub fn is_held_up(&self) -> bool {
        self.held_up.load(Ordering::Relaxed)
    }

    /// A program that no other thread uses now, or the first one when it becomes free.
    fn idle_program(&self) -> MutexGuard<'_, Program> {
        let mut programs = self.programs.iter();
        let idle = programs.find_map(|program| program.try_lock().ok());
        idle.unwrap_or_else(|| {
            let first = self.programs[0].lock();
            // A thread that panicked has left its sockets in the map, with the number of its own pass.
            first.unwrap_or_else(PoisonError::into_inner)
        })
    }
}

impl Maps {
    fn new() -> Result<Self, BpfError> {
        Ok(Maps {
            states: Variable::new()?,
            chosen: Table::new(u32::try_from(CAPACITY).expect("a small number"))?,
            pass: Variable::new()?,
            verdicts: Shared::new(CAPACITY)?,
            shown: Shared::new(1)?,
        })
    }

    /// The number of sockets that the walk has shown so far.
    fn shown(&self) -> u64 {
        self.shown.numbers()[0].load(Ordering::Relaxed)
    }
}

impl Program {
    fn load(btf: &Btf, maps: Maps) -> Result<Self, BpfError> {
        let (program, target) = program(btf, &maps)?;
        let iterator = Iterator::load("cwkill_destroy", &program, target)?;
        Ok(Program {
            maps,
            iterator,
            walker: Walker::start().map_err(BpfError::Walker)?,
            passes: 0,
            left: Vec::new(),
        })
    }

    fn destroy(&mut self, chosen: &[Chosen], go_on: impl Fn() -> bool) -> Walk {
        // An earlier walk was left. It still uses the maps.
        if !self.is_idle() {
            return Walk::none(chosen, End::Stopped);
        }
        if chosen.is_empty() {
            return Walk::none(chosen, End::Whole);
        }
        let keys: Vec<u64> = chosen.iter().map(|socket| socket.cookie).collect();
        let begun = self.begin(chosen, &keys);
        let end = match begun {
            Ok(()) => walk::wait(&mut self.walker, || self.maps.shown(), go_on),
            Err(error) => End::Failed(error),
        };
        let verdicts = &self.maps.verdicts.numbers()[..chosen.len()];
        if !matches!(end, End::Whole) {
            let (none, not_reached) = (NOT_SEEN.into(), NOT_REACHED.into());
            for verdict in verdicts {
                let order = Ordering::SeqCst;
                // An error is the verdict of the program.
                let _ = verdict.compare_exchange(none, not_reached, order, order);
            }
        }
        let verdicts = verdicts.iter().map(|it| parse(it.load(Ordering::SeqCst)));
        let verdicts = verdicts.collect();
        self.left = keys;
        // What was chosen leaves the map now, or after the walk.
        self.is_idle();
        Walk { verdicts, end }
    }

    /// Whether no walk uses the maps. Notices the end of a walk that was left.
    fn is_idle(&mut self) -> bool {
        // Its result is of no use: its sockets were taken back.
        if self.walker.is_walking() && self.walker.result(0).is_none() {
            return false;
        }
        let left = mem::take(&mut self.left);
        if !left.is_empty() {
            // If this fails, the next pass has another number, and perhaps less room.
            let _ = self.maps.chosen.remove(&left);
        }
        true
    }

    /// Tells the program which sockets are chosen, and begins the walk.
    fn begin(&mut self, chosen: &[Chosen], keys: &[u64]) -> Result<(), BpfError> {
        self.passes += 1;
        let maps = &self.maps;
        maps.pass.set(self.passes.into())?;
        let states = chosen.iter().map(|socket| StateSet::from(socket.state));
        let states = states.reduce(StateSet::union);
        maps.states.set(states.map_or(0, |it| it.mask().into()))?;
        for verdict in &maps.verdicts.numbers()[..chosen.len()] {
            verdict.store(NOT_SEEN.into(), Ordering::SeqCst);
        }
        let value = |(index, socket): (u32, &Chosen)| socket.value(index, self.passes);
        let values: Vec<_> = (0..).zip(chosen).map(value).collect();
        maps.chosen.put(keys, &values)?;
        let iterator = self.iterator.begin()?;
        self.walker.begin(&iterator, None).map_err(BpfError::Walker)
    }
}

pub(super) const NAMES: [Name; 4] = [
    Name::Function("bpf_iter_tcp"),
    Name::Function("bpf_sock_destroy"),
    Name::Struct("bpf_iter__tcp"),
    Name::Struct("tcp_sock"),
];

/// The size of a value in the map of chosen sockets. The constants are the places of its parts.
const CHOSEN: usize = 56;
const RECEIVED: i16 = 0;
const ACKED: i16 = 8;
const WRITTEN: i16 = 16;
const UNREAD: i16 = 24;
const MAX_SEND_Q: i16 = 28;
const STATE: i16 = 32;
/// 1 if it has a descriptor, 0 if not.
const ACCEPTED: i16 = 36;
/// 1 if data must not have moved, 0 if it may have.
const COMPARE_DATA: i16 = 40;
/// Its index among the chosen ones.
const INDEX: i16 = 44;
const PASS: i16 = 48;

// The places of what the program has on its stack, from the end.
const KEY: i16 = 8;
const VERDICT: i16 = 16;
const INDEX_KEY: i16 = 24;

// The lower half of a verdict in the shared memory. The upper half of UNSENT are the bytes, that of REFUSED is the errno, below 0.
const NOT_SEEN: u32 = 0;
const DESTROYED: u32 = 1;
const CHANGED: u32 = 2;
const UNSENT: u32 = 3;
/// After DESTROYED.
const REFUSED: u32 = 4;
/// Only cwkill puts it there.
const NOT_REACHED: u32 = 5;
const UPPER_HALF: i32 = 32;

impl Chosen {
    /// Its value in the map, for this pass.
    fn value(&self, index: u32, pass: u32) -> [u8; CHOSEN] {
        let mut value = [0; CHOSEN];
        let mut put = |at: i16, bytes: &[u8]| {
            let at = usize::from(at.unsigned_abs());
            value[at..at + bytes.len()].copy_from_slice(bytes);
        };
        for (at, number) in [
            (MAX_SEND_Q, self.max_send_q),
            (STATE, self.state.number().into()),
            (ACCEPTED, self.accepted.into()),
            (COMPARE_DATA, self.data.is_some().into()),
            (UNREAD, self.data.map_or(0, |data| data.unread)),
            (INDEX, index),
            (PASS, pass),
        ] {
            put(at, &number.to_ne_bytes());
        }
        if let Some(data) = self.data {
            put(RECEIVED, &data.received.to_ne_bytes());
            put(ACKED, &data.acked.to_ne_bytes());
            put(WRITTEN, &data.written.to_ne_bytes());
        }
        value
    }
}

/// The verdict that stands in the shared memory.
fn parse(verdict: u64) -> Verdict {
    let bytes = verdict.to_le_bytes();
    let [lower, upper] = [0, 4].map(|at| {
        let half = bytes[at..].first_chunk().expect("one of two halves");
        u32::from_le_bytes(*half)
    });
    match lower {
        NOT_SEEN => Verdict::NotSeen,
        DESTROYED => Verdict::Destroyed,
        UNSENT => Verdict::Unsent(upper),
        REFUSED => Verdict::Refused(Errno::from_raw(upper.cast_signed().saturating_neg())),
        NOT_REACHED => Verdict::NotReached,
        _ => Verdict::Changed,
    }
}

/// The program, and the number of the function that stands for its iterator.
fn program(btf: &Btf, maps: &Maps) -> Result<(Vec<Insn>, u32), BtfError> {
    use crate::sys::bpf::Register::*;

    let target = btf.function("bpf_iter_tcp")?;
    let bpf_sock_destroy = btf.function("bpf_sock_destroy")?;
    let ctx = btf.structure("bpf_iter__tcp")?;
    let ctx_sk = ctx.pointer("sk_common")?;
    let sk_state = ctx_sk.to.number("skc_state", Size::U8)?;

    let tcp_sock = btf.structure("tcp_sock")?;
    let sk_socket = tcp_sock.pointer("inet_conn.icsk_inet.sk.sk_socket")?;
    let sequence = |name: &str| tcp_sock.number(name, Size::U32);
    let (write_seq, snd_nxt) = (sequence("write_seq")?, sequence("snd_nxt")?);
    let snd_una = sequence("snd_una")?;
    let (rcv_nxt, copied_seq) = (sequence("rcv_nxt")?, sequence("copied_seq")?);
    let counter = |name: &str| tcp_sock.number(name, Size::U64);
    let (bytes_received, bytes_acked) = (counter("bytes_received")?, counter("bytes_acked")?);
    let (bytes_sent, bytes_retrans) = (counter("bytes_sent")?, counter("bytes_retrans")?);

    let number = |verdict: u32| i32::try_from(verdict).expect("a small number");
    let mut asm = Asm::default();
    let (end, report) = (asm.label(), asm.label());
    let (verdict, sk, tp, seen) = (R6, R7, R8, R9);

    // struct sock_common *sk = ctx->sk_common;
    // if (!sk) return 0;
    asm.follow(sk, R1, &ctx_sk).if_is(sk, 0, end);
    // shown++;
    asm.address_of_map_value(R2, maps.shown.fd())
        .load_value(R1, R2)
        .add(R1, 1)
        .store_at(R2, 0, Size::U64, R1);
    // if (!(1 << sk->skc_state & states)) return 0;
    asm.load(R2, sk, sk_state)
        .bit(R1, R2)
        .address_of_map_value(R2, maps.states.fd())
        .load_value(R2, R2)
        .and(R1, R2)
        .if_is(R1, 0, end);
    // struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
    // if (!tp) return 0;
    asm.copy(R1, sk)
        .call(Helper::ToTcpSock)
        .if_is(R0, 0, end)
        .copy(tp, R0);
    // u64 cookie = bpf_get_socket_cookie(tp);
    asm.copy(R1, tp)
        .call(Helper::SocketCookie)
        .spill(KEY, Size::U64, R0);
    // struct chosen *seen = bpf_map_lookup_elem(&chosen, &cookie);
    // if (!seen) return 0;
    asm.address_of_map(R1, maps.chosen.fd())
        .copy(R2, R10)
        .add(R2, -i32::from(KEY))
        .call(Helper::MapLookup)
        .if_is(R0, 0, end)
        .copy(seen, R0);
    // if (seen->pass != pass) return 0;
    asm.load_at(R1, seen, PASS, Size::U32)
        .address_of_map_value(R2, maps.pass.fd())
        .load_value(R2, R2)
        .if_differs(R1, R2, end);
    // if (sk->skc_state != seen->state) return 0;
    asm.load(R1, sk, sk_state)
        .load_at(R2, seen, STATE, Size::U32)
        .if_differs(R1, R2, end);

    // u64 *verdict = bpf_map_lookup_elem(&verdicts, &seen->index);
    // if (!verdict) return 0;
    asm.load_at(R1, seen, INDEX, Size::U32)
        .spill(INDEX_KEY, Size::U32, R1)
        .address_of_map(R1, maps.verdicts.fd())
        .copy(R2, R10)
        .add(R2, -i32::from(INDEX_KEY))
        .call(Helper::MapLookup)
        .if_is(R0, 0, end)
        .copy(verdict, R0);
    // u32 send_q = tp->write_seq - tp->snd_una;
    // u64 mine = (u64)send_q << 32 | UNSENT;
    asm.load(R1, tp, write_seq)
        .load(R2, tp, snd_una)
        .subtract(R1, R2, Size::U32)
        .copy(R2, R1)
        .shift_left(R2, UPPER_HALF)
        .add(R2, number(UNSENT))
        .spill(VERDICT, Size::U64, R2);
    // if (send_q > seen->max_send_q) goto report;
    asm.load_at(R2, seen, MAX_SEND_Q, Size::U32)
        .if_greater(R1, R2, report);
    // mine = CHANGED;
    asm.spill_value(VERDICT, Size::U64, number(CHANGED));
    // if ((tp->sk_socket ? 1 : 0) != seen->accepted) goto report;
    let has_no_socket = asm.label();
    asm.load_at(R2, seen, ACCEPTED, Size::U32)
        .set(R3, 0)
        .follow(R1, tp, &sk_socket)
        .if_is(R1, 0, has_no_socket)
        .set(R3, 1)
        .place(has_no_socket)
        .if_differs(R2, R3, report);
    // if (!seen->compare_data) goto is_as_seen;
    let is_as_seen = asm.label();
    asm.load_at(R1, seen, COMPARE_DATA, Size::U32)
        .if_is(R1, 0, is_as_seen);
    // if (tp->rcv_nxt - tp->copied_seq != seen->unread) goto report;
    asm.load(R1, tp, rcv_nxt)
        .load(R2, tp, copied_seq)
        .subtract(R1, R2, Size::U32)
        .load_at(R2, seen, UNREAD, Size::U32)
        .if_differs(R1, R2, report);
    // if (tp->bytes_received != seen->received) goto report;
    // if (tp->bytes_acked != seen->acked) goto report;
    for (counter, place) in [(bytes_received, RECEIVED), (bytes_acked, ACKED)] {
        asm.load(R1, tp, counter)
            .load_at(R2, seen, place, Size::U64)
            .if_differs(R1, R2, report);
    }
    // u64 written = tp->bytes_sent - tp->bytes_retrans + (tp->write_seq - tp->snd_nxt);
    // if (written != seen->written) goto report;
    asm.load(R1, tp, bytes_sent)
        .load(R2, tp, bytes_retrans)
        .subtract(R1, R2, Size::U64)
        .load(R2, tp, write_seq)
        .load(R3, tp, snd_nxt)
        .subtract(R2, R3, Size::U32)
        .add_register(R1, R2)
        .load_at(R2, seen, WRITTEN, Size::U64)
        .if_differs(R1, R2, report);

    // is_as_seen:
    // mine = DESTROYED;
    asm.place(is_as_seen)
        .spill_value(VERDICT, Size::U64, number(DESTROYED));
    // report:
    // if (cmpxchg(verdict, NOT_SEEN, mine) != NOT_SEEN) return 0;
    asm.place(report)
        .load_at(R1, R10, -VERDICT, Size::U64)
        .set(R0, number(NOT_SEEN))
        .compare_and_exchange(verdict, R1)
        .if_not(R0, number(NOT_SEEN), end);
    // if (mine != DESTROYED) return 0;
    asm.if_not(R1, number(DESTROYED), end);
    // int error = bpf_sock_destroy(sk);
    // if (!error) return 0;
    asm.copy(R1, sk)
        .call_kernel(bpf_sock_destroy)
        .if_is(R0, 0, end);
    // *verdict = (u64)error << 32 | REFUSED;
    asm.shift_left(R0, UPPER_HALF)
        .add(R0, number(REFUSED))
        .store_at(verdict, 0, Size::U64, R0);
    // return 0;
    asm.place(end).go_on();
    Ok((asm.finish(), target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chosen_socket_has_its_parts_where_the_program_reads_them() {
        let socket = Chosen {
            cookie: 7,
            state: TcpState::CloseWait,
            accepted: true,
            max_send_q: 0x1111,
            data: Some(Data {
                unread: 0x2222,
                received: 0x3333_3333_3333,
                acked: 0x4444_4444_4444,
                written: 0x5555_5555_5555,
            }),
        };
        let value = socket.value(0x6666, 0x7777);
        let part = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().unwrap());
        let whole = |at: usize| u64::from_ne_bytes(value[at..at + 8].try_into().unwrap());
        assert_eq!(whole(0), 0x3333_3333_3333);
        assert_eq!(whole(8), 0x4444_4444_4444);
        assert_eq!(whole(16), 0x5555_5555_5555);
        let parts: Vec<u32> = (24..52).step_by(4).map(part).collect();
        assert_eq!(parts, [0x2222, 0x1111, 8, 1, 1, 0x6666, 0x7777]);
        let of_any_data = Chosen {
            data: None,
            accepted: false,
            ..socket
        };
        let value = of_any_data.value(0, 1);
        assert_eq!((value[36], value[40]), (0, 0));
    }

    #[test]
    fn a_number_in_the_shared_memory_is_a_verdict() {
        let number = |upper: i32, lower: u32| {
            u64::from(upper.cast_unsigned()) << UPPER_HALF | u64::from(lower)
        };
        assert_eq!(parse(0), Verdict::NotSeen);
        assert_eq!(parse(number(0, DESTROYED)), Verdict::Destroyed);
        assert_eq!(parse(number(0, CHANGED)), Verdict::Changed);
        assert_eq!(parse(number(9, UNSENT)), Verdict::Unsent(9));
        assert_eq!(parse(number(-1, UNSENT)), Verdict::Unsent(u32::MAX));
        let refused = Verdict::Refused(Errno::ENOENT);
        assert_eq!(parse(number(-2, REFUSED)), refused);
        assert_eq!(parse(number(0, NOT_REACHED)), Verdict::NotReached);
    }
}
