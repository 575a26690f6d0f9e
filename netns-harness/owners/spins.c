/*
 * The modes with an event loop that has paused reading on every stuck socket, as for back pressure. The loop ignores every event
 * but its own, so it spins if a socket wakes it without end.
 *
 *   loop-epoll-0, loop-epoll-pri, loop-epoll-out   level-triggered, for nothing, urgent data, or space to send, of which there is none
 *   loop-epoll-et, loop-epoll-once                 told once
 *   loop-epoll-dup                                 the set has the sockets by descriptors that were closed; duplicates keep them
 *   loop-epoll-nested                              the set with the sockets is in another set
 *   loop-epoll-forked                              a child has the set, and both have the sockets
 *   loop-epoll-shared                              another process shares the descriptor table
 *   loop-poll-0, loop-poll-out                     the same with poll(2)
 *   loop-poll-hidden                               all but the first, with poll(2); another thread is in uninterruptible sleep
 *   loop-select, loop-select-out                   in no set of select(2), or in the one for space to send
 *   loop-glances                                   polls once per millisecond, and without a pause if something has happened
 *   loop-glances-rest                              the same for all but the first
 *   loop-seldom                                    polls once a second, and never without a pause
 *   loop-seldom-spins                              polls once a second, and without a pause if something has happened
 *   loop-logs                                      polls every 30 ms, and works and sleeps a little for every event, as for a line in a log
 *   busy                                           in no loop; a thread computes all the time, another most of the time
 */
#include "owner.h"
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/socket.h>

enum { MAX = 512 };

static const char *kind;
static int fds[MAX], set = -1, news = -1;
static atomic_int known;
/* Shared with the child. */
static atomic_long *wakes;

int has_loop(const char *mode)
{
    return !strncmp(mode, "loop-", 5) || !strcmp(mode, "busy");
}

/* Whether the peers of the stuck sockets stay, so that a send buffer can be full. */
int keeps_peers(const char *mode)
{
    return has_loop(mode) && strstr(mode, "-out") != NULL;
}

static int is(const char *name)
{
    return !strcmp(kind, name);
}

static void sleep_us(long us)
{
    struct timespec time = {0, us * 1000};
    nanosleep(&time, NULL);
}

static void *epolls(void *unused)
{
    struct epoll_event event;
    for (;;)
        if (epoll_wait(set, &event, 1, -1) > 0)
            atomic_fetch_add(wakes, 1);
    return unused;
}

/* The list of the known sockets; before them, what says that there are more. */
static int list_all(struct pollfd *list)
{
    int count = atomic_load(&known);
    list[0] = (struct pollfd){news, POLLIN, 0};
    int first = (is("loop-poll-hidden") || is("loop-glances-rest")) && count > 0;
    for (int i = first; i < count; i++)
        list[i - first + 1] = (struct pollfd){fds[i], is("loop-poll-out") ? POLLOUT : 0, 0};
    return count - first + 1;
}

static void drop_news(void)
{
    uint64_t number;
    if (read(news, &number, sizeof number) < 0 && errno != EAGAIN)
        die("read");
}

static void *polls(void *unused)
{
    static struct pollfd list[MAX + 1];
    int glances = strncmp(kind, "loop-poll-", 10) != 0, seldom = !strncmp(kind, "loop-seldom", 11);
    for (;;) {
        int events = poll(list, list_all(list), glances ? 0 : -1);
        if (events > 0)
            atomic_fetch_add(wakes, 1);
        if (events <= 0 || is("loop-seldom"))
            sleep_us(is("loop-logs") ? 30000 : seldom ? 999000 : 1000);
        else if (is("loop-logs"))
            for (int64_t until = now_ns() + 300000; now_ns() < until;)
                ;
        if (events > 0 && is("loop-logs"))
            sleep_us(50);
        drop_news();
    }
    return unused;
}

static void *selects(void *unused)
{
    for (;;) {
        fd_set input, output;
        int highest = news;
        FD_ZERO(&input);
        FD_ZERO(&output);
        FD_SET(news, &input);
        for (int i = 0; i < atomic_load(&known) && is("loop-select-out"); i++) {
            FD_SET(fds[i], &output);
            highest = fds[i] > highest ? fds[i] : highest;
        }
        if (select(highest + 1, &input, &output, NULL, NULL) > 0)
            atomic_fetch_add(wakes, 1);
        drop_news();
    }
    return unused;
}

static void *computes(void *some_time)
{
    for (;;) {
        for (int64_t until = now_ns() + 6000000; now_ns() < until;)
            ;
        if (some_time)
            sleep_us(4000);
    }
    return NULL;
}

static void add(int to, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(to, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
}

static int inner = -1;

void be_looping(const char *mode)
{
    kind = mode;
    wakes = mmap(NULL, sizeof *wakes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    news = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wakes == MAP_FAILED || news < 0)
        die("mmap");
    if (is("busy")) {
        start(computes, NULL);
        start(computes, &fds);
    } else if (!strncmp(kind, "loop-epoll", 10)) {
        set = inner = epoll_create1(EPOLL_CLOEXEC);
        if (is("loop-epoll-nested")) {
            set = epoll_create1(EPOLL_CLOEXEC);
            add(set, inner, EPOLLIN);
        }
        if (!is("loop-epoll-forked"))
            start(epolls, NULL);
    } else
        start(!strncmp(kind, "loop-select", 11) ? selects : polls, NULL);
}

/* Adds a stuck socket to the loop, and pauses reading on it. */
void pause_reading(int fd)
{
    static const char bytes[65536];
    uint64_t one = 1;
    if (is("busy"))
        return;
    if (keeps_peers(kind)) {
        while (send(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0)
            ;
        if (errno != EAGAIN)
            die("send");
    }
    if (inner >= 0) {
        uint32_t events = is("loop-epoll-out") ? EPOLLOUT : is("loop-epoll-pri") ? EPOLLPRI : is("loop-epoll-et") ? EPOLLET
            : is("loop-epoll-once") ? EPOLLONESHOT : 0;
        int added = is("loop-epoll-dup") ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : fd;
        if (added < 0)
            die("dup");
        add(inner, added, events);
        if (added != fd)
            close(added);
        return;
    }
    if (atomic_load(&known) == MAX)
        die("too many");
    fds[atomic_load(&known)] = fd;
    atomic_fetch_add(&known, 1);
    if (write(news, &one, sizeof one) != sizeof one)
        die("write");
}

/* Gives the set to a child. */
void fork_loop(void)
{
    if (strcmp(kind, "loop-epoll-forked"))
        return;
    if (!fork()) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        prctl(PR_SET_NAME, "its-child", 0, 0, 0);
        epolls(NULL);
    }
    close(set);
}

/* The wake-ups since the last call. */
long take_wakes(void)
{
    return atomic_exchange(wakes, 0);
}
