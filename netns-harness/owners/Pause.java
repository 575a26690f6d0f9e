import java.net.InetSocketAddress;
import java.nio.channels.*;

/* A server that is interested in nothing on every connection. */
public class Pause {
    public static void main(String[] arguments) throws Exception {
        Selector selector = Selector.open();
        ServerSocketChannel listener = ServerSocketChannel.open();
        listener.bind(new InetSocketAddress("127.0.0.1", Integer.parseInt(arguments[0])));
        listener.configureBlocking(false);
        listener.register(selector, SelectionKey.OP_ACCEPT);
        System.out.println("ready");
        while (true) {
            selector.select();
            selector.selectedKeys().clear();
            for (SocketChannel one; (one = listener.accept()) != null; ) {
                one.configureBlocking(false);
                one.register(selector, 0);
            }
        }
    }
}
