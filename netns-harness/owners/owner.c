/*
 * A process that leaks dead TCP sockets, and watches itself for anything that was done to it.
 *
 *   owner MODE [THREADS]
 *
 * Modes, all of them with a heartbeat of 1 ms:
 *   idle   THREADS threads that wait
 *   waits  a thread in each kind of system call that waits, each sure of how it may end
 *   works  threads that compute, make system calls and exchange data without a pause, and check every result
 *   churn  THREADS threads that open, check and close descriptors all the time, some of them dead sockets
 *   epoll  leaked sockets are in an epoll set
 *   kill, errno, log   a seccomp filter that kills on close(2), refuses it, lets it through
 *   splice a thread waits in splice(2) to each leaked socket
 *   traced another process traces it
 *   shares another process has its table of descriptors
 *   unshared   THREADS threads that wait, each with a table of descriptors of its own
 *   vfork  a thread waits for the child of its vfork(2), which nothing interrupts
 *
 * Lines on stdin are orders, each answered by one line:
 *   leak N    make N dead sockets; their descriptors
 *   scatter N the same, with a living descriptor between each two of them
 *   close N   close number N, whatever it is
 *   gap       the longest time between two heartbeats in microseconds, which starts anew
 *   report    `ok COUNT`, or what was wrong
 *   taken     how many dead sockets of a churn were taken from it
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static atomic_long count;   /* of checks that were passed */
static atomic_int wrong;
static char what[512];
static pthread_mutex_t what_lock = PTHREAD_MUTEX_INITIALIZER;

static void fail(const char *format, ...)
{
    pthread_mutex_lock(&what_lock);
    if (!atomic_exchange(&wrong, 1)) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(what, sizeof what, format, arguments);
        va_end(arguments);
    }
    pthread_mutex_unlock(&what_lock);
}

static void die(const char *step)
{
    perror(step);
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static pthread_t start(void *(*run)(void *), void *argument)
{
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 128 * 1024);
    if (pthread_create(&thread, &attributes, run, argument))
        die("pthread_create");
    return thread;
}

/* Dead sockets */

static int listener = -1, epoll_set = -1, close_by_dup;
static struct sockaddr_in address = {.sin_family = AF_INET};

static void listen_somewhere(void)
{
    socklen_t length = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (void *)&address, sizeof address) || listen(listener, 64)
        || getsockname(listener, (void *)&address, &length))
        die("listen");
}

/* A socket whose peer has reset the connection. */
static int dead_socket(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct linger at_once = {1, 0};
    pthread_mutex_lock(&lock);
    int peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer < 0 || connect(peer, (void *)&address, sizeof address))
        die("connect");
    int dead = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (dead < 0)
        die("accept");
    setsockopt(peer, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    /* Closed by taking its number, since close may be what a filter forbids. */
    if (close_by_dup)
        dup3(listener, peer, O_CLOEXEC);
    else
        close(peer);
    pthread_mutex_unlock(&lock);
    /* The reset has been handled when close returns, since both ends are on this host. */
    return dead;
}

/* The heartbeat */

static atomic_long longest_gap;

static void *heartbeat(void *unused)
{
    int64_t last = now_ns();
    for (;;) {
        struct timespec ms = {0, 1000000};
        clock_nanosleep(CLOCK_MONOTONIC, 0, &ms, NULL);
        int64_t now = now_ns();
        if (now - last > atomic_load(&longest_gap))
            atomic_store(&longest_gap, now - last);
        last = now;
    }
    return unused;
}

/* idle */

static pthread_mutex_t never_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;

static void *idle(void *unused)
{
    pthread_mutex_lock(&never_lock);
    for (;;)
        pthread_cond_wait(&never, &never_lock);
    return unused;
}

/* waits: every call is made once and must still be waiting, or must end when it is due */

#define WAITER(name, call)                                                                         \
    static void *name(void *unused)                                                                \
    {                                                                                              \
        long result = (call);                                                                      \
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
WAITER(in_read, read(empty_pipe[0], &byte, 1))
WAITER(in_recv, recv(quiet_socket[0], &byte, 1, 0))
WAITER(in_recv_with_timeout, recv(timed_socket[0], &byte, 1, 0))
WAITER(in_epoll_wait, epoll_wait(empty_epoll, &event, 1, -1))
WAITER(in_epoll_wait_hour, epoll_wait(empty_epoll, &event, 1, 3600 * 1000))
WAITER(in_poll, wait_poll(-1))
WAITER(in_poll_hour, wait_poll(3600 * 1000))
WAITER(in_select, wait_select())
WAITER(in_pause, pause())
WAITER(in_nanosleep, nanosleep(&hour, NULL))
WAITER(in_sigtimedwait, wait_signal())
WAITER(in_semop, wait_semaphore())
WAITER(in_futex, syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, NULL, NULL, 0))
WAITER(in_futex_hour, syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, &hour, NULL, 0))

/* Must end on time, each time, however often it is stopped. */
static void *on_time(void *unused)
{
    for (;;) {
        int64_t began = now_ns();
        struct timespec time = {0, 300000000};
        if (nanosleep(&time, NULL))
            fail("nanosleep: errno %d", errno);
        int64_t took = now_ns() - began;
        if (took < 300000000)
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

/* Its peer sends it a signal a millisecond; none may be lost, and each ends the call (no SA_RESTART). */
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

static void waits(void)
{
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
    for (size_t at = 0; at < sizeof all / sizeof *all; at++)
        start(all[at], NULL);
    taker = start(takes_signals, NULL);
    start(sends_signals, &taker);
}

/* works */

static void *computes(void *unused)
{
    for (;;) {
        /* Through integer and floating-point registers, without a system call. */
        uint64_t a = 1, b = 2, c = 3, d = 4, e = 5, f = 6;
        double x = 1.5, y = 2.5, z = 0;
        for (int round = 0; round < 2000000; round++) {
            a = a * 6364136223846793005u + b;
            b ^= a >> 7;
            c += b * 3;
            d = (d << 5 | d >> 59) ^ c;
            e -= d;
            f = f * 31 + e;
            z += x * y;
            x = -x;
            __asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f), "+x"(x), "+x"(y), "+x"(z));
        }
        static _Atomic uint64_t first;
        uint64_t sum = a ^ b ^ c ^ d ^ e ^ f ^ (uint64_t)(z * 1024), none = 0;
        if (!atomic_compare_exchange_strong(&first, &none, sum) && atomic_load(&first) != sum)
            fail("a sum came out wrong");
        atomic_fetch_add(&count, 1);
    }
    return unused;
}

static void *calls(void *unused)
{
    pid_t self = getpid();
    for (;;) {
        if (syscall(SYS_getpid) != self || syscall(SYS_close, -1) != -1 || errno != EBADF)
            fail("a system call gave a wrong result");
        struct timespec now = {0, 1};
        if (clock_nanosleep(CLOCK_MONOTONIC, 0, &now, NULL))
            fail("clock_nanosleep failed");
        atomic_fetch_add(&count, 1);
    }
    return unused;
}

static void *sends(void *socket)
{
    for (uint64_t number = 0;; number++)
        if (write(*(int *)socket, &number, sizeof number) != sizeof number)
            fail("write: errno %d", errno);
    return NULL;
}

static void *receives(void *socket)
{
    uint64_t got;
    for (uint64_t number = 0;; number++) {
        if (recv(*(int *)socket, &got, sizeof got, MSG_WAITALL) != sizeof got || got != number)
            fail("received %lu for %lu, errno %d", (unsigned long)got, (unsigned long)number, errno);
        atomic_fetch_add(&count, 1);
    }
    return NULL;
}

static void works(void)
{
    static int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        die("socketpair");
    start(computes, NULL);
    start(computes, NULL);
    start(calls, NULL);
    start(sends, &ends[0]);
    start(receives, &ends[1]);
}

/* churn */

/* Numbers are given out and back under this lock, so that a thread may look at one and close it in one step. */
static pthread_mutex_t numbers = PTHREAD_MUTEX_INITIALIZER;
static atomic_long taken;

static int open_something(unsigned *random, int *dead)
{
    *dead = rand_r(random) % 8 == 0;
    if (*dead)
        return dead_socket();
    return rand_r(random) % 2 ? socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)
                              : memfd_create("churn", MFD_CLOEXEC);
}

static void *churns(void *unused)
{
    enum { OPEN = 16 };
    struct { int fd, dead; ino_t inode; } mine[OPEN];
    unsigned random = (unsigned)(uintptr_t)&mine ^ (unsigned)now_ns();
    for (int at = 0; at < OPEN; at++)
        mine[at].fd = -1;
    for (;;) {
        int at = rand_r(&random) % OPEN;
        struct stat stat;
        pthread_mutex_lock(&numbers);
        if (mine[at].fd >= 0) {
            int same = !fstat(mine[at].fd, &stat) && stat.st_ino == mine[at].inode;
            int closed = same && !close(mine[at].fd);
            if (!same && !mine[at].dead)
                fail("descriptor %d is not what it was", mine[at].fd);
            else if (!closed && !mine[at].dead)
                fail("descriptor %d was closed by somebody", mine[at].fd);
            atomic_fetch_add(closed ? &count : &taken, 1);
        }
        mine[at].fd = open_something(&random, &mine[at].dead);
        if (mine[at].fd < 0)
            fail("open: errno %d", errno);
        else if (fstat(mine[at].fd, &stat) && !mine[at].dead)
            fail("a new descriptor is none: errno %d", errno);
        mine[at].inode = stat.st_ino;
        pthread_mutex_unlock(&numbers);
    }
    return unused;
}

/* seccomp */

static void filter_close(unsigned verdict)
{
    close_by_dup = 1;
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_close, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_close_range, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, verdict),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof program / sizeof *program, program};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter))
        die("seccomp");
}

/* Others */

static void *splices(void *fd)
{
    splice(empty_pipe[0], NULL, (int)(intptr_t)fd, NULL, 1, 0);
    return NULL;
}

static void *vforks(void *unused)
{
    pid_t child = vfork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        syscall(SYS_pause);
    }
    return unused;
}

static void *unshared(void *ready)
{
    if (unshare(CLONE_FILES))
        die("unshare");
    sem_post(ready);
    return idle(NULL);
}

static void share_table(void)
{
    if (!syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, NULL)) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        for (;;)
            pause();
    }
}

static void be_traced(void)
{
    int done[2];
    char ok = 0;
    if (pipe(done))
        die("pipe");
    if (!fork()) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        prctl(PR_SET_NAME, "its-tracer", 0, 0, 0);
        ok = !ptrace(PTRACE_SEIZE, getppid(), NULL, NULL);
        if (write(done[1], &ok, 1) == 1)
            for (;;)
                pause();
    }
    if (read(done[0], &ok, 1) != 1 || !ok)
        die("ptrace");
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "idle";
    int threads = argc > 2 ? atoi(argv[2]) : 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    listen_somewhere();
    if (!strcmp(mode, "waits"))
        waits();
    else if (!strcmp(mode, "works"))
        works();
    else if (!strcmp(mode, "epoll"))
        epoll_set = epoll_create1(EPOLL_CLOEXEC);
    else if (!strcmp(mode, "traced"))
        be_traced();
    else if (!strcmp(mode, "shares"))
        share_table();
    else if (!strcmp(mode, "vfork"))
        start(vforks, NULL);
    else if (!strcmp(mode, "splice") && pipe(empty_pipe))
        die("pipe");
    for (int at = 0; at < threads; at++) {
        if (!strcmp(mode, "churn"))
            start(churns, NULL);
        else if (!strcmp(mode, "idle"))
            start(idle, NULL);
        else if (!strcmp(mode, "unshared")) {
            static sem_t ready;
            sem_init(&ready, 0, 0);
            start(unshared, &ready);
            sem_wait(&ready);
        }
    }
    start(heartbeat, NULL);
    if (!strcmp(mode, "kill"))
        filter_close(SECCOMP_RET_KILL_PROCESS);
    else if (!strcmp(mode, "errno"))
        filter_close(SECCOMP_RET_ERRNO | EPERM);
    else if (!strcmp(mode, "log"))
        filter_close(SECCOMP_RET_LOG);

    char line[128];
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        int number = 0;
        int scattered = sscanf(line, "scatter %d", &number) == 1;
        if (scattered || sscanf(line, "leak %d", &number) == 1) {
            for (int at = 0; at < number; at++) {
                int dead = dead_socket();
                if (scattered && eventfd(0, EFD_CLOEXEC) < 0)
                    die("eventfd");
                if (epoll_set >= 0) {
                    struct epoll_event hup = {.events = EPOLLET, .data.fd = dead};
                    if (epoll_ctl(epoll_set, EPOLL_CTL_ADD, dead, &hup))
                        die("epoll_ctl");
                }
                if (!strcmp(mode, "splice"))
                    start(splices, (void *)(intptr_t)dead);
                printf("%d ", dead);
            }
            putchar('\n');
        } else if (sscanf(line, "close %d", &number) == 1) {
            printf("%d\n", close(number));
        } else if (!strncmp(line, "gap", 3)) {
            printf("%ld\n", atomic_exchange(&longest_gap, 0) / 1000);
        } else if (!strncmp(line, "taken", 5)) {
            printf("%ld\n", atomic_load(&taken));
        } else if (!strncmp(line, "report", 6)) {
            pthread_mutex_lock(&what_lock);
            if (atomic_load(&wrong))
                printf("%s\n", what);
            else
                printf("ok %ld\n", atomic_load(&count));
            pthread_mutex_unlock(&what_lock);
        } else
            puts("no such order");
    }
    return 0;
}
