"""What can be done from the command line? `paceline --help` is the map."""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from paceline import __version__
from paceline.calibrate import calibrate
from paceline.diagnose import diagnose
from paceline.domain.errors import PacelineError
from paceline.domain.promise import Promise
from paceline.simulator.cli import simulate
from paceline.workload.replay_cli import replay_command

app = typer.Typer(
    name="paceline",
    help="A gateway for LLM inference fleets that keeps promises about token timing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="The YAML configuration.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Run the command line; bad input ends with a sentence and exit status 2."""
    try:
        app()
    except PacelineError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"paceline {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """A gateway for LLM inference fleets that keeps promises about token timing."""


@app.command()
def serve(config: ConfigPath) -> None:
    """Run the gateway with everything in the configuration, until SIGTERM; SIGHUP reloads it."""
    import uvloop

    from paceline import app as application
    from paceline.config import load

    ended_well = uvloop.run(application.serve(partial(load, config, os.environ)))
    if not ended_well:
        raise typer.Exit(1)


@app.command()
def check(config: ConfigPath, as_json: AsJson = False) -> None:
    """Validate a configuration: exit 0 if it can be used, else 2 and a line for each problem."""
    import msgspec

    from paceline.config import load
    from paceline.domain.errors import ConfigError

    try:
        loaded = load(config, os.environ)
    except ConfigError as error:
        if not as_json:
            raise
        print(msgspec.json.encode({"ok": False, "problems": error.problems}).decode())
        raise typer.Exit(2) from None
    workers = loaded.workers()
    models = [model.name for model in loaded.models]
    if as_json:
        print(msgspec.json.encode({"ok": True, "models": models, "workers": workers}).decode())
    else:
        count = f"{len(workers)} worker{'s' if len(workers) > 1 else ''}"
        print(f"{config} is fine: {', '.join(models)} on {count}")


@app.command()
def engine(
    emulate: Annotated[
        str | None, typer.Option(help="Profile to emulate, such as h100-llama-8b.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="GGUF file to serve with the embedded llama.cpp.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with several emulated engines for one process.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9001,
    slots: Annotated[int, typer.Option(help="Streams at once (embedded).")] = 8,
    context: Annotated[int, typer.Option(help="Tokens of context a stream (embedded).")] = 2048,
    threads: Annotated[int, typer.Option(help="Threads (embedded).")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noise (emulated).")] = 0,
) -> None:
    """Run one engine: emulated with the timing of a GPU, or a real small model on this CPU."""
    if sum(choice is not None for choice in (emulate, model, config)) != 1:
        raise typer.BadParameter("give exactly one of --emulate, --model and --config")
    if model is not None:
        from paceline.engines.embedded import serve_gguf

        serve_gguf(model, host, port, slots, context, threads, name or model.stem)
        return
    import uvloop

    from paceline.engines.emulated import EngineSettings, load_engines, serve_emulated

    if config is not None:
        engines = load_engines(config)
    else:
        assert emulate is not None
        engines = [EngineSettings(profile=emulate, port=port, model=name or emulate, seed=seed)]
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(serve_emulated(engines, host))


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="About 20 seconds.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave all up, to play with.")] = False,
    as_json: AsJson = False,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 1,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="With the real small model, if installed.")
    ] = True,
) -> None:
    """See it all on one machine in about a minute: what headroom keeps that round-robin breaks."""
    from paceline.demo import run_demo

    status = run_demo(seed, quick=quick, keep=keep, as_json=as_json, with_model=model)
    raise typer.Exit(status)


def _tier_promises(path: Path) -> dict[str, Promise]:
    from paceline.config import load

    try:
        loaded = load(path, os.environ)
    except PacelineError as error:
        raise ValueError(str(error)) from None
    promises = {name: tier.promise for name, tier in loaded.tiers.items()}
    return {"": promises[loaded.default_tier], **promises}


app.command("replay")(replay_command(_tier_promises))
app.command("calibrate")(calibrate)
app.command("diagnose")(diagnose)
app.command("simulate")(simulate)
