"""An admin API that says what a gateway before a busy fleet would say.

python tests/dashboard/fake_admin.py [--workers 64] [--port 8081] shows it to a dashboard that runs
by itself: python -m paceline.dashboard --admin http://127.0.0.1:8081 --port 8082
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from random import Random
from time import time
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

BOUNDS_S = [0.001 * 2 ** (i / 2) for i in range(-2, 29)]
CAUSES = ["gateway_queue", "engine_queue", "own_prefill", "others_prefill", "batch", "preemption",
          "transfer", "slow_worker", "hang", "lost_worker", "pause", "link", "gateway"]  # fmt: skip
MODEL = "llama-70b"


class FakeAdmin:
    """Its answers; each can be taken away (404) by naming it in `lacking`."""

    def __init__(self, workers: int = 64, streams: int = 2000, calm: bool = False) -> None:
        self.names = [f"10.0.{i // 16}.{10 + i % 16}:8000" for i in range(workers)]
        self.streams, self.calm = streams, calm
        self.lacking: set[str] = set()
        self.asked: list[str] = []
        self.now: Callable[[], float] = time

    def app(self) -> Starlette:
        async def answer(request: Request) -> Response:
            name = request.path_params["name"]
            self.asked.append(name)
            told = None if name in self.lacking else getattr(self, name, None)
            if told is None:
                return Response(b"{}", 404)
            body = told(dict(request.query_params))
            return Response(msgspec.json.encode(body), media_type="application/json")

        return Starlette(routes=[Route("/paceline/v1/{name}", answer)])

    def rng(self, salt: object, every_s: float = 1.0) -> Random:
        return Random(f"{salt} {int(self.now() / every_s)}")

    def bad(self, i: int) -> bool:
        return not self.calm and i == min(13, len(self.names) - 1)

    def fleet(self, _: dict[str, str]) -> dict[str, Any]:
        workers = [self.worker(i) for i in range(len(self.names))]
        held = 0 if self.calm else 3
        models = {MODEL: {"workers": workers}}
        return {"policy": "headroom", "ready": True, "held": {MODEL: held}, "models": models}

    def worker(self, i: int) -> dict[str, Any]:
        steady, now = Random(i), self.rng(i)
        down = not self.calm and i == 47
        mean = self.streams / len(self.names)
        streams = 0 if down or i == 62 else round(mean * steady.uniform(0.8, 1.2) + now.gauss(0, 1))
        slowdown = 3.1 if self.bad(i) else now.gauss(1.0, 0.03)
        headroom = 1.0 - 0.02 * streams * slowdown * steady.uniform(0.6, 0.9)
        slower = {"than_itself": slowdown, "than_like": slowdown,
                  "seen_ago_s": 24.0 if self.bad(i) else 0.1, "found": self.bad(i)}  # fmt: skip
        kv = min(0.022 * streams * steady.uniform(0.8, 1.2), 0.97)
        return {
            "id": self.names[i], "model": MODEL, "url": f"http://{self.names[i]}", "kind": "vllm",
            "role": "both", "node": f"node-{i // 8:02d}", "cost_per_hour": 4.0,
            "usable": not down, "draining": not self.calm and i == 30, "ejected_for_s": 0,
            "report": {"healthy": not down, "because": "connection refused" if down else "",
                       "running": streams, "waiting": 0, "kv_used": kv},
            "in_flight": {"streams": streams, "arriving": now.choice([0, 0, 0, 1, 2]) * (not down),
                          "uncached_tokens_ahead": now.randrange(3000),
                          "context_tokens": streams * 1400},
            "timing": {"slowdown": slowdown, "samples": 51234, "step_s": 0.019 * slowdown,
                       "prefill_budget": 8192, "prefill_tokens_per_s": 5200.0},
            "slower": slower,
            "room": {"headroom": headroom, "least": "ttft" if i % 3 else "itl", "ttft_s": 0.3,
                     "itl_s": 0.022 * slowdown, "slowdown": slowdown,
                     "kv_used": kv},
            "predictions": {"ttft": {"count": 812, "error": 0.14, "bias": 0.01},
                            "itl": {"count": 812, "error": 0.06, "bias": -0.02}},
        }  # fmt: skip

    def tiers(self, _: dict[str, str]) -> dict[str, Any]:
        return {"tiers": [
            {"name": "standard", "promise": {"ttft_s": 2.0, "itl_s": 0.08}, "attain": 0.95,
             "weight": 2.0, "deadline_s": None},
            {"name": "premium", "promise": {"ttft_s": 0.5, "itl_s": 0.04, "stall_s": 0.5},
             "attain": 0.99, "weight": 8.0, "deadline_s": None},
            {"name": "batch", "promise": {}, "attain": 0.95, "weight": 0.5, "preemptible": True,
             "deadline_s": None},
        ]}  # fmt: skip

    def figures(self, name: str, window_s: float, share: float) -> dict[str, Any]:
        rng = self.rng(name, 5)
        broken = {"premium": 0.028, "standard": 0.031, "acme": 0.03}.get(name, 0.001)
        broken = 0.0 if self.calm else broken * min(1.0, 240 / window_s)
        spare = 0.01 if name == "premium" else 0.05
        requests = round(90 * share * window_s)
        ttft = 0.19 if name == "premium" else 0.7
        return {
            "requests": requests, "requests_per_s": 90 * share,
            "kept": round(requests * (1 - broken)),
            "attainment": 1 - broken, "burn": broken / spare, "shed": 0, "failed": 0, "left": 1,
            "output_tokens": requests * 300, "output_tokens_per_s": 48_000 * share,
            "ttft_s": {"p50": ttft, "p90": ttft * 1.8, "p99": ttft * rng.uniform(2.5, 2.9),
                       "count": requests},
            "itl_s": {"p50": 0.021, "p90": 0.026, "p99": 0.036 if self.calm else 0.047,
                      "count": requests},
            "stall_s": {"p50": 0.06, "p90": 0.11, "p99": 0.62, "count": requests},
            "queued_s": {"p50": 0.0, "p90": 0.0, "p99": 0.2, "count": requests},
            "gap_s": {"p50": 0.021, "p90": 0.027, "p99": 0.05, "count": requests * 300},
        }  # fmt: skip

    def summary(self, query: dict[str, str]) -> dict[str, Any]:
        window = float(query.get("window", "60"))
        by = query.get("by", "tier")
        shares = {"tier": {"standard": 0.62, "premium": 0.3, "batch": 0.08},
                  "tenant": {"acme": 0.5, "globex": 0.38, "initech": 0.12}}.get(by, {})  # fmt: skip
        groups = [{**self.figures(k, window, v), "of": {by: k}} for k, v in shares.items()]
        total = self.figures("total", window, 1.0)
        return {"at": self.now(), "window_s": window, "covered_s": window, "by": [by],
                "total": total, "groups": groups}  # fmt: skip

    def history(self, query: dict[str, str]) -> dict[str, Any]:
        now = self.now()
        slots = []
        for n in range(60, 0, -1):
            begin = (int(now / 10) - n + 1) * 10.0
            slots.append(self.slot(begin, query.get("worker", "")))
        return {"at": now, "window_s": 600, "slot_s": 10, "by": [], "gap_bounds_s": BOUNDS_S,
                "slots": slots}  # fmt: skip

    def slot(self, begin: float, worker: str) -> dict[str, Any]:
        rng = Random(f"{begin}{worker}")
        sick = not self.calm and begin > self.now() - 240
        alone = bool(worker) and self.bad(self.names.index(worker))
        usual = 10.5 + rng.gauss(0, 0.2)  # about 20 ms
        weights = [2.718 ** (-(((i - usual) / 0.8) ** 2)) for i in range(32)]
        if sick:
            slow = 1.0 if alone else 0.025
            late = [2.718 ** (-(((i - 14.0) / 1.2) ** 2)) for i in range(32)]
            weights = [(1 - slow) * w + slow * m for w, m in zip(weights, late, strict=True)]
        counts = [round(80_000 * w / sum(weights)) for w in weights]
        gap = {"p50": 0.066 if sick and alone else 0.0205, "p90": 0.03,
               "p99": 0.13 if sick and alone else 0.07 if sick else 0.034}  # fmt: skip
        total = {"gap_counts": counts, "gap_s": {**gap, "count": sum(counts)}}
        return {"from": begin, "seconds": 10, "total": total, "groups": []}

    def diagnosis(self, _: dict[str, str]) -> dict[str, Any]:
        now = self.now()
        bad = self.names[min(13, len(self.names) - 1)]
        slow = {
            "kind": "slow_worker", "model": MODEL, "worker": bad, "node": "node-01", "tenant": "",
            "since": now - 214, "says": f"{bad} takes 3.1 times as long for a step as its like.",
            "remedy": "Look at the GPU's clocks, temperature and neighbours; drain it if it stays.",
            "evidence": {"times_as_slow": 3.1, "step_ms": 61.0, "expected_step_ms": 19.8},
            "hurt": {"promises_lost": 12, "seconds_lost": 33.2, "streams": 25,
                     "tiers": {"premium": 8, "standard": 4}, "tenants": {"acme": 12}},
        }  # fmt: skip
        down = {
            "kind": "lost_worker", "model": MODEL, "worker": self.names[-1], "node": "node-07",
            "since": now - 3000, "says": f"{self.names[-1]} refuses connections.",
            "remedy": "Restart it, or take it out of the configuration.",
            "evidence": {"failures": 12}, "hurt": {"promises_lost": 0, "tiers": {}},
        }  # fmt: skip
        findings = [] if self.calm else [slow, down]
        kept = f"The GPUs of {MODEL} are 97% utilised, and every promise is kept."
        lost, overdue = (0, 0) if self.calm else (17, 5)
        return {"at": now, "window_s": 30.0, "requests": 2712, "promises_lost": lost,
                "overdue": overdue, "findings": findings,
                "notes": [kept] if self.calm else []}  # fmt: skip

    def stalls(self, query: dict[str, str]) -> dict[str, Any]:
        now, limit = self.now(), int(query.get("limit", "200"))
        found = {}
        for i, name in enumerate(self.names):
            if query.get("worker", name) == name and not self.calm and (i % 5 == 3 or self.bad(i)):
                found[name] = self.late(i, now)[-limit:]
        return {"at": now, "causes": CAUSES, "workers": found, "lost": []}

    def late(self, i: int, now: float) -> list[dict[str, Any]]:
        rng = Random(i)
        bad = self.bad(i)
        start = int(now / 600) * 600.0 - 600
        out = []
        for _ in range(240 if bad else 14):
            at = now - rng.uniform(0, 220) if bad else start + rng.uniform(0, 1200)
            cause = "slow_worker" if bad else rng.choice(CAUSES[1:6])
            late = rng.lognormvariate(-2.5, 0.9)
            split = {cause: late * 0.8, "batch": late * 0.2} if cause != "batch" else {cause: late}
            if at <= now:
                out.append({
                    "at": at, "what": "step", "seconds": late + 0.04, "late_s": late,
                    "cause": cause, "split": split, "streams": rng.randrange(10, 33),
                    "tiers": {"premium": 8, "standard": 14}, "tenants": {"acme": 22},
                    "request_id": "",
                })  # fmt: skip
        return sorted(out, key=lambda each: float(each["at"]))

    def decisions(self, query: dict[str, str]) -> dict[str, Any]:
        now, out = self.now(), []
        for n in range(int(query.get("limit", "100")) if self.names else 0):
            at = int(now * 90) / 90 - n / 90
            rng = Random(f"{at:.3f}")
            name, other = rng.sample(self.names, 2) if len(self.names) > 1 else self.names * 2
            command: dict[str, Any] = {
                "type": "Dispatch", "request_id": f"req_{rng.getrandbits(48):012x}",
                "worker_id": name, "attempt": 1, "produced": 0, "prefilled_at": "",
                "because": "least cost 0.021 of 16: TTFT 131 ms, ITL 19.8 ms",
                "predicted": {"ttft_s": rng.uniform(0.05, 0.3), "itl_s": rng.uniform(0.018, 0.025),
                              "headroom": rng.uniform(0.1, 0.6),
                              "cached_tokens": rng.choice([0, 512, 2048])},
                "runner_up": {"worker_id": other, "costs_more": rng.expovariate(30),
                              "ttft_s": rng.uniform(0.05, 0.4), "itl_s": rng.uniform(0.018, 0.03)},
            }  # fmt: skip
            if not self.calm and rng.random() < 0.04:
                command = {"type": "Hold", "request_id": command["request_id"],
                           "because": "no worker has room for it yet"}  # fmt: skip
            elif not self.calm and rng.random() < 0.02:
                command = {"type": "Shed", "request_id": command["request_id"],
                           "because": "its promise could not be kept",
                           "retry_after_s": 2.5, "unavailable": False}  # fmt: skip
            out.append({"at": at, "command": command})
        return {"decisions": out}

    def tenants(self, _: dict[str, str]) -> dict[str, Any]:
        return {"tenants": [
            {"name": "acme", "tier": "premium", "keys": 2, "max_streams": 1200,
             "requests_per_minute": None, "tokens_per_minute": 3_000_000,
             "usage": {"tenant": "acme", "streams": 1011, "left": {"tokens": 180_000},
                       "refused": 0}},
            {"name": "globex", "tier": "standard", "keys": 1, "max_streams": 800,
             "requests_per_minute": 3000, "tokens_per_minute": 2_000_000,
             "usage": {"tenant": "globex", "streams": 744,
                       "left": {"tokens": 900_000, "requests": 800}, "refused": 41}},
            {"name": "initech", "tier": "batch", "keys": 1, "max_streams": None,
             "requests_per_minute": None, "tokens_per_minute": None,
             "usage": {"tenant": "initech", "streams": 245, "left": {}, "refused": 0}},
        ]}  # fmt: skip

    def cost(self, query: dict[str, str]) -> dict[str, Any]:
        if query.get("by") == "batch":
            return self.batches()

        def spent(share: float) -> dict[str, Any]:
            tokens = int(170e6 * share)
            return {"cost": 190 * share, "worker_s": 171_000 * share, "output_tokens": tokens,
                    "kept_tokens": int(tokens * 0.97), "cost_per_million_tokens": 1.118,
                    "cost_per_million_kept_tokens": 1.152}  # fmt: skip

        shares = {"premium": 0.34, "standard": 0.58, "batch": 0.08}
        total = {**spent(1.0), "cost": 256.0, "worker_s": 230_400, "cost_per_million_tokens": 1.506,
                 "cost_per_million_kept_tokens": 1.552}  # fmt: skip
        groups = [{**spent(v), "of": {"tier": k}} for k, v in shares.items()]
        return {"at": self.now(), "window_s": 3600, "covered_s": 3600, "by": ["tier"],
                "total": total, "unallocated": {"cost": 66.0, "worker_s": 59_400},
                "groups": groups}  # fmt: skip

    def batches(self) -> dict[str, Any]:
        told = [("evals-2026-11", "initech", 18_400, 3, 214, 4_386, 0.0),
                ("nightly:summaries", "globex", 9_120, 0, 31, 0, 0.0),
                ("relabel_7", "initech", 50_000, 12, 0, 0, 5_400.0)]  # fmt: skip
        groups = [
            {"of": {"batch": name, "tenant": tenant}, "done": done, "failed": failed,
             "under_way": under_way, "waiting": waiting, "output_tokens": done * 310,
             "kept_tokens": done * 310, "cost": done * 2.9e-4, "worker_s": done * 0.26,
             "cost_per_million_tokens": 0.935, "cost_per_million_kept_tokens": 0.935,
             "first_seen": self.now() - 9_000, "last_seen": self.now() - ago_s}
            for name, tenant, done, failed, under_way, waiting, ago_s in told
        ]  # fmt: skip
        return {"at": self.now(), "by": ["batch", "tenant"], "groups": [] if self.calm else groups}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--port", type=int, default=8081)
    parser.add_argument("--calm", action="store_true")
    given = parser.parse_args()
    fake = FakeAdmin(given.workers, given.streams, given.calm)
    uvicorn.run(fake.app(), port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
