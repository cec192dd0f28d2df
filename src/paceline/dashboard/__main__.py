"""How does the dashboard run as a process? `python -m paceline.dashboard --admin URL`.

The gateway starts it with the socket to listen on and a pipe as standard input: it ends when that
closes, so that it never outlives the gateway.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Annotated

import typer
import uvicorn

from paceline.dashboard.server import dashboard_app

LESS_URGENT = 10
"""Added to the niceness: tokens come first."""


def main(
    admin: Annotated[str, typer.Option(help="URL of a gateway's admin listener.")],
    fd: Annotated[int, typer.Option(help="A socket that listens; -1: take --port.")] = -1,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8082,
) -> None:
    """Show what a gateway does."""
    os.nice(LESS_URGENT)
    owned = fd >= 0
    listener = socket.socket(fileno=fd) if owned else socket.create_server(("127.0.0.1", port))
    asyncio.run(_serve(admin, listener, owned))


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
    typer.run(main)
