"""Can this scenario be played? From a YAML file to a scenario, and every complaint on that way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random

import yaml
from msgspec.structs import replace

from paceline.config.load import text_of
from paceline.config.reader import Reader
from paceline.config.wording import nearest
from paceline.domain.errors import ConfigError
from paceline.enginemodel import PROFILES
from paceline.simulator.scenario import Requests, Scenario, SimTier
from paceline.workload.traces import Arrival, TraceError, load_trace

Override = tuple[str, str]
"""A setting in place of the file's: ("requests.0.rate", "40")."""
Problem = tuple[str, str]
"""Where something is wrong, and what."""

GENERATED = {"cv", "pattern", "prompt", "output", "shared"}
SESSIONS = GENERATED | {"turns", "think_s", "families"}
TAKES = {
    "independent": GENERATED,
    "documents": GENERATED,
    "chat": SESSIONS,
    "agents": SESSIONS,
    "batch": GENERATED | {"turns"},
    "batch in one go": GENERATED - {"cv", "pattern"},
    "trace": {"file", "most_prompt"},
}
"""Which settings mean something for which kind of requests. The others are refused."""
DEFAULTS = Requests()
ANYTHING = Arrival(0.0, 1, 1)

BIG_FILES = "PACELINE_DATA"
"""The variable that tells where whole traces lie, too big for the folder of a scenario."""

MAP, TEXT, NULL = (f"tag:yaml.org,2002:{name}" for name in ("map", "str", "null"))


def load_scenario(
    path: Path, overrides: Sequence[Override] = (), swept: Sequence[Override] = ()
) -> Scenario:
    """The scenario in a file, or a `ConfigError` with all that is wrong. Paths become absolute."""
    reader = Reader(os.environ, str(path))
    put = [("--set", *setting) for setting in overrides] + [("--sweep", *at) for at in swept]
    scenario = reader.read(text_of(path), Scenario, partial(_override, reader=reader, put=put))
    if scenario is not None:
        files = tuple(_with_file(asked, path.parent) for asked in scenario.requests)
        scenario = replace(scenario, name=scenario.name or path.stem, requests=files)
        for place, what in _problems(scenario):
            if reader.is_sound(place):
                reader.complain(place, what)
    if found := reader.problems():
        raise ConfigError(found)
    if scenario is None:
        raise ConfigError([f"{path}: there is nothing in this file"])
    return scenario


def _with_file(asked: Requests, folder: Path) -> Requests:
    """A trace lies where it is written, or under its name where big files lie."""
    if not asked.file:
        return asked
    written = (folder / asked.file).resolve()
    elsewhere = Path(os.environ.get(BIG_FILES, folder)) / written.name
    found = elsewhere if elsewhere.is_file() and not written.is_file() else written
    return replace(asked, file=str(found.resolve()))


# Overrides


def _override(root: yaml.Node, reader: Reader, put: Sequence[tuple[str, str, str]]) -> None:
    """Put settings where the file has others, so that they are checked as if it had them."""
    for option, key, text in put:
        *way, last = key.replace("[", ".").replace("]", "").split(".")
        given = f"{option} {key}={text}"
        try:
            node, place = root, ""
            for part in way:
                place = _place(node, part, place)
                inside = _item(node, part)
                if inside is None:
                    inside = _put(node, part, yaml.MappingNode(MAP, [], node.start_mark))
                    reader.comes_from(place, given)
                node = inside
            _put(node, last, _value(text, node.start_mark))
            reader.comes_from(_place(node, last, place), given)
        except (LookupError, yaml.YAMLError) as trouble:
            why = trouble.args[0] if isinstance(trouble, LookupError) else "this is not YAML"
            raise ConfigError([f"{given}: {why}"]) from None


def _place(node: yaml.Node, part: str, around: str) -> str:
    """What the reader calls a part of this node."""
    if isinstance(node, yaml.SequenceNode):
        return f"{around}[{part}]"
    return f"{around}.{part}" if around else part


def _value(text: str, around: yaml.Mark) -> yaml.Node:
    """The value as if it stood in the line of what is around it, where complaints are in order."""
    node = yaml.compose("\n" * around.line + text, yaml.SafeLoader)
    return node or yaml.ScalarNode(NULL, "", around)


def _item(node: yaml.Node, part: str) -> yaml.Node | None:
    """What a map or a list has under this name or number, if anything."""
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    inside = isinstance(node, yaml.SequenceNode) and part in map(str, range(len(node.value)))
    return node.value[int(part)] if inside else None


def _put(node: yaml.Node, part: str, value: yaml.Node) -> yaml.Node:
    if isinstance(node, yaml.MappingNode):
        others = [(key, old) for key, old in node.value if key.value != part]
        node.value = [*others, (yaml.ScalarNode(TEXT, part, node.start_mark), value)]
    elif _item(node, part):
        node.value[int(part)] = value
    elif isinstance(node, yaml.SequenceNode):
        raise LookupError(f"there is no {part} in a list of {len(node.value)}")
    else:
        raise LookupError(f"there is no {part} in {node.value}")
    return value


# Rules


def _problems(scenario: Scenario) -> Iterator[Problem]:
    """What no single setting can tell."""
    empty = [place for place in ("workers", "tiers", "requests") if not getattr(scenario, place)]
    if empty:
        yield from ((place, "a scenario needs at least one") for place in empty)
        return
    yield from _workers(scenario)
    yield from _tiers(scenario)
    yield from _requests(scenario)
    yield from _faults(scenario)
    if scenario.warmup_s >= scenario.seconds:
        yield "warmup_s", f"nothing would count: the scenario lasts {scenario.seconds:g} s"


def _workers(scenario: Scenario) -> Iterator[Problem]:
    owner: dict[str, str] = {}
    for index, group in enumerate(scenario.workers):
        at = f"workers[{index}]"
        yield from _known(f"{at}.profile", "profile", [group.profile], PROFILES)
        twice = next((name for name in group.names if name in owner), None)
        if twice:
            yield f"{at}.name", f"{twice} is one of {owner[twice]} already: name these otherwise"
        owner |= dict.fromkeys(group.names, at)


def _tiers(scenario: Scenario) -> Iterator[Problem]:
    tiers = scenario.tiers
    known = [*tiers, *(group.model for group in scenario.workers)]
    for name, tier in tiers.items():
        at, to = f"tiers.{name}.degrade_to", tier.degrade_to
        if tier.overload != "degrade":
            if to:
                yield at, "means nothing without overload: degrade"
        elif not to:
            yield at, "missing: the lower tier or the model that a degraded request gets"
        elif to in tiers and tiers[to].rank >= tier.rank:
            yield at, f"{to} is no lower tier: it must weigh less, or as much and promise less"
        else:
            yield from _known(at, "tier or model", [to], known)


def _lower(tiers: Mapping[str, SimTier], name: str) -> Iterator[str]:
    """The tiers that requests of this one may get instead."""
    while (to := tiers[name].degrade_to) in tiers and tiers[to].rank < tiers[name].rank:
        yield (name := to)


def _requests(scenario: Scenario) -> Iterator[Problem]:
    tiers = scenario.tiers.keys()
    models = list(dict.fromkeys(group.model for group in scenario.workers))
    used: set[str] = set()
    for index, asked in enumerate(scenario.requests):
        at = f"requests[{index}]"
        yield from _asked(scenario, asked, at)
        try:
            came = _recorded(asked.file) if asked.kind == "trace" else [ANYTHING]
        except TraceError as trouble:
            yield f"{at}.file", str(trouble)
            used |= tiers  # Who knows?
            continue
        named = {asked.tier or arrival.tier or scenario.tier for arrival in came}
        yield from _known(f"{at}.tier", "tier", named, tiers)
        used |= named
        named = {asked.model or arrival.model or scenario.model for arrival in came}
        yield from _known(f"{at}.model", "model", named, models)
    used |= {lower for name in used & tiers for lower in _lower(scenario.tiers, name)}
    if used <= tiers:
        yield from (
            (f"tiers.{tier}", "no requests are of this tier") for tier in tiers if tier not in used
        )


def _recorded(file: str) -> list[Arrival]:
    if not file:
        raise TraceError("missing: the path of the trace")
    if not Path(file).is_file():
        raise TraceError(f"there is no file {file}, and none of its name in ${BIG_FILES}")
    return load_trace(Path(file), Random(0))


def _asked(scenario: Scenario, asked: Requests, at: str) -> Iterator[Problem]:
    kind = "batch in one go" if asked.kind == "batch" and asked.turns is None else asked.kind
    for field in sorted(set().union(*TAKES.values()) - TAKES[kind]):
        if getattr(asked, field) != getattr(DEFAULTS, field):
            yield f"{at}.{field}", f"means nothing for requests of kind {kind}"
    if asked.rate is None and asked.kind != "trace":
        yield f"{at}.rate", f"missing: requests a second, for kind {asked.kind}"
    if asked.from_s >= min(asked.until_s, scenario.seconds):
        yield f"{at}.from_s", f"{asked.from_s:g} is after the end"
    for field in ("prompt", "output"):
        median, p99 = getattr(asked, field) or (1, 1)
        if median > p99:
            yield f"{at}.{field}", f"the median {median} is above the 99th percentile {p99}"
    seconds = [second for second, _ in asked.pattern.steps]
    if seconds != sorted(seconds):
        yield f"{at}.pattern.steps", "not in the order of time"


def _faults(scenario: Scenario) -> Iterator[Problem]:
    workers = ["*", *(name for group in scenario.workers for name in group.names)]
    gateways = ["*", *(f"g{i}" for i in range(scenario.gateways.count))]
    for index, fault in enumerate(scenario.faults):
        at = f"faults[{index}]"
        yield from _known(f"{at}.worker", "worker", [fault.worker], workers)
        yield from _known(f"{at}.gateway", "gateway", [fault.gateway], gateways)
        if fault.at_s >= scenario.seconds:
            yield (
                f"{at}.at_s",
                f"{fault.at_s:g} is after the end: the scenario lasts {scenario.seconds:g} s",
            )
        if fault.every_s and fault.every_s <= fault.for_s:
            yield f"{at}.every_s", "it comes again before it is over: set every_s above for_s"


def _known(at: str, what: str, names: Iterable[str], known: Iterable[str]) -> Iterator[Problem]:
    for name in sorted(set(names).difference(known)):
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(known)}"
        yield at, f"unknown {what} {name!r}, {hint}"
