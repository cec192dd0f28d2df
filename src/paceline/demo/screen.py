"""What does one see while it runs? A live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paceline.demo.scenario import PROMISES, SLOW_WORKER, SMALL_MODEL, Scenario
from paceline.workload.drive import Progress
from paceline.workload.report import promise_for

LINE_EVERY_S = 5.0


class WorkerView(msgspec.Struct, frozen=True):
    """A worker as the gateway sees it just now."""

    streams: int
    waiting: int
    """Sent, and without a first token yet."""
    slowdown: float
    itl_s: float
    """Predicted."""

    @classmethod
    def of(cls, seen: Mapping[str, Any]) -> WorkerView:
        """From an entry of the admin API's `fleet`."""
        flight, timing = seen["in_flight"], seen["timing"]
        return cls(flight["streams"], flight["arriving"], timing["slowdown"], timing["step_s"])


class Scene(msgspec.Struct):
    """What is known of the act that is being played; its tasks write it."""

    policy: str
    play: Scenario
    at_s: float = 0.0
    slow: bool = False
    progress: Progress | None = None
    workers: Sequence[WorkerView] = ()
    said: str = ""
    """By the small model, so far."""

    def kept(self) -> dict[str, str]:
        """Promises kept so far, of how many, by tier."""
        ended = self.progress.outcomes if self.progress else []
        shares = {}
        for tier in PROMISES:
            misses = [bool(o.miss(promise_for(tier, PROMISES))) for o in ended if o.tier == tier]
            shares[tier] = f"{misses.count(False)} of {len(misses)}" if misses else "-"
        return shares


class Screen:
    """Shows scenes; `with` it, so that the terminal is left as it was."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # No thread of its own: it would take the interpreter from the clients' clocks.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._line_due_s = 0.0

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._line_due_s = 0.0

    def show(self, scene: Scene) -> None:
        """How it stands."""
        if self.console.is_terminal:
            self._live.update(picture(scene), refresh=True)
        elif scene.at_s >= self._line_due_s:
            self.say(line(scene))
            self._line_due_s = scene.at_s + LINE_EVERY_S

    def clear(self) -> None:
        """Nothing is played any more."""
        self._live.stop()


def line(scene: Scene) -> str:
    """A scene in one line."""
    streams = "/".join(str(worker.streams) for worker in scene.workers)
    kept = ", ".join(f"{tier} {share}" for tier, share in scene.kept().items())
    return f"  {scene.at_s:4.1f} s: streams {streams or '-'}; promises kept: {kept}"


def picture(scene: Scene) -> Group:
    """A scene as a picture."""
    play, progress = scene.play, scene.progress
    table = Table(box=None, pad_edge=False)
    for name in ("worker", "streams", "waiting", "slowdown", "predicted ITL", ""):
        table.add_column(name, justify="left" if name == "worker" else "right")
    for number, worker in enumerate(scene.workers, 1):
        table.add_row(
            str(number),
            str(worker.streams),
            str(worker.waiting),
            f"{worker.slowdown:.2f}",
            f"{worker.itl_s * 1e3:.0f} ms",
            "three times slower" if scene.slow and number == SLOW_WORKER else "",
            style="bold red" if scene.slow and number == SLOW_WORKER else "",
        )
    at_s = min(scene.at_s, play.seconds)
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(scene.policy, style="bold"),
        ProgressBar(total=play.seconds, completed=at_s, width=30),
        f"{at_s:.0f} of {play.seconds:.0f} s",
        f"{progress.sent} sent, {progress.in_flight} in flight" if progress else "",
    )
    kept = ", ".join(f"{tier} {share}" for tier, share in scene.kept().items())
    rows: list[RenderableType] = [head, table, Text(f"promises kept: {kept}", style="bold")]
    if scene.said:
        rows.append(Text(f"{SMALL_MODEL}: {scene.said}", style="cyan"))
    return Group(*rows)
