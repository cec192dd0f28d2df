"""How does an inference engine behave in time?

A continuous-batching scheduler on the caller's clock. Pure: no I/O, clock or chance of its own. The
simulator drives it on a virtual clock, the emulated engine on a real one.
"""

from paceline.enginemodel.blocks import BlockPool
from paceline.enginemodel.generation import Generation
from paceline.enginemodel.plan import StepOutcome, StepPlan
from paceline.enginemodel.profile import PROFILES, Chance, Load, Profile
from paceline.enginemodel.scheduler import Scheduler

__all__ = [
    "PROFILES",
    "BlockPool",
    "Chance",
    "Generation",
    "Load",
    "Profile",
    "Scheduler",
    "StepOutcome",
    "StepPlan",
]
