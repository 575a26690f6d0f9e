// A server that forgets to close a connection whose first byte is L. The argument is its port on 127.0.0.1.
use std::io::Read;
use std::net::{TcpListener, TcpStream};

#[inline(never)]
fn read_to_end(connection: &mut TcpStream) -> usize {
    let mut buffer = [0; 512];
    let mut total = 0;
    while let Ok(count) = connection.read(&mut buffer) { // the end is read here
        if count == 0 {
            break;
        }
        total += count;
    }
    total
}

#[inline(never)]
fn leaky_handler(mut connection: TcpStream, kept: &mut Vec<TcpStream>) {
    let total = read_to_end(&mut connection); // the leak
    kept.push(connection);
    assert!(total < 1 << 30);
}

#[inline(never)]
fn good_handler(mut connection: TcpStream) {
    let total = read_to_end(&mut connection);
    assert!(total < 1 << 30);
}

fn main() {
    let port: u16 = std::env::args().nth(1).unwrap().parse().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let mut kept = Vec::new();
    for connection in listener.incoming() {
        let mut connection = connection.unwrap();
        let mut kind = [0];
        match connection.read(&mut kind) {
            Ok(1) if kind == *b"L" => leaky_handler(connection, &mut kept),
            _ => good_handler(connection),
        }
    }
}
