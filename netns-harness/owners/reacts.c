/*
 * The modes that react to the end of a connection with a delay.
 *
 *   reacts   one thread per stuck socket waits in poll(2) for its end, works for 50 ms and closes it
 *   glances  the same, but the thread polls only every 300 ms
 *   loops    one thread waits in epoll_wait(2) for the end of any stuck socket, computes for 200 us and closes it
 */
#include "owner.h"
#include <poll.h>
#include <sys/epoll.h>
#include <time.h>

int reacts(const char *mode)
{
    return !strcmp(mode, "reacts") || !strcmp(mode, "glances") || !strcmp(mode, "loops");
}

static void must_close(int fd)
{
    if (close(fd))
        fail("close(%d): errno %d", fd, errno);
    else
        atomic_fetch_add(&count, 1);
}

/* poll(2) always reports POLLHUP, once both directions have ended. */
static void *waits_for_its_end(void *fd)
{
    struct pollfd list = {(int)(intptr_t)fd, 0, 0};
    while (poll(&list, 1, -1) != 1)
        ;
    usleep(50000);
    must_close(list.fd);
    return NULL;
}

static void *glances_at_it(void *fd)
{
    struct pollfd list = {(int)(intptr_t)fd, 0, 0};
    while (poll(&list, 1, 0) != 1)
        usleep(300000);
    must_close(list.fd);
    return NULL;
}

static int loop = -1;

static void compute(long microseconds)
{
    struct timespec from, now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
    do
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    while ((now.tv_sec - from.tv_sec) * 1000000 + (now.tv_nsec - from.tv_nsec) / 1000 < microseconds);
}

/* Without any requested event, epoll reports only EPOLLHUP and EPOLLERR. */
static void *closes_what_ends(void *unused)
{
    struct epoll_event ended;
    (void)unused;
    for (;;)
        if (epoll_wait(loop, &ended, 1, -1) == 1) {
            compute(200);
            /* Without this, epoll goes on to report the socket while another process has a descriptor of it (epoll(7)). */
            if (epoll_ctl(loop, EPOLL_CTL_DEL, ended.data.fd, NULL))
                fail("epoll_ctl(%d): errno %d", ended.data.fd, errno);
            must_close(ended.data.fd);
        }
    return NULL;
}

static void add_to_loop(int fd)
{
    struct epoll_event nothing = {.events = 0, .data.fd = fd};
    if (loop < 0) {
        loop = epoll_create1(EPOLL_CLOEXEC);
        start(closes_what_ends, NULL);
    }
    if (epoll_ctl(loop, EPOLL_CTL_ADD, fd, &nothing))
        fail("epoll_ctl(%d): errno %d", fd, errno);
}

void react(const char *mode, int fd)
{
    if (!strcmp(mode, "loops"))
        add_to_loop(fd);
    else
        start(!strcmp(mode, "reacts") ? waits_for_its_end : glances_at_it, (void *)(intptr_t)fd);
}
