"""What is measured, and what was aimed at before it was measured (issue 3, point 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AIMS", "CASES", "Case", "aim_for"]


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of forward. `sequences` of them concurrently, `rows` tokens of each after `cached` positions.

    every_row: logits of all rows are wanted, else of the last. grow: the rows' K,V stay and the next forward follows
    its argmax (decoding); else each repeat is the same forward on the same cache. A growing or uncached forward is
    causal; a block on a cache sees all of itself, as a denoise step does.
    """

    name: str
    rows: int
    cached: int
    every_row: bool = True
    grow: bool = False
    sequences: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * self.sequences

    @property
    def head_rows(self) -> int:
        return self.tokens if self.every_row else self.sequences

    @property
    def keys(self) -> float:
        """Keys a row sees, on average."""
        return self.cached + (self.rows / 2 if self.grow or not self.cached else self.rows)


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("decode, batch 1", 1, 256, grow=True),
        Case("decode, 16 concurrent", 1, 128, grow=True, sequences=16),
        Case("prefill 512", 512, 0, every_row=False),
        Case("prefill 4096", 4096, 0, every_row=False),
        Case("block of 32, all rows", 32, 256),
        Case("block of 32, one row", 32, 256, every_row=False),
        Case("block of 128, all rows", 128, 256),
        Case("block of 128, one row", 128, 256, every_row=False),
    )
}

# (peer, format) -> case -> how many times faster than the peer
AIMS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("llama.cpp", "Q8_0"): {
        "decode, batch 1": 1.4,
        "decode, 16 concurrent": 4.0,
        "prefill 512": 3.5,
        "block of 32, all rows": 4.0,
    },
    ("llama.cpp", "Q4_0"): {
        "decode, batch 1": 1.4,
        "decode, 16 concurrent": 2.5,
        "prefill 512": 2.0,
        "block of 32, all rows": 2.3,
    },
    ("llama.cpp", "Q4_K_M"): {"block of 32, all rows": 4.0},
    ("llama.cpp-avx2", "Q8_0"): {"block of 32, all rows": 2.0},
    ("llama.cpp-avx2", "Q4_0"): {"block of 32, all rows": 2.0},
    ("llama.cpp-avx-vnni", "Q8_0"): {"block of 32, all rows": 2.5},
    ("llama.cpp-avx-vnni", "Q4_0"): {"block of 32, all rows": 2.5},
    **{
        ("openvino-genai", name): {
            "decode, batch 1": 1.4,
            "decode, 16 concurrent": 1.5,
            "prefill 512": 1.2,
            "prefill 4096": 1.5,
            "block of 32, all rows": 2.0,
        }
        for name in ("int8", "int4")
    },
    **{("pytorch", name): {"block of 32, all rows": 2.0} for name in ("bf16", "w8", "w4")},
}


# The same for the cases below and every format: what mixtures were to reach, set before they were measured.
MIXTURES: Mapping[str, float] = {"llama.cpp": 1.5, "pytorch": 3.0}
MIXTURE_CASES = ("decode, batch 1", "decode, 16 concurrent", "block of 32, all rows")


def aim_for(peer: str, form: str, case: str, *, mixture: bool = False) -> float | None:
    """mixture: of a shape with experts."""
    if mixture:
        return MIXTURES.get(peer) if case in MIXTURE_CASES else None
    return AIMS.get((peer, form), {}).get(case)
