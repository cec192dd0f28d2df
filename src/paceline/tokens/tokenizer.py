"""Which tokens does a model see in a text?

A special token cuts a text: what stands before and after it is tokenised apart. So a text is taken
in segments, each of which begins with such a token, and the ids of a segment are remembered: of a
chat that goes on only what is new is tokenised, and a system prompt is tokenised once for all.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import xxhash
from tokenizers import Tokenizer as _Tokenizer

from paceline.tokens.template import ChatTemplate

REMEMBERED = 4_000_000
"""Tokens of segments that are kept: 16 MB, and as much again for their names if they are short."""
SEGMENT_COST = 50
"""What a segment counts for beside its tokens."""

MOST_SEGMENTS = 2000
"""Of a text; what comes after is one segment. To find each takes Python's lock for some
microseconds, and a text may consist of nothing but special tokens."""


class Segments:
    """Ids of the segments met last. May be used by several threads."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._size = 0
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = Lock()

    def get(self, name: bytes) -> array[int] | None:
        with self._lock:
            ids = self._ids.get(name)
            if ids is not None:
                self._ids.move_to_end(name)
            return ids

    def put(self, name: bytes, ids: array[int]) -> None:
        with self._lock:
            if name in self._ids:
                return
            self._ids[name] = ids
            self._size += len(ids) + SEGMENT_COST
            while self._size > self._most:
                _, oldest = self._ids.popitem(last=False)
                self._size -= len(oldest) + SEGMENT_COST


class Tokenizer:
    """A model's tokenizer and chat template, from its folder."""

    def __init__(self, folder: Path, remembered: int = REMEMBERED) -> None:
        """OSError or ValueError, with what is wrong, if the folder does not have them.

        Reading it keeps all other threads waiting for some tenths of a second.
        """
        source = _read(folder / "tokenizer.json")
        try:
            self._tokenizer = _Tokenizer.from_str(source)
            settings = _settings(folder)
            self.template = _template(folder, settings)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{folder}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._segments = Segments(remembered)
        self._cuts = _cuts(self._tokenizer)
        plain = self._encode("a", with_special=False)
        whole = self._encode("a", with_special=True)
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), len(whole))
        self._opening, self._closing = whole[:at], whole[at + len(plain) :]
        self.encoded = 0
        """Letters that were tokenised."""
        self.remembered = 0
        """Letters whose tokens were known."""

    def ids(self, text: str, with_special: bool = False) -> array[int]:
        """Tokens of a text; `with_special`: with those that the tokenizer begins texts with."""
        found = array("I", self._opening if with_special else ())
        for segment in self._split(text):
            name = xxhash.xxh3_128_digest(segment.encode())
            ids = self._segments.get(name)
            if ids is None:
                ids = self._encode(segment, with_special=False)
                self._segments.put(name, ids)
                self.encoded += len(segment)
            else:
                self.remembered += len(segment)
            found += ids
        return found + self._closing if with_special else found

    def _split(self, text: str) -> Iterator[str]:
        start = 0
        if self._cuts is not None:
            for cut in islice(self._cuts.finditer(text), MOST_SEGMENTS):
                if cut.start() > start:
                    yield text[start : cut.start()]
                    start = cut.start()
        if start < len(text):
            yield text[start:]

    def _encode(self, text: str, with_special: bool) -> array[int]:
        # Of all ways to tokenise this one alone lets other threads run.
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=with_special)
        return array("I", found.ids)


def _cuts(tokenizer: _Tokenizer) -> re.Pattern[str] | None:
    """Special tokens before which a text can be cut: those that take nothing of the text around
    them, and are found as they are written."""
    special = [
        token.content
        for token in tokenizer.get_added_tokens_decoder().values()
        if token.special
        and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
    ]
    if not special:
        return None
    return re.compile("|".join(re.escape(token) for token in sorted(special, key=len)[::-1]))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class _Settings(msgspec.Struct):
    """Of tokenizer_config.json: templates, and special tokens by their roles."""

    chat_template: Any
    special: dict[str, str]


def _settings(folder: Path) -> _Settings:
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            said |= msgspec.json.decode(_read(folder / name), type=dict[str, Any])
    special = {}
    for role, token in said.items():
        text = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(text, str):
            special[role] = text
    return _Settings(said.get("chat_template"), special)


def _template(folder: Path, settings: _Settings) -> ChatTemplate | None:
    """The template of a folder, if it has one: among several the engine chooses by the request."""
    source = settings.chat_template
    if (folder / "chat_template.jinja").exists():
        source = _read(folder / "chat_template.jinja")
    elif (folder / "chat_template.json").exists():
        named = msgspec.json.decode(_read(folder / "chat_template.json"), type=dict[str, Any])
        source = named.get("chat_template", source)
    return ChatTemplate(source, settings.special) if isinstance(source, str) else None
