/*
 * The mode in which an exec hangs, as one does on a program file of a slow server: somebody who may say whether a file is opened
 * (fanotify(7)) takes HOLD seconds for it. The file is the interpreter of a script, which is opened with the lock held that
 * ptrace(2) waits for (fs/exec.c, cred_guard_mutex).
 *
 *   hangs  THREADS threads that wait
 *
 * The order `hang WHEN` has another thread execute it: `now`, and it is denied after that; `late`, the same as soon as somebody
 * traces the first thread; `through`, now, and it is let through.
 */
#include "owner.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/fanotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>

enum { HOLD = 3 };
static char directory[] = "/tmp/owner-XXXXXX", program[64], script[64];
static struct { atomic_int let_through, seen; } *shared;

/* The end of the owner, or of its first thread, which is that of the program that was to hang. */
static void remove_files(int unused)
{
    (void)unused;
    unlink(program);
    unlink(script);
    rmdir(directory);
    _exit(0);
}

static void copy_program(void)
{
    char buffer[65536];
    ssize_t got;
    int from = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    int to = open(program, O_WRONLY | O_CREAT | O_CLOEXEC, 0755);
    while ((got = read(from, buffer, sizeof buffer)) > 0)
        if (write(to, buffer, (size_t)got) != got)
            die(program);
    if (from < 0 || to < 0 || got || close(to) || close(from))
        die(program);
    FILE *file = fopen(script, "we");
    if (!file || fprintf(file, "#!%s idle\n", program) < 0 || fclose(file) || chmod(script, 0755))
        die(script);
}

static void decide(int listener)
{
    struct fanotify_event_metadata event;
    while (read(listener, &event, sizeof event) == sizeof event) {
        struct fanotify_response response = {event.fd, FAN_DENY};
        atomic_fetch_add(&shared->seen, 1);
        sleep(HOLD);
        if (atomic_load(&shared->let_through))
            response.response = FAN_ALLOW;
        if (write(listener, &response, sizeof response) != sizeof response)
            break;
        close(event.fd);
    }
    _exit(1);
}

/* With one thread. */
void be_hanging(void)
{
    int ready[2];
    char ok = 0;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || !mkdtemp(directory) || pipe2(ready, O_CLOEXEC))
        die("mkdtemp");
    snprintf(program, sizeof program, "%s/program", directory);
    snprintf(script, sizeof script, "%s/script", directory);
    copy_program();
    if (!fork()) {
        signal(SIGTERM, remove_files);
        prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
        int listener = fanotify_init(FAN_CLASS_CONTENT | FAN_CLOEXEC, O_RDONLY | O_CLOEXEC);
        ok = listener >= 0 && !fanotify_mark(listener, FAN_MARK_ADD, FAN_OPEN_PERM, AT_FDCWD, program);
        if (write(ready[1], &ok, 1) == 1 && ok)
            decide(listener);
        _exit(1);
    }
    if (read(ready[0], &ok, 1) != 1 || !ok)
        die("fanotify");
}

static int is_traced(void)
{
    char text[4096] = "";
    int file = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    if (file < 0 || read(file, text, sizeof text - 1) < 0)
        die("/proc/self/status");
    close(file);
    char *tracer = strstr(text, "TracerPid:");
    return tracer && atoi(tracer + 10);
}

static void *executes(void *late)
{
    while (late && !is_traced())
        ;
    /* So that it is known to be no new one; owner.c, again(). */
    setenv("OWNER_COUNT", "0", 1);
    execl(script, script, NULL);
    if (errno != EPERM)
        fail("exec: errno %d", errno);
    atomic_fetch_add(&count, 1);
    return NULL;
}

/* How many have hung so far; with `now` and `through` this one included. */
int hang(const char *when)
{
    int late = !strncmp(when, "late", 4), seen = atomic_load(&shared->seen);
    atomic_store(&shared->let_through, !strncmp(when, "through", 7));
    start(executes, late ? shared : NULL);
    while (!late && atomic_load(&shared->seen) == seen)
        usleep(1000);
    return atomic_load(&shared->seen);
}
