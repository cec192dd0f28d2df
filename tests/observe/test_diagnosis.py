"""What do the endpoints and `paceline diagnose` say, and is a healthy fleet left in peace?"""

from __future__ import annotations

import asyncio
import json
from math import inf
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient
from test_admin import Idle, serving
from test_stalls import DOCUMENTS, played
from troubled import CHAT, Watched, healthy
from typer.testing import CliRunner

from paceline.cli import app as command_line
from paceline.diagnose import NoDiagnosis, fetch
from paceline.domain.facts import RequestArrived, WorkerAdded
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker
from paceline.kernel import Kernel
from paceline.observe.admin import admin_app
from paceline.observe.diagnosis import GONE_S, Diagnosis
from paceline.observe.findings import diagnosis_routes
from paceline.observe.lag import watch_lag
from paceline.observe.metrics import Metrics
from paceline.observe.stalls import Stalls
from paceline.policy.causes import Cause
from paceline.simulator.scenario import Fault, Requests, SimTier, Workers


def admin_of(diagnosis: Diagnosis) -> Any:
    kernel = Kernel()
    routes = diagnosis_routes(diagnosis)
    return admin_app(kernel, Metrics(kernel, {}, [0.1]), Idle(), lambda: 0.0, routes)


def quiet() -> Diagnosis:
    kernel = Kernel()
    return Diagnosis(kernel, Stalls(kernel), (lambda: 50.0, lambda: 1050.0))


def named(watched: Watched, after_s: float) -> tuple[float, str, str]:
    """When, and what, was found first after a moment, at the head of the list."""
    return next(
        (now, findings[0].kind, findings[0].worker)
        for now, findings in watched.findings
        if findings and now > after_s
    )


@pytest.mark.parametrize(
    ("trouble", "kind", "from_s"),
    [
        ("slow", "slow_worker", 20.0),
        ("hang", "hung_worker", 20.0),
        ("crash", "lost_worker", 20.0),
        ("kv", "kv_pressure", 0.0),
        ("link", "slow_link", 0.0),
        ("flood", "fleet_full", 20.0),
    ],
)
def test_each_trouble_is_named_first_within_fifteen_seconds(
    trouble: str, kind: str, from_s: float
) -> None:
    now, found, _ = named(played(trouble), from_s)
    assert found == kind
    assert now - from_s <= 15.0


def test_prompts_among_decodes_are_named_where_a_worst_gap_is_promised() -> None:
    tiers = {
        "chat": SimTier(ttft_s=1.0, itl_s=0.04, stall_s=0.3),
        "documents": SimTier(ttft_s=20.0),
    }
    watched = Watched(healthy(tiers=tiers, requests=(CHAT, DOCUMENTS)), seed=2).run()
    now, kind, _ = named(watched, 10.0)
    assert kind == "prefill_in_decode"
    assert now <= 25.0


def test_ten_minutes_of_healthy_mixed_load_raise_no_alarm() -> None:
    mixed = (
        CHAT,
        Requests(kind="chat", rate=0.3, tier="chat", tenant="b"),
        Requests(kind="documents", rate=0.2, tier="documents", tenant="law"),
        Requests(kind="batch", rate=0.4, tier="batch", tenant="night", turns=10),
    )
    tiers = {
        "chat": SimTier(ttft_s=1.5, itl_s=0.04, stall_s=1.5, weight=4),
        "documents": SimTier(ttft_s=20.0, itl_s=0.2),
        "batch": SimTier(preemptible=True),
    }
    fleet = (Workers(profile="h100-llama-70b-tp4", count=4),)
    watched = Watched(healthy(seconds=600.0, requests=mixed, tiers=tiers, workers=fleet)).run()
    assert [(now, found[0].says) for now, found in watched.findings if found] == []


def test_a_trouble_that_is_over_is_soon_forgotten_and_its_start_is_remembered() -> None:
    slow = Fault(kind="slow", worker="w0", at_s=15, for_s=10, factor=4.0)
    watched = Watched(healthy(slow)).run()
    found = {now: findings[0] for now, findings in watched.findings if findings}
    assert len({finding.since for finding in found.values()}) == 1
    assert 15.0 < min(found) < 30.0
    assert max(found) < 25.0 + 2 * GONE_S


# What operators see.


def test_the_diagnosis_of_a_troubled_fleet_can_be_asked_for() -> None:
    client = TestClient(admin_of(played("kv").diagnosis))
    answer = client.get("/paceline/v1/diagnosis").json()
    assert set(answer) == {
        "at", "window_s", "requests", "promises_lost", "overdue", "findings", "notes"
    }  # fmt: skip
    for finding in answer["findings"]:
        assert {"kind", "worker", "since", "says", "remedy", "evidence", "hurt"} <= set(finding)


def test_late_events_can_be_asked_for_by_worker() -> None:
    client = TestClient(admin_of(played("documents").diagnosis))
    answer = client.get("/paceline/v1/stalls?worker=w0&limit=5").json()
    assert answer["causes"] == [cause.value for cause in Cause]
    assert list(answer["workers"]) == ["w0"]
    events = answer["workers"]["w0"]
    assert 1 <= len(events) <= 5
    assert events[-1]["streams"] == sum(events[-1]["tiers"].values())
    assert sum(events[-1]["split"].values()) == pytest.approx(events[-1]["late_s"])
    assert {"model", "tier", "worker", "cause", "seconds", "gaps", "promises"} == set(
        answer["lost"][0]
    )
    assert client.get("/paceline/v1/stalls?limit=0").status_code == 400


def test_times_are_those_of_the_wall() -> None:
    assert asyncio.run(quiet().to_json()) == {
        "at": 1050.0,
        "window_s": 30.0,
        "requests": 0,
        "promises_lost": 0,
        "overdue": 0,
        "findings": [],
        "notes": [],
    }


def test_what_is_overdue_counts_among_the_promises_lost() -> None:
    now, kernel = 0.0, Kernel()
    diagnosis = Diagnosis(kernel, stalls := Stalls(kernel), (lambda: now, lambda: now))
    kernel.handle(WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    for name, tier, ttft_s in (("a", "chat", 1.0), ("b", "chat", 9.0), ("c", "batch", inf)):
        arrived = RequestArrived(Request(name, "m", "acme", tier, Promise(ttft_s=ttft_s)))
        stalls.saw(0.0, arrived, kernel.handle(arrived, 0.0))
    now = 5.0
    answer = asyncio.run(diagnosis.to_json())
    assert (answer["requests"], answer["promises_lost"], answer["overdue"]) == (1, 1, 1)
    assert diagnosis.look(now).waiting == {"m": 2}  # the batch job has time


def test_over_quota_counts_within_the_window_alone() -> None:
    now, refused = [0.0], {"acme": 100}
    kernel = Kernel()
    clocks = (lambda: now[0], lambda: now[0])
    diagnosis = Diagnosis(kernel, Stalls(kernel), clocks, lambda: refused)
    assert diagnosis.findings(0.0) == []
    refused = {"acme": 110, "b": 50}
    (acme, b) = diagnosis.findings(5.0)
    assert (acme.tenant, acme.evidence["refused"], b.evidence["refused"]) == ("acme", 10, 50)
    assert diagnosis.findings(60.0) == []


# The command.


def answer_of(*findings: dict[str, Any]) -> dict[str, Any]:
    return {
        "at": 160.0,
        "window_s": 30.0,
        "requests": 400,
        "promises_lost": 12,
        "findings": list(findings),
    }


FINDING = {
    "kind": "slow_worker",
    "since": 100.0,
    "says": "w0 is slow.",
    "remedy": "Look at it.",
    "evidence": {"times_as_slow": 3.1415},
    "hurt": {"promises_lost": 12, "streams": 9, "tiers": {"gold": 12}, "tenants": {"acme": 12}},
}


@pytest.mark.parametrize(("findings", "status"), [((), 0), ((FINDING,), 1)])
def test_the_exit_status_tells_a_script(
    findings: tuple[dict[str, Any], ...], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def told(url: str) -> bytes:
        return msgspec.json.encode(answer_of(*findings))

    monkeypatch.setattr("paceline.diagnose.fetch", told)
    shown = CliRunner().invoke(command_line, ["diagnose"])
    assert shown.exit_code == status
    assert "12 of 400 promises lost" in shown.output
    printed = CliRunner().invoke(command_line, ["diagnose", "--json"])
    assert printed.exit_code == status
    assert len(json.loads(printed.output)["findings"]) == len(findings)


def test_the_table_says_what_is_known_who_is_hurt_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def told(url: str) -> bytes:
        return msgspec.json.encode(answer_of(FINDING))

    monkeypatch.setattr("paceline.diagnose.fetch", told)
    output = CliRunner().invoke(command_line, ["diagnose"], env={"COLUMNS": "120"}).output
    for words in (
        "slow_worker",
        "1 min",
        "times as slow 3.14",
        "gold 12; acme 12",
        "→ Look at it.",
    ):
        assert words in output


def test_where_utilisation_misleads_is_said_below_and_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def told(url: str) -> bytes:
        return msgspec.json.encode(answer_of() | {"notes": ["The GPUs are 98% utilised."]})

    monkeypatch.setattr("paceline.diagnose.fetch", told)
    shown = CliRunner().invoke(command_line, ["diagnose"])
    assert shown.exit_code == 0
    assert shown.output.endswith("The GPUs are 98% utilised.\n")


def test_a_gateway_that_cannot_be_asked_ends_with_a_sentence() -> None:
    with pytest.raises(NoDiagnosis, match="nobody answers; is `paceline serve` running"):
        asyncio.run(fetch("127.0.0.1:1"))


def test_what_is_no_gateway_is_said_to_be_none() -> None:
    async def ask() -> None:
        async with serving(admin_app(Kernel(), Metrics(Kernel(), {}, [0.1]), Idle(), float)) as url:
            await fetch(url)

    with pytest.raises(NoDiagnosis, match="HTTP 404"):
        asyncio.run(ask())


def test_a_live_gateway_can_be_asked() -> None:
    async def ask() -> bytes:
        async with serving(admin_of(quiet())) as url:
            return await fetch(url)

    assert json.loads(asyncio.run(ask()))["findings"] == []


def test_a_late_event_loop_is_told() -> None:
    told: list[tuple[float, float]] = []

    async def busy() -> None:
        task = asyncio.create_task(watch_lag(lambda at, seconds: told.append((at, seconds))))
        await asyncio.sleep(0.01)
        until = asyncio.get_running_loop().time() + 0.2
        while asyncio.get_running_loop().time() < until:
            pass
        await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(busy())
    assert max(seconds for _, seconds in told) > 0.1
