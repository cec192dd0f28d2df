"""What is in an engine's KV cache? Heard from vLLM and SGLang, which tell it over ZeroMQ.

`sources` asks an engine where it tells, `KvEventStream` listens, `Decoder` understands. `Ears` do
all of it for one worker. Nothing here is imported before an engine is found that may tell anything.
"""

from paceline.engines.kvevents.decode import Batch, Decoder
from paceline.engines.kvevents.ears import Ears
from paceline.engines.kvevents.sources import Source, sources
from paceline.engines.kvevents.stream import KvEventStream

__all__ = ["Batch", "Decoder", "Ears", "KvEventStream", "Source", "sources"]
