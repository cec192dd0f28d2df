"""A page as NVIDIA's DCGM exporter writes it, for GPUs that a test thinks up.

No GPU was at hand: names, labels, their order and the form of numbers are those of its own template
(`internal/pkg/rendermetrics`), its `etc/*.csv` and pages that users have published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WELL = {
    "DCGM_FI_DEV_SM_CLOCK": 1980,
    "DCGM_FI_DEV_MEMORY_TEMP": 9223372036854775794,  # blank: this GPU does not tell
    "DCGM_FI_DEV_GPU_TEMP": 61,
    "DCGM_FI_DEV_POWER_USAGE": 512.365,
    "DCGM_FI_DEV_GPU_UTIL": 98,
    "DCGM_FI_DEV_XID_ERRORS": 0,
    "DCGM_FI_DEV_FB_FREE": 9120,
    "DCGM_FI_DEV_FB_USED": 71920,
    "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": 0,
    "DCGM_FI_PROF_SM_ACTIVE": 0.731,
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.082,
    "DCGM_FI_PROF_DRAM_ACTIVE": 0.644,
}
"""An H100 that decodes."""
HOT = {
    **WELL,
    "DCGM_FI_DEV_SM_CLOCK": 1095,
    "DCGM_FI_DEV_GPU_TEMP": 88,
    "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": 0x60,
}
Values = Mapping[str, float]


def page(gpus: Sequence[Values], more: str = "", uuid: str = "UUID") -> str:
    """The page of a machine with these GPUs. `more`: further labels, with their comma."""
    lines = []
    for name in dict.fromkeys(name for gpu in gpus for name in gpu):
        told = [(i, gpu[name]) for i, gpu in enumerate(gpus) if name in gpu]
        lines += [f"# HELP {name} What its field says.", f"# TYPE {name} gauge"]
        for i, value in told:
            labels = (
                f'gpu="{i}",{uuid}="GPU-5fd4f087-86f3-7a43-b711-4771313afc{i:02d}",'
                f'pci_bus_id="00000000:{i:02X}:00.0",device="nvidia{i}",'
                f'modelName="NVIDIA H100 80GB HBM3"{more},Hostname="node-a"'
            )
            shown = f"{value:.6f}" if isinstance(value, float) else str(value)
            lines.append(f"{name}{{{labels}}} {shown}")
    return "\n".join(lines) + "\n"
