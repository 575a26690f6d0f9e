/* An echo server that leaks: it reads a connection that begins with L to its end and never closes it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void *serve(void *argument)
{
    int connection = (int)(intptr_t)argument, leaks;
    char data[65536];
    ssize_t got;
    leaks = recv(connection, data, 1, 0) == 1 && *data == 'L';
    while ((got = recv(connection, data, sizeof data, 0)) > 0)
        if (!leaks && send(connection, data, got, MSG_NOSIGNAL) != got)
            break;
    if (!leaks)
        close(connection);
    return NULL;
}

int main(int argc, char **argv)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    pthread_attr_t attributes;
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    address.sin_port = htons(argc > 1 ? atoi(argv[1]) : 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 1024)) {
        perror("listen");
        return 1;
    }
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 * 1024);
    puts("ready");
    fflush(stdout);
    for (;;) {
        pthread_t thread;
        int connection = accept(listener, NULL, NULL);
        if (connection < 0)
            usleep(10000);
        else if (pthread_create(&thread, &attributes, serve, (void *)(intptr_t)connection))
            close(connection);
    }
}
