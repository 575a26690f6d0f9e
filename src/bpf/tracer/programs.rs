//! The programs of the tracer. Each function returns the instructions, and the number of the hook's type.

use super::slots::{
    AT, BY, CALL, COOKIE_SHIFT, FOR_OPENED, FOR_READ, FP, HEAD, IP, LEN, LR, SP, STARTED,
};
use super::slots::{OPENED, PART, READS, READY, STACK};
use super::{
    ACCEPTED, BY_ITSELF, CLOSED_COUNT, CLOSED_MASK, CONNECTED, COOKIE, END_READ, LIFE, Maps,
    NO_SLOT_COUNT, OPENED_COUNT, OPENED_HOW, OPENED_MASK, READ_COUNT, READ_SLOT, SHOWN_COUNT,
    STUCK_SINCE, WEIGHT, WITH_DATA,
};
use crate::sys::bpf::Register::{R0, R1, R2, R3, R4, R6, R7, R8, R9, R10};
use crate::sys::bpf::{Asm, Btf, BtfError, Field, Helper, Insn, Label, Register, Size};

type Program = Result<(Vec<Insn>, u32), BtfError>;

/// include/uapi/linux/in.h
const IPPROTO_TCP: i32 = 6;
/// include/net/tcp_states.h
const TCP_SYN_SENT: i32 = 2;
const TCP_CLOSE_WAIT: i32 = 8;
/// include/uapi/linux/bpf.h
const BPF_SK_STORAGE_GET_F_CREATE: i32 = 1;

// The places of what a program has on its stack, from the end.
const MY_COOKIE: i16 = 8;
const INDEX: i16 = 12;
const IS_AGAIN: i16 = 16;

// What the programs keep in registers that survive a call.
const SK: Register = R6;
/// The numbers that belong to the socket.
const MINE: Register = R7;
const SLOT: Register = R8;

/// Among how many slots of its kind a program looks for a free one, one attempt after the other. While connections are closed soon, the first ones
/// are used again and again, so they are in the cache of the processor. While many leak, these are taken; of half-full slots one in
/// 64 is missed.
const AMONG: [usize; 8] = {
    const ALL: usize = usize::MAX;
    [8, 64, ALL, ALL, ALL, ALL, ALL, ALL]
};

/// The fields that the programs read.
struct Fields {
    sk_state: Field,
    sk_protocol: Field,
    ip: Field,
    sp: Field,
    fp: Field,
    /// On processors that have it.
    lr: Option<Field>,
    /// The number of the system call.
    call: Field,
    /// The first thread of a thread's process, and when that was started.
    leader: i16,
    started: Field,
}

impl Fields {
    fn new(btf: &Btf) -> Result<Self, BtfError> {
        let sock = btf.structure("sock")?;
        // The kernel's struct of registers has other names on each processor.
        let registers = btf.structure("pt_regs")?;
        let number = |name: &str| registers.number(name, Size::U64);
        let call = match cfg!(target_arch = "aarch64") {
            true => registers.number("syscallno", Size::U32)?,
            false => number("orig_ax")?,
        };
        let [ip, fp, lr] = match cfg!(target_arch = "aarch64") {
            true => [
                Some(number("pc")?),
                Some(registers.element("regs", 29, Size::U64)?),
                Some(registers.element("regs", 30, Size::U64)?),
            ],
            false => [Some(number("ip")?), Some(number("bp")?), None],
        };
        let leader = btf.structure("task_struct")?.pointer("group_leader")?;
        let here = |field: Option<Field>| field.expect("every processor has it");
        Ok(Fields {
            sk_state: sock.number("__sk_common.skc_state", Size::U8)?,
            sk_protocol: sock.number("sk_protocol", Size::U16)?,
            ip: here(ip),
            sp: number("sp")?,
            fp: here(fp),
            lr,
            call,
            leader: leader.offset,
            started: leader.to.number("start_boottime", Size::U64)?,
        })
    }
}

/// The offset of a number in a slot or in what belongs to a socket.
fn at(place: usize) -> i16 {
    i16::try_from(8 * place).expect("a short record")
}

fn immediate(number: usize) -> i32 {
    i32::try_from(number).expect("a small number")
}

/// The tracepoint inet_sock_set_state(sk, oldstate, newstate): the thread that connects, the peer's FIN, and the end of CLOSE-WAIT.
pub(super) fn set_state(btf: &Btf, maps: &Maps) -> Program {
    let fields = Fields::new(btf)?;
    let target = btf.tracepoint("inet_sock_set_state")?;
    let mut asm = Asm::default();
    let (closed_by_peer, connects, end) = (asm.label(), asm.label(), asm.label());
    // if (newstate == TCP_CLOSE_WAIT) goto closed_by_peer;
    // if (newstate == TCP_SYN_SENT) goto connects;
    // if (oldstate != TCP_CLOSE_WAIT) return 0;
    // The most frequent ones end here: the kernel runs this for each change of each socket.
    asm.load_at(SK, R1, 0, Size::U64)
        .load_at(R2, R1, 16, Size::U64)
        .if_is(R2, TCP_CLOSE_WAIT, closed_by_peer)
        .if_is(R2, TCP_SYN_SENT, connects)
        .load_at(R2, R1, 8, Size::U64)
        .if_not(R2, TCP_CLOSE_WAIT, end);

    // u64 *mine = bpf_sk_storage_get(&lives, sk, NULL, 0);
    // if (!mine) return 0;
    get_storage(&mut asm, maps, 0, end);
    free_slot(&mut asm, maps, end);
    asm.jump(end);

    // closed_by_peer:
    asm.place(closed_by_peer);
    if_tcp(&mut asm, &fields, end);
    count(&mut asm, maps, CLOSED_COUNT);
    if_sampled(&mut asm, maps, CLOSED_MASK, end);
    create_storage(&mut asm, maps, end);
    // mine[STUCK_SINCE] = bpf_ktime_get_ns();
    // mine[WEIGHT] = counters[CLOSED_MASK] + 1;
    asm.call(Helper::Now)
        .store_at(MINE, at(STUCK_SINCE), Size::U64, R0)
        .address_of_map_value(R1, maps.counters.fd())
        .load_at(R1, R1, at(CLOSED_MASK), Size::U64)
        .add(R1, 1)
        .store_at(MINE, at(WEIGHT), Size::U64, R1)
        .jump(end);

    asm.place(connects);
    if_tcp(&mut asm, &fields, end);
    opened(&mut asm, &fields, maps, CONNECTED, end);
    asm.place(end).go_on();
    Ok((asm.finish(), target))
}

/// The tracepoint sock_recv_length(sk, ret, flags): the thread that reads the end, alone or with the last bytes.
pub(super) fn read_end(btf: &Btf, maps: &Maps) -> Program {
    let target = btf.tracepoint("sock_recv_length")?;
    let mut asm = Asm::default();
    asm.load_at(R2, R1, at(1), Size::U64);
    Ok((end_is_read(asm, btf, maps)?, target))
}

/// The return of tcp_recvmsg(sk, ...), of IPv4 and IPv6: the same.
pub(super) fn read_return(btf: &Btf, maps: &Maps) -> Program {
    let target = btf.function("tcp_recvmsg")?;
    // What it returns comes after its parameters, whose number depends on the kernel.
    let returned = btf.parameters("tcp_recvmsg")?;
    let mut asm = Asm::default();
    asm.load_at(R2, R1, at(returned), Size::U64);
    Ok((end_is_read(asm, btf, maps)?, target))
}

/// `asm` has loaded into R2 how much was read.
fn end_is_read(mut asm: Asm, btf: &Btf, maps: &Maps) -> Result<Vec<Insn>, BtfError> {
    let fields = Fields::new(btf)?;
    let tcp_sock = btf.structure("tcp_sock")?;
    let copied_seq = tcp_sock.number("copied_seq", Size::U32)?;
    let rcv_nxt = tcp_sock.number("rcv_nxt", Size::U32)?;
    let (end, again, read) = (asm.label(), asm.label(), asm.label());
    let returned = R9;
    // An int: nobody says what the upper half of the register holds.
    // if (ret < 0) return 0;
    asm.spill(IS_AGAIN, Size::U32, R2)
        .load_at(R2, R10, -IS_AGAIN, Size::U32)
        .copy(R3, R2)
        .mask(R3, i32::MIN)
        .if_not(R3, 0, end);
    // if (sk->sk_state != TCP_CLOSE_WAIT) return 0;
    asm.copy(returned, R2)
        .load_at(SK, R1, 0, Size::U64)
        .load(R2, SK, fields.sk_state)
        .if_not(R2, TCP_CLOSE_WAIT, end);
    if_tcp(&mut asm, &fields, end);
    // struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
    // if (!tp || tp->copied_seq != tp->rcv_nxt) return 0;
    // The FIN counts: it was read with these bytes, or before. A read without room, and one that leaves the data where they are (MSG_PEEK), are not of
    // interest.
    asm.copy(R1, SK)
        .call(Helper::ToTcpSock)
        .if_is(R0, 0, end)
        .load(R1, R0, copied_seq)
        .load(R2, R0, rcv_nxt)
        .if_differs(R1, R2, end);
    // It has memory if its FIN was sampled.
    get_storage(&mut asm, maps, 0, end);
    // if (!mine[WEIGHT] || mine[END_READ] == BY_ITSELF) return 0;
    // mine[END_READ] = ret ? WITH_DATA : BY_ITSELF;
    // Who reads the end with the last bytes may not know it yet. The call that returns 0 replaces that one.
    asm.load_at(R1, MINE, at(WEIGHT), Size::U64)
        .if_is(R1, 0, end)
        .load_at(R2, MINE, at(END_READ), Size::U64)
        .if_is(R2, BY_ITSELF, end)
        .load_at(R1, MINE, at(COOKIE), Size::U64)
        .spill(MY_COOKIE, Size::U64, R1)
        .spill(IS_AGAIN, Size::U32, R2)
        .if_is(returned, 0, again)
        .if_not(R2, 0, end)
        .set(R1, WITH_DATA)
        .store_at(MINE, at(END_READ), Size::U64, R1)
        .jump(read);
    asm.place(again)
        .set(R1, BY_ITSELF)
        .store_at(MINE, at(END_READ), Size::U64, R1)
        .place(read);
    // u32 is_again = what mine[END_READ] was;
    // if (!is_again) counters[READ_COUNT]++;
    let counted = asm.label();
    asm.load_at(R1, R10, -IS_AGAIN, Size::U32)
        .if_not(R1, 0, counted);
    count(&mut asm, maps, READ_COUNT);
    asm.place(counted);
    let none = asm.label();
    sample(&mut asm, &fields, maps, FOR_READ, none);
    // u64 read_slot = index + 1;
    // The slot of the earlier read becomes free. It may be the same one, if cwkill has taken that sample.
    // mine[READ_SLOT] = read_slot;
    // return 0;
    let (read_slot, other, freed) = (R9, asm.label(), asm.label());
    asm.load_at(read_slot, R10, -INDEX, Size::U32)
        .add(read_slot, 1)
        .load_at(R1, MINE, at(READ_SLOT), Size::U64)
        .if_differs(R1, read_slot, other)
        .jump(freed)
        .place(other);
    free_slot(&mut asm, maps, freed);
    asm.place(freed)
        .store_at(MINE, at(READ_SLOT), Size::U64, read_slot)
        .jump(end);
    // none: the earlier read was not where the thread got to know of the end, so it goes, too. If it had no slot either, it was counted.
    let not_counted = asm.label();
    asm.place(none)
        .load_at(R1, R10, -IS_AGAIN, Size::U32)
        .if_is(R1, 0, not_counted);
    free_slot(&mut asm, maps, end);
    asm.set(R1, 0)
        .store_at(MINE, at(READ_SLOT), Size::U64, R1)
        .place(not_counted);
    count(&mut asm, maps, NO_SLOT_COUNT);
    asm.place(end).go_on();
    Ok(asm.finish())
}

/// Frees the slot with the read of this socket, if there is one and it is ready. `end`: there is nothing to free.
fn free_slot(asm: &mut Asm, maps: &Maps, end: Label) {
    // if (!mine[READ_SLOT]) goto end;
    // u32 index = mine[READ_SLOT] - 1;
    asm.load_at(R1, MINE, at(READ_SLOT), Size::U64)
        .if_is(R1, 0, end)
        .add(R1, -1)
        .spill(INDEX, Size::U32, R1);
    // u64 *slot = bpf_map_lookup_elem(&slots, &index);
    // if (!slot) goto end;
    get_slot(asm, maps, end);
    // cmpxchg(slot, mine[COOKIE] << COOKIE_SHIFT | FOR_READ | READY, 0);
    asm.load_at(R0, MINE, at(COOKIE), Size::U64)
        .shift_left(R0, COOKIE_SHIFT)
        .add(R0, FOR_READ | READY)
        .set(R1, 0)
        .compare_and_exchange(SLOT, R1);
}

/// The hook sock_graft(sk, parent) of security modules: the thread that accepts.
pub(super) fn security_hook(btf: &Btf, maps: &Maps) -> Program {
    let target = btf.function("bpf_lsm_sock_graft")?;
    Ok((accepted(btf, maps, 0)?, target))
}

/// The return of inet_csk_accept: the thread that accepts.
pub(super) fn accept_return(btf: &Btf, maps: &Maps) -> Program {
    let target = btf.function("inet_csk_accept")?;
    // What it returns comes after its parameters, whose number depends on the kernel.
    let returned = btf.parameters("inet_csk_accept")?;
    Ok((accepted(btf, maps, returned)?, target))
}

/// `argument`: where the program gets the socket.
fn accepted(btf: &Btf, maps: &Maps, argument: usize) -> Result<Vec<Insn>, BtfError> {
    let fields = Fields::new(btf)?;
    let mut asm = Asm::default();
    let end = asm.label();
    // if (!sk) return 0;
    asm.load_at(SK, R1, at(argument), Size::U64)
        .if_is(SK, 0, end);
    if_tcp(&mut asm, &fields, end);
    opened(&mut asm, &fields, maps, ACCEPTED, end);
    asm.place(end).go_on();
    Ok(asm.finish())
}

/// The iterator over the TCP sockets of a network namespace: reports what belongs to those in CLOSE-WAIT.
pub(super) fn report(btf: &Btf, maps: &Maps) -> Program {
    let target = btf.function("bpf_iter_tcp")?;
    let ctx = btf.structure("bpf_iter__tcp")?;
    let (ctx_meta, ctx_sk) = (ctx.pointer("meta")?, ctx.pointer("sk_common")?);
    let meta_seq = ctx_meta.to.pointer("seq")?;
    let sk_state = ctx_sk.to.number("skc_state", Size::U8)?;
    let mut asm = Asm::default();
    let end = asm.label();
    // if (!ctx->sk_common) return 0;
    asm.copy(R9, R1).follow(SK, R9, &ctx_sk).if_is(SK, 0, end);
    count(&mut asm, maps, SHOWN_COUNT);
    // if (ctx->sk_common->skc_state != TCP_CLOSE_WAIT) return 0;
    asm.load(R2, SK, sk_state).if_not(R2, TCP_CLOSE_WAIT, end);
    get_storage(&mut asm, maps, 0, end);
    // bpf_seq_write(ctx->meta->seq, mine, 8 * LIFE);
    asm.follow(R1, R9, &ctx_meta)
        .follow(R1, R1, &meta_seq)
        .copy(R2, MINE)
        .set(R3, immediate(8 * LIFE))
        .call(Helper::SeqWrite);
    asm.place(end).go_on();
    Ok((asm.finish(), target))
}

/// A connection was opened by the current thread. Only one that is sampled gets memory.
fn opened(asm: &mut Asm, fields: &Fields, maps: &Maps, how: i32, end: Label) {
    count(asm, maps, OPENED_COUNT);
    if_sampled(asm, maps, OPENED_MASK, end);
    create_storage(asm, maps, end);
    // mine[OPENED_HOW] = how;
    asm.set(R1, how)
        .store_at(MINE, at(OPENED_HOW), Size::U64, R1);
    sample(asm, fields, maps, FOR_OPENED, end);
}

/// `if (bpf_get_prandom_u32() & counters[mask]) goto otherwise;`
fn if_sampled(asm: &mut Asm, maps: &Maps, mask: usize, otherwise: Label) {
    asm.call(Helper::Random)
        .address_of_map_value(R1, maps.counters.fd())
        .load_at(R1, R1, at(mask), Size::U64)
        .and(R0, R1)
        .if_not(R0, 0, otherwise);
}

/// `if (sk->sk_protocol != IPPROTO_TCP) goto otherwise;`
fn if_tcp(asm: &mut Asm, fields: &Fields, otherwise: Label) {
    asm.load(R2, SK, fields.sk_protocol)
        .if_not(R2, IPPROTO_TCP, otherwise);
}

/// `u64 *mine = bpf_sk_storage_get(&lives, sk, NULL, flags); if (!mine) goto none;`
fn get_storage(asm: &mut Asm, maps: &Maps, flags: i32, none: Label) {
    asm.address_of_map(R1, maps.lives.fd())
        .copy(R2, SK)
        .set(R3, 0)
        .set(R4, flags)
        .call(Helper::SocketStorage)
        .if_is(R0, 0, none)
        .copy(MINE, R0);
}

/// The same, for a socket that may have nothing yet, and `mine[COOKIE] = bpf_get_socket_cookie(sk);`.
fn create_storage(asm: &mut Asm, maps: &Maps, none: Label) {
    asm.copy(R1, SK)
        .call(Helper::SocketCookie)
        .spill(MY_COOKIE, Size::U64, R0);
    get_storage(asm, maps, BPF_SK_STORAGE_GET_F_CREATE, none);
    asm.load_at(R1, R10, -MY_COOKIE, Size::U64)
        .store_at(MINE, at(COOKIE), Size::U64, R1);
}

/// `u64 *slot = bpf_map_lookup_elem(&slots, &index); if (!slot) goto none;`
fn get_slot(asm: &mut Asm, maps: &Maps, none: Label) {
    asm.address_of_map(R1, maps.slots.fd())
        .copy(R2, R10)
        .add(R2, -i32::from(INDEX))
        .call(Helper::MapLookup)
        .if_is(R0, 0, none)
        .copy(SLOT, R0);
}

/// `counters[place]++`, on every processor at once.
fn count(asm: &mut Asm, maps: &Maps, place: usize) {
    asm.address_of_map_value(R1, maps.counters.fd())
        .add(R1, at(place).into())
        .set(R2, 1)
        .add_at_once(R1, R2);
}

/// Puts the registers and the stack of the current thread into a free slot, whose number stays in `index`. `none`: there is no free slot.
fn sample(asm: &mut Asm, fields: &Fields, maps: &Maps, what: i32, none: Label) {
    let (first, count) = match what {
        FOR_OPENED => (READS, OPENED),
        _ => (0, READS),
    };
    let (taken, filled) = (asm.label(), asm.label());
    for among in AMONG {
        // u32 index = first + (bpf_get_prandom_u32() & (min(among, count) - 1));
        asm.call(Helper::Random)
            .mask(R0, immediate(among.min(count) - 1))
            .add(R0, immediate(first))
            .spill(INDEX, Size::U32, R0);
        get_slot(asm, maps, none);
        // if (!cmpxchg(slot, 0, cookie << COOKIE_SHIFT | what)) goto taken;
        asm.load_at(R1, R10, -MY_COOKIE, Size::U64)
            .shift_left(R1, COOKIE_SHIFT)
            .add(R1, what)
            .set(R0, 0)
            .compare_and_exchange(SLOT, R1)
            .if_is(R0, 0, taken);
    }
    asm.jump(none);
    // taken:
    // slot[AT] = bpf_ktime_get_ns();
    // slot[BY] = bpf_get_current_pid_tgid();
    asm.place(taken)
        .call(Helper::Now)
        .store_at(SLOT, at(AT), Size::U64, R0)
        .call(Helper::CurrentPid)
        .store_at(SLOT, at(BY), Size::U64, R0);
    // struct pt_regs *regs = bpf_task_pt_regs(bpf_get_current_task_btf());
    // slot[IP] = regs->ip; and so on
    // slot[STARTED] = task->group_leader->start_boottime;
    let sp = R9;
    asm.call(Helper::CurrentTask)
        .load_at(R1, R0, fields.leader, Size::U64)
        .load(R1, R1, fields.started)
        .store_at(SLOT, at(STARTED), Size::U64, R1)
        .copy(R1, R0)
        .call(Helper::TaskRegisters)
        .load(sp, R0, fields.sp)
        .store_at(SLOT, at(SP), Size::U64, sp);
    // slot[CALL] = regs->orig_ax;
    let others = [
        (CALL, Some(fields.call)),
        (IP, Some(fields.ip)),
        (FP, Some(fields.fp)),
        (LR, fields.lr),
    ];
    for (place, field) in others {
        if let Some(field) = field {
            asm.load(R1, R0, field)
                .store_at(SLOT, at(place), Size::U64, R1);
        }
    }
    // slot[LEN] = 0;
    // Memory ends at a page, and a stack soon. So the parts end at pages, too, and the first one is shorter:
    // u64 first = PART - (sp & (PART - 1));
    // if (bpf_probe_read_user(slot + HEAD, first, sp)) goto filled;
    // slot[LEN] = first;
    // The socket is not used any more.
    let first = SK;
    asm.set(R1, 0)
        .store_at(SLOT, at(LEN), Size::U64, R1)
        .copy(R1, sp)
        .mask(R1, immediate(PART - 1))
        .set(first, immediate(PART))
        .subtract(first, R1, Size::U64)
        .copy(R1, SLOT)
        .add(R1, immediate(8 * HEAD))
        .copy(R2, first)
        .copy(R3, sp)
        .call(Helper::ReadUser)
        .if_not(R0, 0, filled)
        .store_at(SLOT, at(LEN), Size::U64, first);
    for part in 0..STACK / PART - 1 {
        // if (bpf_probe_read_user(slot + HEAD + first + part, PART, sp + first + part)) goto filled;
        // slot[LEN] += PART;
        let skipped = part * PART;
        asm.copy(R1, SLOT)
            .add(R1, immediate(8 * HEAD + skipped))
            .add_register(R1, first)
            .set(R2, immediate(PART))
            .copy(R3, sp)
            .add(R3, immediate(skipped))
            .add_register(R3, first)
            .call(Helper::ReadUser)
            .if_not(R0, 0, filled)
            .copy(R1, first)
            .add(R1, immediate(skipped + PART))
            .store_at(SLOT, at(LEN), Size::U64, R1);
    }
    // filled:
    // cmpxchg(slot, *slot, *slot | READY);
    // Nobody else changes a slot that is not ready.
    asm.place(filled)
        .load_value(R0, SLOT)
        .copy(R1, R0)
        .add(R1, READY)
        .compare_and_exchange(SLOT, R1);
}
