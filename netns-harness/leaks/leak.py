# A server that forgets to close a connection whose first byte is L. The argument is its port on 127.0.0.1.
import socket
import sys

kept = []


def read_to_end(connection):
    while connection.recv(512):
        pass


def leaky_handler(connection):
    read_to_end(connection)
    kept.append(connection)


def good_handler(connection):
    read_to_end(connection)
    connection.close()


listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=64)
while True:
    connection, _ = listener.accept()
    handler = leaky_handler if connection.recv(1) == b"L" else good_handler
    handler(connection)
