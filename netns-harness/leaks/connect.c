// A client that forgets to close connections that its server has closed. Arguments: the port on 127.0.0.1, how often, and anything if it reads
// to the end.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

__attribute__((noinline)) int open_connection(int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	address.sin_port = htons(port);
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	int connection = socket(AF_INET, SOCK_STREAM, 0);
	int failed = connect(connection, (void *)&address, sizeof address); // connected here
	return failed ? -1 : connection;
}

__attribute__((noinline)) int ask(int port, int reads)
{
	char byte;
	int connection = open_connection(port);
	while (reads && read(connection, &byte, 1) > 0)
		;
	return connection + 1;
}

int main(int count, char **arguments)
{
	int total = 0, often = count > 2 ? atoi(arguments[2]) : 1;
	for (int i = 0; i < often; i++)
		total += ask(atoi(arguments[1]), count > 3);
	for (;;)
		pause();
	return total;
}
