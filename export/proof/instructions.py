"""The integer instructions of this CPU, as it says and as it computes."""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from ptq4vit_fx.export.proof.runtime import products_saturate

#: Names of instruction sets, the fastest first, and what PyTorch and Linux (x86: "flags", ARM: "Features") call them.
INSTRUCTION_SETS = {
    "AMX": ("amx_int8",),
    "AVX512-VNNI": ("avx512_vnni",),
    "AVX-VNNI": ("avx_vnni",),
    "I8MM": ("i8mm",),
    "dotprod": ("dot", "asimddp"),
    "AVX512": ("avx512_bw", "avx512bw"),
    "AVX2": ("avx2",),
}
#: With these, four products of 8 bits are summed in 32 bits by one instruction.
DOT_PRODUCTS = frozenset(["AMX", "AVX512-VNNI", "AVX-VNNI", "I8MM", "dotprod"])
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Instructions:
    """The CPU of this machine.

    found: names out of INSTRUCTION_SETS, the fastest first, None where the system does not tell. saturates: whether u8
    x s8 products came out wrong when ONNX Runtime was made to compute them: this is measured, everywhere.
    """

    cpu: str
    found: tuple[str, ...] | None
    saturates: bool

    def __str__(self) -> str:
        if self.found is None:
            known = "instruction sets unknown (this system does not tell)"
        elif not self.found:
            known = "none of " + ", ".join(INSTRUCTION_SETS)
        else:
            dots = "" if DOT_PRODUCTS.intersection(self.found) else "; no instruction for dot products of 8 bits"
            known = f"{', '.join(self.found)}{dots}"
        measured = "saturate: the results are inexact" if self.saturates else "are exact"
        return f"CPU {self.cpu}: {known}; measured: u8 x s8 products {measured}"


def cpu_instructions() -> Instructions:
    """Return what this CPU has. ONNX Runtime does not tell which kernels it takes; it chooses by these flags."""
    flags = _flags()
    return Instructions(
        cpu=_name(),
        found=None if flags is None else instruction_sets(flags),
        saturates=products_saturate(),
    )


def _name() -> str:
    """Return the machine's architecture, behind the processor's own name where Linux tells it."""
    machine = platform.machine() or "unknown"
    name = cpuinfo_field(CPUINFO.read_text(), "model name") if CPUINFO.is_file() else None
    return f"{name} ({machine})" if name else machine


def instruction_sets(flags: Collection[str]) -> tuple[str, ...]:
    """Return the names of the instruction sets among a CPU's flags, the fastest first."""
    return tuple(name for name, spellings in INSTRUCTION_SETS.items() if any(word in flags for word in spellings))


def _flags() -> Collection[str] | None:
    """Ask PyTorch, whose newer versions know on every system, else Linux; None if neither tells."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return {name for name, value in capabilities().items() if value is True}
    return cpuinfo_flags(CPUINFO.read_text()) if CPUINFO.is_file() else None


def cpuinfo_flags(text: str) -> Collection[str] | None:
    """Return the flags of the first processor in the text of /proc/cpuinfo; None if it lists none."""
    flags = cpuinfo_field(text, "flags", "Features")
    return None if flags is None else flags.split()


def cpuinfo_field(text: str, *keys: str) -> str | None:
    """Return what the first processor in the text of /proc/cpuinfo has under one of these keys; None if nothing."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None
