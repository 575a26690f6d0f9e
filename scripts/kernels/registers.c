/*
 * An owner whose threads check their registers around every system call, for scripts/kernels/in-lab on arm64.
 *
 * Usage: registers PORT SIGNALS MODE...
 * It leaves sockets in CLOSE-WAIT on PORT. For each MODE a thread makes calls of one kind, with a value in every register that the
 * kernel must keep, and compares all of them after each call. With SIGNALS "signals" a timer also interrupts the threads. When
 * /tmp/registers-end exists, every thread makes ten more turns. The program exits with 0 if no register was changed, every call had its result and the
 * descriptors of the sockets are closed; otherwise with 1 and a line that says what was wrong.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct frame {
	uint64_t arguments[6]; /* x0 to x5 */
	uint64_t number;       /* x8 */
	uint64_t spin;         /* turns of a loop before the call */
	uint64_t after[31];    /* x0 to x30 */
	uint64_t flags;        /* NZCV */
};

/* Sets every register, spins, makes the call and stores every register. */
void checked_call(struct frame *frame);
asm(".text\n.global checked_call\nchecked_call:\n"
    "sub sp, sp, #384\n"
    "stp x19, x20, [sp, #256]\n stp x21, x22, [sp, #272]\n stp x23, x24, [sp, #288]\n"
    "stp x25, x26, [sp, #304]\n stp x27, x28, [sp, #320]\n stp x29, x30, [sp, #336]\n"
    "str x0, [sp, #352]\n"
    "ldp x4, x5, [x0, #32]\n ldp x2, x3, [x0, #16]\n ldr x8, [x0, #48]\n ldr x9, [x0, #56]\n"
    "ldp x0, x1, [x0]\n"
    ".irp n, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30\n"
    "mov x\\n, #\\n\n movk x\\n, #0xabcd, lsl #48\n"
    ".endr\n"
    "1: subs x9, x9, #1\n b.ne 1b\n"
    "svc #0\n"
    "stp x0, x1, [sp, #0]\n stp x2, x3, [sp, #16]\n stp x4, x5, [sp, #32]\n stp x6, x7, [sp, #48]\n"
    "stp x8, x9, [sp, #64]\n stp x10, x11, [sp, #80]\n stp x12, x13, [sp, #96]\n stp x14, x15, [sp, #112]\n"
    "stp x16, x17, [sp, #128]\n stp x18, x19, [sp, #144]\n stp x20, x21, [sp, #160]\n stp x22, x23, [sp, #176]\n"
    "stp x24, x25, [sp, #192]\n stp x26, x27, [sp, #208]\n stp x28, x29, [sp, #224]\n"
    "mrs x0, nzcv\n stp x30, x0, [sp, #240]\n"
    "ldr x0, [sp, #352]\n add x0, x0, #64\n mov x1, sp\n mov x2, #32\n"
    "2: ldr x3, [x1], #8\n str x3, [x0], #8\n subs x2, x2, #1\n b.ne 2b\n"
    "ldp x19, x20, [sp, #256]\n ldp x21, x22, [sp, #272]\n ldp x23, x24, [sp, #288]\n"
    "ldp x25, x26, [sp, #304]\n ldp x27, x28, [sp, #320]\n ldp x29, x30, [sp, #336]\n"
    "add sp, sp, #384\n ret\n");

static void fail(const char *what, const char *mode, long long found)
{
	printf("registers: %s, in mode %s: %#llx\n", what, mode, found);
	fflush(stdout);
	_exit(1);
}

/* Makes a call and returns its result. */
static long call(const char *mode, uint64_t spin, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
	struct frame frame = { { a, b, c, d, e, f }, number, spin, { 0 }, 0 };
	checked_call(&frame);
	for (int n = 1; n < 31; n++) {
		uint64_t wanted = 0xabcd000000000000 | n;
		char name[] = "xNN was changed";
		if (n < 6)
			wanted = frame.arguments[n];
		else if (n == 8)
			wanted = number;
		else if (n == 9)
			wanted = 0;
		/* The kernel continues some calls with restart_syscall, whose number stays in x8. */
		if (n == 8 && frame.after[n] == SYS_restart_syscall)
			continue;
		name[1] = '0' + n / 10;
		name[2] = '0' + n % 10;
		if (frame.after[n] != wanted)
			fail(name, mode, frame.after[n]);
	}
	/* The loop has left Z and C. */
	if (frame.flags != 0x60000000)
		fail("the flags were changed", mode, frame.flags);
	return (long)frame.after[0];
}

static int has_signals;

/* A signal with a handler ends some calls, in spite of SA_RESTART. */
static void expect(const char *mode, long result, long wanted)
{
	if (result != wanted && !(has_signals && result == -EINTR))
		fail("another result", mode, result);
}

/* Every 40 ms a byte, for a thread that waits for it. */
static int ticking_pipe(void)
{
	int ends[2];
	if (pipe(ends))
		fail("no pipe", "start", errno);
	if (fork() == 0) {
		signal(SIGPIPE, SIG_DFL);
		/* It has no descriptor of the socket. */
		close_range(3, ends[1] - 1, 0);
		close_range(ends[1] + 1, ~0U, 0);
		while (write(ends[1], "x", 1) == 1)
			usleep(40000);
		_exit(0);
	}
	close(ends[1]);
	return ends[0];
}

static uint64_t address(const void *pointer) { return (uint64_t)(uintptr_t)pointer; }

struct work {
	const char *mode;
	pthread_t thread;
	int pipe;
};

#define TURNS 10

static void *run(void *argument)
{
	struct work *work = argument;
	const char *mode = work->mode;
	int pipe = work->pipe;
	struct timespec pause = { 0, 50000000 };
	struct epoll_event event = { .events = EPOLLIN };
	struct pollfd entry = { pipe, POLLIN, 0 };
	uint32_t word = 0;
	char byte;
	int set = epoll_create1(0);
	if (set < 0 || epoll_ctl(set, EPOLL_CTL_ADD, pipe, &event))
		fail("no epoll set", mode, errno);

	/* The threads go on for some turns after the file exists. */
	for (int left = TURNS; left > 0; left -= !access("/tmp/registers-end", F_OK)) {
		if (!strcmp(mode, "sleep")) {
			struct timespec rest = pause;
			expect(mode, call(mode, 1, SYS_nanosleep, address(&pause), address(&rest), 2, 3, 4, 5), 0);
		} else if (!strcmp(mode, "futex")) {
			expect(mode, call(mode, 1, SYS_futex, address(&word), FUTEX_WAIT_PRIVATE, 0, address(&pause), 4, 5), -ETIMEDOUT);
		} else if (!strcmp(mode, "read")) {
			expect(mode, call(mode, 1, SYS_read, pipe, address(&byte), 1, 3, 4, 5), 1);
		} else if (!strcmp(mode, "ppoll")) {
			long ready = call(mode, 1, SYS_ppoll, address(&entry), 1, 0, 0, 4, 5);
			expect(mode, ready, 1);
			if (ready == 1 && read(pipe, &byte, 1) != 1)
				fail("no byte after poll", mode, errno);
		} else if (!strcmp(mode, "epoll")) {
			long ready = call(mode, 1, SYS_epoll_pwait, set, address(&event), 1, -1, 0, 5);
			/* A stop ends it with EINTR on arm64 (cwkill-reclaim(8), NOTES). */
			if (ready != -EINTR)
				expect(mode, ready, 1);
			if (ready == 1 && read(pipe, &byte, 1) != 1)
				fail("no byte after epoll", mode, errno);
		} else if (!strcmp(mode, "compute")) {
			/* Some milliseconds between two calls. */
			expect(mode, call(mode, 3000000, SYS_getpid, 0, 1, 2, 3, 4, 5), getpid());
		} else {
			fail("no such mode", mode, 0);
		}
	}
	return NULL;
}

static void handler(int signal) { (void)signal; }

/* Sockets in CLOSE-WAIT. No two of their descriptors are adjacent, so each is closed with a call of its own. */
#define LEAKED 20

static void leak(int port, int *leaked)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = { htonl(INADDR_LOOPBACK) } };
	int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (bind(listener, (void *)&at, sizeof(at)) || listen(listener, 1))
		fail("no listener", "start", errno);
	for (int i = 0; i < LEAKED; i++) {
		int peer = socket(AF_INET, SOCK_STREAM, 0);
		if (connect(peer, (void *)&at, sizeof(at)) || (leaked[i] = accept(listener, NULL, NULL)) < 0)
			fail("no connection", "start", errno);
		close(peer);
		/* It takes the number of the peer, between two numbers of leaked ones. */
		if (dup(0) < 0)
			fail("no file", "start", errno);
	}
	close(listener);
}

int main(int argc, char **argv)
{
	struct work works[16] = { 0 };
	int count = argc - 3, leaked[LEAKED];
	if (argc < 4 || count > 16) {
		fprintf(stderr, "usage: registers PORT SIGNALS MODE...\n");
		return 2;
	}
	has_signals = !strcmp(argv[2], "signals");
	for (int i = 0; i < count; i++) {
		works[i].mode = argv[i + 3];
		works[i].pipe = ticking_pipe();
	}
	leak(atoi(argv[1]), leaked);
	if (has_signals) {
		struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART };
		/* Often one in a stop of an emulated machine, which still gets work done between them. */
		struct itimerval timer = { { 0, 200000 }, { 0, 200000 } };
		sigaction(SIGALRM, &action, NULL);
		setitimer(ITIMER_REAL, &timer, NULL);
	}
	/* The first of them runs in this thread, which the signals reach first. */
	for (int i = 1; i < count; i++)
		if (pthread_create(&works[i].thread, NULL, run, &works[i]))
			fail("no thread", works[i].mode, errno);
	run(&works[0]);
	for (int i = 1; i < count; i++)
		pthread_join(works[i].thread, NULL);
	for (int i = 0; i < LEAKED; i++)
		if (fcntl(leaked[i], F_GETFD) != -1 || errno != EBADF)
			fail("a descriptor is still open", "end", leaked[i]);
	return 0;
}
