/*
 * The mode in which an exec hangs, as it does if the program is on a slow file server: a fanotify(7) listener takes HOLD
 * seconds to allow the open. The file is the interpreter of a script. The kernel opens it with the lock that ptrace(2) waits
 * for (fs/exec.c, cred_guard_mutex).
 *
 *   hangs  THREADS idle threads
 *
 * The order `hang WHEN` has another thread execute the script. `now`: at once, and the open is denied in the end. `late`: the
 * same, as soon as a process traces the first thread. `through`: at once, and the open is allowed in the end.
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

/* Runs when the owner ends, or its first thread. */
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

/* Forks, so the process must still have a single thread. */
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
    /* Marks the next program as executed by this one; see restored() in owner.c. */
    setenv("OWNER_COUNT", "0", 1);
    execl(script, script, NULL);
    if (errno != EPERM)
        fail("exec: errno %d", errno);
    atomic_fetch_add(&count, 1);
    return NULL;
}

/* How many have hung so far, including this one for `now` and `through`. */
int hang(const char *when)
{
    int late = !strncmp(when, "late", 4), seen = atomic_load(&shared->seen);
    atomic_store(&shared->let_through, !strncmp(when, "through", 7));
    start(executes, late ? shared : NULL);
    while (!late && atomic_load(&shared->seen) == seen)
        usleep(1000);
    return atomic_load(&shared->seen);
}
