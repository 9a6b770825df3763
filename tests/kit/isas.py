"""The instruction sets of native kernels: which ones a machine that has one has besides."""

from __future__ import annotations

__all__ = ["CHAINS", "lesser"]

CHAINS = (  # each has those after it
    ("avx512", "avx512vl", "avx2", "scalar"),
    ("avxvnni", "avx2", "scalar"),
    ("i8mm", "dotprod", "neon", "scalar"),
)


def lesser(isa: str) -> tuple[str, ...]:
    """What a machine whose kernels use `isa` can be asked for instead."""
    return next(chain[chain.index(isa) + 1 :] for chain in CHAINS if isa in chain)
