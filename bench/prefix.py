"""What does it cost to know what all workers have cached?

The exact index, fed with an engine's events, beside the approximate one, fed with dispatches. Each
worker's cache is full: prompts of 8k tokens in blocks of 16, half of each shared by all. What is
published is in vLLM's form: a prompt is one event, a block that is given up one too. Prints a table
and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator

import msgspec
from rich.console import Console
from rich.table import Table

from paceline.domain.kvevents import BlockEvent, token_blocks
from paceline.engines.kvevents import Decoder
from paceline.gateway.intake import prefix_blocks
from paceline.kernel.blocks import BlockIndex
from paceline.kernel.prefix import PrefixIndex

TOKENS = 8192
BLOCK = 16
SHARED = TOKENS // 2
"""Tokens at the beginning of each prompt that all prompts have."""
BYTES_EACH = 4
"""Of text, for each token."""
PROMPTS_EACH = 57
"""Prompts in a worker's cache: 464,896 tokens."""


def tokens_of(worker: int, prompt: int) -> list[int]:
    rng = random.Random(worker << 20 | prompt)
    return [*range(SHARED), *(rng.randrange(128_000) for _ in range(TOKENS - SHARED))]


def hashes_of(worker: int, prompt: int) -> list[int]:
    """The worker's own: those of the shared beginning are the same in each of its prompts."""
    common, own = random.Random(worker), random.Random(~(worker << 20 | prompt))
    shared = [common.getrandbits(64) for _ in range(SHARED // BLOCK)]
    return shared + [own.getrandbits(64) for _ in range((TOKENS - SHARED) // BLOCK)]


def stored(worker: int, prompt: int) -> bytes:
    """What vLLM publishes once it has computed a prompt."""
    tokens, hashes, known = tokens_of(worker, prompt), hashes_of(worker, prompt), 0
    parent = None
    if prompt:
        known = SHARED // BLOCK
        parent = hashes[known - 1]
    event = {
        "type": "BlockStored",
        "block_hashes": hashes[known:],
        "parent_block_hash": parent,
        "token_ids": tokens[known * BLOCK :],
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * (len(hashes) - known),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return msgspec.msgpack.encode([1.0, [event], 0])


def decoded(worker: int, prompt: int) -> bytes:
    """Of streams that decode: one block each."""
    rng = random.Random(worker << 20 | prompt)
    parent = hashes_of(worker, prompt)[-1]
    events = [
        {
            "type": "BlockStored",
            "block_hashes": [rng.getrandbits(64)],
            "parent_block_hash": parent,
            "token_ids": [rng.randrange(128_000) for _ in range(BLOCK)],
            "block_size": BLOCK,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None],
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
        for _ in range(64)
    ]
    return msgspec.msgpack.encode([1.0, events, 0])


def removed(worker: int, prompt: int) -> bytes:
    hashes = hashes_of(worker, prompt)[SHARED // BLOCK :]
    return msgspec.msgpack.encode(
        [
            1.0,
            [
                {"type": "BlockRemoved", "block_hashes": [h], "medium": "GPU", "group_idx": 0}
                for h in reversed(hashes)
            ],
            0,
        ]
    )


def filled(workers: int) -> BlockIndex:
    index, decoder = BlockIndex(), Decoder()
    for worker in range(workers):
        index.begin(worker, whole=True)
        for prompt in range(PROMPTS_EACH):
            index.change(worker, decoder.decode(stored(worker, prompt)).events)
    return index


def guessed(workers: int) -> PrefixIndex:
    index = PrefixIndex()
    for worker in range(workers):
        index.add(worker, 1 << 20)
        for prompt in range(PROMPTS_EACH):
            index.insert(worker, prefix_blocks(text_of(worker, prompt)))
    return index


def text_of(worker: int, prompt: int) -> bytes:
    rng = random.Random(worker << 20 | prompt)
    return bytes(SHARED * BYTES_EACH) + rng.randbytes((TOKENS - SHARED) * BYTES_EACH)


def events_per_s(
    index: BlockIndex, workers: int, make: Callable[[int, int], bytes], prompts: int
) -> tuple[float, float]:
    """Blocks a second of one core: by the index alone, and with decoding and hashing."""
    decoder = Decoder()
    decoder.decode(stored(0, 0))  # it knows the engine
    told = [(w, make(w, p)) for p in range(prompts) for w in range(workers)]
    blocks = decoding_ns = digesting_ns = 0
    for worker, payload in told:
        began = time.thread_time_ns()
        events = decoder.decode(payload).events
        read = time.thread_time_ns()
        index.change(worker, events)
        digesting_ns += time.thread_time_ns() - read
        decoding_ns += read - began
        blocks += sum(map(blocks_in, events))
    return 1e9 * blocks / digesting_ns, 1e9 * blocks / (digesting_ns + decoding_ns)


def blocks_in(event: BlockEvent) -> int:
    return len(getattr(event, "hashes", ()))


def median_us(times: int, work: Callable[[], object]) -> float:
    took = []
    for _ in range(times):
        began = time.perf_counter_ns()
        work()
        took.append(time.perf_counter_ns() - began)
    return sorted(took)[times // 2] / 1e3


def bytes_each(make: Callable[[int], BlockIndex | PrefixIndex], workers: int) -> tuple[float, int]:
    """Memory for each block of each worker, and how many of those there are."""
    gc.collect()
    tracemalloc.start()
    index = make(workers)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(map(index.size, range(workers)))
    return used / held, held


def measure(workers: int, times: int) -> Iterator[tuple[str, float, float | None]]:
    """What, of the exact index, of the approximate one."""
    exact, guess = filled(workers), guessed(workers)
    prompt = tokens_of(0, 3)
    names, text = token_blocks(prompt, BLOCK).names, text_of(0, 3)
    texts = prefix_blocks(text)
    unknown = token_blocks(tokens_of(workers, 0)[SHARED:], BLOCK).names
    yield (
        f"lookup, µs: {TOKENS} tokens, half held by {workers} workers",
        median_us(times, lambda: exact.depths(names)),
        median_us(times, lambda: guess.depths(texts)),
    )
    alike = BlockIndex()
    whole = Decoder().decode(stored(0, 0)).events
    for worker in range(workers):
        alike.change(worker, whole)
    first = token_blocks(tokens_of(0, 0), BLOCK).names
    yield (
        f"lookup, µs: {TOKENS} tokens, all held by {workers} workers",
        median_us(times, lambda: alike.depths(first)),
        None,
    )
    yield (
        f"lookup, µs: {TOKENS} tokens, held by nobody",
        median_us(times, lambda: exact.depths(unknown)),
        None,
    )
    yield (
        f"naming a prompt of {TOKENS} tokens, µs",
        median_us(times, lambda: token_blocks(prompt, BLOCK)),
        median_us(times, lambda: prefix_blocks(text)),
    )
    for what, index, make in (
        ("prompts computed", BlockIndex(), stored),
        ("streams decoded", exact, decoded),
        ("blocks given up", exact, removed),
    ):
        alone, heard = events_per_s(index, workers, make, 10)
        yield f"{what}: blocks a second, index alone", alone, None
        yield f"{what}: blocks a second, with decoding", heard, None
    exact_bytes, blocks = bytes_each(filled, workers)
    guess_bytes, _ = bytes_each(guessed, workers)
    yield f"bytes for each of {blocks:,} blocks", exact_bytes, guess_bytes
    yield (
        "bytes for each token cached",
        exact_bytes / BLOCK,
        guess_bytes / (256 / BYTES_EACH),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--times", type=int, default=300, help="lookups of each kind")
    args = parser.parse_args()
    table = Table(title=f"What {args.workers} workers have cached")
    for column in ("", "exact", "approximate"):
        table.add_column(column, justify="right" if column else "left")
    results = []
    for what, exact, guess in measure(args.workers, args.times):
        table.add_row(what, figure(exact), "" if guess is None else figure(guess))
        results.append({"what": what, "exact": round(exact, 1), "approximate": guess})
    Console(width=100).print(table)
    print(json.dumps({"bench": "prefix", "workers": args.workers, "results": results}))


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    main()
