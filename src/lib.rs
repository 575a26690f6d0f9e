//! Closes TCP sockets stuck in CLOSE-WAIT without killing the process that leaks them.
//!
//! Data flows one way, as fields of one record:
//! - `cwkill`: **find → plan → act → verify → report**, with one [`model::Target`] for each socket. The run reads top to bottom in
//!   [`commands::close`]; [`injector`] is the module that acts and verifies.
//! - `cwkill reclaim`: **find → inspect → stop → inspect again → close → release → report**, with one
//!   [`report::reclaim::DeadDescriptor`] for each descriptor. The run reads top to bottom in `commands::reclaim`; [`reclaim`] acts.
//!
//! # The layers
//! A module uses only modules above it (`tests/layers.rs` fails otherwise):
//!
//! | layer | modules |
//! |---|---|
//! | strings, system calls, kernel version, memory, threads | `text`, `sys` (every `unsafe`), [`kernel`], `memory`, `parallel`, `netlink` |
//! | TCP | [`tcp`]: states, address pairs, sequence numbers, segments |
//! | Linux | `bpf`: programs that the kernel runs; [`proc`]: /proc; [`sock_diag`]: the kernel's socket tables; [`routes`]: which addresses are of this host; `conntrack`: connection tracking, by /proc and by netlink; [`packet`]: raw and packet sockets |
//! | data | [`model`]: the terms of the glossary as types; [`control`]: clock, pauses and Ctrl-C of a run |
//! | which sockets | [`filter`]: selectors, expressions of ss(8), the kernel's bytecode |
//! | what there is | [`privileges`]: rights, and giving them up; [`history`]: the sockets that earlier runs have seen; [`finder`]: sockets, owners, listeners, dead descriptors |
//! | acts | [`injector`]: the methods, the plan and the engine that runs it; [`reclaim`]: closing dead descriptors inside their process; [`drain`]: freeing the slots of dead connections in a backlog |
//! | results | `diagnose`: who leaks and why; `check`: thresholds; `watch`: new stuck sockets; `doctor`: what works here; `trace`: the lines of code that leak |
//! | options | [`cli`]: the arguments; [`config`]: their meaning |
//! | words | [`report`]: tables, JSON, notes, exit status; `audit`: the log |
//! | the daemon | [`daemon`]: its configuration and its policies, the numbers of its sweeps, and how they are served |
//! | the program | `terminal`; [`commands`]: one file for each command |
//!
//! # Glossary
//! - **stuck socket**: a socket in CLOSE-WAIT, or in the states that `--state` names.
//! - **target**: a matched socket with its owners, its plan, the attempts and the outcome.
//! - **owner**: a process that has a descriptor of a socket. [`model::Owner`] is one such descriptor with its process. A socket has
//!   several after fork(2).
//! - **descriptor table**: the descriptors of a process, which its threads share. A **thread table** is one that a single thread has
//!   (unshare(2), CLONE_FILES), or the other threads after the exit of the first.
//! - **listener**: the listening socket at which a connection waits for accept(2), or several of a **group** with SO_REUSEPORT if the
//!   kernel does not tell at which.
//! - **backlog**: the queue of a listening socket with the connections that wait for accept(2). Each takes a **slot** until it is
//!   accepted, also when it is dead. **drain**: to free the slots of dead connections. (The cause `drained` is about unread bytes.)
//! - **forwarded connection**: a connection between other hosts that this host routes. conntrack has an **entry** for it. Its **original
//!   direction** is that of the packets of the end that has opened it; the **source** is that end, the **destination** the address to
//!   which it has connected.
//! - **subflow**: a TCP connection that is a part of an MPTCP connection. The MPTCP socket is the one that has a descriptor and is
//!   stuck.
//! - **other end**: the socket at the other end of a connection, if it is in a namespace that was read.
//! - **leg**: one of the two connections that a proxy joins. The **other leg** of a stuck socket has bytes that its peer does not take.
//! - **inherited**: a descriptor that a process got from the process that started it, and does not use. **heir**: such a process.
//! - **circumstance**: a fact about an owner that explains its sockets better than their causes do.
//! - **orphan**: a socket that its owner has closed. No process has a descriptor of it; only the kernel uses it.
//! - **iterator**: a program of cwkill that the kernel runs for each of its objects of a kind, here for each descriptor or each TCP socket,
//!   while cwkill reads its records (BPF). **walk**: one such run over all sockets. **walker**: the child process of cwkill that makes it.
//! - **held up**: a walk that waits for the lock of a socket whose owner hangs. cwkill **leaves** the walk then.
//! - **duplicate**: a descriptor of cwkill for a file of another process, mostly a socket of an owner (pidfd_getfd(2)).
//! - **standard descriptor**: standard input, output or error, number 0, 1 or 2.
//! - **dead socket**: a socket in CLOSE, in no TCP table, that was connected. **dead descriptor**: an open descriptor of one.
//! - **cookie**: the number that the kernel gives to a socket and to no later one. With it, cwkill asks for exactly this socket.
//! - **inode**: the number of the file of a socket. It links a socket of the kernel's tables with the descriptors in /proc. A socket
//!   without a file has none: it was never accepted, or its owner has closed it.
//! - **place**: an address, with the interface to which its socket is bound. Of a trace: the lines of code that read the end of streams and
//!   leave their sockets open, or that open connections whose end nobody reads.
//! - **address gone**: a socket has lost its local address: it is not an address of this host any more, and the kernel delivers no
//!   segment to it.
//! - **trace**: to watch, by programs of the kernel, who opens connections and who reads the end of their streams. A **sample** is what a
//!   program keeps of a thread: its registers and the top of its stack. It is in a **slot**, a part of a fixed amount of memory, until
//!   cwkill takes it or the socket leaves CLOSE-WAIT.
//! - **own frame**: a function on a stack that is of the program itself, not of the C library, a language or what runs programs. The first one is
//!   marked.
//! - **cause**: why a socket is stuck, from its queues and its inode.
//! - **method**: a way to close a socket: probe, shutdown, destroy, rst.
//! - **plan**: the methods to try on a target, in order. **exclusion**: why a method is not among them. **skip**: why a target is left alone.
//! - **act**: to use a method on a socket, or to close a descriptor inside its process.
//! - **attempt**: one method tried on one target. **outcome**: what became of a target: closed, closing, gone, skipped, failed.
//! - **gone**: a socket or descriptor that ended without an act of cwkill. A process has **exited**, a file of /proc is **missing**, and
//!   a lookup that finds nothing has **not found** its socket.
//! - **pending**: still without a result: a socket that a method waits for, or a descriptor that reclaim has not decided on.
//! - **grace**: how long a socket gets to close before the next method.
//! - **react**: an owner reacts if it closes its descriptor because the connection has ended.
//! - **at one instant**: with the lock of the socket held, so that nothing can change between the judgement and the act.
//! - **recheck**: a lookup by cookie right before an act. **verify**: to look in the kernel's tables for the socket after an act: by
//!   its cookie, or for very many sockets with one list.
//! - **nameless namespace**: a network namespace without a process and without a name. A descriptor of a socket keeps it alive.
//! - **coverage**: what could not be seen.
//! - **left out**: what may match and is only counted: a socket that is too young or in use, or of an owner that could not be read, and a
//!   network namespace that the operator has not named.
//! - **absent owner**: a process, unit, container or cgroup that the operator names, and that does not exist.
//! - **scope**: selectors, and the network namespaces they are applied to.
//! - **age**: how long a socket has been stuck, at least. **idle time**: for how long no data has moved in it, at least.
//! - **history**: the file with which a run tells later ones which sockets it has seen. A run **adds** an **entry** for each socket, and
//!   **applies** the entries to the ages and idle times of the sockets that it lists.
//! - **snapshot**: the state, the unread bytes and the byte counters of a socket at one time. As long as it is the same, no data has
//!   moved.
//! - **quiet**: how long a dead socket has been dead, at least.
//! - **suspect**: an open descriptor of a socket that is in no TCP table. Its **verdict**: dead, never connected, or unknown.
//! - **to spin**: a thread spins if it wakes without end, because a closed socket is always ready. **interest**: the events for which a
//!   process waits at a socket, by an epoll set or by poll(2). **paused**: a socket that an owner waits
//!   for without asking for input. If it were closed, the owner would spin.
//! - **canary**: the socket of an owner that is closed first, to see whether the owner spins.
//! - **overview**: what a terminal shows of a run: one screen, with a row for each process and listener.
//! - **intent**: the record in the log, before the act, of a socket or descriptor that cwkill is about to close.
//! - **reclaim**: to close a dead descriptor inside its process. **evidence**: the facts from /proc that show how the process uses its
//!   descriptors, for example system calls and epoll sets. **in use**: the evidence speaks against closing the descriptor;
//!   of a socket: data has moved in it within the last seconds (`--min-idle`).
//! - **advice**: what the operator can do about the descriptors that were kept in a process, with the commands.
//! - **stop**: all threads of a process stopped by ptrace(2). **remote syscall**: a system call of cwkill in place of a thread's own.
//! - **caller**: the user who started cwkill. With file capabilities cwkill has more privileges than its caller.
//! - **confinement**: what keeps cwkill from the rest of the host: the container that it runs in, its pid namespace, its seccomp filter, its
//!   security label.
//! - **privilege**: a right that a method needs: a capability, or the right to attach to the owner.

mod audit;
mod bpf;
mod check;
pub mod cli;
pub mod commands;
pub mod config;
mod conntrack;
pub mod control;
pub mod daemon;
mod diagnose;
mod doctor;
pub mod drain;
pub mod filter;
pub mod finder;
pub mod history;
pub mod injector;
pub mod kernel;
mod memory;
pub mod model;
mod netlink;
pub mod packet;
mod parallel;
pub mod privileges;
pub mod proc;
pub mod reclaim;
pub mod report;
pub mod routes;
pub mod sock_diag;
mod sys;
pub mod tcp;
mod terminal;
mod text;
#[cfg(feature = "trace")]
mod trace;
mod watch;

#[cfg(fuzzing)]
pub use trace::worker::fuzzing;
