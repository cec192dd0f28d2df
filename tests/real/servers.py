"""How does a test get a real engine for as long as it needs one?

    with vllm_server(8101, core=0) as first, vllm_server(8102, core=1) as second:
        ...  # first.url is http://127.0.0.1:8101

Each engine is a process group of its own, bound to its core, and is gone when the block ends,
whatever happened in it. What it printed stays in `logs/` beside the installed engines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from install import engines_home, model_gguf, model_hf, vllm_venv

VLLM_READY_S = 240.0
LLAMACPP_READY_S = 60.0
STOP_S = 5.0
LOG_TAIL_LINES = 40


class EngineDidNotStart(Exception):
    """It ended or stayed silent; the message carries the end of its log."""


@dataclass(frozen=True)
class Engine:
    url: str
    served_name: str
    process_id: int
    """Leader of its process group: `os.killpg` with it is the death of the whole engine."""
    log: Path


@contextmanager
def vllm_server(
    port: int,
    core: int,
    served_name: str = "m",
    extra: Sequence[str] = (),
    model: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Engine]:
    """vLLM on one core, 40 to 60 s until it is ready. `tiny_hf()` is the `model` with the
    quickest steps; `extra` are more arguments of `vllm serve`."""
    command = [str(vllm_venv() / "bin" / "vllm"), "serve", str(model or model_hf())]
    command += ["--served-model-name", served_name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"]
    command += ["--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
    command += ["--enable-prompt-tokens-details", *extra]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "LD_PRELOAD": ":".join(_faster_libraries()),
        **(env or {}),
    }
    name = f"vllm-{port}"
    with _running(name, command, core, settings, port, served_name, VLLM_READY_S) as engine:
        yield engine


@contextmanager
def llamacpp_server(
    port: int,
    core: int | None = None,
    served_name: str = "m",
    slots: int = 8,
    context: int = 2048,
) -> Iterator[Engine]:
    """The embedded engine, as `paceline engine` starts it: ready within a second or two."""
    command = [sys.executable, "-m", "paceline", "engine", "--model", str(model_gguf())]
    command += ["--port", str(port), "--name", served_name]
    command += ["--slots", str(slots), "--context", str(context)]
    name = f"llamacpp-{port}"
    with _running(name, command, core, {}, port, served_name, LLAMACPP_READY_S) as engine:
        yield engine


@contextmanager
def together(*servers: AbstractContextManager[Engine]) -> Iterator[list[Engine]]:
    """All of them, in the time that the slowest takes to start."""
    with ExitStack() as running, ThreadPoolExecutor(len(servers)) as starters:
        yield list(starters.map(running.enter_context, servers))


@contextmanager
def _running(
    name: str,
    command: Sequence[str],
    core: int | None,
    settings: Mapping[str, str],
    port: int,
    served_name: str,
    ready_s: float,
) -> Iterator[Engine]:
    log = engines_home() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    bound = ["taskset", "--cpu-list", str(core)] if core is not None else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*bound, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, log, ready_s)
        yield Engine(url, served_name, process.pid, log)
    finally:
        _stop(process)


def _wait_until_ready(
    url: str, process: subprocess.Popen[bytes], log: Path, ready_s: float
) -> None:
    """Both engines answer `/health` with 200 once they serve; llama.cpp with 503 before that."""
    ends = time.monotonic() + ready_s
    while not _is_healthy(url):
        if process.poll() is not None:
            raise EngineDidNotStart(f"ended with {process.returncode}\n{_tail(log)}")
        if b"Address already in use" in log.read_bytes():  # vLLM goes on without its engine
            raise EngineDidNotStart(f"a port is taken\n{_tail(log)}")
        if time.monotonic() > ends:
            raise EngineDidNotStart(f"not ready after {ready_s:.0f} s\n{_tail(log)}")
        time.sleep(0.1)
    # Somebody else's engine may hold the port; ours has then ended with an error.
    time.sleep(0.1)
    if process.poll() is not None:
        raise EngineDidNotStart(f"{url} is taken by another process\n{_tail(log)}")


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Politely first. Then the whole group: vLLM computes in a child, which would live on, and
    hold its core and gigabytes, if its parent had crashed or been killed by the test."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([f"the end of {log}:", *lines[-LOG_TAIL_LINES:]])


def _faster_libraries() -> list[str]:
    """An allocator and an OpenMP that vLLM's CPU backend is a good deal faster with, if present."""
    places = [
        *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"),
        *(vllm_venv() / "lib").glob("libiomp5.so"),
    ]
    return [str(path) for path in places]
