"""What must be patched in vLLM so that two of them hand over to each other on a box of two cores?

A plugin that vLLM loads at its start (entry point `vllm.general_plugins`); `install.py` puts it
into vLLM's environment. It does nothing unless `PACELINE_SMALL_CPUS` is set.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

PROGRESS_US = 500
"""How often NIXL looks for news. Its Python API says 0: a thread that spins on its own core."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    if "PACELINE_SMALL_CPUS" in os.environ:
        _leave_cores_alone()
        _look_for_news_now_and_then()
        _count_no_accelerators()


def _leave_cores_alone() -> None:
    """With NIXL the worker moves to the last core of its NUMA node: all engines to the same one."""
    from vllm.platforms.cpu import CpuPlatform  # type: ignore[import-not-found]

    CpuPlatform.discover_numa_topology = classmethod(lambda cls: [])


def _look_for_news_now_and_then() -> None:
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")
    if importlib.util.find_spec("nixl") is not None:
        bindings: Any = importlib.import_module("nixl._bindings")
        bindings.nixlAgentConfig = _patient(bindings.nixlAgentConfig)


def _patient(config: Any) -> type:
    class Patient(config):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PROGRESS_US if name == "pthrDelay" and not value else value)

    return Patient


def _count_no_accelerators() -> None:
    """Mooncake's connector asks for the number of the device that it is on."""
    import torch  # type: ignore[import-not-found]

    if not torch.accelerator.is_available():
        torch.accelerator.current_device_index = lambda: 0
        torch.accelerator.set_device_index = lambda *_, **__: None
