"""How does the dashboard run as a process? `python -m paceline.dashboard --admin URL`.

The gateway starts it with the socket to listen on and a pipe as standard input: it ends when that
closes, so that it never outlives the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys

import uvicorn

from paceline.dashboard.server import dashboard_app

LESS_URGENT = 10
"""Added to the niceness: tokens come first."""


def main() -> None:
    """Show what a gateway does."""
    parser = argparse.ArgumentParser(prog="paceline.dashboard", description=main.__doc__)
    parser.add_argument("--admin", required=True, help="URL of the gateway's admin listener")
    parser.add_argument("--port", type=int, default=8082, help="port to listen on, 127.0.0.1")
    parser.add_argument("--fd", type=int, help="a socket that listens already, in its place")
    given = parser.parse_args()
    os.nice(LESS_URGENT)
    owned = given.fd is not None
    if owned:
        listener = socket.socket(fileno=given.fd)
    else:
        listener = socket.create_server(("127.0.0.1", given.port))
    asyncio.run(_serve(given.admin, listener, owned))


async def _serve(admin: str, listener: socket.socket, owned: bool) -> None:
    config = uvicorn.Config(
        dashboard_app(admin), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    if owned:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _ended, server)
    await server.serve([listener])


def _ended(server: uvicorn.Server) -> None:
    """The pipe from the gateway closed, or said something: either way it is over."""
    asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    server.should_exit = True


if __name__ == "__main__":
    main()
