"""What does the code say of itself? Writes docs/reference from it, and lists in other pages.

python docs/generate.py            write the pages anew
python docs/generate.py --check    exit 1 if one of them is not what the code says
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from math import inf
from pathlib import Path
from types import ModuleType, NoneType
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import msgspec
import typer
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Route

from paceline.cli import app as command_line
from paceline.config import settings
from paceline.domain import commands, errors, facts
from paceline.domain.gpu import Gpu
from paceline.domain.outcome import Outcome
from paceline.domain.promise import Promise
from paceline.domain.request import LIFECYCLE, Request, State
from paceline.domain.worker import Worker
from paceline.enginemodel import PROFILES, Load
from paceline.engines.emulated import EngineSettings, faults
from paceline.engines.emulated.server import EmulatedEngine
from paceline.gateway import auth, intake
from paceline.gateway.flavors import FLAVORS
from paceline.gateway.ordinary import ordinary_app
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel
from paceline.observe.admin import admin_app
from paceline.observe.cluster import Cluster
from paceline.observe.dashboard import Dashboard
from paceline.observe.diagnosis import Diagnosis
from paceline.observe.events import event_routes
from paceline.observe.findings import diagnosis_routes
from paceline.observe.gpu_metrics import GpuMetrics
from paceline.observe.late_metrics import LateMetrics
from paceline.observe.losses import Losses, of_request
from paceline.observe.metrics import Metrics
from paceline.observe.pace_metrics import PaceMetrics
from paceline.observe.sheet import sheet_of
from paceline.observe.stalls import Stalls
from paceline.observe.views import cluster_routes
from paceline.policy.causes import Cause
from paceline.policy.disagg import LOCAL_TOKENS, QUEUED, by_length
from paceline.policy.pace import Slower
from paceline.policy.route import POLICIES
from paceline.simulator.load import TAKES, load_scenario
from paceline.simulator.scenario import Scenario

DOCS = Path(__file__).parent
REFERENCE = DOCS / "reference"
SCENARIOS = DOCS.parent / "scenarios"
NOTICE = "<!-- Written by docs/generate.py from the code. Do not edit. -->\n\n"

ENDPOINTS = {
    "/v1/models": "The models on offer, aliases included.",
    "/v1/models/{name:path}": "One of them; 404 for an unknown name.",
    "/health/live": "200 while the process runs.",
    "/health/ready": "200 when every model has a usable worker, else 503.",
    "/metrics": "All metrics in Prometheus' text format; see [Metrics](metrics.md).",
    "/paceline/v1/fleet": "Every worker: what is in flight, what was learned of its timing, how "
    "well its predictions fit.",
    "/paceline/v1/decisions": "The newest commands with their reasons, newest first; `limit` "
    "(1 to 1,000) and `request_id` narrow them.",
    "/paceline/v1/timing": "The timing model learned of every worker.",
    "/v1/chat/completions": "Chat. Streamed answers are timed token by token.",
    "/v1/completions": "Completions; a prompt of token ids is counted exactly.",
    "/v1/responses": "OpenAI's Responses.",
    "/v1/messages": "Anthropic's Messages.",
    "/v1/embeddings": "Embeddings.",
    "/health": "200.",
    "/ping": "200.",
    "/version": "The version of vLLM that is imitated.",
    "/load": "Requests that are not finished.",
    "/kv_event_sources": "Where it tells of its KV cache.",
    "/tokenize": "Token ids of a text.",
    "/reset_prefix_cache": "Forget what is cached, unless blocks are in use.",
    "/emulate/state": "What runs, waits and was ordered.",
    "/emulate/steps": "The newest steps as they really were, if `step_log` is set.",
    "/emulate/slowdown": "Steps take `factor` times as long.",
    "/emulate/hang": "No step ends for a while.",
    "/emulate/crash": "All connections and the listener are gone.",
    "/emulate/fault": "The next generations go wrong.",
    "/emulate/refuse": "New connections are reset, while those that stand go on.",
    "/emulate/fetch": "Another emulated engine fetches a prompt that is held for it.",
    "/emulate/cut": "The connections of all answers under way are reset.",
    "/emulate/reset": "No slowdown, no hang, no faults.",
}
"""A sentence for each endpoint whose handler has none."""


def pages() -> dict[Path, str]:
    """Every page of the reference, and the page that lists the scenarios."""
    written = {
        "config.md": config_page(),
        "cli.md": cli_page(),
        "http.md": http_page(),
        "metrics.md": metrics_page(),
        "policies.md": policies_page(),
        "scenario.md": scenario_page(),
        "kernel.md": kernel_page(),
        "emulated-engine.md": emulated_page(),
    }
    reference = {REFERENCE / name: NOTICE + text for name, text in written.items()}
    lab = DOCS / "lab.md"
    return {**reference, lab: between(lab.read_text(encoding="utf-8"), "scenarios", suite())}


def main(arguments: Sequence[str]) -> int:
    stale = {
        path: text
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        if "--check" in arguments:
            print(f"{path} is stale: run `make docs`", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


# Pages.


def config_page() -> str:
    parts = [
        "# Configuration\n\n"
        "One YAML file, read by `paceline serve --config FILE` and checked by `paceline check`. "
        "An unknown key is refused, and the nearest known one is named. `${NAME}` reads the "
        "environment, `${NAME:-default}` with something to fall back to.\n",
    ]
    for where, struct in sections("", settings.Config):
        title = title_of(where)
        rows = [(f"`{key}`", default, text) for key, default, text in documented(struct)]
        parts.append(f"## {title}\n\n{doc(struct)}\n\n{table(('key', 'default', ''), rows)}")
    later = ", ".join(f"`{key}`" for key in settings.LATER)
    parts.append(f"Keys of versions to come ({later}) are refused until they do something.\n")
    return "\n".join(parts)


def scenario_page() -> str:
    parts = [
        "# Scenario\n\n"
        "One YAML file, played by `paceline simulate FILE`: "
        "[Simulate](../how-to/simulate.md) says how to write one. An unknown key is refused, and "
        "the nearest known one is named. `--set KEY=VALUE` and `--sweep KEY=V1,V2` put another "
        "value in place of the file's; a list is counted from 0: `requests.0.rate`.\n"
    ]
    for where, struct in sections("", Scenario):
        hints = get_type_hints(struct, include_extras=True)
        names = {field.encode_name: field.name for field in msgspec.structs.fields(struct)}
        rows = [
            (f"`{key}`", kind_of(hints[names[key]]), default, text)
            for key, default, text in documented(struct)
        ]
        head = ("key", "type", "default", "")
        parts.append(f"## {title_of(where)}\n\n{doc(struct)}\n\n{table(head, rows)}")
    takes = ((kind, ", ".join(f"`{key}`" for key in sorted(keys))) for kind, keys in TAKES.items())
    parts.append(
        "## Kinds of requests\n\nBeside `kind`, `rate`, `tier`, `tenant`, `model`, `from_s` and "
        "`until_s`, which all of them have, each kind has these keys; the others are refused. A "
        "batch comes in one go if it has no `turns`.\n\n"
        + table(("kind", "its own keys"), takes)
        + "\nProfiles for `profile` stand with the "
        "[emulated engine](emulated-engine.md#profiles), formats of traces in "
        "[Replay a trace](../how-to/replay-a-trace.md).\n"
    )
    return "\n".join(parts)


def suite() -> str:
    """The scenarios of the lab, each with its sentence."""
    files = sorted(SCENARIOS.glob("*.yaml"))
    rows = ((f"`{file.stem}`", load_scenario(file).about) for file in files)
    return table(("scenario", "what it tests"), rows)


def cli_page() -> str:
    group: Any = typer.main.get_command(command_line)
    parts = [f"# Command line\n\n{group.help}\n", table(("option", "default", ""), options(group))]
    for name, command in sorted(group.commands.items()):
        arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(("[OPTIONS]", *arguments))
        parts.append(
            f"## paceline {name}\n\n{doc(command.callback, command.help)}\n\n"
            f"    paceline {name} {usage}\n\n" + table(("option", "default", ""), options(command))
        )
    return "\n".join(parts)


def http_page() -> str:
    own = ordinary_app({}, 0.0, lambda: True)
    headers = (*auth.TTFT_HEADERS, *auth.TPOT_HEADERS, *auth.OBJECTIVE_HEADERS)
    tree = inspect.cleandoc(errors.__doc__ or "").split("\n\n")[1]
    return f"""# HTTP

## Clients' listener

Paceline answers these itself:

{table(("method", "path", ""), starlette_routes(own))}
Generations pass through the relay to a worker, from `POST` with a JSON body:

{table(("path", ""), ((f"`{path}`", ENDPOINTS[path]) for path in FLAVORS))}
Every other `/v1/*` path, such as `/v1/embeddings`, is passed to a worker of the model that the body
names, and its answer is passed back; a multipart form may name the model too. `/v1/files` and
`/v1/batches` are reserved.

**Request headers.** `Authorization: Bearer KEY` or `x-api-key` say who asks. `x-request-id` names
the request, if nothing of that name is under way. These ask for less than one may have, never for
more: {", ".join(f"`{name}`" for name in headers)}, and `service_tier` in the body.
`{intake.BATCH_HEADER}` says of which batch of requests it is, in 1 to 64 characters of
`A-Z a-z 0-9 . _ : -`; it changes no decision, and no engine gets to see it.

**Response headers.** `x-paceline-worker`, `x-paceline-tier`, `x-request-id` and `Server-Timing`
(`queue` and `ttft`, or `engine` for an answer that is no stream, in milliseconds).

**Errors** have the shape of OpenAI's API. 429 and 503 carry `Retry-After`.

{tree}

A stream that breaks after its first token ends with `data: {{"error": …}}` and without `[DONE]`.

## Admin listener

For operators; keep it private.

{table(("method", "path", ""), starlette_routes(admin_of(Kernel())))}
The emulated engine's endpoints, and the faults that it takes orders for, stand on
[its own page](emulated-engine.md)."""


def metrics_page() -> str:
    rows = []
    for family in text_string_to_metric_families(exposition()):
        labels = dict.fromkeys(
            f"`{label}`" for sample in family.samples for label in sample.labels if label != "le"
        )
        name = family.name + "_total" * (family.type == "counter")
        rows.append((f"`{name}`", family.type, ", ".join(labels), family.documentation))
    rows = [row for row in rows if not row[0].endswith("_created`")]
    return (
        "# Metrics\n\n`GET /metrics` on the admin listener, in Prometheus' text format. Times are "
        "in seconds. What they are good for: [Read the metrics](../how-to/metrics.md).\n\n"
        + table(("metric", "type", "labels", ""), rows)
    )


def policies_page() -> str:
    rows = []
    for name, policy in POLICIES.items():
        text = inspect.getdoc(policy) or ""
        rows.append((f"`{name}`", text.split("\n\n")[0], text.partition("Source: ")[2]))
    return (
        "# Routing policies\n\nSet with `routing.policy`. [Routing](../concepts.md#routing) says "
        "how `headroom` decides; the others are there to compare with.\n\n"
        + table(("policy", "takes", "source"), rows)
        + f"""
## Prefill on workers of its own

`headroom` weighs both ways for each prompt ([design note 10](../design/0010-disaggregation.md)).
The others ask twice, for the worker that answers and for the one that prefills, and share a prompt
by one rule: it is handed over if more than {LOCAL_TOKENS:,.0f} of its tokens are not cached where
it would be answered, while fewer than {QUEUED} prompts are on the prefill workers. Both figures are
those that were best for these policies over the scenarios `disaggregated` and `slow-link`. Where a
worker cannot prefill by itself, every prompt is handed over.

Source: {(inspect.getdoc(by_length) or "").partition("Source: ")[2]}
"""
    )


def kernel_page() -> str:
    arrows = [
        f"    {here.name} --> {there.name}: {event.value}"
        for here, leads in LIFECYCLE.items()
        for event, there in leads.items()
    ]
    ends = [f"    {state.name} --> [*]" for state, leads in LIFECYCLE.items() if not leads]
    diagram = "\n".join(["stateDiagram-v2", f"    [*] --> {State.QUEUED.name}", *arrows, *ends])
    return f"""# Facts, commands and the life of a request

The kernel takes facts and gives commands; see [Architecture](../architecture.md).

## The life of a request

```mermaid
{diagram}
```

An event that a state does not name is a late echo and changes nothing.

## Facts

{table(("fact", "fields", ""), structs(facts, get_args(facts.Fact)))}
## Commands

{table(("command", "fields", ""), structs(commands, get_args(commands.Command)))}"""


def emulated_page() -> str:
    orders = [s for s in vars(faults).values() if isinstance(s, type) and issubclass(s, Struct)]
    bodies = "\n".join(
        f"### `POST /emulate/{order.__name__.lower()}`\n\n{doc(order)}\n\n"
        + table(
            ("field", "default", ""),
            (
                (f"`{key}`", default, text or choices(order, key))
                for key, default, text in documented(order)
            ),
        )
        for order in orders
        if order is not Struct
    )
    profiles = [
        (
            f"`{name}`",
            f"{profile.step_seconds(Load()) * 1e3:.3g}",
            f"{profile.kv_tokens:,}",
            f"{profile.max_num_seqs:,}",
            f"{profile.max_num_batched_tokens:,}",
        )
        for name, profile in PROFILES.items()
    ]
    rows = [(f"`{key}`", default, text) for key, default, text in documented(EngineSettings)]
    return f"""# Emulated engine

`paceline engine --emulate PROFILE` speaks vLLM's API and takes as long as the profile says, without
a GPU. `paceline engine --config FILE` runs several in one process, from a list `engines:` of

{table(("key", "default", ""), rows)}
## Profiles

{table(("profile", "empty step, ms", "KV tokens", "streams", "tokens a step"), profiles)}
## Endpoints

{table(("method", "path", ""), emulated_routes())}
## Faults on command

{bodies}"""


# What the pages are made of.

Struct = msgspec.Struct


def between(page: str, name: str, text: str) -> str:
    """The page with this text between its two marks of that name."""
    before, mark, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->\n")
    if not (mark and end):
        raise ValueError(f"a page has lost its marks <!-- {name} --> and <!-- /{name} -->")
    return f"{before}{mark}\n{text}\n{end}{after}"


def title_of(where: str) -> str:
    return f"`{where}`" if where else "Top level"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = (" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in r) for r in lines)
    return "".join(f"| {line} |\n" for line in cells)


def doc(thing: object, text: str | None = None) -> str:
    """The docstring, on one line."""
    return " ".join((text or inspect.getdoc(thing) or "").split())


def sections(where: str, struct: type[Struct]) -> Iterator[tuple[str, type[Struct]]]:
    """Every part of the configuration with its place, outer parts first."""
    yield where, struct
    hints = get_type_hints(struct)
    for field in msgspec.structs.fields(struct):
        for suffix, part in parts_of(hints[field.name], "", struct.__module__):
            place = f"{where}.{field.encode_name}" if where else field.encode_name
            yield from sections(place + suffix, part)


def parts_of(hint: Any, suffix: str, module: str) -> Iterator[tuple[str, type[Struct]]]:
    """The structs of a module within a type, each with how its place is written."""
    if isinstance(hint, type) and hint.__module__ == module:
        yield suffix, hint
    more = {tuple: "[]", dict: ".NAME", Mapping: ".NAME"}.get(get_origin(hint) or hint, "")
    for part in get_args(hint):
        yield from parts_of(part, suffix + more, module)


KINDS = {bool: "true or false", float: "number", int: "whole number", str: "text"}
BOUNDS = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ "}


def kind_of(hint: Any) -> str:
    """What may be written for a value of this type: words, and the range."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = ((sign, getattr(inner[1], name)) for name, sign in BOUNDS.items())
        told = (f"{sign}{limit:g}" for sign, limit in limits if limit is not None)
        return " ".join((kind_of(inner[0]), ", ".join(told)))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"[{', '.join(kind_of(part) for part in inner)}]"
    if origin is tuple:
        return f"list of {kind_of(inner[0])}" if get_origin(inner[0]) else "list, see below"
    if origin is Mapping:
        return "by name, see below"
    if inner:
        return " or ".join(kind_of(part) for part in inner if part is not NoneType)
    return KINDS.get(hint, "see below")


def documented(struct: type[Struct]) -> Iterator[tuple[str, str, str]]:
    """Each field of a struct as it is written, its default, and its sentence."""
    texts = sentences(struct)
    for field in msgspec.structs.fields(struct):
        yield field.encode_name, default_of(field), texts.get(field.name, "")


def default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    if value == inf:
        return "∞"
    if value is None or value in ("", (), {}) or isinstance(value, Struct):
        return f"`{value}`" if type(value).__name__ == "Address" else ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


@cache
def sentences(struct: type[Struct]) -> dict[str, str]:
    """The docstrings below a class's fields."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(struct)))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def choices(struct: type[Struct], field: str) -> str:
    """The values of a `Literal`; empty for other types."""
    values = get_args(get_type_hints(struct)[field])
    return ", ".join(f"`{value}`" for value in values if isinstance(value, str))


def options(command: Any) -> Iterator[tuple[str, str, str]]:
    for option in command.params:
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        if option.param_type_name == "argument":
            names = f"`{option.name.upper()}`"
        default = option.default
        told = isinstance(default, str | int | float) and default is not False and default != ""
        shown = "required" if option.required else f"`{default}`" if told else ""
        if isinstance(option.show_default, str):  # in words: it is not the same on all machines
            shown = option.show_default
        yield names, shown, option.help or ""


def starlette_routes(app: Starlette) -> Iterator[tuple[str, str, str]]:
    for route in app.routes:
        if isinstance(route, Route):
            methods = ", ".join(sorted((route.methods or set()) - {"HEAD"}))
            path = route.path.replace(":path", "")
            yield methods, f"`{path}`", doc(route.endpoint) or ENDPOINTS[route.path]


def emulated_routes() -> Iterator[tuple[str, str, str]]:
    async def made() -> EmulatedEngine:
        return EmulatedEngine(EngineSettings(), "127.0.0.1")

    engine = asyncio.run(made())
    for method, paths in (("GET", engine._get), ("POST", engine._post)):
        for path in paths:
            yield method, f"`{path}`", ENDPOINTS[path]


def structs(module: ModuleType, kinds: Sequence[type[Struct]]) -> Iterator[tuple[str, str, str]]:
    for kind in kinds:
        names = ", ".join(f"`{field.name}`" for field in msgspec.structs.fields(kind))
        text = doc(kind) if kind.__doc__ else ""
        yield f"`{kind.__name__}`", names, text


def admin_of(kernel: Kernel) -> Starlette:
    metrics = Metrics(kernel, {}, GAP_BOUNDS)
    nothing = cast(Any, None)
    clocks = (lambda: 0.0, lambda: 0.0)
    cluster = Cluster(kernel, {}, lambda tier: 1.0, 0.0)
    views = [
        *diagnosis_routes(Diagnosis(kernel, Stalls(kernel), clocks)),
        *cluster_routes(cluster, kernel, GAP_BOUNDS, lambda: 0.0),
        *event_routes(kernel, nothing, lambda: 0.0, nothing),
        *Dashboard(False).routes(),
    ]
    return admin_app(kernel, metrics, nothing, lambda: 0.0, views)


def exposition() -> str:
    """The metrics after one request on one worker, so that every family has a sample."""
    kernel = Kernel()
    kernel.handle(facts.WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    request = Request("r", "m", "t", "standard", Promise())
    kernel.handle(facts.RequestArrived(request), 0.0)
    gaps = {("m", "standard", "w"): [0] * (len(GAP_BOUNDS) + 1)}
    metrics = Metrics(kernel, gaps, GAP_BOUNDS, lambda: {"t": 1}, lambda: {"standard": 0.95})
    over = Outcome(
        request=request,
        worker="w",
        status=200,
        error="",
        attempts=2,
        because="",
        predicted=None,
        queued_s=1.0,
        ttft_s=1.0,
        itl_s=1.0,
        stall_s=1.0,
        seconds=1.0,
        prompt_tokens=1,
        cached_tokens=1,
        output_tokens=1,
        degraded_to=request,
    )
    metrics.count(sheet_of(over))
    metrics.shed(request)
    metrics.moved(request, "it hangs")
    metrics.paused(request, "others need the room")
    losses, split = Losses(), {Cause.LINK: 1.0}
    late = of_request(0.0, "mean", 2.0, split, ("r", "m", "standard", "t", "w"))
    losses.add(late, {"standard": split}, {"standard": 1})
    metrics.also(LateMetrics(losses))
    gpu = Gpu(0, "", 1.0, 1.0, 1.0, 1.0)
    metrics.also(GpuMetrics(kernel, lambda worker_id: (gpu,)))
    metrics.also(PaceMetrics(kernel, lambda worker_id: Slower(1.0, 1.0, 0.0, False)))
    return metrics.text().decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
