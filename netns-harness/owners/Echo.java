// An echo server that leaks: it reads a connection that begins with L to its end and never closes it.
import java.io.IOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;

public class Echo {
    static final List<Socket> leaked = Collections.synchronizedList(new ArrayList<>());

    static void serve(Socket connection) {
        try {
            var in = connection.getInputStream();
            var data = new byte[65536];
            boolean leaks = in.read() == 'L';
            for (int got; (got = in.read(data)) >= 0; )
                if (!leaks)
                    connection.getOutputStream().write(data, 0, got);
            if (leaks)
                leaked.add(connection);
            else
                connection.close();
        } catch (IOException error) {
            System.err.println(error);
        }
    }

    public static void main(String[] arguments) throws Exception {
        var address = InetAddress.getByName("127.0.0.1");
        var listener = new ServerSocket(Integer.parseInt(arguments[0]), 1024, address);
        System.out.println("ready");
        while (true) {
            try {
                var connection = listener.accept();
                var thread = new Thread(null, () -> serve(connection), "serve", 256 * 1024);
                thread.setDaemon(true);
                thread.start();
            } catch (IOException error) {
                Thread.sleep(10);
            }
        }
    }
}
