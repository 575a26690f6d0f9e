// A module for Redis whose command LEAK.FETCH PORT reads from a server on 127.0.0.1 to the end, and forgets to close the connection. It
// declares what it uses of redismodule.h.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

typedef int (*Command)(void *context, void **arguments, int count);

static int (*reply)(void *context, long long number);
static int (*number_of)(const void *text, long long *number);

__attribute__((noinline)) static long read_to_end(int connection)
{
	char buffer[512];
	long count, total = 0;
	while ((count = read(connection, buffer, sizeof buffer)) > 0) // the end is read here
		total += count;
	return total;
}

__attribute__((noinline)) static int open_connection(long long port)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	address.sin_port = htons(port);
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	int connection = socket(AF_INET, SOCK_STREAM, 0);
	int failed = connect(connection, (void *)&address, sizeof address); // connected here
	return failed ? -1 : connection;
}

static int fetch_command(void *context, void **arguments, int count)
{
	long long port = 0;
	if (count == 2)
		number_of(arguments[1], &port);
	int connection = open_connection(port);
	long total = read_to_end(connection); // the leak
	return reply(context, total);
}

int RedisModule_OnLoad(void *context)
{
	// The first pointer of the context finds the functions of the interface.
	int (*find)(const char *, void *) = *(void **)context;
	void (*set_attributes)(void *, const char *, int, int);
	int (*create_command)(void *, const char *, Command, const char *, int, int, int);
	if (find("RedisModule_SetModuleAttribs", &set_attributes) || find("RedisModule_CreateCommand", &create_command)
	    || find("RedisModule_ReplyWithLongLong", &reply) || find("RedisModule_StringToLongLong", &number_of))
		return 1;
	set_attributes(context, "leak", 1, 1);
	return create_command(context, "leak.fetch", fetch_command, "", 0, 0, 0);
}
