"""`paceline simulate`: which policy would have kept more promises?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import TracebackType
from typing import Annotated

import typer
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from paceline.domain.errors import ConfigError
from paceline.kernel.timing import Timing, from_json
from paceline.policy.route import POLICIES
from paceline.simulator import report
from paceline.simulator.compare import Comparison, compare
from paceline.simulator.from_log import in_words, recorded, write_scenario
from paceline.simulator.html import page
from paceline.simulator.incident import Incident, incident
from paceline.simulator.learned import live_fleet, profiles_of
from paceline.simulator.load import Override, load_scenario
from paceline.simulator.many import Job, play_all
from paceline.simulator.oracle import ORACLE
from paceline.simulator.result import Result
from paceline.simulator.scenario import Scenario
from paceline.simulator.simulation import by_name

ALL_POLICIES = (*POLICIES, ORACLE)
CORES = os.cpu_count() or 1


def simulate(
    scenario: Annotated[
        Path | None, typer.Argument(help="A scenario file; or --from-log.", show_default=False)
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Which to compare with the first of them; or all.")
    ] = "headroom,least-requests",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each policy.")] = 3,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="KEY=V1,V2,... such as load=0.8,1,1.2; of several all combinations."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE in place of the file's, as workers.0.count=6."),
    ] = None,
    timing: Annotated[
        Path | None, typer.Option(help="Play it on the fleet that `paceline calibrate` wrote.")
    ] = None,
    from_log: Annotated[
        list[Path] | None,
        typer.Option(help="Play what this log of facts tells; several, if it was rotated."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Keep the scenario made of --from-log in this folder, to change it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a report with charts to this file.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.", show_default="cores")] = CORES,
) -> None:
    """Play a scenario on a virtual clock, and compare what policies make of it.

    All policies play the same seeds, so their differences are not those of chance arrivals.
    """
    sweeps = [_setting("--sweep", text) for text in sweep or ()]
    settings = [_setting("--set", text) for text in set_ or ()]
    with ExitStack() as until_played:
        told = _incident(from_log, scenario, timing, keep) if from_log or keep else None
        if told is not None:
            folder = keep or Path(until_played.enter_context(TemporaryDirectory()))
            scenario = _written(told, folder, from_log or ())
        if scenario is None:
            raise ConfigError(["give a scenario file, or --from-log"])
        jobs = plan(
            scenario,
            policies=policies_named(policy),
            seeds=seeds,
            sweeps=sweeps,
            settings=settings,
            timing=told.timing if told is not None else _timing(timing) if timing else None,
        )
        if html is not None:
            _write(html, "")  # Not after minutes of work does one want to hear that this fails.
        with Watch(len(jobs), hidden=as_json) as watch:
            results = play_all(jobs, workers, watch.on_done)
    if told is not None and not sweeps and not settings:
        seeds_played = dict.fromkeys(job.seed for job in jobs)
        happened = [recorded(told, jobs[0].scenario, seed) for seed in seeds_played]
        comparisons = [compare([*happened, *results])]
    else:
        comparisons = _compared(jobs, results)
    if html is not None:
        _write(html, page(jobs[0].scenario, comparisons))
    if as_json:
        print(report.as_json(comparisons).decode())
    else:
        Console(highlight=False).print(*report.for_terminal(comparisons), sep="\n")
    Console(stderr=True, highlight=False).print(watch.pace(), style="dim", soft_wrap=True)


def plan(
    path: Path,
    *,
    policies: Sequence[str],
    seeds: int,
    sweeps: Sequence[Override] = (),
    settings: Sequence[Override] = (),
    timing: Timing | None = None,
) -> list[Job]:
    """All runs: each combination of swept settings, each policy, each seed."""
    profiles = profiles_of(timing) if timing else by_name
    jobs = []
    for at in _combinations(sweeps):
        scenario = load_scenario(path, settings, at)
        if timing:
            scenario = _on_fleet(scenario, timing, [key for key, _ in (*settings, *at)])
        jobs += [
            Job(scenario, policy, seed, profiles, dict(at))
            for policy in policies
            for seed in range(seeds)
        ]
    return jobs


def policies_named(text: str) -> tuple[str, ...]:
    """`a,b,c` or `all`."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if names == ("all",):
        return ALL_POLICIES
    if unknown := [name for name in names if name not in ALL_POLICIES]:
        known = ", ".join(ALL_POLICIES)
        raise ConfigError([f"--policy {name}: unknown; there are {known}" for name in unknown])
    return names


class Watch:
    """Shows how far many runs are, and how fast they go."""

    def __init__(self, total: int, *, hidden: bool = False) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("played"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[last]}"),
            TimeElapsedColumn(),
            console=console,
            disable=hidden or not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, last="")
        self._began = perf_counter()
        self._elapsed_s = 0.0
        self._requests = 0
        self._simulated_s = 0.0
        self.core_s: Counter[str] = Counter()
        """Seconds of one core that it took, by scenario."""

    def __enter__(self) -> Watch:
        self._bar.start()
        self._began = perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._elapsed_s = perf_counter() - self._began

    def on_done(self, job: Job, result: Result, core_s: float) -> None:
        self._requests += result.total.requests
        self._simulated_s += job.scenario.seconds
        self.core_s[job.scenario.name] += core_s  # type: ignore[assignment]
        self._bar.update(self._task, advance=1, last=job.title)

    def pace(self) -> str:
        """What is not in a result, which is the same on all machines."""
        busy_s = sum(self.core_s.values()) or 1e-9
        return (
            f"{self._requests:,} requests in {self._elapsed_s:.1f} s. A core plays "
            f"{self._requests / busy_s:,.0f} requests a second, "
            f"{self._simulated_s / busy_s:,.0f} times as fast as real time."
        )


def _setting(option: str, text: str) -> Override:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ConfigError([f"{option} {text}: give a key and what it is set to, as load=1.2"])
    return key, value


def _combinations(sweeps: Sequence[Override]) -> Iterator[tuple[Override, ...]]:
    """`[("a", "1,2"), ("b", "3")]`: a=1 and b=3, then a=2 and b=3. One, empty, without sweeps."""
    return product(*([(key, value) for value in values.split(",")] for key, values in sweeps))


def _compared(jobs: Sequence[Job], results: Sequence[Result]) -> list[Comparison]:
    """One comparison for each combination of swept settings, in their order."""
    groups: dict[tuple[Override, ...], list[Result]] = {}
    for job, result in zip(jobs, results, strict=True):
        groups.setdefault(tuple(job.at.items()), []).append(result)
    return [compare(group, dict(at)) for at, group in groups.items()]


def _timing(path: Path) -> Timing:
    try:
        return from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None


def _on_fleet(scenario: Scenario, timing: Timing, set_keys: Sequence[str]) -> Scenario:
    """The scenario on the live fleet in place of its own workers."""
    fleet = live_fleet(timing)
    names = {"*", *(name for workers in fleet for name in workers.names)}
    models = {"", *(workers.model for workers in fleet)}
    problems = [
        *(f"{key}: --timing has workers of its own" for key in set_keys if key[:7] == "workers"),
        *(f"no worker serves {r.model}" for r in scenario.requests if r.model not in models),
        *(f"no worker is called {f.worker}" for f in scenario.faults if f.worker not in names),
    ]
    if not fleet:
        problems = ["--timing: it knows no worker"]
    if problems:
        raise ConfigError(problems)
    return replace(scenario, workers=fleet)


def _incident(
    from_log: Sequence[Path] | None, scenario: Path | None, timing: Path | None, keep: Path | None
) -> Incident:
    """What the log tells; in words, on stderr."""
    if not from_log:
        raise ConfigError(["--keep is for --from-log"])
    if scenario is not None or timing is not None:
        raise ConfigError(["--from-log has a scenario and a timing of its own"])
    if keep is not None and not keep.is_dir():
        raise ConfigError([f"--keep {keep}: there is no such folder"])
    told = incident(from_log)
    Console(stderr=True, highlight=False).print(*in_words(told), sep="\n", soft_wrap=True)
    return told


def _written(told: Incident, folder: Path, logs: Sequence[Path]) -> Path:
    if not told.stories:
        raise ConfigError([f"{logs[0]}: there is no request in it"])
    return write_scenario(told, folder, logs[0].name)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None
