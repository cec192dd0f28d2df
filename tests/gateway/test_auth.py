"""Who asks, and what may they have? Keys lead to tiers; requests can only ask for less."""

import hashlib
import json
from math import inf
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from starlette.applications import Starlette

from paceline.domain.errors import InvalidRequest, Unauthorized
from paceline.domain.promise import ANONYMOUS, Promise, Tenant, Tier
from paceline.domain.request import Request
from paceline.gateway.auth import FOUND_BY, Directory
from paceline.gateway.exchange import Exchange
from paceline.gateway.ports import Host
from paceline.gateway.quota import Quotas
from paceline.gateway.server import Gateway
from paceline.wire.server import HttpRequest, ServerConnection

TIERS = {
    tier.name: tier
    for tier in (
        Tier("standard", Promise(2.0, 0.08), weight=2),
        Tier("premium", Promise(0.5, 0.04, 0.5), weight=8),
        Tier("batch", weight=1, preemptible=True),
        Tier("relaxed", Promise(5.0, 0.1), weight=2),
    )
}


def tenant(name: str, key: str, tier: str) -> Tenant:
    return Tenant(name, tier, key_sha256=hashlib.sha256(key.encode()).digest())


ACME = tenant("acme", "acme-key", "premium")
NIGHT = tenant("night", "night-key", "batch")
OPEN = Directory(TIERS, [ACME, NIGHT], "standard", anonymous=True)
CLOSED = Directory(TIERS, [ACME, NIGHT], "standard", anonymous=False)


# Who asks


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer acme-key"},
        {"authorization": "bearer  acme-key "},
        {"x-api-key": "acme-key"},
        {"authorization": "Bearer ", "x-api-key": "acme-key"},
    ],
)
def test_a_key_leads_to_its_tenant_as_openais_and_anthropics_clients_send_it(
    headers: dict[str, str],
) -> None:
    assert CLOSED.identify(headers) == ACME


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer acme-key2"},
        {"authorization": "acme"},
        {"authorization": "Basic YTpi"},
        {"authorization": "Bearer clé\x00"},
        {"x-api-key": "wrong"},
    ],
)
def test_a_wrong_key_is_refused_and_never_anonymous(headers: dict[str, str]) -> None:
    for directory in (OPEN, CLOSED):
        with pytest.raises(Unauthorized, match="not known"):
            directory.identify(headers)


def test_a_refusal_does_not_repeat_the_key() -> None:
    with pytest.raises(Unauthorized) as caught:
        OPEN.identify({"authorization": "Bearer nearly-right"})
    assert b"nearly-right" not in caught.value.to_openai()


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer "}, {"x-api-key": ""}])
def test_without_a_key_one_is_anonymous_where_that_is_allowed(headers: dict[str, str]) -> None:
    assert OPEN.identify(headers) == Tenant(ANONYMOUS, "standard")
    with pytest.raises(Unauthorized, match="needed"):
        CLOSED.identify(headers)


def test_where_no_keys_exist_none_can_be_wrong() -> None:
    directory = Directory(TIERS, [], "standard", anonymous=True)
    assert directory.identify({"authorization": "Bearer EMPTY"}).name == ANONYMOUS


def test_an_empty_digest_is_no_way_in() -> None:
    directory = Directory(TIERS, [Tenant("keyless", "premium")], "standard", anonymous=False)
    with pytest.raises(Unauthorized):
        directory.identify({"authorization": "Bearer "})


def test_a_key_must_be_right_in_every_bit_and_not_only_where_it_is_looked_up() -> None:
    right = hashlib.sha256(b"a-key").digest()
    for place in range(FOUND_BY, len(right)):
        wrong = bytearray(right)
        wrong[place] ^= 1
        directory = Directory(TIERS, [Tenant("t", "standard", bytes(wrong))], "standard", False)
        with pytest.raises(Unauthorized):
            directory.identify({"x-api-key": "a-key"})


def test_old_and_new_key_lead_to_the_same_tenant_while_one_replaces_the_other() -> None:
    both = [tenant("acme", "old", "premium"), tenant("acme", "new", "premium")]
    directory = Directory(TIERS, both, "standard", anonymous=False)
    assert {directory.identify({"x-api-key": key}).name for key in ("old", "new")} == {"acme"}
    directory = Directory(TIERS, both[1:], "standard", anonymous=False)
    with pytest.raises(Unauthorized):
        directory.identify({"x-api-key": "old"})


# What they may have


def test_a_request_that_says_nothing_has_its_tenants_tier_and_promise() -> None:
    assert OPEN.resolve(ACME, {}, None) == (TIERS["premium"], TIERS["premium"].promise)


@pytest.mark.parametrize(
    ("service_tier", "tier"),
    [
        ("auto", "premium"),
        ("default", "premium"),
        ("priority", "premium"),
        ("flex", "batch"),
        ("standard", "standard"),
    ],
)
def test_service_tier_lowers_the_tier(service_tier: str, tier: str) -> None:
    assert OPEN.resolve(ACME, {}, service_tier)[0] == TIERS[tier]
    assert OPEN.resolve(NIGHT, {}, service_tier)[0] == TIERS["batch"]


def test_an_unknown_service_tier_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"'gold'.*premium") as caught:
        OPEN.resolve(ACME, {}, "gold")
    assert caught.value.param == "service_tier"


@pytest.mark.parametrize("header", ["x-gateway-inference-objective", "x-llm-d-inference-objective"])
def test_an_objective_lowers_the_tier_and_is_ignored_where_it_raises_or_is_unknown(
    header: str,
) -> None:
    assert OPEN.resolve(ACME, {header: "standard"}, None)[0].name == "standard"
    assert OPEN.resolve(NIGHT, {header: "premium"}, None)[0].name == "batch"
    assert OPEN.resolve(ACME, {header: "nonesuch"}, None)[0].name == "premium"


def test_of_two_wishes_the_lower_one_counts() -> None:
    headers = {"x-gateway-inference-objective": "standard"}
    assert OPEN.resolve(ACME, headers, "flex")[0].name == "batch"
    assert OPEN.resolve(ACME, headers, "auto")[0].name == "standard"


def test_of_two_tiers_with_one_weight_the_looser_promise_is_the_lower() -> None:
    standard = Tenant("t", "standard")
    relaxed = Tenant("t", "relaxed")
    assert OPEN.resolve(standard, {}, "relaxed")[0].name == "relaxed"
    assert OPEN.resolve(relaxed, {}, "standard")[0].name == "relaxed"


@pytest.mark.parametrize("prefix", ["x-slo-", "x-llm-d-slo-"])
def test_promise_headers_are_milliseconds_and_loosen_only(prefix: str) -> None:
    looser = {f"{prefix}ttft-ms": "1500", f"{prefix}tpot-ms": "62.5"}
    assert OPEN.resolve(ACME, looser, None)[1] == Promise(1.5, 0.0625, 0.5)
    tighter = {f"{prefix}ttft-ms": "1", f"{prefix}tpot-ms": "1"}
    assert OPEN.resolve(ACME, tighter, None)[1] == TIERS["premium"].promise


def test_a_promise_header_cannot_make_a_promise_where_there_is_none() -> None:
    assert OPEN.resolve(NIGHT, {"x-slo-ttft-ms": "100"}, None)[1] == Promise(inf, inf, inf)


@pytest.mark.parametrize("value", ["", "fast", "0", "-1", "nan", "inf", "1e999", "500ms"])
@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-llm-d-slo-tpot-ms"])
def test_a_bad_number_in_a_promise_header_is_a_bad_request(header: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match="milliseconds above 0") as caught:
        OPEN.resolve(ACME, {header: value}, None)
    assert caught.value.param == header


bounds = st.floats(0.001, 100) | st.just(inf)
promises = st.builds(Promise, bounds, bounds, bounds)
names = ["a", "b", "c", "d"]


@given(
    st.lists(st.tuples(promises, st.sampled_from([1.0, 2.0, 8.0])), min_size=4, max_size=4),
    st.sampled_from(names),
    st.dictionaries(
        st.sampled_from(["x-slo-ttft-ms", "x-llm-d-slo-tpot-ms"]),
        st.floats(0.1, 1e6).map(str),
    ),
    st.none() | st.sampled_from([*names, "nonesuch"]),
    st.none() | st.sampled_from([*names, "flex", "auto", "priority"]),
)
def test_no_request_ever_gets_more_than_its_tenant_has(
    drawn: list[tuple[Promise, float]],
    own: str,
    headers: dict[str, str],
    objective: str | None,
    service_tier: str | None,
) -> None:
    tiers = {
        name: Tier(name, promise, weight=weight)
        for name, (promise, weight) in zip(names, drawn, strict=True)
    }
    if objective is not None:
        headers = headers | {"x-gateway-inference-objective": objective}
    directory = Directory(tiers, [], own, anonymous=True)
    tier, promise = directory.resolve(directory.identify({}), headers, service_tier)
    assert tier.weight <= tiers[own].weight
    for bound in ("ttft_s", "itl_s", "stall_s"):
        assert getattr(promise, bound) >= getattr(tiers[own].promise, bound)
        assert getattr(promise, bound) >= getattr(tier.promise, bound)


# What becomes of a request at the door


class Door:
    """Host and client of a gateway: keeps what comes in, and what is answered at once."""

    def __init__(self, directory: Directory, quotas: Quotas | None = None) -> None:
        names = {"m": "m", "large": "m", "small": "s"}
        self._gateway = Gateway(cast(Host, self), directory, names, Starlette(), quotas=quotas)
        self.opened: list[Exchange] = []
        self.context: object = None
        self.status = 0
        self.body = b""
        self.headers: dict[str, str] = {}

    def open(self, exchange: Exchange) -> None:
        self.opened.append(exchange)

    def knows(self, request_id: str) -> bool:
        return False

    def answer(self, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
        self.status, self.body, self.headers = status, body, dict(headers)

    def ask(self, model: str = "m", **headers: str) -> Exchange:
        """A stream that could go on elsewhere."""
        http = HttpRequest()
        http.method, http.path = "POST", "/v1/chat/completions"
        http.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        http.body = json.dumps({"model": model, "messages": [], "stream": True}).encode()
        self._gateway.on_request(cast(ServerConnection, self), http)
        return self.opened[-1]


def way_down(request: Request | None) -> list[tuple[str, str, str]]:
    """Tier, model and overload rule of a request, and of what it becomes step by step."""
    return [] if request is None else [steps(request), *way_down(request.instead)]


def steps(request: Request) -> tuple[str, str, str]:
    return (request.tier, request.model, request.overload)


def directory_of(own: str, *tiers: Tier) -> Directory:
    return Directory({tier.name: tier for tier in tiers}, [], own, anonymous=True)


def test_a_request_carries_what_its_tier_says_of_it() -> None:
    tier = Tier("t", Promise(1.0), 0.9, 3.0, overload="shed", preemptible=True, deadline_s=60.0)
    request = Door(directory_of("t", tier)).ask().request
    assert (request.tier, request.promise, request.weight) == ("t", Promise(1.0), 3.0)
    assert (request.overload, request.preemptible, request.deadline_s) == ("shed", True, 60.0)
    assert (request.streaming, request.resumable, request.instead) == (True, True, None)


PREMIUM = Tier("premium", Promise(0.5, 0.04), weight=8, overload="degrade", degrade_to="standard")
STANDARD = Tier("standard", Promise(2.0, 0.08), weight=2, overload="degrade", degrade_to="small")


def test_a_request_knows_its_way_down_step_by_step() -> None:
    request = Door(directory_of("premium", PREMIUM, STANDARD)).ask("large").request
    assert way_down(request) == [
        ("premium", "m", "degrade"),
        ("standard", "m", "degrade"),
        ("standard", "s", "degrade"),
    ]
    assert request.instead is not None
    assert request.instead.weight == 2
    assert request.instead.promise == STANDARD.promise
    assert replace(request.instead, instead=None) == replace(
        request, tier="standard", promise=STANDARD.promise, weight=2, instead=None
    )


def test_a_request_for_the_smaller_model_has_no_way_down_to_it() -> None:
    assert way_down(Door(directory_of("standard", STANDARD)).ask("small").request) == [
        ("standard", "s", "degrade")
    ]


def test_a_promise_that_was_loosened_stays_so_on_the_way_down() -> None:
    door = Door(directory_of("premium", PREMIUM, STANDARD))
    request = door.ask(x_slo_ttft_ms="9000", x_slo_tpot_ms="50").request
    assert request.promise == Promise(9.0, 0.05)
    assert request.instead is not None
    assert request.instead.promise == Promise(9.0, 0.08)


def test_a_fairness_id_makes_no_tenant_of_its_own() -> None:
    door = Door(OPEN)
    assert door.ask(x_gateway_inference_fairness_id="me").request.tenant == ANONYMOUS


def limited(**limits: int) -> Door:
    acme = replace(ACME, **cast(Any, limits))
    return Door(Directory(TIERS, [acme], "standard", anonymous=True), Quotas([acme]))


def test_a_request_over_a_limit_is_answered_429_and_never_begins() -> None:
    door = limited(requests_per_minute=2, max_streams=10)
    for _ in range(3):
        door.ask(x_api_key="acme-key")
    assert len(door.opened) == 2
    assert door.status == 429
    assert json.loads(door.body)["error"]["code"] == "requests_per_minute"
    assert door.headers["Retry-After"] == "30"
    assert door.headers["x-ratelimit-remaining-requests"] == "0"
    door.ask()
    assert len(door.opened) == 3  # others don't feel it


def test_an_answer_tells_what_is_left() -> None:
    told = limited(tokens_per_minute=1000).ask(x_api_key="acme-key")._own_headers()
    assert dict(told)["x-ratelimit-remaining-tokens"] == "999"


def test_a_request_that_is_wrong_uses_nothing_up() -> None:
    door = limited(requests_per_minute=1, max_streams=1)
    door.opened.append(cast(Exchange, None))
    for _ in range(3):
        door.ask("nonesuch", x_api_key="acme-key")
        assert door.status == 404
    door.ask(x_api_key="acme-key")
    assert len(door.opened) == 2
