/*
 * The modes that react to the end of a connection with a delay.
 *
 *   reacts   one thread per stuck socket waits in poll(2) for its end, works for 50 ms and closes it
 *   glances  the same, but the thread polls only every 300 ms
 */
#include "owner.h"
#include <poll.h>

int reacts(const char *mode)
{
    return !strcmp(mode, "reacts") || !strcmp(mode, "glances");
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

void react(const char *mode, int fd)
{
    start(!strcmp(mode, "reacts") ? waits_for_its_end : glances_at_it, (void *)(intptr_t)fd);
}
