"""What does the least relay in Python cost? Bytes in, bytes out, an engine connection a client.

`protocol` is uvloop from protocol to protocol, `epoll` a loop around select.epoll. Neither parses,
routes, keeps books or guards against slow readers: they are floors to compare a gateway with.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import select
import socket
from collections.abc import Callable
from itertools import count
from typing import cast

import uvloop

LOCALHOST = "127.0.0.1"
BACKLOG = 4096


class EngineSide(asyncio.Protocol):
    """The way back: what the engine says goes to the client."""

    def __init__(self, client: ClientSide) -> None:
        self.client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.client.engine_ready(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        self.client.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.client.transport.close()


class ClientSide(asyncio.Protocol):
    """The way there: what the client says goes to the engine, once that is connected."""

    transport: asyncio.Transport

    def __init__(self, engine_port: int) -> None:
        self.engine_port = engine_port
        self.engine: asyncio.Transport | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        connect = loop.create_connection(lambda: EngineSide(self), LOCALHOST, self.engine_port)
        self.connecting = loop.create_task(connect)

    def engine_ready(self, engine: asyncio.Transport) -> None:
        self.engine = engine
        engine.writelines(self.early)
        if self.transport.is_closing():
            engine.close()

    def data_received(self, data: bytes) -> None:
        if self.engine is None:
            self.early.append(data)
        else:
            self.engine.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.engine is not None:
            self.engine.close()


async def relay_by_protocol(port: int, engine_ports: range) -> None:
    """uvloop sets TCP_NODELAY on every connection itself."""
    turn = count()

    def client() -> ClientSide:
        return ClientSide(engine_ports[next(turn) % len(engine_ports)])

    server = await asyncio.get_running_loop().create_server(
        client, LOCALHOST, port, backlog=BACKLOG
    )
    await server.serve_forever()


def relay_by_epoll(port: int, engine_ports: range) -> None:
    """A peer whose socket is full or broken is cut off."""
    buffer = bytearray(1 << 18)
    view = memoryview(buffer)
    ready = select.epoll()
    ends: dict[int, tuple[socket.socket, socket.socket, Callable[[bytearray], int], int]] = {}
    listener = socket.create_server((LOCALHOST, port), backlog=BACKLOG)
    listener.setblocking(False)
    ready.register(listener, select.EPOLLIN)
    turn = count()

    def accept() -> None:
        client, _ = listener.accept()
        engine_port = engine_ports[next(turn) % len(engine_ports)]
        engine = socket.create_connection((LOCALHOST, engine_port))
        for end, other in ((client, engine), (engine, client)):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ready.register(end, select.EPOLLIN)
            ends[end.fileno()] = (end, other, end.recv_into, other.fileno())

    def close(fd: int) -> None:
        for end in ends[fd][:2]:
            del ends[end.fileno()]
            end.close()

    while True:
        for fd, _ in ready.poll():
            try:
                if fd == listener.fileno():
                    accept()
                elif fd in ends:
                    _, _, receive, other = ends[fd]
                    got = receive(buffer)
                    if not got or os.write(other, view[:got]) < got:
                        close(fd)
            except OSError:
                if fd in ends:
                    close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("relay", choices=["protocol", "epoll"])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--engine-port", type=int, default=9001, help="the first of the engines'")
    parser.add_argument("--engines", type=int, default=1)
    args = parser.parse_args()
    engine_ports = range(args.engine_port, args.engine_port + args.engines)
    gc.freeze()
    if args.relay == "epoll":
        relay_by_epoll(args.port, engine_ports)
    else:
        uvloop.run(relay_by_protocol(args.port, engine_ports))


if __name__ == "__main__":
    main()
