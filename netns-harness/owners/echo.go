// An echo server that leaks: it reads a connection that begins with L to its end and never closes it.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

var (
	lock   sync.Mutex
	leaked []net.Conn
)

func serve(connection net.Conn) {
	first := make([]byte, 1)
	if _, err := io.ReadFull(connection, first); err == nil && first[0] == 'L' {
		io.Copy(io.Discard, connection)
		lock.Lock()
		leaked = append(leaked, connection)
		lock.Unlock()
		return
	}
	io.Copy(connection, connection)
	connection.Close()
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	fmt.Println("ready")
	for {
		connection, err := listener.Accept()
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		go serve(connection)
	}
}
