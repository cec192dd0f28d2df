"""Does every kind of engine keep what its adapter promises, also through the gateway?

A new adapter passes when it has passed here: give it a row in `live.STARTS` and in `ENGINES`.
SGLang and TensorRT-LLM are the emulated engine behind a front here (`dialects.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from live import Body, Client, LiveEngine, events_of, gateway_before, live_engine

pytestmark = pytest.mark.timeout(300)

ENGINES = [
    "emulated",
    "sglang",
    "trtllm",
    pytest.param("vllm", marks=pytest.mark.real),
    pytest.param("llamacpp", marks=pytest.mark.real),
]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOKENS = 12
ASK = {"messages": [{"role": "user", "content": "Count from one to twenty in words."}]}
STORY = {"prompt": "Once upon a time, in a village by the sea,"}
PROMPTS: dict[str, Body] = {CHAT: ASK, TEXT: STORY}
BOTH = pytest.mark.parametrize("path", [CHAT, TEXT])


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[LiveEngine]:
    with live_engine(request.param) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(engine: LiveEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Its name for the model is not the engine's."""
    with gateway_before([engine], tmp_path_factory.mktemp("gateway"), "public-name") as url:
        yield Client(engine, url, "public-name", is_gateway=True)


@pytest.fixture(params=["direct", "gateway"])
def client(request: pytest.FixtureRequest, engine: LiveEngine) -> Client:
    if request.param == "direct":
        return Client(engine, engine.url, engine.model, is_gateway=False)
    through: Client = request.getfixturevalue("gateway")
    return through


# What the engine says of itself.


def test_detection_tells_its_kind_and_the_model(engine: LiveEngine) -> None:
    found = engine.detected()
    assert found is not None
    assert (found.kind, found.serves_as) == (engine.kind, engine.model)
    assert found.max_model_len or engine.kind == "trtllm"


def test_its_report_is_healthy_and_has_figures(engine: LiveEngine) -> None:
    report = engine.report()
    assert report.healthy, report.because
    assert report.running is not None
    assert report.waiting is not None
    assert report.kv_used is not None
    assert report.kv_capacity_tokens
    assert report.max_model_len or engine.kind == "trtllm"
    if engine.kind == "vllm":
        assert report.block_size
        assert report.preemptions_total is not None
        assert report.prefix_queries_total is not None


# What it answers.


def text_of(answer: Body) -> str:
    """The text in one event, or in a whole answer."""
    found = ""
    for choice in answer["choices"]:
        part = choice.get("delta") or choice.get("message") or choice
        found += part.get("content") or part.get("text") or ""
    return found


def joined(events: list[Body]) -> str:
    return "".join(text_of(event) for event in events)


def assert_same(engine: LiveEngine, one: str, other: str) -> None:
    """Real engines may round otherwise in another batch, and then a later token may differ."""
    if engine.exact:
        assert one == other
    else:
        assert one.split()[:2] == other.split()[:2] != []


@BOTH
def test_a_stream_brings_all_its_tokens_and_says_how_many(client: Client, path: str) -> None:
    asked = {"max_tokens": TOKENS, "stream_options": {"include_usage": True}}
    events = client.stream(path, **PROMPTS[path], **asked)
    (usage,) = [event["usage"] for event in events if event.get("usage")]
    with_text = [event for event in events if text_of(event)]
    assert 0 < len(with_text) <= usage["completion_tokens"] <= TOKENS
    if client.engine.exact:
        assert len(with_text) == usage["completion_tokens"]
    reasons = [event["choices"][0]["finish_reason"] for event in events if event["choices"]]
    assert reasons[-1] in ("length", "stop")
    assert set(reasons[:-1]) <= {None}


def test_a_chat_begins_with_its_role(client: Client) -> None:
    first = client.stream(CHAT, **ASK, max_tokens=2)[0]
    assert first["choices"][0]["delta"]["role"] == "assistant"


@BOTH
def test_usage_has_an_event_of_its_own_only_if_asked_for(client: Client, path: str) -> None:
    events = client.stream(path, **PROMPTS[path], max_tokens=2)
    assert all(event["choices"] for event in events)


@BOTH
def test_an_answer_in_one_piece_is_the_stream_in_one_piece(client: Client, path: str) -> None:
    whole = client.ask(path, **PROMPTS[path], max_tokens=TOKENS)
    assert 0 < whole["usage"]["completion_tokens"] <= TOKENS
    assert whole["usage"]["prompt_tokens"] > 0
    streamed = client.stream(path, **PROMPTS[path], max_tokens=TOKENS)
    assert_same(client.engine, text_of(whole), joined(streamed))


def test_two_streams_at_once_both_get_their_own(client: Client) -> None:
    prompts = ("The days of the week are Monday,", "Red, green and")
    alone = [joined(client.stream(TEXT, prompt=prompt, max_tokens=TOKENS)) for prompt in prompts]
    responses = [client.open_stream(TEXT, prompt=p, max_tokens=TOKENS) for p in prompts]
    for response, expected in zip(responses, alone, strict=True):
        assert_same(client.engine, joined(events_of(response)), expected)


def test_the_adapters_extras_are_accepted(client: Client) -> None:
    extras = client.engine.adapter.extras(CHAT, urgency=3)
    assert text_of(client.ask(CHAT, **ASK, max_tokens=2, **extras))


def test_a_prompt_seen_before_is_reported_as_cached(client: Client) -> None:
    # Longer than vLLM's largest block, 128 tokens on CPUs, and not a prefix of anything else here.
    who = "gateway" if client.is_gateway else "engine"
    prompt = f"The {who} knows: " + "the quick brown fox jumps over the lazy dog, " * 25
    cached = []
    for _ in range(2):
        usage = client.ask(TEXT, prompt=prompt, max_tokens=1)["usage"]
        cached.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    assert cached[0] < 100 < cached[1]


# What goes wrong.


def test_a_client_that_leaves_frees_its_slot(client: Client) -> None:
    window = client.engine.report().max_model_len or 4096
    endless = {"max_tokens": window - 100, "ignore_eos": True}
    response = client.open_stream(TEXT, **STORY, **endless)
    assert response.readline().startswith(b"data: ")
    wait_for_running(client.engine, 1)
    response.close()
    wait_for_running(client.engine, 0)


def wait_for_running(engine: LiveEngine, count: int) -> None:
    """Wait for less time than an answer that fills the context takes at any engine here."""
    gives_up = time.monotonic() + 5
    while engine.report().running != count:
        assert time.monotonic() < gives_up, f"the engine does not get to {count} running"
        time.sleep(0.02)


def assert_error(answer: tuple[int, Body], *statuses: int) -> None:
    status, body = answer
    assert status in statuses, body
    error = body.get("error", body)  # SGLang and TensorRT-LLM tell it without a frame
    assert error["message"]


def test_an_unknown_model_is_an_error(client: Client) -> None:
    if client.engine.kind != "vllm" and not client.is_gateway:
        pytest.skip("it has one model and takes every name for it")
    assert_error(client.post(CHAT, {"model": "nobody", "max_tokens": 1, **ASK}), 404)


def test_a_body_that_is_no_json_is_an_error(client: Client) -> None:
    assert_error(client.post(CHAT, b'{"model": '), 400, 422)


def test_a_prompt_beyond_the_context_is_an_error(client: Client) -> None:
    body = {"model": client.model, "prompt": "word " * 20_000, "max_tokens": 1}
    assert_error(client.post(TEXT, body), 400, 413)


# What goes on.


@BOTH
def test_a_broken_generation_goes_on_from_its_last_token(client: Client, path: str) -> None:
    asked: Body = {"model": client.model, "temperature": 0, "stream": True, **PROMPTS[path]}
    whole = joined(client.stream(path, **asked, max_tokens=TOKENS))
    begun = joined(client.stream(path, **asked, max_tokens=TOKENS // 2))
    rest = client.engine.adapter.continuation(path, asked, begun, None)
    if client.engine.kind == "trtllm" and path == CHAT:
        assert rest is None
        pytest.skip("its chats cannot be continued")
    assert rest is not None
    rest["max_tokens"] = TOKENS - TOKENS // 2
    ended = joined(client.stream(path, **rest))
    assert ended
    if client.engine.exact:
        assert begun + ended == whole
    else:
        assert_same(client.engine, whole, begun + ended)
        print(f"{client.engine.kind} {path}: {begun!r} + {ended!r} for {whole!r}")


def test_token_ids_go_on_as_they_are(client: Client) -> None:
    if not client.engine.adapter.token_ids(TEXT):
        pytest.skip("its answers have no token ids")
    prompt = [504, 3575, 282, 4649, 314]
    asked: Body = {"model": client.model, "temperature": 0, "prompt": prompt}
    asked |= {"return_token_ids": True}
    (whole,) = client.ask(TEXT, **asked, max_tokens=TOKENS)["choices"]
    begun = whole["token_ids"][: TOKENS // 2]
    rest = client.engine.adapter.continuation(TEXT, asked, "", begun)
    assert rest is not None
    assert rest["prompt"] == prompt + begun
    rest["max_tokens"] = TOKENS - TOKENS // 2
    (ended,) = client.ask(TEXT, **rest)["choices"]
    equal = TOKENS if client.engine.exact else len(begun) + 1
    assert (begun + ended["token_ids"])[:equal] == whole["token_ids"][:equal]
