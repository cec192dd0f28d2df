"""How does the dashboard look? Screenshots of a running gateway, in a real browser.

    python bench/screens.py [--out docs/images] [--admin URL] [--calm] [--seconds 45]

Without `--admin` it builds a stage of its own: eight emulated engines, a gateway with its
dashboard, three tiers of load, and after a third of the time one engine four times as slow. Needs
`pip install playwright` and a Chromium (Debian: apt install chromium).
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import yaml

from paceline.demo.stage import free_ports, process, ready, url

MODEL, PROFILE, SLOW = "llama-8b", "a100-llama-8b", 2
PORTS = range(9001, 9009)
"""Of the engines: the same in every picture."""
TIERS = {
    "premium": {"ttft_s": 0.5, "itl_s": 0.04, "stall_s": 0.5, "attain": 0.99, "weight": 8},
    "standard": {"ttft_s": 1.5, "itl_s": 0.08, "weight": 2},
    "batch": {"preemptible": True, "weight": 0.5},
}
RATE = 14.0
SIZE = {"width": 1280, "height": 800}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@asynccontextmanager
async def stage(seconds: float, slow: bool, folder: Path) -> AsyncIterator[str]:
    """A gateway under load; gives the URL of its admin listener at the moment to look."""
    (listen, admin), ports = free_ports(2), list(PORTS)
    engines = [
        {"profile": PROFILE, "speed": 0.5, "port": port, "model": MODEL, "seed": i}
        for i, port in enumerate(ports)
    ]
    workers = [
        {"url": url(port), "kind": "vllm", "node": f"node-{i // 4}", "cost_per_hour": 2.5}
        for i, port in enumerate(ports)
    ]
    gateway: dict[str, Any] = {
        "listen": f"127.0.0.1:{listen}",
        "admin": f"127.0.0.1:{admin}",
        "models": [{"name": MODEL, "workers": workers}],
        "tiers": TIERS,
        "default_tier": "premium",
        "tenants": [{"name": "acme", "key": "a", "tier": "premium", "max_streams": 200}],
        "anonymous": True,
        "observe": {"dashboard": True},
        "logging": {"level": "warning"},
    }
    for name, content in (("engines", {"engines": engines}), ("gateway", gateway)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    with ExitStack() as running:
        for name, command, health in (
            ("engines", "engine", url(ports[-1]) + "/health"),
            ("gateway", "serve", url(listen) + "/health/ready"),
        ):
            log = folder / f"{name}.log"
            config = str(folder / f"{name}.yaml")
            started = running.enter_context(process(log, command, "--config", config))
            await ready(started, health, log)
        load = ["replay", "chat", "--url", url(listen), "--rate", str(RATE), "--key", "a"]
        load += ["--tiers", "premium=0.4,standard=0.5,batch=0.1", "--duration", str(seconds + 60)]
        running.enter_context(process(folder / "load.log", *load))
        await asyncio.sleep(seconds / 3)
        if slow:
            order = {"factor": 4, "seconds": seconds}
            async with aiohttp.ClientSession() as session:
                await session.post(url(ports[SLOW]) + "/emulate/slowdown", json=order)
        await asyncio.sleep(seconds * 2 / 3)
        yield url(admin)


async def glance(admin: str, path: Path) -> None:
    """What somebody sees who opens the dashboard."""
    from playwright.async_api import async_playwright

    browser_path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = await browser.new_page(viewport=SIZE, color_scheme="light")
        await page.goto(admin)
        await page.wait_for_timeout(1500)
        await page.screenshot(path=path)
        await browser.close()


async def shoot(admin: str, out: Path, name: str) -> list[Path]:
    """The whole page in both themes, and the worst worker closely."""
    from playwright.async_api import async_playwright

    browser_path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    taken = []
    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = await browser.new_page(viewport=SIZE, color_scheme=scheme)
            page.on("pageerror", lambda error: print("error in the page:", error))
            await page.goto(admin)
            await page.wait_for_timeout(2500)
            taken.append(out / f"{name}-{scheme}.png")
            await page.screenshot(path=taken[-1])
            taken.append(out / f"{name}-{scheme}-whole.png")
            await page.screenshot(path=taken[-1], full_page=True)
        worst = page.locator(".tile.over, .tile:has(em), .tile.tight")
        await (worst if await worst.count() else page.locator(".tile")).first.click()
        await page.wait_for_timeout(2500)
        taken.append(out / f"{name}-worker.png")
        await page.locator("#worker").screenshot(path=taken[-1])
        await browser.close()
    return taken


async def main(given: argparse.Namespace) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    if given.admin:
        taken = await shoot(given.admin, given.out, given.name)
    else:
        with TemporaryDirectory() as folder:
            async with stage(given.seconds, not given.calm, Path(folder)) as admin:
                taken = await shoot(admin, given.out, given.name)
    for path in taken:
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("screens"))
    parser.add_argument("--name", default="dashboard")
    parser.add_argument("--admin", default="", help="URL of a running gateway's admin listener")
    parser.add_argument("--calm", action="store_true", help="without the slow engine")
    parser.add_argument("--seconds", type=float, default=45.0)
    asyncio.run(main(parser.parse_args()))
