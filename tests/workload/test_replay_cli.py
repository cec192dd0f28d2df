from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest
import typer
from scripted_engine import ScriptedEngine, answer
from typer.testing import CliRunner, Result

from paceline.domain.promise import Promise
from paceline.workload.replay_cli import parse_promise, parse_shares, plan, replay_command

SAMPLES = Path(__file__).parents[2] / "examples" / "traces"


def tier_promises(path: Path) -> dict[str, Promise]:
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    return {"premium": Promise(ttft_s=0.000001), "standard": Promise(ttft_s=60.0)}


app = typer.Typer()
app.command()(replay_command(tier_promises))


def replay(*args: str) -> Result:
    return CliRunner().invoke(app, args)


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    """An engine in a thread of its own, since the command runs its own loop."""
    scripted = ScriptedEngine(lambda body: (200, [answer(body["max_tokens"])]))
    started, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with scripted.serving():
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    started.wait()
    yield scripted
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def test_a_trace_is_replayed_and_reported_as_json_and_csv(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    rows = tmp_path / "out.csv"
    result = replay(
        str(SAMPLES / "azure-conv-sample.csv"),
        *("--url", engine.url, "--speed", "100", "--limit", "40", "--promise", "60,60"),
        *("--json", "--csv", str(rows), "--check-tokens"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tiers"]["all"]["requests"] == 40
    assert report["tiers"]["all"]["attainment"] == 1.0
    assert len(rows.read_text().splitlines()) == 41


def test_a_workload_is_dealt_to_tiers_with_promises_from_a_config(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    config = tmp_path / "paceline.yaml"
    config.touch()
    result = replay(
        *("poisson", "--url", engine.url, "--rate", "200", "--duration", "0.3", "--json"),
        *("--tiers", "premium=1,standard=1", "--config", str(config)),
    )
    assert result.exit_code == 0, result.output
    tiers = json.loads(result.stdout)["tiers"]
    assert (tiers["premium"]["attainment"], tiers["standard"]["attainment"]) == (0.0, 1.0)


def test_people_get_a_table(engine: ScriptedEngine) -> None:
    result = replay("chat", "--url", engine.url, "--rate", "50", "--duration", "0.3")
    assert result.exit_code == 0
    assert "promise kept" in result.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nothing.csv", "--model", "m"], "no such file"),
        (["poisson"], "does not list its models"),
        (["poisson", "--model", "m", "--promise", "0.5"], "TTFT,ITL"),
        (["poisson", "--model", "m", "--promise", "fast,faster"], "times are seconds"),
        (["poisson", "--model", "m", "--tiers", "premium"], "shares above 0"),
        (["poisson", "--model", "m", "--config", "none.yaml"], "none.yaml"),
        (["poisson", "--model", "m", "--csv", "/nowhere/x.csv"], "/nowhere/x.csv"),
        (["poisson", "--model", "m", "--duration", "0.001"], "no request is left"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_status_2(args: list[str], says: str) -> None:
    result = replay(*args, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_same_seed_plans_the_same_replay() -> None:
    for source in ("mixed", str(SAMPLES / "mooncake-sample.jsonl")):
        first, again, other = (
            plan(source, seed, rate=5.0, duration_s=20.0, tiers={"a": 1, "b": 1})
            for seed in (1, 1, 2)
        )
        assert first == again != other


def test_a_rate_is_the_rate_after_speeding_up() -> None:
    arrivals = plan(str(SAMPLES / "azure-conv-sample.csv"), 0, rate=10.0, speed=2.0)
    span_s = arrivals[-1].at_s - arrivals[0].at_s
    assert len(arrivals) / span_s == pytest.approx(10.0, rel=0.2)
    generated = plan("poisson", 0, rate=10.0, speed=2.0, duration_s=100.0)
    assert len(generated) == pytest.approx(1000, rel=0.15)


def test_promises_are_read_in_seconds_or_milliseconds() -> None:
    assert parse_promise("0.5,40ms") == ("", Promise(0.5, 0.04))
    assert parse_promise("premium=0.5s,0.04,1") == ("premium", Promise(0.5, 0.04, 1.0))
    assert parse_promise(",40ms") == ("", Promise(inf, 0.04))


def test_shares_are_relative() -> None:
    assert parse_shares("a=1, b=3") == {"a": 1.0, "b": 3.0}
    assert parse_shares("") == {}
