"""Can this file be used? The way from text to settings, and every complaint on that way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from paceline.config import rules
from paceline.config.reader import Reader
from paceline.config.settings import Config
from paceline.domain.errors import ConfigError


def parse(text: str, environ: Mapping[str, str], source: str) -> Config:
    """The settings in a text, or a `ConfigError` with all that is wrong. Pure."""
    reader = Reader(environ, source)
    config = reader.read(text, Config) or Config()
    for place, what in rules.problems(config):
        if reader.is_sound(place):
            reader.complain(place, what)
    if found := reader.problems():
        raise ConfigError(found)
    return config


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """The settings in a file. Paths within it start where Paceline was started."""
    config = parse(text_of(path), environ, str(path))
    missing = [f"{path}: {place}: {what}" for place, what in _unusable_files(config)]
    if missing:
        raise ConfigError(missing)
    return config


def text_of(path: Path) -> str:
    """What stands in a file, or a `ConfigError`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: this is not text in UTF-8"]) from None


def _unusable_files(config: Config) -> Iterator[tuple[str, str]]:
    if config.tls is not None:
        for place, name in (("tls.cert", config.tls.cert), ("tls.key", config.tls.key)):
            if not Path(name).is_file():
                yield place, f"there is no file {name}"
    if config.log_facts is not None and not Path(config.log_facts).parent.is_dir():
        yield "log_facts", f"there is no folder {Path(config.log_facts).parent}"
