// A server that reads nothing from any connection.
package main

import (
	"fmt"
	"net"
	"os"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	fmt.Println("ready")
	var paused []net.Conn
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		paused = append(paused, connection)
	}
}
