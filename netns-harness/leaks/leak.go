// A server that forgets to close a connection whose first byte is L. The argument is its port on 127.0.0.1.
package main

import (
	"net"
	"os"
)

var kept []net.Conn

//go:noinline
func readToEnd(connection net.Conn) int {
	buffer := make([]byte, 512)
	total := 0
	for {
		count, err := connection.Read(buffer) // the end is read here
		if err != nil {
			return total
		}
		total += count
	}
}

//go:noinline
func leakyHandler(connection net.Conn) {
	readToEnd(connection) // the leak
	kept = append(kept, connection)
}

//go:noinline
func goodHandler(connection net.Conn) {
	readToEnd(connection)
	connection.Close()
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		kind := make([]byte, 1)
		connection.Read(kind)
		if kind[0] == 'L' {
			leakyHandler(connection)
		} else {
			goodHandler(connection)
		}
	}
}
