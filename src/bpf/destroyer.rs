//! Destroys chosen TCP sockets, each only if it is as cwkill has last seen it: an iterator over `tcp`.
//!
//! The kernel runs the program with the lock of each socket held. So the application can neither write nor read between the comparison and
//! the abort, and no segment of the peer is processed. SOCK_DESTROY cannot give that: its request only names the socket.
//!
//! The program reports a socket first, and destroys it only if there was room for the report. Otherwise the kernel shows it the same socket
//! again at the next read(2), and it would find an aborted one that nobody has heard of.

use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::part;
use crate::sys::bpf::{Asm, BpfError, Btf, BtfError, Helper, Insn, Iterator, Name, Size};
use crate::sys::bpf::{Table, Variable};
use crate::tcp::{StateSet, TcpState};

/// The loaded programs. Threads can use them at the same time.
#[derive(Debug)]
pub struct Destroyer {
    programs: Vec<Mutex<Program>>,
}

/// A program with its own maps. Only one thread uses it at a time.
#[derive(Debug)]
struct Program {
    iterator: Iterator,
    /// The states of the chosen sockets.
    states: Variable,
    /// The chosen sockets by their cookies, each with the number of the pass for which it was chosen.
    chosen: Table<CHOSEN>,
    /// The number of this pass.
    pass: Variable,
    passes: u32,
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
    Destroyed,
    /// It was left alone, because it has changed.
    Changed,
    /// It was left alone, because `write_seq - snd_una` was this.
    Unsent(u32),
    /// The kernel has not destroyed it.
    Refused(Errno),
}

/// The number of sockets that one pass takes.
pub const CAPACITY: usize = 1 << 16;
/// The number of programs, for threads on several processors.
const PROGRAMS: usize = 2;

impl Destroyer {
    /// Loads the programs. To use them takes no capability, not even CAP_NET_ADMIN.
    ///
    /// # Errors
    /// The kernel lacks something that they need (Linux 6.5), or refuses them.
    pub fn load() -> Result<Self, BpfError> {
        let btf = Btf::of_kernel(&NAMES)?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let load = |_| Program::load(&btf).map(Mutex::new);
        let programs = (0..processors.min(PROGRAMS)).map(load);
        Ok(Destroyer {
            programs: programs.collect::<Result<_, _>>()?,
        })
    }

    /// Walks all TCP sockets of the network namespace of the calling thread once, and destroys those of `chosen`, of which there are at
    /// most [`CAPACITY`], that are as expected. Stops early if `go_on` returns false. Returns the verdict on each of `chosen`, in the
    /// same order.
    ///
    /// # Errors
    /// The kernel refuses a step before anything was destroyed. If a later read fails, for lack of memory, the verdicts so far count.
    pub fn destroy(
        &self,
        chosen: &[Chosen],
        go_on: impl Fn() -> bool,
    ) -> Result<Vec<Verdict>, BpfError> {
        self.idle_program().destroy(chosen, go_on)
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

impl Program {
    fn load(btf: &Btf) -> Result<Self, BpfError> {
        let (states, pass) = (Variable::new()?, Variable::new()?);
        let chosen = Table::new(u32::try_from(CAPACITY).expect("a small number"))?;
        let maps = Maps {
            states: states.fd(),
            pass: pass.fd(),
            chosen: chosen.fd(),
        };
        let (program, target) = program(btf, &maps)?;
        let iterator = Iterator::load("cwkill_destroy", &program, target)?;
        Ok(Program {
            iterator,
            states,
            chosen,
            pass,
            passes: 0,
        })
    }

    fn destroy(
        &mut self,
        chosen: &[Chosen],
        go_on: impl Fn() -> bool,
    ) -> Result<Vec<Verdict>, BpfError> {
        let mut verdicts = vec![Verdict::NotSeen; chosen.len()];
        if chosen.is_empty() {
            return Ok(verdicts);
        }
        self.passes += 1;
        self.pass.set(self.passes.into())?;
        let states = chosen.iter().map(|socket| StateSet::from(socket.state));
        let states = states.reduce(StateSet::union);
        self.states.set(states.map_or(0, |it| it.mask().into()))?;
        let keys: Vec<u64> = chosen.iter().map(|socket| socket.cookie).collect();
        let value = |(index, socket): (u32, &Chosen)| socket.value(index, self.passes);
        let values: Vec<_> = (0..).zip(chosen).map(value).collect();
        self.chosen.put(&keys, &values)?;
        let ran = self.iterator.run(|records: &[[u8; RECORD]]| {
            for record in records {
                let (index, verdict) = parse(record);
                if let Some(slot) = verdicts.get_mut(index) {
                    *slot = verdict;
                }
            }
            go_on()
        });
        // If this fails, the next pass has another number, and perhaps less room.
        let _ = self.chosen.remove(&keys);
        match ran {
            Err(error) if verdicts.iter().all(|it| *it == Verdict::NotSeen) => Err(error),
            _ => Ok(verdicts),
        }
    }
}

const NAMES: [Name; 4] = [
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

/// The size of a record: what the program reports of a socket. The constants are the places of its parts, from the end, as the program has
/// it on its stack.
const RECORD: usize = 16;
const RECORD_INDEX: i16 = 16;
const RECORD_SEND_Q: i16 = 12;
const RECORD_VERDICT: i16 = 8;
const RECORD_ERROR: i16 = 4;
/// The cookie, which the program has below its record.
const KEY: i16 = 24;

// The verdicts in a record.
const DESTROYED: i32 = 1;
const CHANGED: i32 = 2;
const UNSENT: i32 = 3;
/// After a record with DESTROYED.
const REFUSED: i32 = 4;

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

/// The index of the socket in a record, and the verdict on it.
fn parse(record: &[u8; RECORD]) -> (usize, Verdict) {
    let index = u32::from_ne_bytes(part(record, RECORD_INDEX));
    let verdict = match i32::from_ne_bytes(part(record, RECORD_VERDICT)) {
        DESTROYED => Verdict::Destroyed,
        UNSENT => Verdict::Unsent(u32::from_ne_bytes(part(record, RECORD_SEND_Q))),
        REFUSED => {
            let error = i32::from_ne_bytes(part(record, RECORD_ERROR));
            Verdict::Refused(Errno::from_raw(error.saturating_neg()))
        }
        _ => Verdict::Changed,
    };
    (usize::try_from(index).unwrap_or(usize::MAX), verdict)
}

/// The descriptors of the maps of a program.
struct Maps {
    states: RawFd,
    pass: RawFd,
    chosen: RawFd,
}

/// The program, and the number of the function that stands for its iterator.
fn program(btf: &Btf, maps: &Maps) -> Result<(Vec<Insn>, u32), BtfError> {
    use crate::sys::bpf::Register::*;

    let target = btf.function("bpf_iter_tcp")?;
    let bpf_sock_destroy = btf.function("bpf_sock_destroy")?;
    let ctx = btf.structure("bpf_iter__tcp")?;
    let (ctx_meta, ctx_sk) = (ctx.pointer("meta")?, ctx.pointer("sk_common")?);
    let meta_seq = ctx_meta.to.pointer("seq")?;
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

    let mut asm = Asm::default();
    let (end, report) = (asm.label(), asm.label());
    let (context, sk, tp, seen) = (R6, R7, R8, R9);

    // struct sock_common *sk = ctx->sk_common;
    // if (!sk) return 0;
    asm.copy(context, R1)
        .follow(sk, context, &ctx_sk)
        .if_is(sk, 0, end);
    // if (!(1 << sk->skc_state & states)) return 0;
    asm.load(R2, sk, sk_state)
        .bit(R1, R2)
        .address_of_map_value(R2, maps.states)
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
    asm.address_of_map(R1, maps.chosen)
        .copy(R2, R10)
        .add(R2, -i32::from(KEY))
        .call(Helper::MapLookup)
        .if_is(R0, 0, end)
        .copy(seen, R0);
    // if (seen->pass != pass) return 0;
    asm.load_at(R1, seen, PASS, Size::U32)
        .address_of_map_value(R2, maps.pass)
        .load_value(R2, R2)
        .if_differs(R1, R2, end);
    // if (sk->skc_state != seen->state) return 0;
    asm.load(R1, sk, sk_state)
        .load_at(R2, seen, STATE, Size::U32)
        .if_differs(R1, R2, end);

    // struct record record = { .index = seen->index, .send_q = tp->write_seq - tp->snd_una, .verdict = UNSENT };
    asm.load_at(R1, seen, INDEX, Size::U32)
        .spill(RECORD_INDEX, Size::U32, R1)
        .load(R1, tp, write_seq)
        .load(R2, tp, snd_una)
        .subtract(R1, R2, Size::U32)
        .spill(RECORD_SEND_Q, Size::U32, R1)
        .spill_value(RECORD_VERDICT, Size::U32, UNSENT)
        .spill_value(RECORD_ERROR, Size::U32, 0);
    // if (record.send_q > seen->max_send_q) goto report;
    asm.load_at(R2, seen, MAX_SEND_Q, Size::U32)
        .if_greater(R1, R2, report);
    // record.verdict = CHANGED;
    asm.spill_value(RECORD_VERDICT, Size::U32, CHANGED);
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

    // bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
    let write_record = |asm: &mut Asm| {
        asm.follow(R1, context, &ctx_meta)
            .follow(R1, R1, &meta_seq)
            .copy(R2, R10)
            .add(R2, -i32::from(RECORD_INDEX))
            .set(R3, i32::from(RECORD_INDEX))
            .call(Helper::SeqWrite);
    };
    // is_as_seen:
    // record.verdict = DESTROYED;
    // if (bpf_seq_write(...)) return 0;
    asm.place(is_as_seen)
        .spill_value(RECORD_VERDICT, Size::U32, DESTROYED);
    write_record(&mut asm);
    asm.if_not(R0, 0, end);
    // int error = bpf_sock_destroy(sk);
    // if (!error) return 0;
    asm.copy(R1, sk)
        .call_kernel(bpf_sock_destroy)
        .if_is(R0, 0, end);
    // record.verdict = REFUSED;
    // record.error = error;
    asm.spill_value(RECORD_VERDICT, Size::U32, REFUSED)
        .spill(RECORD_ERROR, Size::U32, R0);
    // report:
    // bpf_seq_write(...);
    asm.place(report);
    write_record(&mut asm);
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
    fn a_record_tells_the_verdict() {
        let record = |parts: [i32; 4]| {
            let mut record = [0; RECORD];
            for (at, part) in (0..).step_by(4).zip(parts) {
                record[at..at + 4].copy_from_slice(&part.to_ne_bytes());
            }
            parse(&record)
        };
        assert_eq!(record([5, 0, 1, 0]), (5, Verdict::Destroyed));
        assert_eq!(record([6, 9, 2, 0]), (6, Verdict::Changed));
        assert_eq!(record([7, 9, 3, 0]), (7, Verdict::Unsent(9)));
        let refused = Verdict::Refused(Errno::ENOENT);
        assert_eq!(record([8, 0, 4, -2]), (8, refused));
    }
}
