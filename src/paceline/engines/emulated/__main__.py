"""`python -m paceline.engines.emulated`: engines without a GPU, from the shell."""

from __future__ import annotations

import argparse
import gc

from paceline.enginemodel import PROFILES
from paceline.engines.emulated import EngineSettings, load_engines, serve_emulated

try:
    from uvloop import run
except ImportError:  # Windows has none
    from asyncio import run  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paceline.engines.emulated", description=__doc__
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--emulate", metavar="PROFILE", choices=PROFILES, help=", ".join(PROFILES))
    what.add_argument("--config", metavar="FILE", help="YAML: engines: [{profile: …, port: …}, …]")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="", help="name that clients ask for")
    parser.add_argument("--speed", type=float, default=1.0, help="times faster than the profile")
    parser.add_argument("--kv-events-endpoint", default="", help="such as tcp://*:5557")
    parser.add_argument("--kv-events-replay-endpoint", default="", help="such as tcp://*:5558")
    args = parser.parse_args()
    try:
        engines = (
            load_engines(args.config)
            if args.config
            else [
                EngineSettings(
                    profile=args.emulate,
                    port=args.port,
                    model=args.model,
                    speed=args.speed,
                    kv_events_endpoint=args.kv_events_endpoint,
                    kv_events_replay_endpoint=args.kv_events_replay_endpoint,
                )
            ]
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    gc.freeze()
    try:
        run(serve_emulated(engines, args.host, lambda urls: print(*urls, sep="\n", flush=True)))
    except* KeyboardInterrupt:
        pass
    except* OSError as errors:
        parser.error(str(errors.exceptions[0]))


if __name__ == "__main__":
    main()
