"""Is every endpoint served, by Paceline itself or by an engine, as clients of OpenAI expect?"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from scripted import ROLE, SSE, Act, ScriptedEngine, always, answer, scripted, stream, token

from paceline.engines.emulated import EngineSettings, emulated_engines
from stand import MODEL, Stand, get, live_gateway, on_loop, post, tenant, until

FAST = EngineSettings(profile="tiny", model=MODEL, speed=20.0)
ASK = {"max_tokens": 5, "ignore_eos": True}


@asynccontextmanager
async def emulated(**options: Any) -> AsyncIterator[Stand]:
    async with emulated_engines([FAST]) as (engine,), live_gateway(engine.url, **options) as stand:
        yield stand


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], **ASK},
        ),
        ("/v1/completions", {"prompt": "a", **ASK}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 5, "ignore_eos": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], **ASK}),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
@on_loop
async def test_generations_are_served_and_counted(
    path: str, body: dict[str, Any], streaming: bool
) -> None:
    async with emulated() as gateway:
        reply = await gateway.ask({**body, "stream": streaming}, path)
        assert (reply.status, reply.whole) == (200, True)
        assert len(reply.events) >= 5 if streaming else reply.json["usage"]
        (outcome,) = gateway.outcomes
        assert (outcome.output_tokens, outcome.kept) == (5, True)
        assert outcome.prompt_tokens
        assert (outcome.itl_s > 0) == streaming
        assert reply.headers["x-paceline-worker"] == "w0"
        assert reply.headers["x-paceline-tier"] == "standard"
        assert reply.headers["server-timing"].startswith("queue;dur=")
        await gateway.settled()


@on_loop
async def test_embeddings_pass_through() -> None:
    async with emulated() as gateway:
        reply = await gateway.ask({"input": ["a", "b"]}, "/v1/embeddings")
        assert len(reply.json["data"]) == 2


@on_loop
async def test_models_are_listed_with_their_aliases() -> None:
    async with live_gateway("http://127.0.0.1:1", names={MODEL: MODEL, "gpt": MODEL}) as gateway:
        listed = (await gateway.raw(get("/v1/models"))).json["data"]
        assert [(m["id"], m.get("alias_of")) for m in listed] == [(MODEL, None), ("gpt", MODEL)]
        assert (await gateway.raw(get("/v1/models/gpt"))).json["id"] == "gpt"
        missing = await gateway.raw(get("/v1/models/none"))
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")


@on_loop
async def test_a_form_passes_as_it_is() -> None:
    form = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'
    kind = "multipart/form-data; boundary=b"
    async with (
        scripted(always(answer(b'{"text":"hi"}'))) as (engine,),
        live_gateway(engine.url) as gateway,
    ):
        path = "/v1/audio/transcriptions"
        reply = await gateway.raw(post(form, path, content_type=kind))
        assert reply.json == {"text": "hi"}
        (asked,) = engine.asked
        assert (asked.target, asked.body) == (path, form)
        assert asked.headers["content-type"] == kind
        wrong = form.replace(b"\r\nm\r\n", b"\r\nother\r\n")
        assert (await gateway.raw(post(wrong, path, content_type=kind))).status == 404


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@on_loop
async def test_other_paths_below_v1_pass_through(method: str) -> None:
    async with scripted(always(answer(b"[]"))) as (engine,), live_gateway(engine.url) as gateway:
        reply = await gateway.raw(get("/v1/responses/resp_1?after=2&x=%20", method))
        assert reply.json == []
        (asked,) = engine.asked
        assert (asked.method, asked.target) == (method, "/v1/responses/resp_1?after=2&x=%20")


@on_loop
async def test_where_several_models_are_served_one_must_be_named() -> None:
    names = {MODEL: MODEL, "n": "n"}
    async with scripted(always(answer())) as (engine,), live_gateway(engine.url, names=names) as g:
        unnamed = await g.ask({"messages": []})
        assert (unnamed.status, unnamed.error["param"]) == (400, "model")
        assert (await g.ask({"messages": [], "model": MODEL})).status == 200
        assert (await g.ask({"messages": [], "model": "n"})).status == 503


@on_loop
async def test_readiness_follows_the_workers() -> None:
    async with live_gateway("http://127.0.0.1:1", ready=False) as gateway:
        assert (await gateway.raw(get("/health/live"))).status == 200
        reply = await gateway.raw(get("/health/ready"))
        assert (reply.status, reply.error["code"]) == (503, "unavailable")
        gateway.adapters[0].healthy = True
        await until(lambda: gateway.host.ready)
        assert (await gateway.raw(get("/health/ready"))).status == 200


@on_loop
async def test_an_answer_of_no_content_passes() -> None:
    nothing = b"HTTP/1.1 204 No Content\r\n\r\n"
    async with scripted(always(nothing)) as (engine,), live_gateway(engine.url) as gateway:
        async with await gateway.client() as client:
            for _ in range(2):
                client.write(post({}, "/v1/x"))
                assert (await client.reply()).status == 204
        assert engine.opened == 1


@on_loop
async def test_hop_by_hop_headers_of_an_engine_stay_behind() -> None:
    headers = (b"connection: keep-alive", b"keep-alive: timeout=5", b"x-more: 1", b"trailer: x")
    async with (
        scripted(always(answer(b"{}", 200, *headers))) as (engine,),
        live_gateway(engine.url) as gateway,
    ):
        reply = await gateway.ask()
        assert reply.headers["x-more"] == "1"
        assert not {"connection", "keep-alive", "trailer"} & set(reply.headers)


# The client that most people use.


def client_of(gateway: Stand, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0)


MESSAGES: Any = [{"role": "user", "content": "hello"}]


@on_loop
async def test_openai_s_client_streams_and_does_not() -> None:
    async with emulated() as gateway, client_of(gateway) as client:
        chat = client.chat.completions
        whole = await chat.create(
            model=MODEL, messages=MESSAGES, max_tokens=5, extra_body={"ignore_eos": True}
        )
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 5
        parts = await chat.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=5,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        texts = [part.choices[0].delta.content async for part in parts]
        assert len([text for text in texts if text]) == 5
        assert [model.id async for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, openai.BadRequestError), (422, openai.UnprocessableEntityError)],
)
@on_loop
async def test_openai_s_client_understands_an_engine_s_refusal(
    status: int, kind: type[openai.APIStatusError]
) -> None:
    script = always(answer(b'{"error":{"message":"no"}}', status))
    async with (
        scripted(script) as (engine,),
        live_gateway(engine.url) as gateway,
        client_of(gateway) as client,
    ):
        with pytest.raises(kind):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)


@on_loop
async def test_openai_s_client_understands_our_refusals() -> None:
    script = always(answer(b"{}", 500))
    tenants = [tenant("acme", "sk-right")]
    async with scripted(script) as (engine,), live_gateway(engine.url, tenants=tenants) as gateway:
        async with client_of(gateway, "sk-wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        async with client_of(gateway, "sk-right") as client:
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="other", messages=MESSAGES)
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model=MODEL, messages=MESSAGES)


@on_loop
async def test_openai_s_client_notices_a_broken_stream() -> None:
    script = always(SSE, ROLE, token(), Act.PAUSE, Act.CLOSE)
    async with (
        scripted(script) as (engine,),
        live_gateway(engine.url) as gateway,
        client_of(gateway) as client,
    ):
        parts = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="the stream broke"):
            async for _ in parts:
                pass


# TLS.


OPENSSL = (
    *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
    *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
    *("-addext", "subjectAltName=IP:127.0.0.1"),
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine that nobody has signed, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    try:
        subprocess.run(
            [*OPENSSL, "-keyout", key, "-out", cert],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("needs the openssl command")
    return cert, key


def serving(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return context


@on_loop
async def test_clients_may_come_over_tls(certificate: tuple[Path, Path]) -> None:
    async with (
        scripted(always(stream())) as (engine,),
        live_gateway(engine.url, tls=serving(certificate)) as gateway,
    ):
        gateway.tls = ssl.create_default_context(cafile=certificate[0])
        async with await gateway.client() as client:
            for _ in range(3):
                client.write(post({"stream": True, "messages": []}))
                assert (await client.reply()).text == "hihihi"
        assert (await gateway.raw(get("/health/live"))).status == 200
        refused = await gateway.raw(b"nonsense\r\n\r\n")
        assert refused.status == 400
        plain, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(get("/health/live"))
        assert b"200" not in await plain.read()
        writer.close()


@on_loop
async def test_engines_may_be_reached_over_tls(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    engine = ScriptedEngine(always(stream()))
    async with engine.serving(ssl=serving(certificate)), live_gateway(engine.url) as gateway:
        assert [(await gateway.stream()).text for _ in range(3)] == ["hihihi"] * 3
        assert engine.opened == 1


@on_loop
async def test_an_engine_that_nobody_vouches_for_gets_no_request(
    certificate: tuple[Path, Path],
) -> None:
    engine = ScriptedEngine(always(stream()))
    async with engine.serving(ssl=serving(certificate)), live_gateway(engine.url) as gateway:
        assert (await gateway.stream()).status == 502
        assert not engine.asked
