"""How does a machine with no engine at all get one? Run llama.cpp's own server in this process.

The PyPI package `xllamacpp` carries llama.cpp compiled for plain CPUs, with its OpenAI-compatible
HTTP server: continuous batching, slots, streaming, `/metrics`. `paceline engine` and `paceline
demo` start it as a process of its own, so that a crash of C++ code or a busy core never takes the
gateway with it. To the gateway it is an engine like any other, reached over HTTP.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from paceline.domain.errors import PacelineError

BATCH_TOKENS = 64
"""Prompt tokens in one step. A prompt stalls the other streams by a step, and a core reads some
200 tokens a second: 64 of them cost 0.4 s, llama.cpp's own 2,048 the whole prompt at once. Larger
batches were no faster here."""

MISSING = 'The embedded engine needs llama.cpp: pip install "paceline[demo]"'


class EngineDidNotStart(PacelineError):
    """The message says what is missing."""


def serve_gguf(
    model: Path, host: str, port: int, slots: int, context: int, threads: int, alias: str
) -> None:
    """Serve `model` until SIGTERM or SIGINT, then end the process.

    `slots` requests run at once, each with up to `context` tokens of its own, and `threads` is
    the number of cores that compute.
    """
    server_type, params = _settings(model, host, port, slots, context, threads, alias)
    # The mask must stand before llama.cpp starts its threads: they inherit it, and a signal
    # given to one of them would kill the process halfway through an answer.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    try:
        server = server_type(params)
    except RuntimeError as failed:  # llama.cpp has said more on stderr, or nothing at all.
        because = f"is port {port} free, and {model} a GGUF file of a model that it knows?"
        raise EngineDidNotStart(f"llama.cpp did not start: {because}") from failed
    print(f"serving {model.name} as {alias} at {server.listening_address}", flush=True)
    signal.sigwait(stop)
    # Closing the server instead waits for the answers under way: half a minute with a stream,
    # for ever with an answer in one piece. Who sends the signal has drained it or wants it gone.
    os._exit(0)


def _settings(
    model: Path, host: str, port: int, slots: int, context: int, threads: int, alias: str
) -> tuple[Any, Any]:
    try:
        from xllamacpp import CommonParams, Server
    except ImportError as missing:
        raise EngineDidNotStart(MISSING) from missing
    if not model.is_file():
        raise EngineDidNotStart(f"no GGUF file at {model}")

    params = CommonParams()
    params.model.path = str(model)
    params.model_alias = {alias}
    params.hostnames = [host]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_batch = params.n_ubatch = max(BATCH_TOKENS, slots)
    params.cont_batching = True
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.ui = False
    params.offline = True  # Otherwise a path that is not found may become a download.
    params.warmup = False  # A small model's first step is no slower than the others.
    params.fit_params = False  # It fits models to the memory of GPUs.
    params.cache_ram_mib = 0  # A second prompt cache of up to 8 GB; each slot keeps its own.
    params.verbosity = 2  # Warnings and errors; the next level has three lines a request.
    return Server, params
