from __future__ import annotations

from pathlib import Path

import pytest

from paceline.domain.errors import ConfigError
from paceline.simulator.load import load_scenario
from paceline.simulator.scenario import Pattern, Requests, Scenario
from paceline.simulator.traffic import arrivals

SMALL = """\
about: A test.
seconds: 60
workers:
  - {profile: tiny, count: 2}
tiers:
  standard: {ttft_s: 2, itl_s: 0.08}
requests:
  - {rate: 3}
"""

FULL = """\
about: Whatever can be said is said.
seconds: 600
warmup_s: 30
drain_s: 60
load: 1.2
margin: 0.2
first_token_timeout_s: 100
stall_timeout_s: 20
engine_priority: true
workers:
  - {profile: h100-llama-8b, count: 3, name: new, model: eight, node: a, cost_per_hour: 4}
  - {profile: a100-llama-8b, name: old, model: eight, speed: 0.5, added_s: 60, start_up_s: 30,
     kv_tokens: 50000}
tiers:
  premium: {ttft_s: 0.5, itl_s: 0.04, stall_s: 1, weight: 8, overload: degrade,
            degrade_to: standard}
  standard: {ttft_s: 2, overload: degrade, degrade_to: flex}
  flex: {preemptible: true, deadline_s: 300, weight: 0.5}
gateways: {count: 2, every_s: 0.1, delay_s: 0.05, loss: 0.1}
network: {latency_s: 0.002, bytes_per_s: 1e9, probe_s: 1}
requests:
  - {kind: chat, rate: 4, cv: 2, tier: premium, tenant: acme, turns: 6, think_s: 5, shared: 512,
     resumable: 0.9}
  - kind: independent
    rate: 10
    from_s: 60
    until_s: 500
    prompt: [500, 4000]
    output: [100, 500]
    pattern: {diurnal_period_s: 300, diurnal_swing: 0.3, steps: [[100, 2], [200, 0.5]]}
    tier: standard
  - {kind: batch, rate: 1, turns: 40, tier: standard}
  - {kind: trace, file: own.jsonl, most_prompt: 1000, rate: 1, tier: standard}
faults:
  - {kind: slow, worker: new1, at_s: 100, for_s: 20, factor: 3, every_s: 60}
  - {kind: partition, worker: "*", at_s: 300, for_s: 10, gateway: g1}
"""


@pytest.fixture(autouse=True)
def _nothing_lies_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PACELINE_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def load(folder: Path, text: str, *overrides: tuple[str, str]) -> Scenario:
    path = folder / "s.yaml"
    path.write_text(text)
    return load_scenario(path, overrides)


def complaints(folder: Path, text: str, *overrides: tuple[str, str]) -> list[str]:
    """What is wrong, without the path before it."""
    with pytest.raises(ConfigError) as refusal:
        load(folder, text, *overrides)
    return [problem.removeprefix(f"{folder}/s.yaml:") for problem in refusal.value.problems]


def trace(folder: Path, name: str = "own.jsonl", more: str = "") -> Path:
    file = folder / name
    file.write_text(f'{{"at_s": 0, "prompt_tokens": 5, "output_tokens": 1{more}}}\n')
    return file


def test_all_that_a_scenario_can_say_is_read(tmp_path: Path) -> None:
    own = trace(tmp_path)
    scenario = load(tmp_path, FULL)
    assert scenario.workers[0].names == ("new0", "new1", "new2")
    assert scenario.tier == "premium"
    assert scenario.tiers["premium"].promise.stall_s == 1.0
    assert scenario.urgency == {"premium": 0, "standard": 1, "flex": 2}
    assert scenario.requests[1].prompt == (500, 4000)
    assert scenario.requests[1].pattern == Pattern(
        diurnal_period_s=300.0, diurnal_swing=0.3, steps=((100.0, 2.0), (200.0, 0.5))
    )
    assert scenario.requests[3].file == str(own)
    assert scenario.faults[1].gateway == "g1"
    assert scenario.load == 1.2
    assert next(arrivals(scenario, 1)).model == "eight"


def test_a_small_scenario_is_enough_and_is_called_as_its_file(tmp_path: Path) -> None:
    scenario = load(tmp_path, SMALL)
    assert scenario.requests == (Requests(rate=3.0),)
    assert scenario.name == "s"


def test_all_problems_are_told_at_once_with_place_and_line(tmp_path: Path) -> None:
    text = SMALL.replace("count: 2", "cuont: 2").replace("itl_s: 0.08", "itl_s: 80ms")
    assert complaints(tmp_path, text.replace("rate: 3", "rate: -3")) == [
        "4: workers[0].cuont: unknown key, did you mean count (a whole number of at least 1)?",
        "6: tiers.standard.itl_s: expected a number above 0, got '80ms': write the number alone",
        "8: requests[0].rate: expected a number above 0, got '-3'",
    ]


@pytest.mark.parametrize(
    ("written", "instead", "says"),
    [
        ("tiny", "tinny", "4: workers[0].profile: unknown profile 'tinny', did you mean tiny?"),
        ("  - {profile: tiny, count: 2}", "  []", "4: workers: a scenario needs at least one"),
        ("  - {rate: 3}", "  []", "8: requests: a scenario needs at least one"),
        ("  standard: {ttft_s: 2, itl_s: 0.08}", "  {}", "6: tiers: a scenario needs at least one"),
        ("seconds: 60\n", "", "1: seconds: missing: a number above 0"),
        ("rate: 3", "cv: 2", "8: requests[0].rate: missing: requests a second, for kind "
         "independent"),
        ("rate: 3", "rate: 3, tier: standart", "8: requests[0].tier: unknown tier 'standart', "
         "did you mean standard?"),
        ("rate: 3", "rate: 3, model: x", "8: requests[0].model: unknown model 'x', known are m"),
        ("rate: 3", "rate: 3, turns: 4", "8: requests[0].turns: means nothing for requests of kind "
         "independent"),
        ("rate: 3", "rate: 3, kind: batch, cv: 4", "8: requests[0].cv: means nothing for requests "
         "of kind batch in one go"),
        ("rate: 3", "rate: 3, from_s: 60", "8: requests[0].from_s: 60 is after the end"),
        ("rate: 3", "rate: 3, prompt: [9, 5]", "8: requests[0].prompt: the median 9 is above the "
         "99th percentile 5"),
        ("rate: 3", "rate: 3, prompt: [5]", "8: requests[0].prompt: expected a list of 2: a whole "
         "number of at least 1, a whole number of at least 1, got 1"),
        ("rate: 3", "rate: 3, pattern: {steps: [[9, 1], [3, 2]]}", "8: requests[0].pattern.steps: "
         "not in the order of time"),
        ("rate: 3", "kind: trace", "8: requests[0].file: missing: the path of the trace"),
        ("requests:", "warmup_s: 60\nrequests:", "7: warmup_s: nothing would count: the scenario "
         "lasts 60 s"),
        ("itl_s: 0.08", "overload: degrade", "6: tiers.standard.degrade_to: missing: the lower "
         "tier or the model that a degraded request gets"),
        ("itl_s: 0.08", "degrade_to: m", "6: tiers.standard.degrade_to: means nothing without "
         "overload: degrade"),
        ("itl_s: 0.08", "overload: degrade, degrade_to: x", "6: tiers.standard.degrade_to: unknown "
         "tier or model 'x', known are standard, m"),
        ("itl_s: 0.08", "overload: degrade, degrade_to: standard", "6: tiers.standard.degrade_to: "
         "standard is no lower tier: it must weigh less, or as much and promise less"),
        ("itl_s: 0.08", "overload: drop", "6: tiers.standard.overload: expected one of degrade, "
         "queue, shed, got 'drop'"),
        ("requests:", "  other: {}\nrequests:", "7: tiers.other: no requests are of this tier"),
        ("tiers:", "  - {profile: tiny}\ntiers:", "5: workers[1].name: w0 is one of workers[0] "
         "already: name these otherwise"),
        ("requests:", "faults: [{kind: hang, worker: w2, at_s: 1}]\nrequests:",
         "7: faults[0].worker: unknown worker 'w2', known are *, w0, w1"),
        ("requests:", "faults: [{kind: hang, worker: w1, at_s: 60}]\nrequests:",
         "7: faults[0].at_s: 60 is after the end: the scenario lasts 60 s"),
        ("requests:", "faults: [{kind: hang, worker: w1, at_s: 6, every_s: 9}]\nrequests:",
         "7: faults[0].every_s: it comes again before it is over: set every_s above for_s"),
        ("requests:", "faults: [{kind: partition, worker: w1, at_s: 6, gateway: g1}]\nrequests:",
         "7: faults[0].gateway: unknown gateway 'g1', known are *, g0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_told(
    tmp_path: Path, written: str, instead: str, says: str
) -> None:
    assert complaints(tmp_path, SMALL.replace(written, instead)) == [says]


def test_an_empty_or_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing in this file"):
        load(tmp_path, "")
    with pytest.raises(ConfigError, match="No such file"):
        load_scenario(tmp_path / "none.yaml")


def test_a_trace_lies_beside_the_scenario_or_under_its_name_where_big_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SMALL.replace("rate: 3", "kind: trace, file: traces/big.jsonl")
    [says] = complaints(tmp_path, text)
    assert (
        f"there is no file {tmp_path}/traces/big.jsonl, and none of its name in $PACELINE_DATA"
        in says
    )
    (tmp_path / "data").mkdir()
    far = trace(tmp_path / "data", "big.jsonl")
    monkeypatch.setenv("PACELINE_DATA", str(far.parent))
    assert load(tmp_path, text).requests[0].file == str(far)
    (tmp_path / "traces").mkdir()
    near = trace(tmp_path / "traces", "big.jsonl")
    assert load(tmp_path, text).requests[0].file == str(near)


def test_a_trace_is_looked_into(tmp_path: Path) -> None:
    text = SMALL.replace("rate: 3", "kind: trace, file: own.jsonl")
    trace(tmp_path, more=', "tier": "gold"')
    assert "8: requests[0].tier: unknown tier 'gold', known are standard" in complaints(
        tmp_path, text
    )
    (tmp_path / "own.jsonl").write_text("nonsense")
    assert "own.jsonl:1: no known form of trace" in complaints(tmp_path, text)[0]


def test_overrides_take_the_place_of_what_is_written(tmp_path: Path) -> None:
    scenario = load(
        tmp_path,
        SMALL,
        ("requests.0.rate", "40"),
        ("requests[0].prompt", "[300, 900]"),
        ("requests.0.pattern.diurnal_period_s", "30"),
        ("gateways.count", "4"),
        ("workers.0.count", "6"),
        ("load", "1.5"),
        ("load", "2"),
        ("tiers.standard.ttft_s", ""),
    )
    [asked] = scenario.requests
    assert (asked.rate, asked.prompt) == (40.0, (300, 900))
    assert asked.pattern.diurnal_period_s == 30.0
    assert (scenario.gateways.count, scenario.workers[0].count, scenario.load) == (4, 6, 2.0)
    assert scenario.tiers["standard"].ttft_s == float("inf")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("requests.0.rat", "4", "requests[0].rat: unknown key, did you mean rate (a number "
         "above 0)?"),
        ("requests.0.rate", "many", "requests[0].rate: expected a number above 0, got 'many'"),
        ("requests.0.prompt", "[1, a]", "requests[0].prompt[1]: expected a whole number of at "
         "least 1, got 'a'"),
        ("requests.1.rate", "4", "there is no 1 in a list of 1"),
        ("requests.first.rate", "4", "there is no first in a list of 1"),
        ("seconds.count", "4", "there is no count in 60"),
        ("load", "[1", "this is not YAML"),
        ("tiers.standart.ttft_s", "1", "tiers.standart: no requests are of this tier"),
        ("second", "2", "second: unknown key, did you mean seconds (a number above 0)?"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_told_as_it_was_given(
    tmp_path: Path, key: str, value: str, says: str
) -> None:
    assert complaints(tmp_path, SMALL, (key, value)) == [f"--set {key}={value}: {says}"]


def test_a_wrong_swept_value_is_told_as_one(tmp_path: Path) -> None:
    (path := tmp_path / "s.yaml").write_text(SMALL)
    with pytest.raises(ConfigError, match=r"^--sweep load=fast: load: expected a number above 0"):
        load_scenario(path, [("load", "2")], [("load", "fast")])


def test_what_a_setting_makes_wrong_elsewhere_is_told_with_its_line(tmp_path: Path) -> None:
    wrong = complaints(tmp_path, SMALL + "warmup_s: 10\n", ("seconds", "5"))
    assert wrong == ["9: warmup_s: nothing would count: the scenario lasts 5 s"]
