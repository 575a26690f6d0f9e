// Maps each file of its arguments as the loader maps code, says at which address the file would begin, and waits for the end of its input.
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int count, char **arguments)
{
	char byte;
	for (int i = 1; i < count; i++) {
		int file = open(arguments[i], O_RDONLY);
		// The code begins with the second page. Behind the end of a cut file there is nothing.
		char *at = mmap(0, 0x10000, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0x1000);
		if (file < 0 || at == (char *)MAP_FAILED) {
			perror(arguments[i]);
			return 1;
		}
		printf("%p\n", at - 0x1000);
		close(file);
	}
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}
