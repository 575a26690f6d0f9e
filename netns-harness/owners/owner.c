/*
 * A process that leaks dead TCP sockets and checks itself for damage.
 *
 *   owner MODE [THREADS]
 *
 * Every mode has a heartbeat of 1 ms. More modes are in waits.c, works.c, reacts.c, transfers.c, hangs.c, ring.c
 * and spins.c, more orders in locks.c:
 *   idle   THREADS idle threads
 *   sleeps THREADS threads that sleep
 *   epoll  leaked sockets are in an epoll set
 *   kill, errno, log   a seccomp filter kills the process on close(2), refuses the call, or only logs it
 *   no-open   a seccomp filter kills the process on openat(2)
 *   splice a thread waits in splice(2) to each leaked socket
 *   traced another process traces this one
 *   shares another process shares the descriptor table
 *   unshared   THREADS idle threads, each with its own descriptor table
 *   vfork  a thread waits for the child of its vfork(2), which nothing interrupts
 *   leaderless the first thread has ended
 *   computes   no thread makes a system call after the order `compute`, for a while
 *   chroot     the root directory has no dev
 *   execs  THREADS idle threads, and one that executes the program again every few milliseconds
 *
 * Each line on stdin is an order. The answer is one line:
 *   leak N    make N dead sockets; their descriptors
 *   scatter N the same, with an open descriptor after each, which must not change
 *   copy      start a thread that copies the descriptor table
 *   wait      have a thread wait on a pipe, as MODE says; the descriptor of the pipe
 *   onto N    leak a dead socket as descriptor N
 *   inetd     leak a dead socket as descriptors 0, 1 and 2, as a service that inetd started; orders come and go elsewhere
 *   inetd stuck   the same with a socket in CLOSE-WAIT
 *   log       open a new file, write to standard output, and close the file; its number and its size
 *   fill      open descriptors up to the limit; their number
 *   compute MS   answer, and then compute for this time, without a system call; for a process with one thread
 *   stuck N   make N sockets in CLOSE-WAIT; their descriptors
 *   aborted   make a socket in CLOSE-WAIT, add it to the loop of spins.c, and have its peer reset the connection
 *   answered N   make N dead sockets with 30000 unread bytes; their descriptors
 *   read N    read descriptor N to its end; the number of bytes
 *   fresh     make sockets that look dead but can still be used, and must not change: never connected, bound, refused,
 *             refused and SO_ERROR read, disconnected, disconnected and refused, connecting, listening
 *   use N     connect descriptor N, a socket without a connection; 0 or the errno
 *   connect   complete the connection of the connecting socket of `fresh`; 0 or the errno
 *   close N   close descriptor N
 *   finish    complete a transfer
 *   hang WHEN have a thread execute a program whose exec hangs; how many have hung
 *   lock      have a thread receive, and keep the lock of an open connection until `unlock`; its descriptor
 *   unlock    let that thread go on; the number of bytes that it has received
 *   seal      make /proc/PID unreadable for other processes of the user
 *   gap       the longest time between two heartbeats since the last `gap`, in microseconds
 *   report    `ok COUNT`, or the first failure
 *   taken     how many dead sockets of a churn were closed by another process
 *   wakes     how many times the loop of spins.c has woken since the last `wakes`
 *   forgiven  how many calls ended early in a permitted way
 */
#include "owner.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

atomic_long count;
static atomic_int wrong;
static char failure[512];
static pthread_mutex_t failure_lock = PTHREAD_MUTEX_INITIALIZER;

void fail(const char *format, ...)
{
    pthread_mutex_lock(&failure_lock);
    if (!atomic_exchange(&wrong, 1)) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(failure, sizeof failure, format, arguments);
        va_end(arguments);
    }
    pthread_mutex_unlock(&failure_lock);
}

void die(const char *step)
{
    perror(step);
    exit(1);
}

int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

pthread_t start(void *(*run)(void *), void *argument)
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

/* Whether leaked descriptors are closed on exec. Where they are not, they show whether an exec has happened. */
static int on_exec = SOCK_CLOEXEC;

/* A socket whose peer has reset the connection. */
int dead_socket(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct linger at_once = {1, 0};
    struct pollfd reset = {0};
    pthread_mutex_lock(&lock);
    int peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer < 0 || connect(peer, (void *)&address, sizeof address))
        die("connect");
    int dead = accept4(listener, NULL, NULL, on_exec);
    if (dead < 0)
        die("accept");
    setsockopt(peer, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    /* dup3 closes the old descriptor. A filter may forbid close. */
    if (close_by_dup)
        dup3(listener, peer, O_CLOEXEC);
    else
        close(peer);
    pthread_mutex_unlock(&lock);
    /* On a busy machine the kernel handles the reset after close has returned. */
    reset.fd = dead;
    if (poll(&reset, 1, 20000) != 1)
        die("the reset");
    return dead;
}

/* Descriptors that must not change */

static struct kept { int fd; unsigned long inode; } *kept;
static int kept_count;

static unsigned long inode_of(int fd)
{
    struct stat stat;
    return fstat(fd, &stat) ? 0 : stat.st_ino;
}

static int keep_as(int fd, unsigned long inode)
{
    kept = realloc(kept, (kept_count + 1) * sizeof *kept);
    if (fd < 0 || !kept)
        die("a descriptor to keep");
    kept[kept_count++] = (struct kept){fd, inode};
    return fd;
}

static int keep(int fd)
{
    return keep_as(fd, inode_of(fd));
}

static void check_kept(void)
{
    for (int i = 0; i < kept_count; i++)
        if (inode_of(kept[i].fd) != kept[i].inode)
            fail("descriptor %d has changed", kept[i].fd);
}

/* Sockets that look dead but can still be used */

static int full = -1, connecting = -1;

static int new_socket(int flags)
{
    return keep(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0));
}

static int connect_to(int fd, in_port_t port)
{
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_addr = address.sin_addr, .sin_port = port};
    return connect(fd, (void *)&peer, sizeof peer) ? errno : 0;
}

/* Connects and disconnects a socket, which can then connect again. */
static int disconnected(int flags)
{
    struct sockaddr nothing = {.sa_family = AF_UNSPEC};
    int fd = new_socket(0);
    if (connect_to(fd, address.sin_port))
        die("connect");
    int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (accepted < 0 || connect(fd, &nothing, sizeof nothing) || fcntl(fd, F_SETFL, flags))
        die("disconnect");
    close(accepted);
    return fd;
}

static void fresh(void)
{
    enum { CLOSED_PORT = 1 };
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr = address.sin_addr};
    socklen_t length = sizeof any;
    int error = 0;
    socklen_t error_length = sizeof error;
    int never = new_socket(0), bound = new_socket(0), listening = new_socket(0);
    int refused = new_socket(SOCK_NONBLOCK), asked = new_socket(SOCK_NONBLOCK);
    int back = disconnected(0), back_refused = disconnected(O_NONBLOCK);
    int filler = new_socket(0);
    full = new_socket(0);
    connecting = new_socket(SOCK_NONBLOCK);
    if (bind(bound, (void *)&any, sizeof any) || bind(listening, (void *)&any, sizeof any) || listen(listening, 8))
        die("listen");
    if (connect_to(refused, htons(CLOSED_PORT)) != EINPROGRESS || connect_to(asked, htons(CLOSED_PORT)) != EINPROGRESS
        || connect_to(back_refused, htons(CLOSED_PORT)) != EINPROGRESS
        || getsockopt(asked, SOL_SOCKET, SO_ERROR, &error, &error_length) || error != ECONNREFUSED)
        die("a refused connection");
    /* One connection fills the queue. The kernel then drops every SYN. */
    if (bind(full, (void *)&any, sizeof any) || listen(full, 0) || getsockname(full, (void *)&any, &length)
        || connect_to(filler, any.sin_port) || connect_to(connecting, any.sin_port) != EINPROGRESS)
        die("a connection that waits");
    printf("%d %d %d %d %d %d %d %d\n", never, bound, refused, asked, back, back_refused, connecting, listening);
}

static int use(int fd)
{
    int error = 0;
    if (fcntl(fd, F_SETFL, 0))
        return errno;
    /* The first connect may return the error of an earlier refusal. */
    for (int attempt = 0; attempt < 3; attempt++) {
        error = connect_to(fd, address.sin_port);
        if (!error) {
            int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
            char byte = 'x';
            if (write(fd, &byte, 1) != 1 || read(accepted, &byte, 1) != 1)
                error = errno;
            close(accepted);
            break;
        }
    }
    return error;
}

static int finish_connecting(void)
{
    struct pollfd writable = {connecting, POLLOUT, 0};
    int error = 0;
    socklen_t length = sizeof error;
    keep(accept4(full, NULL, NULL, SOCK_CLOEXEC));
    if (poll(&writable, 1, 20000) != 1)
        return ETIMEDOUT;
    return getsockopt(connecting, SOL_SOCKET, SO_ERROR, &error, &length) ? errno : error;
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

/* sleeps */

static void *sleeps(void *unused)
{
    for (;;) {
        struct timespec hour = {3600, 0};
        clock_nanosleep(CLOCK_MONOTONIC, 0, &hour, NULL);
    }
    return unused;
}

/* seccomp */

static void filter_calls(unsigned one, unsigned other, unsigned action)
{
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, one, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, other, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof program / sizeof *program, program};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter))
        die("seccomp");
}

static void filter_close(unsigned action)
{
    close_by_dup = 1;
    filter_calls(SYS_close, SYS_close_range, action);
}

/* Other modes */

static int silent_pipe[2];

static void *splices(void *fd)
{
    splice(silent_pipe[0], NULL, (int)(intptr_t)fd, NULL, 1, 0);
    return NULL;
}

static void *vforks(void *forked)
{
    pid_t child = vfork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        sem_post(forked);
        syscall(SYS_pause);
    }
    return NULL;
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

/* execs */

/* Locked while an order is executed, so that an exec does not lose it. */
static pthread_mutex_t orders = PTHREAD_MUTEX_INITIALIZER;
static const char *const COUNT = "OWNER_COUNT", *const KEPT = "OWNER_KEPT";

static void *execs(void *threads)
{
    char number[32];
    usleep(3000);
    pthread_mutex_lock(&orders);
    if (atomic_load(&wrong))
        goto stays;
    check_kept();
    if (atomic_load(&wrong))
        goto stays;
    snprintf(number, sizeof number, "%ld", atomic_load(&count) + 1);
    setenv(COUNT, number, 1);
    char *list = calloc(kept_count + 1, 48), *end = list;
    for (int i = 0; i < kept_count; i++)
        end += sprintf(end, "%d:%lu ", kept[i].fd, kept[i].inode);
    setenv(KEPT, list, 1);
    execl("/proc/self/exe", "owner", "execs", threads, NULL);
    fail("exec: errno %d", errno);
stays:
    pthread_mutex_unlock(&orders);
    return NULL;
}

/* Restores the state from before an exec. Whether there was one. */
static int restored(void)
{
    const char *number = getenv(COUNT), *list = getenv(KEPT);
    int fd, length;
    unsigned long inode;
    if (!number)
        return 0;
    atomic_store(&count, atol(number));
    for (; list && sscanf(list, "%d:%lu %n", &fd, &inode, &length) == 2; list += length)
        keep_as(fd, inode);
    return 1;
}

/* Orders */

static const char *mode = "idle";

static void leak(int number, int scattered)
{
    for (int i = 0; i < number; i++) {
        int dead = waits_on(mode) && !scattered ? leak_waited_on(mode) : dead_socket();
        if (scattered)
            keep(memfd_create("alive", on_exec ? MFD_CLOEXEC : 0));
        if (epoll_set >= 0) {
            struct epoll_event hup = {.events = EPOLLET, .data.fd = dead};
            if (epoll_ctl(epoll_set, EPOLL_CTL_ADD, dead, &hup))
                die("epoll_ctl");
        }
        if (!strcmp(mode, "splice"))
            start(splices, (void *)(intptr_t)dead);
        if (has_ring(mode))
            put_into_ring(mode, dead);
        printf("%d ", dead);
    }
    putchar('\n');
}

/* A socket that has sent FIN and received an answer after that. */
static int answered_socket(void)
{
    static const char answer[30000];
    struct pollfd over = {.events = POLLRDHUP};
    int peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer < 0 || connect(peer, (void *)&address, sizeof address))
        die("connect");
    over.fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (shutdown(over.fd, SHUT_WR) || write(peer, answer, sizeof answer) != sizeof answer || close(peer)
        || poll(&over, 1, 20000) != 1)
        die("answer");
    return over.fd;
}

static long read_all(int fd)
{
    char buffer[4096];
    long all = 0, got;
    while ((got = read(fd, buffer, sizeof buffer)) > 0)
        all += got;
    return got < 0 ? -errno : all;
}

/* A socket whose peer has closed. */
static int stuck_socket(void)
{
    struct pollfd finished = {.events = POLLRDHUP};
    int peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer < 0 || connect(peer, (void *)&address, sizeof address))
        die("connect");
    finished.fd = accept4(listener, NULL, NULL, on_exec);
    if (keeps_peers(mode) ? shutdown(peer, SHUT_WR) : close(peer))
        die("close");
    if (poll(&finished, 1, 20000) != 1)
        die("the peer did not close");
    return finished.fd;
}

/* A socket in CLOSE-WAIT in the loop, whose peer then resets the connection. */
static int aborted_socket(void)
{
    struct pollfd over = {.events = POLLRDHUP};
    struct linger at_once = {1, 0};
    int peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer < 0 || connect(peer, (void *)&address, sizeof address))
        die("connect");
    over.fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (shutdown(peer, SHUT_WR) || poll(&over, 1, 20000) != 1)
        die("the peer did not finish");
    pause_reading(over.fd);
    setsockopt(peer, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(peer);
    return over.fd;
}

/* Makes sockets whose peer has closed. */
static void stuck(int number)
{
    for (int i = 0; i < number; i++) {
        int fd = stuck_socket();
        if (reacts(mode))
            react(mode, fd);
        if (has_loop(mode))
            pause_reading(fd);
        printf("%d ", fd);
    }
    if (has_loop(mode))
        fork_loop();
    putchar('\n');
}

/* Standard input and output, for orders and answers, move to other numbers. */
static int orders_fd = STDIN_FILENO;

static void inetd(int is_stuck)
{
    int fd = is_stuck ? stuck_socket() : dead_socket();
    if (orders_fd == STDIN_FILENO) {
        int out = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 10);
        orders_fd = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 10);
        stdin = fdopen(orders_fd, "r");
        stdout = fdopen(out, "w");
        setvbuf(stdout, NULL, _IOLBF, 0);
    }
    for (int standard = 0; standard <= 2; standard++)
        if (dup2(fd, standard) != standard)
            die("dup2");
    close(fd);
}

/* A file that takes a standard number gets the output. */
static void log_to_a_file(void)
{
    struct stat stat;
    int fd = open("/", O_TMPFILE | O_RDWR, 0600);
    if (fd < 0)
        fd = memfd_create("log", MFD_CLOEXEC);
    ssize_t ignored = send(STDOUT_FILENO, "lost", 4, MSG_NOSIGNAL);
    if (ignored < 0)
        ignored = errno == ENOTSOCK ? write(STDOUT_FILENO, "lost", 4) : 0;
    if (fd < 0 || fstat(fd, &stat))
        die("the log");
    printf("%d %ld\n", fd, (long)stat.st_size);
    close(fd);
}

static void compute(int milliseconds)
{
    int64_t until = now_ns() + milliseconds * 1000000LL;
    printf("%d\n", milliseconds);
    /* clock_gettime is no system call: the vDSO answers it. */
    while (now_ns() < until)
        ;
}

/* An open connection with unread bytes. */
static int open_socket(void)
{
    int peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer < 0 || connect(peer, (void *)&address, sizeof address) || write(peer, "bytes", 5) != 5)
        die("connect");
    return accept4(listener, NULL, NULL, SOCK_CLOEXEC);
}

static void execute(const char *line)
{
    int number = 0;
    if (sscanf(line, "scatter %d", &number) == 1)
        leak(number, 1);
    else if (sscanf(line, "leak %d", &number) == 1)
        leak(number, 0);
    else if (!strncmp(line, "inetd", 5)) {
        inetd(!strncmp(line, "inetd stuck", 11));
        puts("0 1 2");
    } else if (!strncmp(line, "fill", 4)) {
        while (fcntl(listener, F_DUPFD_CLOEXEC, 0) >= 0)
            number++;
        printf("%d\n", number);
    } else if (!strncmp(line, "log", 3))
        log_to_a_file();
    else if (sscanf(line, "compute %d", &number) == 1)
        compute(number);
    else if (sscanf(line, "stuck %d", &number) == 1)
        stuck(number);
    else if (!strncmp(line, "aborted", 7))
        printf("%d\n", aborted_socket());
    else if (sscanf(line, "answered %d", &number) == 1) {
        while (number-- > 0)
            printf("%d ", answered_socket());
        putchar('\n');
    } else if (sscanf(line, "read %d", &number) == 1)
        printf("%ld\n", read_all(number));
    else if (sscanf(line, "close %d", &number) == 1)
        printf("%d\n", close(number));
    else if (sscanf(line, "use %d", &number) == 1)
        printf("%d\n", use(number));
    else if (!strncmp(line, "copy", 4)) {
        static sem_t ready;
        sem_init(&ready, 0, 0);
        start(unshared, &ready);
        sem_wait(&ready);
        puts("1");
    } else if (!strncmp(line, "wait", 4))
        printf("%d\n", wait_on(mode, -1));
    else if (sscanf(line, "onto %d", &number) == 1)
        printf("%d\n", leak_onto(number));
    else if (!strncmp(line, "connect", 7))
        printf("%d\n", finish_connecting());
    else if (!strncmp(line, "fresh", 5))
        fresh();
    else if (!strncmp(line, "finish", 6))
        printf("%ld\n", finish_transfer());
    else if (!strncmp(line, "hang ", 5))
        printf("%d\n", hang(line + 5));
    else if (!strncmp(line, "lock", 4))
        printf("%d\n", lock(open_socket()));
    else if (!strncmp(line, "unlock", 6))
        printf("%ld\n", unlock());
    else if (!strncmp(line, "seal", 4))
        printf("%d\n", prctl(PR_SET_DUMPABLE, 0, 0, 0, 0));
    else if (!strncmp(line, "gap", 3))
        printf("%ld\n", atomic_exchange(&longest_gap, 0) / 1000);
    else if (!strncmp(line, "taken", 5))
        printf("%ld\n", taken());
    else if (!strncmp(line, "accepted", 8))
        printf("%ld\n", accepted_by_ring());
    else if (!strncmp(line, "wakes", 5))
        printf("%ld\n", take_wakes());
    else if (!strncmp(line, "forgiven", 8))
        printf("%ld\n", forgiven());
    else if (!strncmp(line, "report", 6)) {
        check_kept();
        pthread_mutex_lock(&failure_lock);
        if (atomic_load(&wrong))
            printf("%s\n", failure);
        else
            printf("ok %ld\n", atomic_load(&count));
        pthread_mutex_unlock(&failure_lock);
    } else
        puts("unknown order");
}

static void *take_orders(void *unused)
{
    char line[128];
    for (;;) {
        struct pollfd input = {orders_fd, POLLIN, 0};
        /* An exec loses input that was read. So wait first, lock, and then read. */
        poll(&input, 1, -1);
        pthread_mutex_lock(&orders);
        if (!fgets(line, sizeof line, stdin))
            exit(0);
        execute(line);
        pthread_mutex_unlock(&orders);
    }
    return unused;
}

int main(int argc, char **argv)
{
    char *threads = argc > 2 ? argv[2] : "1";
    if (argc > 1)
        mode = argv[1];
    setvbuf(stdout, NULL, _IOLBF, 0);
    listen_somewhere();
    /* Makes the descriptor table larger than that of other processes. cwkill skips a process if an unreadable one could
     * share its table, and assumes that for tables of equal size. */
    fcntl(listener, F_DUPFD_CLOEXEC, 3000);
    if (!strcmp(mode, "waits") || !strcmp(mode, "forgiving"))
        waits(!strcmp(mode, "forgiving"));
    else if (!strcmp(mode, "works"))
        works();
    else if (!strcmp(mode, "epoll"))
        epoll_set = epoll_create1(EPOLL_CLOEXEC);
    else if (!strcmp(mode, "traced"))
        be_traced();
    else if (!strcmp(mode, "shares") || !strcmp(mode, "loop-epoll-shared"))
        share_table();
    else if (!strcmp(mode, "vfork") || !strcmp(mode, "loop-poll-hidden")) {
        /* The child has a copy of every open descriptor. Of a peer in dead_socket, it would hold back the reset. */
        static sem_t forked;
        sem_init(&forked, 0, 0);
        start(vforks, &forked);
        sem_wait(&forked);
    } else if (!strcmp(mode, "splice") && pipe(silent_pipe))
        die("pipe");
    else if (!strcmp(mode, "hangs")) {
        on_exec = 0;
        be_hanging();
    } else if (has_transfer(mode))
        transfer(mode);
    else if (has_ring(mode))
        be_in_ring(mode, listener);
    if (has_loop(mode))
        be_looping(mode);
    for (int i = 0; i < atoi(threads); i++) {
        if (!strcmp(mode, "churn"))
            start(churns, NULL);
        else if (!strcmp(mode, "idle") || !strcmp(mode, "execs") || !strcmp(mode, "hangs")
            || (has_loop(mode) && i > 0))
            start(idle, NULL);
        else if (!strcmp(mode, "sleeps"))
            start(sleeps, NULL);
        else if (!strcmp(mode, "unshared")) {
            static sem_t ready;
            sem_init(&ready, 0, 0);
            start(unshared, &ready);
            sem_wait(&ready);
        }
    }
    if (!strcmp(mode, "chroot") && (chdir("/proc/self/fdinfo") || chroot(".")))
        die("chroot");
    if (strcmp(mode, "computes"))
        start(heartbeat, NULL);
    if (!strcmp(mode, "kill"))
        filter_close(SECCOMP_RET_KILL_PROCESS);
    else if (!strcmp(mode, "errno"))
        filter_close(SECCOMP_RET_ERRNO | EPERM);
    else if (!strcmp(mode, "log"))
        filter_close(SECCOMP_RET_LOG);
    else if (!strcmp(mode, "no-open"))
        filter_calls(SYS_openat, SYS_openat2, SECCOMP_RET_KILL_PROCESS);
    if (!restored())
        puts("ready");
    if (!strcmp(mode, "execs")) {
        on_exec = 0;
        start(execs, threads);
    } else if (!strcmp(mode, "leaderless")) {
        start(take_orders, NULL);
        pthread_exit(NULL);
    }
    take_orders(NULL);
}
