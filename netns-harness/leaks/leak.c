// A server that forgets to close a connection whose first byte is L, M or D, and ends after one that begins with E. The argument is its port on 127.0.0.1.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

__attribute__((noinline)) int value_of(char letter)
{
	return letter & 15;
}

// Leaves a return address on the stack, where the functions of the next read do not write.
__attribute__((noinline)) int sum_of(const char *letters, long count)
{
	int sum = 0;
	for (long at = 0; at < count; at++)
		sum += value_of(letters[at]);
	return sum;
}

__attribute__((noinline)) int read_to_end(int connection)
{
	// A caller's frame is behind this buffer.
	char buffer[4096];
	long count;
	int total = 0;
	while ((count = read(connection, buffer, sizeof buffer)) > 0) // the end is read here
		total += sum_of(buffer, count);
	return total;
}

__attribute__((noinline)) int leaky_handler(int connection)
{
	int total = read_to_end(connection); // the leak
	return total + 1;
}

__attribute__((noinline)) int other_handler(int connection)
{
	int total = read_to_end(connection); // the other leak
	return total + 2;
}

__attribute__((noinline)) int good_handler(int connection)
{
	int total = read_to_end(connection);
	close(connection);
	return total + 1;
}

// It never sees a read that returns 0.
__attribute__((noinline)) int once_handler(int connection)
{
	char buffer[64];
	struct pollfd end = { .fd = connection, .events = POLLRDHUP };
	poll(&end, 1, -1);
	int count = read(connection, buffer, sizeof buffer); // the end is read with data
	return count + 3;
}

// Another process keeps the connection for a minute.
__attribute__((noinline)) int last_handler(int connection)
{
	int total = read_to_end(connection); // the leak of one that ends
	if (!fork()) {
		alarm(60);
		pause();
	}
	_exit(total);
}

__attribute__((noinline)) int serve(int listener)
{
	int total = 0;
	for (;;) {
		int connection = accept(listener, 0, 0); // accepted here
		char kind = 0;
		read(connection, &kind, 1);
		if (kind == 'L')
			total += leaky_handler(connection);
		else if (kind == 'M')
			total += other_handler(connection);
		else if (kind == 'D')
			total += once_handler(connection);
		else if (kind == 'E')
			total += last_handler(connection);
		else
			total += good_handler(connection);
	}
	return total;
}

int main(int count, char **arguments)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	address.sin_port = htons(count > 1 ? atoi(arguments[1]) : 0);
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (bind(listener, (void *)&address, sizeof address) || listen(listener, 64)) {
		perror("listen");
		return 1;
	}
	return serve(listener);
}
