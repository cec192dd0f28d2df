"""What text stands for a prompt of which only the length and the shared prefix are known?

A passage is a slice of one fixed text, begun with its name. The name makes it unique, the slicing
makes it cheap: a prompt of 100,000 tokens costs microseconds, so that the driver is never slow.
"""

from __future__ import annotations

from functools import cache
from random import Random

import xxhash

from paceline.workload.traces import BLOCK_TOKENS, Arrival

WORDS = """
the of and to in is you that it he was for on are as with his they at be this have from or one had
by but not what all were we when your can said use an each she do how if will up out many then them
so some her make like him into time has look two more go see no way my than who its now find long
down day did get come made may part
"""
"""Short common words: with the space about four characters, and one token in most vocabularies."""

TEXT_CHARS = 1 << 17


def prompt_text(arrival: Arrival, index: int, salt: str = "", chars_per_token: float = 4.0) -> str:
    """The prompt. Same blocks give the same text; what they don't cover is unique to the index."""
    if arrival.prompt:
        return arrival.prompt
    pieces = []
    left = arrival.shared_tokens
    for block in arrival.blocks:
        tokens = min(BLOCK_TOKENS, left)
        left -= tokens
        pieces.append(passage(f"{salt}/{block:x}", round(tokens * chars_per_token)))
    if own := arrival.prompt_tokens - arrival.shared_tokens:
        pieces.append(passage(f"{salt}#{index}", max(1, round(own * chars_per_token))))
    return "".join(pieces)


def passage(name: str, chars: int) -> str:
    """Text of so many characters; a shorter passage is the beginning of a longer one."""
    start = xxhash.xxh32_intdigest(name.encode()) % TEXT_CHARS
    rounds = 1 + (start + chars) // TEXT_CHARS
    return f"{name}: {(_text() * rounds)[start : start + chars]}"[:chars]


@cache
def _text() -> str:
    words = Random(1).choices(WORDS.split(), k=TEXT_CHARS)  # noqa: S311
    return " ".join(words)[:TEXT_CHARS]
