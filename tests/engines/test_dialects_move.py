"""Do streams of SGLang and TensorRT-LLM go on elsewhere when their worker dies?"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from dialects import Front, SGLangFront, TRTLLMFront, served
from live import Body, Client, LiveEngine, emulated, gateway_before

pytestmark = pytest.mark.timeout(120)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, Body] = {
    CHAT: {"messages": [{"role": "user", "content": "Count!"}]},
    TEXT: {"prompt": "Count!"},
}
TOKENS = 1500
"""Of an answer: some seconds of the emulated engine."""


DONE: Body = {"the answer is": "whole"}


def told(response: http.client.HTTPResponse) -> Iterator[Body]:
    """The events of an answer as they come."""
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if data:
            yield DONE if data == b"[DONE]" else msgspec.json.decode(data)


def text_of(event: Body) -> str:
    choice = event["choices"][0]
    return (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""


@pytest.mark.parametrize(
    ("kind", "front", "path", "goes_on"),
    [
        ("sglang", SGLangFront, CHAT, True),
        ("sglang", SGLangFront, TEXT, True),
        ("trtllm", TRTLLMFront, TEXT, True),
        ("trtllm", TRTLLMFront, CHAT, False),
    ],
)
def test_an_answer_whose_worker_dies_is_whole_or_ends_with_an_error(
    kind: str, front: type[Front], path: str, goes_on: bool, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        enter = stack.enter_context
        engines = [enter(emulated()) for _ in range(2)]
        workers = [LiveEngine(enter(served(front(e.url))), kind, exact=True) for e in engines]
        gateway = enter(gateway_before(workers, tmp_path, "public-name"))
        client = Client(workers[0], gateway, "public-name", is_gateway=True)
        asked = ASKED[path] | {"max_tokens": TOKENS, "ignore_eos": True}
        events = told(enter(client.open_stream(path, **asked)))
        begun = [next(events) for _ in range(20)]
        busy = [bool(worker.report().running) for worker in workers]
        assert sorted(busy) == [False, True]
        engines[busy.index(True)].process.kill()
        rest = list(events)
    if goes_on:
        assert rest.pop() == DONE
        whole = "".join(map(text_of, begun + rest))
        assert whole == "".join(f" t{i}" for i in range(TOKENS))
    else:
        assert DONE not in rest
        assert rest[-1]["error"]["message"]
