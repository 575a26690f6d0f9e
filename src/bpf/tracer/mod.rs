//! What happens to TCP sockets while cwkill traces them: who opened them, when the peer closed them, and who read the end of the stream.
//!
//! The kernel runs the programs (`programs`) at its tracepoints. They keep a few numbers for each socket, in memory that goes with it, and
//! put registers and the top of the stack of the thread that opens a socket or reads its end into one of a fixed number of slots (`slots`). A
//! socket that leaves CLOSE-WAIT frees the slot of its read. So a connection that is closed soon costs at most two copies of a stack, and only the
//! sample of its opening is unwound.
//!
//! They run in the process that made the system call, or in an interrupt, for all processes of the host. Nothing stays in the kernel when
//! cwkill has ended, however it ends.

mod programs;
mod slots;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;

use super::walk::{self, End};
use super::{BpfError, NotSeen};
use crate::sys::bpf::{Btf, Hook, Iterator, Name, Shared, SocketStorage, Tracepoint, Walker};
use slots::{OPENED, READS, SLOT, Slots};
pub use slots::{Sample, Thread, Traced};

/// The attached programs and their memory.
#[derive(Debug)]
pub struct Tracer {
    attached: Vec<Tracepoint>,
    iterator: Iterator,
    walker: Walker,
    slots: Slots,
    counters: Shared,
    not_seen: NotSeen,
}

/// The maps that the programs use.
#[derive(Debug)]
struct Maps {
    lives: SocketStorage<LIFE>,
    slots: Shared,
    counters: Shared,
}

/// What is known of a socket in CLOSE-WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    pub cookie: u64,
    /// When the peer's FIN came, by CLOCK_MONOTONIC; `None` if that was before the trace, or was not sampled.
    pub stuck_since: Option<Duration>,
    /// How the connection was opened, if that was during the trace and was sampled.
    pub opened: Option<Opened>,
    /// Of how many FINs its own was the sampled one; 0 if it was not sampled. It stands for so many sockets.
    pub weight: u64,
}

/// How a connection was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    Connected,
    Accepted,
}

/// What the programs have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ends that were read, of connections that were sampled.
    pub reads: u64,
    /// Those of them of which no slot was free.
    pub reads_without_slot: u64,
    /// Connections that were opened.
    pub opened: u64,
    /// Connections that the peer has closed.
    pub closed_by_peer: u64,
}

/// How many numbers belong to a socket. The constants below are their indices.
const LIFE: usize = 6;
const COOKIE: usize = 0;
const STUCK_SINCE: usize = 1;
/// How its end was read; 0 if it was not.
const END_READ: usize = 2;
/// The number of its slot for the read, and 1; 0 if it has none.
const READ_SLOT: usize = 3;
const OPENED_HOW: usize = 4;
/// Of how many FINs its own was the sampled one; 0 if it was not sampled.
const WEIGHT: usize = 5;

/// The values of END_READ: with the last bytes, or by a call that returned 0.
const WITH_DATA: i32 = 1;
const BY_ITSELF: i32 = 2;

/// The values of OPENED_HOW.
const CONNECTED: i32 = 1;
const ACCEPTED: i32 = 2;

// The indices of the counters.
const READ_COUNT: usize = 0;
const NO_SLOT_COUNT: usize = 1;
const OPENED_COUNT: usize = 2;
const CLOSED_COUNT: usize = 3;
/// A connection that is opened, or that the peer closes, is sampled if a random number has none of these bits.
const OPENED_MASK: usize = 4;
const CLOSED_MASK: usize = 5;
/// The sockets that the walk has shown.
const SHOWN_COUNT: usize = 6;
const COUNTERS: usize = 7;

const NAMES: [Name; 14] = [
    Name::Tracepoint("inet_sock_set_state"),
    Name::Tracepoint("sock_recv_length"),
    Name::Function("bpf_iter_tcp"),
    Name::Function("bpf_lsm_sock_graft"),
    Name::Function("inet_csk_accept"),
    Name::Function("tcp_recvmsg"),
    Name::Function("bpf_task_pt_regs"),
    Name::Struct("bpf_iter__tcp"),
    Name::Struct("bpf_iter_meta"),
    Name::Struct("sock"),
    Name::Struct("sock_common"),
    Name::Struct("tcp_sock"),
    Name::Struct("task_struct"),
    Name::Struct("pt_regs"),
];

impl Tracer {
    /// Loads the programs and attaches them. It needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN; nothing else here does.
    ///
    /// # Errors
    /// The kernel lacks something that the programs need (Linux 5.15), or refuses them. That a kernel cannot tell of reads or of accepted
    /// connections is no error: see [`Tracer::detach`].
    pub fn attach() -> Result<Self, BpfError> {
        let btf = &Btf::of_kernel(&NAMES)?;
        // What an old kernel lacks comes before the maps, whose memory it counts as locked (until Linux 5.11): EPERM would mislead.
        if btf.tracepoint("sock_recv_length").is_err() {
            // The youngest of the helpers.
            btf.function("bpf_task_pt_regs")?;
        }
        let maps = Maps {
            lives: SocketStorage::new()?,
            slots: Shared::groups(READS + OPENED, SLOT)?,
            counters: Shared::groups(1, COUNTERS)?,
        };
        let (program, target) = programs::report(btf, &maps)?;
        let iterator = Iterator::load("cwkill_lives", &program, target)?;
        let (program, target) = programs::set_state(btf, &maps)?;
        let hook = Hook::Tracepoint(target);
        let mut attached = vec![Tracepoint::attach("cwkill_state", &program, hook)?];
        let mut keep = |attempt: Result<Tracepoint, BpfError>| {
            let failed = attempt.map(|link| attached.push(link)).err();
            failed.map(|error| format!("{:#}", anyhow::Error::new(error)))
        };
        let not_seen = NotSeen {
            reads: keep(attach_read(btf, &maps)),
            accepts: keep(attach_accept(btf, &maps)),
            later: false,
        };
        let Maps {
            slots, counters, ..
        } = maps;
        Ok(Tracer {
            attached,
            iterator,
            walker: Walker::start().map_err(BpfError::Walker)?,
            slots: Slots::new(slots),
            counters,
            not_seen,
        })
    }

    /// Detaches the programs. Returns what they have not seen. What they have kept stays.
    pub fn detach(&mut self) -> NotSeen {
        let later = !self.attached.drain(..).all(|program| program.is_run());
        NotSeen {
            later,
            ..std::mem::take(&mut self.not_seen)
        }
    }

    /// Empties the slots: those of reads that are `age` old, and those of connections that were opened, however old they are.
    pub fn take(&self, age: Duration, each: impl FnMut(Sample)) {
        self.slots.take(age, each);
    }

    /// From now on samples one of `closed` connections that the peer closes, and one of `opened` connections that are opened.
    ///
    /// # Panics
    /// One of them is no power of two.
    pub fn sample_one_of(&self, closed: u32, opened: u32) {
        assert!(closed.is_power_of_two() && opened.is_power_of_two());
        let numbers = self.counters.numbers();
        for (index, of) in [(CLOSED_MASK, closed), (OPENED_MASK, opened)] {
            numbers[index].store(u64::from(of) - 1, Ordering::Relaxed);
        }
    }

    pub fn counts(&self) -> Counts {
        let number = |index: usize| {
            let numbers = self.counters.numbers();
            numbers[index].load(Ordering::Relaxed)
        };
        Counts {
            reads: number(READ_COUNT),
            reads_without_slot: number(NO_SLOT_COUNT),
            opened: number(OPENED_COUNT),
            closed_by_peer: number(CLOSED_COUNT),
        }
    }

    /// Adds to `lives` what is known of the sockets that are in CLOSE-WAIT now in the network namespace of the calling thread. Until Linux 5.19
    /// it takes CAP_BPF. Returns whether that is all: since Linux 5.15 the walk waits for the lock of each socket (net/ipv4/tcp_ipv4.c,
    /// bpf_iter_tcp_seq_show), and is left if it waits too long, or at `until`.
    ///
    /// The sockets of the namespace are walked. An iterator over all sockets with storage would be one walk for all, but it lets programs write
    /// into the storage, which some kernels forbid [measured: EPERM on a guest with Linux 6.18.44].
    ///
    /// # Errors
    /// [`BpfError::Refused`], [`BpfError::Read`], [`BpfError::Walker`].
    pub fn lives(&mut self, lives: &mut Vec<Life>, until: Instant) -> Result<bool, BpfError> {
        if self.walker.is_walking() {
            // It is held up in another namespace.
            self.walker = Walker::start().map_err(BpfError::Walker)?;
        }
        let flags = MemfdFlags::CLOEXEC;
        let records = rustix::fs::memfd_create(c"cwkill-lives", flags)
            .map_err(|error| BpfError::Walker(error.into()))?;
        let iterator = self.iterator.begin()?;
        self.walker
            .begin(&iterator, Some(&records))
            .map_err(BpfError::Walker)?;
        let shown = &self.counters.numbers()[SHOWN_COUNT];
        let shown = || shown.load(Ordering::Relaxed);
        let is_time = || Instant::now() < until;
        let is_whole = match walk::wait(&mut self.walker, shown, is_time) {
            End::Whole => true,
            End::Stopped | End::HeldUp => false,
            End::Failed(error) => return Err(error),
        };
        // Not from where the file stands: a walker that was left writes there later.
        let records = File::from(records);
        let len = records.metadata().map_err(BpfError::Read)?.len();
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        let read = records.read_exact_at(&mut bytes, 0);
        read.map_err(BpfError::Read)?;
        // The last one may be cut, if the walk was left.
        lives.extend(bytes.as_chunks().0.iter().map(parse));
        Ok(is_whole)
    }
}

/// Attaches the program for reads of the end: at a tracepoint (Linux 6.3), or at the return of a function. The error is that of the latter.
fn attach_read(btf: &Btf, maps: &Maps) -> Result<Tracepoint, BpfError> {
    const PROGRAM: &str = "cwkill_end";
    let by_tracepoint = || {
        let (program, target) = programs::read_end(btf, maps)?;
        Tracepoint::attach(PROGRAM, &program, Hook::Tracepoint(target))
    };
    by_tracepoint().or_else(|_: BpfError| {
        let (program, target) = programs::read_return(btf, maps)?;
        Tracepoint::attach(PROGRAM, &program, Hook::Return(target))
    })
}

/// Attaches the program for accepted connections: at the hook of security modules, if the kernel runs the LSM `bpf`, or at the return of a
/// function.
fn attach_accept(btf: &Btf, maps: &Maps) -> Result<Tracepoint, BpfError> {
    const PROGRAM: &str = "cwkill_accept";
    let by_hook = || {
        let (program, target) = programs::security_hook(btf, maps)?;
        Tracepoint::attach(PROGRAM, &program, Hook::Security(target))
    };
    let by_return = || {
        let (program, target) = programs::accept_return(btf, maps)?;
        Tracepoint::attach(PROGRAM, &program, Hook::Return(target))
    };
    match runs_security_module() {
        true => by_hook().or_else(|_: BpfError| by_return()),
        false => by_return(),
    }
}

/// Whether the kernel asks programs of BPF at its security hooks. It attaches them to a hook that it never asks, too.
fn runs_security_module() -> bool {
    std::fs::read_to_string("/sys/kernel/security/lsm").is_ok_and(|names| has_bpf(&names))
}

/// Whether a list such as `lockdown,yama,bpf` has `bpf`.
fn has_bpf(names: &str) -> bool {
    names.trim_end().split(',').any(|name| name == "bpf")
}

fn parse(record: &[u8; 8 * LIFE]) -> Life {
    let number = |place: usize| {
        let bytes = record[8 * place..].first_chunk().expect("a place in it");
        u64::from_ne_bytes(*bytes)
    };
    let time = |place| (number(place) != 0).then(|| Duration::from_nanos(number(place)));
    let opened = [(CONNECTED, Opened::Connected), (ACCEPTED, Opened::Accepted)];
    let mut opened = opened.into_iter();
    let is_it = |(how, _): &(i32, Opened)| number(OPENED_HOW) == u64::from(how.unsigned_abs());
    Life {
        cookie: number(COOKIE),
        stuck_since: time(STUCK_SINCE),
        opened: opened.find(is_it).map(|(_, opened)| opened),
        weight: number(WEIGHT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_security_modules_are_told_by_their_whole_names() {
        assert!(has_bpf("lockdown,yama,bpf\n"));
        assert!(has_bpf("bpf"));
        assert!(!has_bpf("lockdown,bpfguard\n"));
        assert!(!has_bpf("\n"));
    }

    #[test]
    fn a_record_has_its_parts_where_the_programs_put_them() {
        let mut words = [0_u64; LIFE];
        words[COOKIE] = 77;
        words[STUCK_SINCE] = 5_000_000_000;
        words[OPENED_HOW] = 2;
        words[WEIGHT] = 64;
        let mut record = [0; 8 * LIFE];
        for (place, word) in record.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_ne_bytes();
        }
        let life = Life {
            cookie: 77,
            stuck_since: Some(Duration::from_secs(5)),
            opened: Some(Opened::Accepted),
            weight: 64,
        };
        assert_eq!(parse(&record), life);
    }
}
