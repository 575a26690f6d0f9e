# A server that pauses reading on every connection.
import asyncio, sys


class Paused(asyncio.Protocol):
    def connection_made(self, transport):
        transport.pause_reading()


async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Paused, "127.0.0.1", int(sys.argv[1]))
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main())
