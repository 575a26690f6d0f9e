// An echo server that leaks: it reads a connection that begins with L to its end and never closes it.
const leaked = [];
const server = require("net").createServer({ allowHalfOpen: true }, (connection) => {
  let first = true;
  connection.on("data", (data) => {
    if (first && data[0] === "L".charCodeAt(0)) leaked.push(connection);
    else if (data.length > (first ? 1 : 0)) connection.write(first ? data.subarray(1) : data);
    first = false;
  });
  connection.on("end", () => {
    if (!leaked.includes(connection)) connection.end();
  });
  connection.on("error", () => {});
});
server.listen(Number(process.argv[2]), "127.0.0.1", 1024, () => console.log("ready"));
