// A server that pauses reading on every connection.
require("net")
  .createServer({ allowHalfOpen: true }, (connection) => {
    connection.on("error", () => {});
    connection.pause();
  })
  .listen(Number(process.argv[2]), "127.0.0.1", () => console.log("ready"));
