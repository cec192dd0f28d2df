"""Which tokens are in a text, and which does the engine answer with?

Token i of every answer is the text " t<i>", so that a test can prove that none was lost or doubled.
A prompt that ends in such tokens is a partial answer, and the engine goes on counting from there.
All other text gives a token for every four bytes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from math import log1p
from typing import overload

import numpy as np
import xxhash

TEXT_IDS = 1 << 17
"""Ids below are pieces of text; `TEXT_IDS + i` is the answer's token i."""

_COUNTERS = re.compile(r"((?: t\d{1,9})+)")


def encode(text: str) -> list[int]:
    """Token ids of a text, the same every time."""
    ids: list[int] = []
    for i, part in enumerate(_COUNTERS.split(text)):
        if i % 2:
            ids += (TEXT_IDS + int(number) for number in part.split(" t")[1:])
        elif part:
            ids += _pieces(part.encode("utf-8", "surrogatepass"))
    return ids


def _pieces(data: bytes) -> list[int]:
    words = np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4")
    hashed: list[int] = ((words * np.uint32(2_654_435_761)) >> np.uint32(15)).tolist()
    return hashed


def partial_answer(ids: Sequence[int]) -> int:
    """How many tokens at the end of a prompt belong to its answer."""
    count = 0
    while count < len(ids) and ids[-1 - count] >= TEXT_IDS:
        count += 1
    return count


def next_number(ids: Sequence[int]) -> int:
    """The number of the token that comes after these."""
    return ids[-1] - TEXT_IDS + 1 if ids[-1] >= TEXT_IDS else 0


class BlockChain(Sequence[int]):
    """A hash for each full block, over all text up to its end, of a prompt and then its answer.

    Computed as far as it is looked at, since most answers end long before their limit.
    """

    def __init__(
        self, prompt: Sequence[int], size: int, answer: Sequence[int] = (), salt: str = ""
    ) -> None:
        self._ids = array("I", prompt)
        self._answer = answer
        self._tokens = len(prompt) + len(answer)
        self._size = size
        self.salt = salt
        self._last = xxhash.xxh3_64_intdigest(salt.encode())
        self._hashes: list[int] = []

    def __len__(self) -> int:
        return self._tokens // self._size

    @overload
    def __getitem__(self, at: int, /) -> int: ...
    @overload
    def __getitem__(self, at: slice, /) -> list[int]: ...
    def __getitem__(self, at: int | slice, /) -> int | list[int]:
        blocks = range(len(self))[at]
        if isinstance(blocks, int):
            self._compute(blocks + 1)
            return self._hashes[blocks]
        self._compute(max(blocks.start + 1, blocks.stop) if blocks else 0)
        return [self._hashes[block] for block in blocks]

    def tokens_of(self, block: int) -> list[int]:
        """What is in a block."""
        self._compute(block + 1)
        return self._ids[block * self._size : (block + 1) * self._size].tolist()

    def _compute(self, blocks: int) -> None:
        size = self._size
        if (missing := blocks * size - len(self._ids)) > 0:
            start = len(self._answer) - (self._tokens - len(self._ids))
            self._ids.extend(self._answer[start : start + missing])
        for block in range(len(self._hashes), blocks):
            text = self._ids[block * size : (block + 1) * size]
            self._last = xxhash.xxh3_64_intdigest(text.tobytes(), self._last)
            self._hashes.append(self._last)


def answer_length(ids: Sequence[int], mean: float, seed: int) -> int:
    """How many tokens the answer to a prompt has: exponential, drawn by a hash of the prompt."""
    digest = xxhash.xxh3_64_intdigest(array("I", ids).tobytes(), seed)
    return 1 + int(-mean * log1p(-(digest >> 11) / (1 << 53)))
