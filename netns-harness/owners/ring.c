/*
 * The modes with an io_uring.
 *
 *   ring         an idle ring
 *   ring-holds   leaked sockets are registered with the ring
 *   ring-polls   a poll of a pipe is in flight
 *   ring-sq      its descriptor is closed, its memory is still mapped; a kernel thread takes requests
 *   ring-wq      the same, and a kernel thread waits in a request
 *   ring-accepts     the ring accepts every connection at the listening socket (multishot, Linux 5.19)
 *   ring-accepts-wq  a kernel thread accepts one connection there, and another waits in a request
 */
#include "owner.h"
#include <dirent.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#ifndef IORING_ACCEPT_MULTISHOT
#define IORING_ACCEPT_MULTISHOT 1
#endif

enum { ENTRIES = 8 };

static int ring = -1, slots;
static struct io_uring_params params;
static char *rings;
static struct io_uring_sqe *requests;

int has_ring(const char *mode)
{
    return !strncmp(mode, "ring", 4);
}

static _Atomic unsigned *word(unsigned offset)
{
    return (void *)(rings + offset);
}

/* Submits a request to the kernel without waiting for its completion. */
static void submit(struct io_uring_sqe request)
{
    unsigned tail = atomic_load(word(params.sq_off.tail)), i = tail % ENTRIES;
    requests[i] = request;
    ((unsigned *)(rings + params.sq_off.array))[i] = i;
    atomic_store(word(params.sq_off.tail), tail + 1);
    if (!(params.flags & IORING_SETUP_SQPOLL) && syscall(SYS_io_uring_enter, ring, 1, 0, 0, NULL, 0) != 1)
        die("io_uring_enter");
}

/* Waits until the name of a thread of this process has this prefix. */
static void until_there_is(const char *name)
{
    for (int attempt = 0; attempt < 5000; attempt++) {
        DIR *tasks = opendir("/proc/self/task");
        struct dirent *task;
        int found = 0;
        if (!tasks)
            die("/proc/self/task");
        while ((task = readdir(tasks))) {
            char path[300], comm[32] = "";
            snprintf(path, sizeof path, "/proc/self/task/%s/comm", task->d_name);
            int file = open(path, O_RDONLY | O_CLOEXEC);
            if (file < 0)
                continue;
            found |= read(file, comm, sizeof comm - 1) > 0 && !strncmp(comm, name, strlen(name));
            close(file);
        }
        closedir(tasks);
        if (found)
            return;
        usleep(1000);
    }
    errno = ETIMEDOUT;
    die(name);
}

/* The completions so far that gave a descriptor, if nothing but accept was requested. */
long accepted_by_ring(void)
{
    unsigned tail = atomic_load(word(params.cq_off.tail));
    struct io_uring_cqe *completions = (void *)(rings + params.cq_off.cqes);
    long accepted = 0;
    if (tail > params.cq_entries)
        die("too many completions");
    for (unsigned i = 0; i < tail; i++)
        accepted += completions[i].res >= 0;
    return accepted;
}

void be_in_ring(const char *mode, int listener)
{
    int sq = !strcmp(mode, "ring-sq"), wq = !strcmp(mode, "ring-wq");
    int accepts = !strcmp(mode, "ring-accepts"), accepts_wq = !strcmp(mode, "ring-accepts-wq");
    params.flags = sq ? IORING_SETUP_SQPOLL : 0;
    params.sq_thread_idle = 3600 * 1000;
    ring = (int)syscall(SYS_io_uring_setup, ENTRIES, &params);
    if (ring < 0)
        die("io_uring_setup");
    size_t size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t other = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    /* One mapping for both queues (IORING_FEAT_SINGLE_MMAP, Linux 5.4). */
    rings = mmap(NULL, size > other ? size : other, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
        IORING_OFF_SQ_RING);
    requests = mmap(NULL, params.sq_entries * sizeof *requests, PROT_READ | PROT_WRITE,
        MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQES);
    if (rings == MAP_FAILED || requests == MAP_FAILED)
        die("mmap");
    if (!strcmp(mode, "ring-holds")) {
        int none[ENTRIES];
        memset(none, -1, sizeof none);
        if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_FILES, none, ENTRIES))
            die("io_uring_register");
    }
    static int pipe_ends[2];
    static char byte;
    if (pipe2(pipe_ends, O_CLOEXEC))
        die("pipe2");
    if (!strcmp(mode, "ring-polls"))
        submit((struct io_uring_sqe){.opcode = IORING_OP_POLL_ADD, .fd = pipe_ends[0], .poll32_events = POLLIN});
    if (accepts)
        submit((struct io_uring_sqe){.opcode = IORING_OP_ACCEPT, .ioprio = IORING_ACCEPT_MULTISHOT, .fd = listener,
            .accept_flags = SOCK_CLOEXEC});
    if (accepts_wq)
        submit((struct io_uring_sqe){.opcode = IORING_OP_ACCEPT, .flags = IOSQE_ASYNC, .fd = listener,
            .accept_flags = SOCK_CLOEXEC});
    if (wq || accepts_wq)
        submit((struct io_uring_sqe){.opcode = IORING_OP_READ, .flags = IOSQE_ASYNC, .fd = pipe_ends[0],
            .addr = (uintptr_t)&byte, .len = 1});
    if (accepts_wq)
        until_there_is("iou-wrk-");
    if (sq || wq) {
        /* The mappings keep the ring alive. */
        close(ring);
        until_there_is(sq ? "iou-sqp-" : "iou-wrk-");
    }
}

void put_into_ring(const char *mode, int fd)
{
    struct io_uring_files_update update = {.offset = slots++, .fds = (uintptr_t)&fd};
    if (!strcmp(mode, "ring-holds")
        && syscall(SYS_io_uring_register, ring, IORING_REGISTER_FILES_UPDATE, &update, 1) != 1)
        die("io_uring_register");
}
