// Makes connections to the server of leak.c as fast as that takes them. Each begins with a byte of a pattern, and ends there. Where the byte is
// G, it waits for the server to close, so no more wait there than the pattern is long. Arguments: the port, how many, the pattern.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int count, char **arguments)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	if (count != 4)
		return 2;
	address.sin_port = htons(atoi(arguments[1]));
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	int often = atoi(arguments[2]), length = strlen(arguments[3]);
	for (int i = 0; i < often; i++) {
		int connection = socket(AF_INET, SOCK_STREAM, 0);
		char kind = arguments[3][i % length], answer;
		if (connect(connection, (void *)&address, sizeof address) || write(connection, &kind, 1) != 1
		    || (kind == 'G' && (shutdown(connection, SHUT_WR) || read(connection, &answer, 1)))) {
			perror("storm");
			return 1;
		}
		close(connection);
	}
	return 0;
}
