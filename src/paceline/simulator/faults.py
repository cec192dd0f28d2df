"""What goes wrong, and when?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from paceline.simulator.replica import Replica
from paceline.simulator.scenario import Fault

if TYPE_CHECKING:
    from paceline.simulator.simulation import Simulation


def schedule_faults(simulation: Simulation) -> None:
    """Have the scenario's troubles happen."""
    for fault in simulation.scenario.faults:
        begin = BEGIN[fault.kind]
        for at_s in times(fault, simulation.scenario.seconds):
            for name, replica in simulation.replicas.items():
                if fault.worker in ("*", name):
                    simulation.clock.at(at_s, partial(begin, simulation, fault), replica)


def times(fault: Fault, end_s: float) -> Iterator[float]:
    """When the trouble begins: once, or again and again until the last arrival."""
    at_s = fault.at_s
    yield at_s
    while fault.every_s and (at_s := at_s + fault.every_s) < end_s:
        yield at_s


def _slow(simulation: Simulation, fault: Fault, replica: Replica) -> None:
    replica.slow(fault.factor)
    ends_at = simulation.clock.now + fault.for_s
    simulation.clock.at(ends_at, lambda _: replica.slow(1.0 / fault.factor))


def _hang(simulation: Simulation, fault: Fault, replica: Replica) -> None:
    replica.hang(simulation.clock.now + fault.for_s)


def _crash(simulation: Simulation, fault: Fault, replica: Replica) -> None:
    if replica.up:
        replica.crash()
        simulation.handovers.lost(replica)
        for gateway in simulation.gateways:
            gateway.crashed(replica)
        simulation.start(replica, fault.for_s + replica.start_up_s)


def _partition(simulation: Simulation, fault: Fault, replica: Replica) -> None:
    for gateway in simulation.gateways:
        if fault.gateway in ("*", f"g{gateway.index}"):
            gateway.cut_off(replica, simulation.clock.now + fault.for_s)


def _link(simulation: Simulation, fault: Fault, replica: Replica) -> None:
    simulation.handovers.slow(replica.node, fault.factor)
    ends_at = simulation.clock.now + fault.for_s
    simulation.clock.at(
        ends_at, lambda _: simulation.handovers.slow(replica.node, 1.0 / fault.factor)
    )


BEGIN: dict[str, Callable[[Simulation, Fault, Replica], None]] = {
    "slow": _slow,
    "hang": _hang,
    "crash": _crash,
    "partition": _partition,
    "link": _link,
}
