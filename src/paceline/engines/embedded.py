"""How does a machine with no engine at all get one? Run llama.cpp's own server in this process.

The PyPI package `xllamacpp` carries llama.cpp compiled for plain CPUs, with its OpenAI-compatible
HTTP server: continuous batching, slots, streaming, `/metrics`. `paceline engine` and `paceline
demo` start it as a process of its own, so that a crash of C++ code or a busy core never takes the
gateway with it. To the gateway it is an engine like any other, reached over HTTP.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}

MISSING = 'The embedded engine needs llama.cpp: pip install "paceline[demo]"'


def serve_gguf(
    model: Path, host: str, port: int, slots: int, context: int, threads: int, alias: str
) -> None:
    """Serve `model` until SIGTERM or SIGINT.

    `slots` requests run at once, each with up to `context` tokens of its own, and `threads` is
    the number of cores that compute.
    """
    server_type, params = _settings(model, host, port, slots, context, threads, alias)
    with _held_back(STOP_SIGNALS):
        server = server_type(params)
        print(f"serving {model.name} as {alias} at {server.listening_address}", flush=True)
        signal.sigwait(STOP_SIGNALS)
        del server


def _settings(
    model: Path, host: str, port: int, slots: int, context: int, threads: int, alias: str
) -> tuple[Any, Any]:
    try:
        from xllamacpp import CommonParams, Server
    except ImportError as missing:
        raise ModuleNotFoundError(MISSING, name="xllamacpp") from missing
    if not model.is_file():
        raise FileNotFoundError(f"no GGUF file at {model}")

    params = CommonParams()
    params.model.path = str(model)
    params.model_alias = {alias}
    params.hostnames = [host]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cont_batching = True
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.sse_ping_interval = 1
    return Server, params


@contextmanager
def _held_back(signals: set[signal.Signals]) -> Iterator[None]:
    """Keep `signals` pending for `sigwait`. The mask must stand before llama.cpp starts its
    threads: they inherit it, and a signal given to one of them would kill the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
