# An echo server that leaks: it reads a connection that begins with L to its end and never closes it.
import errno, socket, sys, threading, time

leaked = []


def serve(connection):
    if connection.recv(1) == b"L":
        while connection.recv(4096):
            pass
        leaked.append(connection)
        return
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.close()


threading.stack_size(128 * 1024)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
print("ready", flush=True)
while True:
    try:
        connection, _ = listener.accept()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        time.sleep(0.01)
        continue
    threading.Thread(target=serve, args=(connection,), daemon=True).start()
