/*
 * The modes in which threads wait.
 *
 *   waits      one thread per kind of blocking system call: each call is made once and must still block, or end
 *              when it is due
 *   forgiving  the same, but a call may end early as docs/decisions/reclaim.md says for a cwkill that is killed
 *   poll, ppoll, select, pselect, poll-int80    a thread waits on the descriptor of each leaked socket
 */
#include "owner.h"
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>

/* How a call may end early: never; with EINTR, as after any debugger; with a spurious wake-up. */
enum end { NEVER, EINTR_ONLY, WAKES };

static int forgives;
static atomic_long forgiven_ends;

long forgiven(void)
{
    return atomic_load(&forgiven_ends);
}

static int may_end(enum end end, long result)
{
    int may = forgives && ((end == EINTR_ONLY && result == -1 && errno == EINTR) || (end == WAKES && result == 0));
    if (may)
        atomic_fetch_add(&forgiven_ends, 1);
    return may;
}

#define WAITER(name, end, call)                                                                    \
    static void *name(void *unused)                                                                \
    {                                                                                              \
        long result;                                                                               \
        do                                                                                         \
            result = (call);                                                                       \
        while (may_end(end, result));                                                              \
        fail("%s ended with %ld, errno %d", #name, result, errno);                                 \
        return unused;                                                                             \
    }

static int empty_pipe[2], empty_epoll, quiet_socket[2], timed_socket[2], semaphores;
static uint32_t futex_word;
static struct timespec hour = {3600, 0};
static struct timeval hour_tv = {3600, 0};

static long wait_select(void)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(empty_pipe[0], &set);
    return select(empty_pipe[0] + 1, &set, NULL, NULL, &hour_tv);
}

static long wait_poll(int timeout)
{
    struct pollfd pollfd = {empty_pipe[0], POLLIN, 0};
    return poll(&pollfd, 1, timeout);
}

static long wait_signal(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    return sigtimedwait(&set, NULL, &hour);
}

static long wait_semaphore(void)
{
    struct sembuf down = {0, -1, 0};
    return semop(semaphores, &down, 1);
}

static struct epoll_event event;
static char byte;
WAITER(in_read, NEVER, read(empty_pipe[0], &byte, 1))
WAITER(in_recv, NEVER, recv(quiet_socket[0], &byte, 1, 0))
WAITER(in_recv_with_timeout, EINTR_ONLY, recv(timed_socket[0], &byte, 1, 0))
WAITER(in_epoll_wait, EINTR_ONLY, epoll_wait(empty_epoll, &event, 1, -1))
WAITER(in_epoll_wait_hour, EINTR_ONLY, epoll_wait(empty_epoll, &event, 1, 3600 * 1000))
WAITER(in_poll, NEVER, wait_poll(-1))
WAITER(in_poll_hour, NEVER, wait_poll(3600 * 1000))
WAITER(in_select, NEVER, wait_select())
WAITER(in_pause, NEVER, pause())
WAITER(in_nanosleep, WAKES, nanosleep(&hour, NULL))
WAITER(in_sigtimedwait, EINTR_ONLY, wait_signal())
WAITER(in_semop, EINTR_ONLY, wait_semaphore())
WAITER(in_futex, WAKES, syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, NULL, NULL, 0))
WAITER(in_futex_hour, WAKES, syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, &hour, NULL, 0))

/* Must end on time, however often the thread is stopped. */
static void *on_time(void *unused)
{
    for (;;) {
        int64_t began = now_ns();
        struct timespec time = {0, 300000000};
        if (nanosleep(&time, NULL))
            fail("nanosleep: errno %d", errno);
        int64_t took = now_ns() - began;
        if (took < 300000000 && !may_end(WAKES, 0))
            fail("slept only %ld us", (long)(took / 1000));
        atomic_fetch_add(&count, 1);
    }
    return unused;
}

static atomic_long signals_sent, signals_taken;

static void on_signal(int signal)
{
    (void)signal;
    atomic_fetch_add(&signals_taken, 1);
}

/* Another thread sends a signal every millisecond. None may be lost, and each ends the call (no SA_RESTART). */
static void *takes_signals(void *unused)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    for (;;) {
        errno = 0;
        if (pause() != -1 || errno != EINTR)
            fail("pause ended with errno %d", errno);
    }
    return unused;
}

static void *sends_signals(void *thread)
{
    for (;;) {
        struct timespec ms = {0, 1000000};
        long before = atomic_load(&signals_sent);
        atomic_fetch_add(&signals_sent, 1);
        pthread_kill(*(pthread_t *)thread, SIGUSR1);
        int64_t until = now_ns() + 5000000000LL;
        while (atomic_load(&signals_taken) <= before) {
            if (now_ns() > until) {
                fail("a signal was lost: %ld sent, %ld taken", before + 1, atomic_load(&signals_taken));
                return NULL;
            }
            sched_yield();
        }
        atomic_fetch_add(&count, 1);
        nanosleep(&ms, NULL);
    }
}

void waits(int forgiving)
{
    forgives = forgiving;
    static pthread_t taker;
    struct sigaction action = {.sa_handler = on_signal};
    sigset_t blocked;
    struct timeval long_time = {3600, 0};
    sigaction(SIGUSR1, &action, NULL);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigaddset(&blocked, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &blocked, NULL);
    if (pipe(empty_pipe) || socketpair(AF_UNIX, SOCK_STREAM, 0, quiet_socket)
        || socketpair(AF_UNIX, SOCK_STREAM, 0, timed_socket))
        die("pipe");
    setsockopt(timed_socket[0], SOL_SOCKET, SO_RCVTIMEO, &long_time, sizeof long_time);
    empty_epoll = epoll_create1(0);
    semaphores = semget(IPC_PRIVATE, 1, 0600);
    void *(*all[])(void *) = {in_read, in_recv, in_recv_with_timeout, in_epoll_wait,
        in_epoll_wait_hour, in_poll, in_poll_hour, in_select, in_pause, in_nanosleep,
        in_sigtimedwait, in_semop, in_futex, in_futex_hour, on_time};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        start(all[i], NULL);
    taker = start(takes_signals, NULL);
    start(sends_signals, &taker);
}

/*
 * A thread that waits on a descriptor. poll(2) returns at once for a dead socket. So the thread waits on a pipe, and then the
 * dead socket gets the number of the pipe. select(2) for exceptional conditions waits on the socket itself.
 */

struct wait {
    const char *mode;
    int fd;
    pid_t tid;
    _Atomic int begun;
};

int waits_on(const char *mode)
{
    static const char *const modes[] = {"poll", "ppoll", "select", "pselect", "poll-int80"};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(mode, modes[i]))
            return 1;
    return 0;
}

/* poll(2) through the 32-bit system call, which a 64-bit program can use, too. */
static long poll_int80(int fd)
{
#ifdef __x86_64__
    struct pollfd *list = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    long result;
    if (list == MAP_FAILED)
        die("mmap");
    *list = (struct pollfd){fd, POLLIN, 0};
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(168L), "b"((long)list), "c"(1L), "d"(-1L) : "memory", "r8", "r9", "r10", "r11");
    return result;
#else
    (void)fd;
    errno = ENOSYS;
    return -1;
#endif
}

static void *waits_on_it(void *argument)
{
    struct wait *wait = argument;
    int fd = wait->fd;
    struct pollfd list[3] = {{empty_pipe[0], POLLIN, 0}, {empty_pipe[0], POLLIN, 0}, {fd, POLLIN, 0}};
    fd_set set;
    long result;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    wait->tid = (pid_t)syscall(SYS_gettid);
    atomic_store(&wait->begun, 1);
    if (!strcmp(wait->mode, "poll"))
        /* With a timeout: after a stop, the kernel continues it with restart_syscall(2). */
        result = poll(list, 3, 3600 * 1000);
    else if (!strcmp(wait->mode, "ppoll"))
        result = ppoll(list, 3, &hour, NULL);
#ifdef SYS_select
    else if (!strcmp(wait->mode, "select"))
        result = syscall(SYS_select, fd + 1, NULL, NULL, &set, &hour_tv);
#endif
    else if (!strcmp(wait->mode, "poll-int80"))
        result = poll_int80(fd);
    else
        result = pselect(fd + 1, NULL, NULL, &set, &hour, NULL);
    fail("%s ended with %ld, errno %d", wait->mode, result, errno);
    return NULL;
}

/* Waits until the thread sleeps in its system call, and not in one that starts it. After a stop, that may be
 * restart_syscall(2). */
static void until_it_waits(const struct wait *wait)
{
    for (int attempt = 0; attempt < 40000; attempt++) {
        char path[64], text[64] = "";
        long number = -1;
        snprintf(path, sizeof path, "/proc/self/task/%d/syscall", (int)wait->tid);
        int file = atomic_load(&wait->begun) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        if (file >= 0) {
            if (read(file, text, sizeof text - 1) > 0)
                sscanf(text, "%ld ", &number);
            close(file);
        }
        long wanted = !strcmp(wait->mode, "ppoll") ? SYS_ppoll : SYS_pselect6;
#ifdef SYS_poll
        if (!strcmp(wait->mode, "poll"))
            wanted = SYS_poll;
        if (!strcmp(wait->mode, "select"))
            wanted = SYS_select;
        if (!strcmp(wait->mode, "poll-int80"))
            wanted = 168;
#else
        if (!strcmp(wait->mode, "poll"))
            wanted = SYS_ppoll;
#endif
        if (number == wanted || number == SYS_restart_syscall)
            return;
        usleep(500);
    }
    errno = ETIMEDOUT;
    die(wait->mode);
}

static int polls(const char *mode)
{
    return waits_on(mode) && !strstr(mode, "select");
}

/* The newest thread that waits. */
static struct wait *newest;

/* Has a thread wait on the descriptor `fd`, or on a new pipe if it is -1. The descriptor. */
int wait_on(const char *mode, int fd)
{
    struct wait *wait = calloc(1, sizeof *wait);
    if (!empty_pipe[1] && pipe2(empty_pipe, O_CLOEXEC))
        die("pipe2");
    wait->mode = mode;
    wait->fd = fd < 0 ? fcntl(empty_pipe[0], F_DUPFD_CLOEXEC, 0) : fd;
    start(waits_on_it, wait);
    until_it_waits(wait);
    newest = wait;
    return wait->fd;
}

/* Leaks a dead socket as descriptor `fd`. */
int leak_onto(int fd)
{
    int dead = dead_socket();
    /* After a stop, a call that has not restarted yet would see the dead socket. */
    if (newest)
        until_it_waits(newest);
    if (dup3(dead, fd, O_CLOEXEC) < 0 || close(dead))
        die("dup3");
    return fd;
}

/* Leaks a dead socket on whose descriptor a thread waits. */
int leak_waited_on(const char *mode)
{
    return polls(mode) ? leak_onto(wait_on(mode, -1)) : wait_on(mode, dead_socket());
}
