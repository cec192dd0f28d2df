"""An engine without a GPU: to its clients a vLLM server, in time like the GPU of its profile."""

from paceline.engines.emulated.server import emulated_engines, serve_emulated
from paceline.engines.emulated.settings import EngineSettings, load_engines

__all__ = ["EngineSettings", "emulated_engines", "load_engines", "serve_emulated"]
