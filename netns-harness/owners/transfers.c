/*
 * The modes in which a thread waits in a partial transfer. A stop ends the call with the part that is done: the kernel restarts
 * only calls that have transferred nothing (signal(7)). The thread must transfer the rest.
 *
 *   transfer-send  send(2) of 20 MiB to a socket that no thread reads
 *   transfer-recv  recv(2) with MSG_WAITALL of 1000 bytes, of which 5 have arrived
 *   transfer-pipe  write(2) of 200000 bytes to a pipe that no thread reads
 *
 * The order `finish` has the other side read or send the rest.
 */
#include "owner.h"
#include <sys/socket.h>

enum { SEND = 20 << 20, RECV = 1000, PIPE = 200000 };
static const char *kind;
static int ends[2];
static char *bytes;

static void *transfers(void *unused)
{
    long wanted, done;
    errno = 0;
    if (!strcmp(kind, "send"))
        done = send(ends[1], bytes, wanted = SEND, 0);
    else if (!strcmp(kind, "recv"))
        done = recv(ends[1], bytes, wanted = RECV, MSG_WAITALL);
    else
        done = write(ends[1], bytes, wanted = PIPE);
    if (done != wanted)
        fail("%s ended short: %ld of %ld, errno %d", kind, done, wanted, errno);
    atomic_fetch_add(&count, 1);
    return unused;
}

int has_transfer(const char *mode)
{
    return !strncmp(mode, "transfer-", 9);
}

void transfer(const char *mode)
{
    kind = mode + 9;
    bytes = calloc(1, SEND);
    if (!strcmp(kind, "pipe") ? pipe(ends) : socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        die("pipe");
    if (!strcmp(kind, "recv") && write(ends[0], bytes, 5) != 5)
        die("write");
    start(transfers, NULL);
}

/* Has the other side read or send the rest. The number of bytes. */
long finish_transfer(void)
{
    char buffer[65536];
    long all = 0, got;
    if (!strcmp(kind, "recv"))
        return write(ends[0], bytes, RECV - 5);
    for (long wanted = !strcmp(kind, "send") ? SEND : PIPE; all < wanted; all += got) {
        /* If the call ended early, no more bytes arrive. */
        if (atomic_load(&count) && all)
            break;
        got = read(ends[0], buffer, sizeof buffer);
        if (got <= 0)
            break;
    }
    return all;
}
