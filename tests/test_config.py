"""Config: one reader of files and environment, and one sentence for each thing that is wrong."""

import ast
import contextlib
import hashlib
import itertools
import json
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import KINDS, POLICIES, Address, Config, Secret, load, parse
from paceline.config import settings as config_settings
from paceline.config.running import parse_worker
from paceline.config.values import EngineUrl
from paceline.domain.errors import ConfigError
from paceline.domain.gpu import Gpus
from paceline.domain.promise import Promise, Tier
from paceline.policy import route

ROOT = Path(__file__).parent.parent
MODELS = "models: [{name: m, workers: [{url: 'http://h:1'}]}]\n"


def problems(text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, environ, "it.yaml")
    return list(caught.value.problems)


def problem(text: str, **environ: str) -> str:
    (only,) = problems(text, **environ)
    return only


# What a config gives


def test_the_smallest_config_names_one_worker() -> None:
    config = parse(MODELS, {}, "it.yaml")
    assert config.listen == Address("127.0.0.1", 8080)
    assert config.tiers == {"standard": Tier("standard")}
    assert config.anonymous
    (worker,) = config.workers()
    assert (worker.id, worker.model, worker.url) == ("h:1", "m", "http://h:1")
    assert worker.kind == ""  # to be detected


def test_the_example_can_be_loaded() -> None:
    config = load(ROOT / "examples/paceline.yaml", {"ACME_KEY": "secret"})
    assert [worker.id for worker in config.workers()] == [f"127.0.0.1:900{i}" for i in (1, 2, 3)]
    assert config.tiers["premium"].promise == Promise(0.5, 0.04, 0.5)
    assert config.tiers["batch"] == Tier("batch", preemptible=True, deadline_s=86400)
    assert config.tiers["batch"].promise.ttft_s == inf
    acme = config.tenants[0]
    assert (acme.tier, acme.max_streams, acme.tokens_per_minute) == ("premium", 64, 200_000)
    assert acme.key_sha256 == hashlib.sha256(b"secret").digest()
    assert config.tenants[1].requests_per_minute == 600
    assert config.aliases["llama"] == config.aliases["llama-70b"] == "llama-70b"
    assert config.engine_keys() == {}


def test_a_tenant_with_several_keys_is_one_tenant() -> None:
    hashed = [hashlib.sha256(key).hexdigest() for key in (b"d", b"e", b"f")]
    text = f"""{MODELS}
tenants:
  - {{name: t, keys: [a, b], key: c, key_sha256: {hashed[0]}, keys_sha256: {hashed[1:]}}}
"""
    config = parse(text, {}, "it.yaml")
    digests = {hashlib.sha256(key.encode()).digest() for key in "abcdef"}
    assert {tenant.key_sha256 for tenant in config.tenants} == digests
    assert {tenant.name for tenant in config.tenants} == {"t"}


def test_a_tier_with_a_deadline_alone_promises_no_first_token() -> None:
    tier = parse(MODELS + "tiers: {standard: {deadline_s: 60}}", {}, "it.yaml").tiers["standard"]
    assert (tier.promise.ttft_s, tier.deadline_s) == (inf, 60.0)


@pytest.mark.parametrize("to", ["standard", "small", "s"])
def test_a_tier_degrades_to_a_lower_tier_or_a_model_by_any_of_its_names(to: str) -> None:
    text = f"""
models:
  - {{name: m, workers: [{{url: "http://h:1"}}]}}
  - {{name: small, aliases: [s], workers: [{{url: "http://h:2"}}]}}
tiers: {{premium: {{weight: 2, overload: degrade, degrade_to: {to}}}, standard: {{}}}}
"""
    assert parse(text, {}, "it.yaml").tiers["premium"].degrade_to == to


@pytest.mark.parametrize(
    ("tiers", "told"),
    [
        ("a: {overload: degrade}", "needs it: name a lower tier, or a model"),
        ("a: {degrade_to: b}", "acts with `overload: degrade` only"),
        ("a: {overload: degrade, degrade_to: a}", "'a' is no lower tier"),
        ("a: {overload: degrade, degrade_to: b}", "'b' is no lower tier"),
        ("a: {ttft_s: 2, overload: degrade, degrade_to: c}", "'c' is no lower tier"),
        (
            "a: {overload: degrade, degrade_to: x}",
            "unknown tier or model 'x', known are a, b, c, m",
        ),
        ("a: {overload: degrade, degrade_to: m}", "'m' is the only model"),
        ("m: {}, a: {overload: degrade, degrade_to: m}", "'m' is a tier and a model"),
    ],
)
def test_a_way_down_that_leads_nowhere_or_round_is_refused(tiers: str, told: str) -> None:
    text = f"{MODELS}default_tier: a\ntiers: {{{tiers}, b: {{}}, c: {{ttft_s: 1}}}}"
    found = problem(text)
    assert "tiers.a.degrade_to: " in found
    assert told in found


def test_listing_tenants_closes_the_door_to_others_unless_told() -> None:
    tenants = MODELS + "tenants: [{name: t, key: k}]\n"
    assert not parse(tenants, {}, "it.yaml").anonymous
    assert parse(tenants + "anonymous: true", {}, "it.yaml").anonymous


def test_an_equal_text_gives_an_equal_config_and_another_key_a_different_one() -> None:
    text = MODELS + "tenants: [{name: t, key: '${K}'}]"
    assert parse(text, {"K": "a"}, "x") == parse(text, {"K": "a"}, "y")
    assert parse(text, {"K": "a"}, "x") != parse(text, {"K": "b"}, "x")


def test_no_key_is_told_by_a_config_or_an_encoder() -> None:
    text = """
models: [{name: m, workers: [{url: "http://h:1", api_key: engine-secret}]}]
tenants: [{name: t, key: tenant-secret}]
"""
    config = parse(text, {}, "it.yaml")
    assert "secret" not in repr(config).replace("Secret", "")
    assert "secret" not in repr(config.workers()) + repr(config.tenants)
    assert config.engine_keys() == {"h:1": Secret("engine-secret")}
    assert config.engine_keys()["h:1"].reveal() == "engine-secret"
    with pytest.raises(TypeError):
        msgspec.json.encode(config)


@pytest.mark.parametrize(
    "text",
    [
        "tenants: [{name: t, key_sha256: s3cret}]",
        "tenants: [{name: t, key: ' s3cret'}]",
        "tenants: [{name: t, keyy: s3cret}]",
        "tenants: [{name: t, key: [s3cret]}]",
        "tenants: [{name: t, key: 's3cret]}",
        "models: [{name: m, workers: [{url: 'http://me:s3cret@h:1'}]}]",
    ],
)
def test_no_complaint_repeats_a_secret(text: str) -> None:
    assert "s3cret" not in "\n".join(problems(text))


# The environment


def test_the_environment_is_filled_in() -> None:
    text = """
listen: ${HOST:-0.0.0.0}:${PORT}
models: [{name: "a $${b} ${NAME}", workers: [{url: "http://h:1", cost_per_hour: "${COST}"}]}]
log_facts: ${FACTS:-}
"""
    config = parse(text, {"PORT": "80", "NAME": "${PORT}", "COST": "4"}, "it.yaml")
    assert config.listen == Address("0.0.0.0", 80)
    assert config.models[0].name == "a ${b} ${PORT}"
    assert config.models[0].workers[0].cost_per_hour == 4.0
    assert config.log_facts is None


def test_a_missing_variable_is_named_with_its_place() -> None:
    told = problem(MODELS + "tenants:\n  - {name: t, key: '${ACME_KEY}'}")
    assert told == "it.yaml:3: tenants[0].key: ACME_KEY is not set in the environment"


def test_a_variable_in_a_comment_is_not_missed() -> None:
    parse(MODELS + "# ${NOWHERE}", {}, "it.yaml")


def test_a_broken_variable_is_refused() -> None:
    assert "broken ${…}" in problem(MODELS + "log_facts: ${not a name}")


# What is wrong, and where


def test_an_unknown_key_is_refused_with_its_place_and_the_nearest_name() -> None:
    text = """
models:
  - name: m
    workers:
      - url: http://h:1
      - url: http://h:2
        cost_per_huor: 3
"""
    assert problem(text) == (
        "it.yaml:7: models[0].workers[1].cost_per_huor: unknown key, did you mean cost_per_hour "
        "(an amount of money of at least 0 and at most 1,000,000)?"
    )


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("tiers: {standard: {ttft_s: 0.5s}}", "got '0.5s': write 0.5"),
        ("tiers: {standard: {ttft_s: 500ms}}", "got '500ms': write 0.5"),
        ("tiers: {standard: {ttft_s: 2 min}}", "got '2 min': write 120"),
        ("tiers: {standard: {ttft_s: 0}}", "expected seconds as a number above 0"),
        ("tiers: {standard: {ttft_s: .inf}}", "expected seconds as a number above 0"),
        ("tiers: {standard: {ttft_s: '0.5'}}", "got '0.5': write it without quotes"),
        ("tiers: {standard: {ttft_ms: 500}}", "did you mean ttft_s (seconds as a number"),
        ("tiers: {standard: {tpot_ms: 50}}", "did you mean itl_s (seconds as a number"),
        ("tiers: {standard: {attain: 99}}", "expected a share above 0 and at most 1, got '99'"),
        ("tiers: {standard: {overload: shedd}}", "got 'shedd', did you mean shed?"),
        ("tiers: {standard: {preemptible: 1}}", "expected true or false, got '1'"),
        ("tiers: {standard: }", "tiers.standard: expected a map, got nothing"),
        ("tiers: [standard]", "tiers: expected a map, got a list"),
        ("limits: {max_body_mb: 32MB}", "got '32MB': write the number alone"),
        ("retries: {attempts: 2.5}", "expected a whole number of at least 1 and at most 10"),
        ("retries: {attempts: 11}", "of at least 1 and at most 10, got '11'"),
        ("routing: {policy: headrom}", "did you mean headroom?"),
        ("routing: {polcy: headroom}", "routing.polcy: unknown key, did you mean policy?"),
        ("queue: {max_wait_s: 0}", "queue.max_wait_s: expected seconds as a number above 0"),
        ("shutdown: {notice_s: 30}", "shutdown.notice_s: is longer than shutdown.grace_s"),
        ("log_facts: {}", "log_facts: expected a text of 1 to 256 characters, got a map"),
        ("listen: 8080", "expected host:port such as 127.0.0.1:8080"),
        ("listen: ::1:8080", "expected host:port such as 127.0.0.1:8080"),
        ("listen: h:65536", "with a port from 0 to 65535"),
        ("admin: 127.0.0.1:8080", "127.0.0.1:8080 is taken by listen"),
        ("default_tier: gold", "default_tier: unknown tier 'gold'"),
        ("anonymous: false", "nobody could ask"),
        ("tenants: [{name: t}]", "tenants[0]: no key to know the tenant by"),
        ("tenants: [{key: k}]", "tenants[0].name: missing: a text of 1 to 256 characters"),
        ("tenants: [{name: anonymous, key: k}]", "stands for those who ask without a key"),
        ("tenants: [{name: t, key: k, tier: x}]", "tenants[0].tier: unknown tier 'x'"),
        ("tenants: [{name: t, key_sha256: ab}]", "expected 64 hex digits"),
        ("tenants: [{name: t, keys: [a, ~]}]", "tenants[0].keys[1]: expected"),
        ("tls: {cert: a.pem}", "tls.key: missing: a text"),
        ("database: sqlite:///x", "database: comes with a later version"),
        ("cluster: {}", "cluster: comes with a later version"),
        ("? [a]\n: b", "expected single words as keys, got a list"),
        ("limits: {max_head_kb: 1}\nlimits: {}", "limits: written twice"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(setting: str, told: str) -> None:
    text = MODELS + setting
    if setting.startswith("default_tier"):
        text += "\ntiers: {standard: {}}"
    assert told in problem(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: b: c", "it.yaml:1: this is not YAML: mapping values are not allowed here"),
        ("a: \x00", "it.yaml:1: this is not YAML: special characters are not allowed"),
        ("just words", "expected a map, got 'just words'"),
        ("[]", "expected a map, got a list"),
    ],
)
def test_a_text_that_is_no_config_gets_one_sentence(text: str, told: str) -> None:
    assert told in "\n".join(problems(text))


@pytest.mark.parametrize("text", ["", "models:", "models: []", "models: [{name: m, workers: []}]"])
def test_no_workers_at_all_is_answered_with_the_ways_to_get_some(text: str) -> None:
    told = problem(text)
    assert "models[].workers" in told
    assert "paceline demo" in told
    assert "paceline engine --emulate" in told


@pytest.mark.parametrize(
    "other",
    [
        "http://localhost:9001/",
        "http://LOCALHOST:9001",
        "http://127.0.0.1:9001/v1",
        "http://127.0.0.1:9001/v1/",
        "https://localhost:9001",
    ],
)
def test_two_workers_with_one_url_are_refused_however_it_is_written(other: str) -> None:
    text = f"""
models:
  - name: m
    workers: [{{url: "http://localhost:9001"}}]
  - name: n
    workers: [{{url: "{other}"}}]
"""
    assert problem(text) == (
        "it.yaml:6: models[1].workers[0].url: leads to the same engine as models[0].workers[0].url"
    )


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("models: [{name: m, aliases: [a, m], workers: &w [{url: 'http://h'}]}]", "aliases[1]"),
        ("tenants: [{name: t, key: a}, {name: t, key: b}]", "tenants[1].name"),
        ("tenants: [{name: t, key: a}, {name: u, key: a}]", "tenants[1]"),
        ("tenants: [{name: t, keys: [a, a]}]", "tenants[0]"),
    ],
)
def test_nothing_may_be_named_twice(setting: str, place: str) -> None:
    text = setting if setting.startswith("models") else MODELS + setting
    told = problem(text)
    assert place in told
    assert "same" in told


def test_all_problems_are_told_at_once_in_the_order_of_the_text() -> None:
    text = """
listen: nowhere
models:
  - {name: m, workers: [{url: "http://h:1", kind: vlm}]}
tiers: {gold: {ttft_s: fast}}
default_tier: silver
"""
    assert [told.split(": ")[:2] for told in problems(text)] == [
        ["it.yaml:2", "listen"],
        ["it.yaml:4", "models[0].workers[0].kind"],
        ["it.yaml:5", "tiers.gold.ttft_s"],
        ["it.yaml:6", "default_tier"],
    ]


def test_a_problem_is_told_once_and_not_by_its_consequences() -> None:
    assert "kind" in problem("models: [{name: m, workers: [{url: 'http://h:1', kind: x}]}]")
    assert "url" in problem("models: [{name: m, workers: [{kind: vllm}]}]")


# YAML as people write it


def test_anchors_and_merge_keys_work_and_overrides_are_no_duplicates() -> None:
    text = """
models:
  - name: m
    workers:
      - &base {url: "http://h:1", kind: vllm, cost_per_hour: "${COST}"}
      - &more {<<: *base, url: "http://h:2"}
      - {<<: *more, url: "http://h:3"}
"""
    config = parse(text, {"COST": "2"}, "it.yaml")
    assert [worker.id for worker in config.workers()] == ["h:1", "h:2", "h:3"]
    assert {worker.cost_per_hour for worker in config.workers()} == {2.0}


def test_texts_stay_as_they_are_written() -> None:
    config = parse(
        "models: [{name: 010, aliases: [no, 1:30], workers: [{url: 'http://h'}]}]", {}, ""
    )
    assert config.models[0].name == "010"
    assert config.models[0].aliases == ("no", "1:30")


def test_whole_numbers_may_be_written_like_large_ones() -> None:
    text = MODELS + "tenants: [{name: t, key: k, tokens_per_minute: 2e5, max_streams: 1_000}]"
    assert parse(text, {}, "").tenants[0].tokens_per_minute == 200_000


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("[::1]:8080", Address("::1", 8080)),
        ("gateway.local:80", Address("gateway.local", 80)),
    ],
)
def test_addresses_are_read_and_written_alike(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "url", "name"),
    [
        ("http://H", "http://h:80", "h:80"),
        ("HTTPS://Example.com/", "https://example.com:443", "example.com:443"),
        ("http://h:1/engine/v1", "http://h:1/engine", "h:1/engine"),
        ("http://[::1]:9/v1", "http://[::1]:9", "[::1]:9"),
    ],
)
def test_engine_urls_have_one_spelling_and_a_short_name(text: str, url: str, name: str) -> None:
    assert str(EngineUrl.parse(text)) == url
    assert EngineUrl.parse(text).name == name


@pytest.mark.parametrize(
    "text",
    [
        "h:1",
        "ftp://h",
        "http://",
        "http://h:0",
        "http://h:x",
        "http://h/?a=1",
        "http://[::1",
        "http://a b",
    ],
)
def test_what_is_no_engine_url_is_refused(text: str) -> None:
    assert "expected the URL of an engine" in problem(
        f"models: [{{name: m, workers: [{{url: '{text}'}}]}}]"
    )


@pytest.mark.parametrize("text", ["http://node-a:9400", "http://node-a:9400/metrics"])
def test_a_worker_says_who_tells_of_its_gpus(text: str) -> None:
    worker = f'{{"url": "http://h", "model": "m", "gpus": {{"url": "{text}", "indices": [2, 3]}}}}'
    assert parse_worker(worker)[0].gpus == Gpus("http://node-a:9400", (2, 3))
    with pytest.raises(ConfigError, match="URL of a DCGM exporter"):
        parse_worker(worker.replace("http://node", "node"))


def test_the_policies_are_those_that_the_kernel_has() -> None:
    assert set(POLICIES) == set(route.POLICIES)


# Files


def test_a_file_that_cannot_be_read_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml", {})
    (tmp_path / "latin.yaml").write_bytes(b"listen: \xff")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        load(tmp_path / "latin.yaml", {})


def test_files_named_in_a_config_must_be_there(tmp_path: Path) -> None:
    text = MODELS + f"tls: {{cert: '{tmp_path}/c.pem', key: '{tmp_path}/k.pem'}}\n"
    path = tmp_path / "it.yaml"
    path.write_text(text + f"log_facts: {tmp_path}/logs/facts\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    places = [told.split(": ")[1] for told in caught.value.problems]
    assert places == ["tls.cert", "tls.key", "log_facts"]
    for name in ("c.pem", "k.pem"):
        (tmp_path / name).touch()
    (tmp_path / "logs").mkdir()
    assert load(path, {}).tls is not None


# Workers that share requests

SHARED = {
    "prefill, decode": "",
    "prefill": "workers: all of them prefill, and none answers: give one of them role decode",
    "prefill, both": "workers[0].transfer: no other worker of m takes prompts over by nixl",
    "prefill, both nixl": "",
    "prefill mooncake, decode": "[0].transfer: no other worker of m takes prompts over by mooncake",
    "prefill sglang, decode": "[0].transfer: vllm does not hand over by sglang; it knows nixl",
    "both, decode": "",
}


@pytest.mark.parametrize(("shared", "told"), SHARED.items())
def test_roles_must_fit_each_other(shared: str, told: str) -> None:
    workers = []
    for place, (role, *transfer) in enumerate(part.split() for part in shared.split(",")):
        of = {"url": f"http://h:{place + 1}", "kind": "vllm", "role": role}
        workers.append(of | ({"transfer": transfer[0]} if transfer else {}))
    text = yaml.safe_dump({"models": [{"name": "m", "workers": workers}]})
    if told:
        assert told in problem(text)
    else:
        assert parse(text, {}, "it.yaml").workers()


@pytest.mark.parametrize(
    ("worker", "told"),
    [
        (
            "role: prefill",
            "role prefill needs it, or `kind`: one of nixl, mooncake, sglang, trtllm",
        ),
        ("role: decode, kind: llamacpp", "llamacpp has no way to hand a prompt over"),
        ("role: both, kind: sglang, transfer: sglang", "started to prefill or to decode"),
        ("transfer: nixl, kind: openai", "openai does not hand over by nixl; it knows none"),
        ("lease_s: 0", "lease_s: expected seconds as a number above 0"),
        ("bootstrap_port: 0", "bootstrap_port: expected a port"),
    ],
)
def test_a_role_needs_a_way_to_hand_over(worker: str, told: str) -> None:
    text = "models: [{name: m, workers: [{url: 'http://h:1', %s}, {url: 'http://h:2'}]}]"
    assert any(told in line for line in problems(text % worker))


@pytest.mark.parametrize(
    ("kind", "transfer"), [("vllm", "nixl"), ("sglang", "sglang"), ("trtllm", "trtllm")]
)
def test_the_way_to_hand_over_follows_from_the_kind(kind: str, transfer: str) -> None:
    workers = [f"{{url: 'http://h:{i}', kind: {kind}, role: {role}}}" for i, role in PARTS]
    config = parse(f"models: [{{name: m, workers: [{', '.join(workers)}]}}]", {}, "it.yaml")
    assert {worker.transfer for worker in config.workers()} == {transfer}
    assert [worker.prefills for worker in config.workers()] == [True, False]


PARTS = ((1, "prefill"), (2, "decode"))


# Properties

words = st.text("abcdefghijklmnopqrstuvwxyz-_0123456789.", min_size=1, max_size=12)
seconds = st.floats(0.001, 86_400)
counts = st.integers(1, 10**9)


def maps(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


workers = maps(
    {},
    {
        "kind": st.sampled_from(KINDS),
        "node": words,
        "cost_per_hour": st.floats(0, 100),
        "served_model": words,
        "prefill_budget": counts,
    },
)
tiers = maps(
    {},
    {
        "ttft_s": seconds,
        "itl_s": seconds,
        "stall_s": seconds,
        "attain": st.floats(0.01, 1),
        "weight": st.floats(0.01, 100),
        "overload": st.sampled_from(["queue", "shed"]),
        "preemptible": st.booleans(),
        "deadline_s": seconds,
    },
)
sections = maps(
    {},
    {
        "routing": maps({}, {"policy": st.sampled_from(POLICIES), "margin": st.floats(0, 0.9)}),
        "limits": maps(
            {},
            {
                "max_body_mb": st.floats(0.1, 100),
                "max_connections": counts.filter(lambda n: n <= 10**6),
            },
        ),
        "timeouts": maps({}, {"connect_s": seconds, "stall_s": seconds}),
        "retries": maps({}, {"attempts": st.integers(1, 10)}),
        "queue": maps({}, {"max_waiting": st.integers(0, 10**6), "max_wait_s": seconds}),
        "shutdown": maps({}, {"grace_s": st.floats(1.0, 86_400)}),
        "logging": maps({}, {"level": st.sampled_from(["info", "off"])}),
        "log_facts": words,
    },
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(words, min_size=1, max_size=3, unique=True))
    document: dict[str, Any] = {"models": []}
    for m, name in enumerate(names):
        drawn = draw(st.lists(workers, min_size=1, max_size=3))
        if len(drawn) > 1 and draw(st.booleans()):
            transfer = draw(st.sampled_from(["nixl", "mooncake"]))
            for worker, role in zip(drawn, ("prefill", "decode", "both"), strict=False):
                worker |= {"kind": "vllm", "role": role, "transfer": transfer}
        listed = [{"url": f"http://h{m}:{i + 1}", **worker} for i, worker in enumerate(drawn)]
        document["models"].append({"name": name, "workers": listed})
    document["tiers"] = draw(st.dictionaries(words, tiers, min_size=1, max_size=3))
    document["default_tier"] = draw(st.sampled_from(sorted(document["tiers"])))
    document["tenants"] = [
        {"name": name, "key": f"key-of-{name}", "max_streams": draw(counts)}
        for name in draw(st.lists(words, max_size=3, unique=True))
        if name != "anonymous"
    ]
    return document | draw(sections)


def as_written(config: Config) -> Any:
    """The config in the form of the file. Its models and tenants are not: they have secrets."""
    written = msgspec.to_builtins(config)
    return written | {"listen": str(config.listen), "admin": str(config.admin)}


@settings(max_examples=50, deadline=None)
@given(documents())
def test_a_config_survives_a_round_trip(document: dict[str, Any]) -> None:
    config = parse(yaml.safe_dump(document), {}, "it.yaml")
    assert config == parse(json.dumps(document), {}, "it.json")
    written = as_written(config)
    for section in ("routing", "limits", "timeouts", "retries", "logging"):
        assert written[section] | document.get(section, {}) == written[section]
    for name, tier in document["tiers"].items():
        assert written["tiers"][name] | tier == written["tiers"][name]
    again = {key: written[key] for key in document if key not in ("models", "tenants")}
    assert parse(yaml.safe_dump(document | again), {}, "again") == config
    assert [w.url for w in config.workers()] == [
        worker["url"] for model in document["models"] for worker in model["workers"]
    ]


def maps_within(value: Any, place: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every map whose keys are settings, with its place."""
    found = []
    if isinstance(value, dict):
        if place != "tiers":
            found.append((place, value))
        for key, item in value.items():
            found += maps_within(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            found += maps_within(item, f"{place}[{i}]")
    return found


KNOWN = {
    field.encode_name
    for value in vars(config_settings).values()
    if isinstance(value, type) and issubclass(value, msgspec.Struct)
    for field in msgspec.structs.fields(value)
} | set(config_settings.LATER)


@settings(max_examples=50, deadline=None)
@given(documents(), words.filter(lambda key: key not in KNOWN and not key[0].isdigit()), st.data())
def test_an_unknown_key_always_names_its_place(
    document: dict[str, Any], key: str, data: st.DataObject
) -> None:
    place, chosen = data.draw(st.sampled_from(maps_within(document)))
    chosen[key] = 1
    told = problem(json.dumps(document, indent=1))
    assert f": {place}.{key}: unknown key" in told if place else f": {key}: unknown key" in told


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_no_text_at_all_does_more_than_raise_a_config_error(text: str) -> None:
    for text_or_value in (text, MODELS + f"log_facts: {text}", f"models: [{text}]"):
        with contextlib.suppress(ConfigError):
            parse(text_or_value, {}, "it.yaml")


def test_every_setting_has_a_sentence() -> None:
    for node in ast.parse(Path(config_settings.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef):
            for setting, after in itertools.pairwise(node.body):
                if isinstance(setting, ast.AnnAssign):
                    told = ast.unparse(after)
                    assert isinstance(after, ast.Expr), ast.unparse(setting)
                    assert told.endswith((".'", '."', '."""')), told


def test_every_default_is_within_its_range() -> None:
    config = parse(MODELS, {}, "it.yaml")
    written = {key: value for key, value in as_written(config).items() if value is not None}
    del written["models"]
    assert parse(MODELS + yaml.safe_dump(written), {}, "it.yaml") == config
