// A server that forgets to close a connection whose first byte is L. The argument is its port on 127.0.0.1.
#include <arpa/inet.h>
#include <cstdlib>
#include <memory>
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>
#include <unistd.h>

namespace shop {

template <typename Buffer> __attribute__((noinline)) long read_to_end(int connection, Buffer &buffer)
{
	long total = 0, count;
	while ((count = recv(connection, &buffer[0], buffer.size(), 0)) > 0) // the end is read here
		total += count;
	return total;
}

struct Handler {
	std::string buffer = std::string(512, ' ');
	virtual ~Handler() = default;
	virtual long handle(int connection) = 0;
};

struct Leaky : Handler {
	long handle(int connection) override
	{
		long total = read_to_end(connection, buffer); // the leak
		return total + 1;
	}
};

struct Good : Handler {
	long handle(int connection) override
	{
		long total = read_to_end(connection, buffer);
		close(connection);
		return total + 1;
	}
};

} // namespace shop

int main(int, char **arguments)
{
	sockaddr_in address = {};
	address.sin_family = AF_INET;
	address.sin_port = htons(std::atoi(arguments[1]));
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (bind(listener, (sockaddr *)&address, sizeof address) || listen(listener, 64))
		return 1;
	for (long total = 0;;) {
		int connection = accept(listener, nullptr, nullptr);
		char kind = 0;
		bool leaks = read(connection, &kind, 1) == 1 && kind == 'L';
		std::unique_ptr<shop::Handler> handler;
		if (leaks)
			handler = std::make_unique<shop::Leaky>();
		else
			handler = std::make_unique<shop::Good>();
		total += handler->handle(connection);
	}
}
