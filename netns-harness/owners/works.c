/*
 * The modes in which threads are always busy.
 *
 *   works  threads that compute, make system calls and exchange data without pause, and check every result
 *   churn  THREADS threads that open, check and close descriptors without pause, some of them dead sockets
 */
#include "owner.h"
#include <semaphore.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

static void *computes(void *unused)
{
    for (;;) {
        /* Uses integer and floating-point registers, and no system call. */
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

/* How many numbers can be in flight. The sender must never block in write(2): a stop could leave a partial write. */
static sem_t room;

static void *sends(void *socket)
{
    for (uint64_t number = 0;; number++) {
        while (sem_wait(&room))
            fail("sem_wait: errno %d", errno);
        if (write(*(int *)socket, &number, sizeof number) != sizeof number)
            fail("write: errno %d", errno);
    }
    return NULL;
}

static void *receives(void *socket)
{
    uint64_t got;
    for (uint64_t number = 0;; number++) {
        if (recv(*(int *)socket, &got, sizeof got, 0) != sizeof got || got != number)
            fail("received %lu for %lu, errno %d", (unsigned long)got, (unsigned long)number, errno);
        sem_post(&room);
        atomic_fetch_add(&count, 1);
    }
    return NULL;
}

void works(void)
{
    static int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        die("socketpair");
    sem_init(&room, 0, 16);
    start(computes, NULL);
    start(computes, NULL);
    start(calls, NULL);
    start(sends, &ends[0]);
    start(receives, &ends[1]);
}

/* churn */

/* Descriptors are opened and closed under this lock, so that a thread can check and close one in one step. */
static pthread_mutex_t numbers = PTHREAD_MUTEX_INITIALIZER;
static atomic_long were_taken;

long taken(void)
{
    return atomic_load(&were_taken);
}

static int open_something(unsigned *random, int *dead)
{
    *dead = rand_r(random) % 8 == 0;
    if (*dead)
        return dead_socket();
    return rand_r(random) % 2 ? socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)
                              : memfd_create("churn", MFD_CLOEXEC);
}

void *churns(void *unused)
{
    enum { OPEN = 16 };
    struct { int fd, dead; ino_t inode; } mine[OPEN];
    unsigned random = (unsigned)(uintptr_t)&mine ^ (unsigned)now_ns();
    for (int i = 0; i < OPEN; i++)
        mine[i].fd = -1;
    for (;;) {
        int i = rand_r(&random) % OPEN;
        struct stat stat;
        pthread_mutex_lock(&numbers);
        if (mine[i].fd >= 0) {
            int same = !fstat(mine[i].fd, &stat) && stat.st_ino == mine[i].inode;
            int closed = same && !close(mine[i].fd);
            if (!same && !mine[i].dead)
                fail("descriptor %d has changed", mine[i].fd);
            else if (!closed && !mine[i].dead)
                fail("descriptor %d was closed by another process", mine[i].fd);
            atomic_fetch_add(closed ? &count : &were_taken, 1);
        }
        mine[i].fd = open_something(&random, &mine[i].dead);
        if (mine[i].fd < 0)
            fail("open: errno %d", errno);
        else if (fstat(mine[i].fd, &stat) && !mine[i].dead)
            fail("a new descriptor is none: errno %d", errno);
        mine[i].inode = stat.st_ino;
        pthread_mutex_unlock(&numbers);
    }
    return unused;
}
