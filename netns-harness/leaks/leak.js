// A server that forgets to close a connection whose first byte is L. The argument is its port on 127.0.0.1.
const net = require('net');
const kept = [];

function leakyHandler(connection) {
    kept.push(connection);
}

function goodHandler(connection) {
    connection.on('end', () => connection.end());
}

function handle(connection) {
    connection.on('error', () => {});
    connection.once('data', first => {
        (first[0] === 'L'.charCodeAt(0) ? leakyHandler : goodHandler)(connection);
        connection.on('data', () => {});
    });
}

net.createServer({ allowHalfOpen: true }, handle).listen(+process.argv[2], '127.0.0.1');
