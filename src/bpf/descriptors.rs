//! All descriptors of TCP and MPTCP sockets, and of epoll sets, in one pass: an iterator over `task_file`.
//!
//! The kernel walks the descriptor table of every process in the pid namespace of cwkill and below, and of every thread with a table of its
//! own. It shows the program each file with its process and its number, so it does not matter in which network namespace a socket is,
//! and nothing can change between the name of a process and its table. A socket without a descriptor is not seen: one that was
//! never accepted, an orphan, or one that is on its way to another process.

use super::{KernelTypes, part};
use crate::sys::RemoteFd;
use crate::sys::bpf::{Asm, BpfError, Btf, BtfError, Helper, Insn, Iterator, Name, Size, Variable};
use crate::tcp::StateSet;

/// The loaded program.
#[derive(Debug)]
pub struct Descriptors {
    iterator: Iterator,
    /// The states of the sockets that it reports.
    states: Variable,
}

/// A descriptor of a TCP or MPTCP socket or of an epoll set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The pid, in the pid namespace of cwkill.
    pub pid: i32,
    /// The thread of the process that has the table. It is the pid, unless a thread has a table of its own.
    pub tid: i32,
    pub fd: RemoteFd,
    /// The inode of a socket; `None` for an epoll set.
    pub inode: Option<u32>,
    /// The start time of the process, in nanoseconds since boot.
    pub started: u64,
    /// A number for the table. Threads with the same one share it.
    pub table: u64,
}

/// Why the descriptors could not be read to the end.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorsError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// The kernel's types say how to read the pid in the outermost namespaces only.
    #[error("cwkill runs too deep in pid namespaces for the pids of this kernel")]
    TooDeep,
}

impl Descriptors {
    /// Loads the program. Its reader needs no capability.
    ///
    /// # Errors
    /// The kernel lacks something that the program reads, or refuses the program.
    pub fn load(types: &KernelTypes) -> Result<Self, BpfError> {
        let btf = types.get()?;
        let states = Variable::new()?;
        let (program, target) = program(btf, &states)?;
        let iterator = Iterator::load("cwkill_fds", &program, target)?;
        Ok(Descriptors { iterator, states })
    }

    /// Reads the descriptors of TCP sockets in one of `states`, of all MPTCP sockets and of all epoll sets, until `each` returns false. It
    /// gets them by pid and thread, and those of one table by number.
    ///
    /// # Errors
    /// The iterator failed, or the pids are not readable.
    pub fn read(
        &self,
        states: StateSet,
        mut each: impl FnMut(Descriptor) -> bool,
    ) -> Result<(), DescriptorsError> {
        self.states.set(states.mask().into())?;
        let mut too_deep = false;
        let mut one = |record: &[u8; RECORD]| {
            let descriptor = parse(record);
            too_deep = descriptor.pid == TOO_DEEP;
            // A process without a pid has just ended.
            !too_deep && (descriptor.pid == 0 || each(descriptor))
        };
        self.iterator.run(|records| records.iter().all(&mut one))?;
        match too_deep {
            true => Err(DescriptorsError::TooDeep),
            false => Ok(()),
        }
    }
}

pub(super) const NAMES: [Name; 3] = [
    Name::Function("bpf_iter_task_file"),
    Name::Struct("bpf_iter__task_file"),
    Name::Struct("socket"),
];

/// The size of a record: what the program writes for a descriptor. The constants are the places of its parts, from the end, as the
/// program has it on its stack.
const RECORD: usize = 32;
const STARTED: i16 = 32;
const TABLE: i16 = 24;
const PID: i16 = 16;
const TID: i16 = 12;
const FD: i16 = 8;
const INODE: i16 = 4;

/// The pid in a record whose pid the program could not read.
const TOO_DEEP: i32 = -1;
/// The pid namespaces in each other that the program can tell the pid in. The kernel allows 32 (MAX_PID_NS_LEVEL).
const LEVELS: u32 = 8;

fn parse(record: &[u8; RECORD]) -> Descriptor {
    let inode = u32::from_ne_bytes(part(record, INODE));
    Descriptor {
        pid: i32::from_ne_bytes(part(record, PID)),
        tid: i32::from_ne_bytes(part(record, TID)),
        fd: RemoteFd(i32::from_ne_bytes(part(record, FD))),
        // No socket has number 0 (fs/inode.c, get_next_ino).
        inode: (inode != 0).then_some(inode),
        started: u64::from_ne_bytes(part(record, STARTED)),
        table: u64::from_ne_bytes(part(record, TABLE)),
    }
}

/// include/linux/socket.h
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
/// include/uapi/linux/in.h
const IPPROTO_TCP: i32 = 6;
const IPPROTO_MPTCP: i32 = 262;
/// include/uapi/linux/magic.h
const ANON_INODE_FS_MAGIC: i32 = 0x0904_1934;
/// The name of the file of an epoll set (fs/eventpoll.c, do_epoll_create).
const EVENTPOLL: &[u8; 12] = b"[eventpoll]\0";

/// The program, and the number of the function that stands for its iterator.
fn program(btf: &Btf, states: &Variable) -> Result<(Vec<Insn>, u32), BtfError> {
    use crate::sys::bpf::Register::*;

    let target = btf.function("bpf_iter_task_file")?;
    let ctx = btf.structure("bpf_iter__task_file")?;
    let (ctx_meta, ctx_file) = (ctx.pointer("meta")?, ctx.pointer("file")?);
    let ctx_task = ctx.pointer("task")?;
    let ctx_fd = ctx.number("fd", Size::U32)?;
    let meta_seq = ctx_meta.to.pointer("seq")?;

    let file_inode = ctx_file.to.pointer("f_inode")?;
    let inode_number = file_inode.to.number("i_ino", Size::U64)?;
    let inode_sb = file_inode.to.pointer("i_sb")?;
    let sb_magic = inode_sb.to.number("s_magic", Size::U64)?;
    let file_dentry = ctx_file.to.pointer("f_path.dentry")?;
    // Since Linux 6.14 in a union.
    let dentry_name = file_dentry.to.chars("d_iname");
    let dentry_name = dentry_name.or_else(|_| file_dentry.to.chars("d_shortname.string"))?;
    if dentry_name.len < 12 {
        return Err(BtfError::NotHere("room for a name in struct dentry".into()));
    }

    let socket_sk = btf.structure("socket")?.pointer("sk")?;
    let sock = socket_sk.to;
    let sk_family = sock.number("__sk_common.skc_family", Size::U16)?;
    let sk_state = sock.number("__sk_common.skc_state", Size::U8)?;
    let sk_protocol = sock.number("sk_protocol", Size::U16)?;

    let task_leader = ctx_task.to.pointer("group_leader")?;
    let task_files = ctx_task.to.pointer("files")?;
    let task_pid = ctx_task.to.pointer("thread_pid")?;
    let leader_started = task_leader.to.number("start_boottime", Size::U64)?;
    let pid_level = task_pid.to.number("level", Size::U32)?;
    let pid_numbers = task_pid.to.elements("numbers", "nr", Size::U32, LEVELS)?;

    let mut asm = Asm::default();
    let (is_epoll, with_inode, has_pid, end) = (asm.label(), asm.label(), asm.label(), asm.label());
    let (context, file, task, kept) = (R6, R7, R8, R9);

    // struct file *file = ctx->file;
    // if (!file) return 0;
    asm.copy(context, R1)
        .follow(file, context, &ctx_file)
        .if_is(file, 0, end);
    // struct task_struct *task = ctx->task;
    // if (!task) return 0;
    asm.follow(task, context, &ctx_task).if_is(task, 0, end);
    // struct socket *socket = bpf_sock_from_file(file);
    // if (!socket) goto is_epoll;
    asm.copy(R1, file)
        .call(Helper::SockFromFile)
        .if_is(R0, 0, is_epoll);
    // struct sock *sk = socket->sk;
    // if (!sk) return 0;
    asm.follow(kept, R0, &socket_sk).if_is(kept, 0, end);
    // if (sk->sk_family != AF_INET && sk->sk_family != AF_INET6) return 0;
    let is_inet = asm.label();
    asm.load(R1, kept, sk_family)
        .if_is(R1, AF_INET, is_inet)
        .if_not(R1, AF_INET6, end)
        .place(is_inet);
    // if (sk->sk_protocol == IPPROTO_MPTCP) goto is_wanted;
    // if (sk->sk_protocol != IPPROTO_TCP) return 0;
    let is_wanted = asm.label();
    asm.load(R1, kept, sk_protocol)
        .if_is(R1, IPPROTO_MPTCP, is_wanted)
        .if_not(R1, IPPROTO_TCP, end);
    // if (!(1 << sk->sk_state & states)) return 0;
    asm.load(R2, kept, sk_state)
        .bit(R1, R2)
        .address_of_map_value(R2, states.fd())
        .load_value(R2, R2)
        .and(R1, R2)
        .if_is(R1, 0, end)
        .place(is_wanted);
    // u32 inode = file->f_inode->i_ino;
    asm.follow(R1, file, &file_inode)
        .load(kept, R1, inode_number)
        .jump(with_inode);

    // is_epoll:
    // if (file->f_inode->i_sb->s_magic != ANON_INODE_FS_MAGIC) return 0;
    asm.place(is_epoll)
        .follow(R1, file, &file_inode)
        .follow(R1, R1, &inode_sb)
        .load(R1, R1, sb_magic)
        .if_not(R1, ANON_INODE_FS_MAGIC, end);
    // if (strcmp(file->f_path.dentry->d_iname, "[eventpoll]")) return 0;
    let [first, second, third] = [&EVENTPOLL[..4], &EVENTPOLL[4..8], &EVENTPOLL[8..]]
        .map(|part| i32::from_ne_bytes(part.try_into().expect("4 bytes")));
    asm.follow(R2, file, &file_dentry);
    for (skipped, expected) in [(0, first), (4, second), (8, third)] {
        asm.load_chars(R1, R2, &dentry_name, skipped, Size::U32)
            .if_not(R1, expected, end);
    }
    // u32 inode = 0;
    asm.set(kept, 0).place(with_inode);

    // struct record record = { .inode = inode, .fd = ctx->fd };
    asm.spill(INODE, Size::U32, kept)
        .load(R1, context, ctx_fd)
        .spill(FD, Size::U32, R1);
    // record.table = task->files;
    asm.follow(R1, task, &task_files)
        .spill(TABLE, Size::U64, R1);
    // record.started = task->group_leader->start_boottime;
    asm.follow(R1, task, &task_leader)
        .load(R1, R1, leader_started)
        .spill(STARTED, Size::U64, R1);
    // u32 level = bpf_get_current_task_btf()->thread_pid->level;
    asm.call(Helper::CurrentTask)
        .follow(R1, R0, &task_pid)
        .load(R1, R1, pid_level);
    // record.pid = task->group_leader->thread_pid->numbers[level].nr;
    // record.tid = task->thread_pid->numbers[level].nr;
    asm.follow(R2, task, &task_leader)
        .follow(R2, R2, &task_pid)
        .follow(R3, task, &task_pid);
    for (level, number) in (0..).zip(pid_numbers) {
        let next = asm.label();
        asm.if_not(R1, level, next)
            .load(R4, R2, number)
            .spill(PID, Size::U32, R4)
            .load(R4, R3, number)
            .spill(TID, Size::U32, R4)
            .jump(has_pid)
            .place(next);
    }
    asm.spill_value(PID, Size::U32, TOO_DEEP)
        .spill_value(TID, Size::U32, TOO_DEEP)
        .place(has_pid);
    // bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
    asm.follow(R1, context, &ctx_meta)
        .follow(R1, R1, &meta_seq)
        .copy(R2, R10)
        .add(R2, -i32::from(STARTED))
        .set(R3, i32::from(STARTED))
        .call(Helper::SeqWrite);
    // return 0;
    asm.place(end).go_on();
    Ok((asm.finish(), target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_its_parts_where_the_program_puts_them() {
        let mut record = [0; RECORD];
        record[0..8].copy_from_slice(&7_000_000_000_u64.to_ne_bytes());
        record[8..16].copy_from_slice(&0xffff_8880_0000_1000_u64.to_ne_bytes());
        for (at, number) in [(16, 42_i32), (20, 43), (24, 3), (28, 4711)] {
            record[at..at + 4].copy_from_slice(&number.to_ne_bytes());
        }
        let socket = Descriptor {
            pid: 42,
            tid: 43,
            fd: RemoteFd(3),
            inode: Some(4711),
            started: 7_000_000_000,
            table: 0xffff_8880_0000_1000,
        };
        assert_eq!(parse(&record), socket);
        record[28..].fill(0);
        let epoll = Descriptor {
            inode: None,
            ..socket
        };
        assert_eq!(parse(&record), epoll);
    }
}
