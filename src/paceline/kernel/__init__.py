"""When to do it: facts in, commands out, without I/O, clock or chance of its own."""

from paceline.kernel.kernel import Kernel, Settings

__all__ = ["Kernel", "Settings"]
