// A server that forgets to close a connection whose first byte is L. The argument is its port on 127.0.0.1.
import java.io.InputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.ArrayList;
import java.util.List;

public class Leak {
    static final List<Socket> kept = new ArrayList<>();

    static int readToEnd(InputStream input) throws Exception {
        byte[] buffer = new byte[512];
        int total = 0;
        for (int count; (count = input.read(buffer)) >= 0; )
            total += count;
        return total;
    }

    static void leakyHandler(Socket connection) throws Exception {
        readToEnd(connection.getInputStream());
        kept.add(connection);
    }

    static void goodHandler(Socket connection) throws Exception {
        readToEnd(connection.getInputStream());
        connection.close();
    }

    static void handle(Socket connection) throws Exception {
        if (connection.getInputStream().read() == 'L')
            leakyHandler(connection);
        else
            goodHandler(connection);
    }

    public static void main(String[] arguments) throws Exception {
        int port = Integer.parseInt(arguments[0]);
        ServerSocket listener = new ServerSocket(port, 64, InetAddress.getByName("127.0.0.1"));
        for (;;)
            handle(listener.accept());
    }
}
