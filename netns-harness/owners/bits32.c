/*
 * A 32-bit program that leaks dead TCP sockets. It knows the orders `leak N` and `report` of owner.c, and `ends N`: as `leak N`, with sockets
 * that the peer has closed, and whose end it reads. It needs no C library, so the compiler of a 64-bit host can build it.
 */
enum { EXIT = 1, READ = 3, WRITE = 4, CLOSE = 6, SOCKETCALL = 102, SOCKET = 1, BIND, CONNECT, LISTEN, ACCEPT, NAME, SETSOCKOPT = 14 };

static int call(int number, const void *first, const void *second, const void *third)
{
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(first), "c"(second), "d"(third) : "memory");
    return result;
}

static int sockets(int which, int a, const void *b, const void *c, const void *d, int e)
{
    const void *arguments[] = {(void *)a, b, c, d, (void *)e};
    return call(SOCKETCALL, (void *)which, arguments, 0);
}

static void leave(int status)
{
    call(EXIT, (void *)status, 0, 0);
    __builtin_unreachable();
}

static struct { unsigned short family, port; unsigned address, none[2]; } address = {2, 0, 0x0100007f, {0, 0}};
static int listener;

static int dead_socket(int reads_end)
{
    static const int at_once[] = {1, 0};
    static char buffer[16];
    int peer = sockets(SOCKET, 2, (void *)1, 0, 0, 0);
    if (sockets(CONNECT, peer, &address, (void *)sizeof address, 0, 0))
        leave(2);
    int dead = sockets(ACCEPT, listener, 0, 0, 0, 0);
    /* SOL_SOCKET, SO_LINGER */
    if (!reads_end)
        sockets(SETSOCKOPT, peer, (void *)1, (void *)13, at_once, sizeof at_once);
    call(CLOSE, (void *)peer, 0, 0);
    if (reads_end && call(READ, (void *)dead, buffer, (void *)sizeof buffer))
        leave(5);
    return dead;
}

static char *put(char *end, int number)
{
    if (number >= 10)
        end = put(end, number / 10);
    *end++ = '0' + number % 10;
    return end;
}

static void say(const char *text, int length)
{
    if (call(WRITE, (void *)1, text, (void *)length) != length)
        leave(3);
}

__attribute__((used)) static void program(void)
{
    static int length = sizeof address;
    static char line[128], answer[4096];
    listener = sockets(SOCKET, 2, (void *)1, 0, 0, 0);
    if (sockets(BIND, listener, &address, (void *)sizeof address, 0, 0) || sockets(LISTEN, listener, (void *)64, 0, 0, 0)
        || sockets(NAME, listener, &address, &length, 0, 0))
        leave(4);
    say("ready\n", 6);
    while (call(READ, 0, line, (void *)sizeof line) > 0) {
        char *end = answer;
        int number = 0;
        for (const char *digit = line + 5; line[4] == ' ' && *digit >= '0' && *digit <= '9'; digit++)
            number = number * 10 + *digit - '0';
        if (line[0] == 'r') {
            say("ok 0\n", 5);
            continue;
        }
        while (number-- > 0 && end < answer + sizeof answer - 16) {
            end = put(end, dead_socket(line[0] == 'e'));
            *end++ = ' ';
        }
        *end++ = '\n';
        say(answer, end - answer);
    }
    leave(0);
}

__asm__(".globl _start\n_start:\n\tcall program\n");
