from __future__ import annotations
from collections.abc import Mapping
from typing import Any, Protocol
import aiohttp
from paceline.domain.worker import WorkerReport
class Adapter(Protocol):
    kind: str
    def extras(self, path: str, urgency: int) -> Mapping[str, Any]: ...
    async def report(self, session: aiohttp.ClientSession) -> WorkerReport: ...
class _Stub:
    def __init__(self, url): self.kind="vllm"; self.url=url
    def extras(self, path, urgency): return {}
    async def report(self, session):
        try:
            async with session.get(self.url+"/health", timeout=aiohttp.ClientTimeout(total=1)) as r:
                return WorkerReport(healthy=r.status==200)
        except Exception as e: return WorkerReport(healthy=False, because=repr(e))
def make_adapter(kind, url, name, key): return _Stub(url)
