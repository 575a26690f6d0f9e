/*
 * The orders that keep the lock of a socket, as an owner does that waits in a page fault for a dead file server while it receives. Here the page is one
 * that userfaultfd(2) does not deliver. tcp_recvmsg() has the lock while it copies (net/ipv4/tcp.c).
 *
 * The order `lock` has a thread receive so, and answers when it waits. The order `unlock` delivers the page.
 */
#include "owner.h"
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>

static int faults = -1, locked = -1;
static char *page;
static size_t size;
static pthread_t receiver;
static long received;

static void *receives(void *unused)
{
    (void)unused;
    received = recv(locked, page, size, 0);
    return NULL;
}

/* `fd` has unread bytes. Returns it. */
int lock(int fd)
{
    struct uffdio_api api = {.api = UFFD_API};
    struct uffd_msg fault;
    size = (size_t)sysconf(_SC_PAGESIZE);
    locked = fd;
    page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    /* Without UFFD_USER_MODE_ONLY: the kernel itself is to wait. This needs CAP_SYS_PTRACE. */
    faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (page == MAP_FAILED || faults < 0 || ioctl(faults, UFFDIO_API, &api))
        die("userfaultfd");
    struct uffdio_register range = {.range = {(uintptr_t)page, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(faults, UFFDIO_REGISTER, &range))
        die("UFFDIO_REGISTER");
    receiver = start(receives, NULL);
    if (read(faults, &fault, sizeof fault) != sizeof fault || fault.event != UFFD_EVENT_PAGEFAULT)
        die("the page fault");
    return fd;
}

/* Returns the number of bytes that were received. */
long unlock(void)
{
    struct uffdio_zeropage zero = {.range = {(uintptr_t)page, size}};
    if (ioctl(faults, UFFDIO_ZEROPAGE, &zero) || pthread_join(receiver, NULL))
        die("UFFDIO_ZEROPAGE");
    close(faults);
    return received;
}
