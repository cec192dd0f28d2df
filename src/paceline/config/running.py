"""What of a running gateway's settings may change, and what of them may be shown?"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import fields, replace

from paceline.config.reader import Reader
from paceline.config.rules import hand_over
from paceline.config.settings import Config, ModelSettings, Name, WorkerSettings
from paceline.config.values import Address, Digest, EngineUrl, Secret
from paceline.domain.errors import ConfigError
from paceline.domain.worker import Worker

AT_ONCE = frozenset(("models", "tiers", "default_tier", "tenants", "anonymous"))
"""Settings that a reload changes; all others need a restart."""
HIDDEN = "***"


class Changes(msgspec.Struct, frozen=True):
    """How a configuration differs from the running one, by the names of its settings."""

    config: Config
    """What runs from now on: the new one, but for what needs a restart."""
    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


def changes(running: Config, wanted: Config) -> Changes:
    """What takes effect at once, and what only after a restart?"""
    differing = [f for f in fields(Config) if getattr(running, f.name) != getattr(wanted, f.name)]
    late = [f for f in differing if f.encode_name not in AT_ONCE]
    return Changes(
        config=replace(wanted, **{f.name: getattr(running, f.name) for f in late}),
        changed=tuple(f.encode_name for f in differing if f not in late),
        needs_restart=tuple(f.encode_name for f in late),
    )


def visible(value: Any) -> Any:
    """Settings as plain values, in the words of the file, without what is secret."""
    match value:
        case Address() | EngineUrl():
            return str(value)
        case Secret() | Digest():
            return HIDDEN
        case msgspec.Struct():
            return {f.encode_name: visible(getattr(value, f.name)) for f in fields(value)}
        case tuple():
            return [visible(item) for item in value]
        case dict():
            return {key: visible(item) for key, item in value.items()}
    return value


class _WorkerOrder(WorkerSettings, frozen=True, kw_only=True):
    """One worker by itself, and which model it serves."""

    model: Name


def parse_worker(text: str) -> tuple[Worker, str]:
    """A worker and its key, from JSON or YAML; `ConfigError` with all that is wrong. Pure.

    Variables are not read: whoever may add workers need not be able to see the environment.
    """
    reader = Reader({}, "worker")
    order = reader.read(text, _WorkerOrder)
    problems = reader.problems()
    if order is not None:
        problems += [f"{setting}: {problem}" for setting, problem in hand_over(order)]
    if order is None or problems:
        raise ConfigError(problems or ["worker: nothing is said of it"])
    config = Config(models=(ModelSettings(name=order.model, workers=(order,)),))
    (worker,) = config.workers()
    return worker, order.api_key.reveal() if order.api_key is not None else ""
