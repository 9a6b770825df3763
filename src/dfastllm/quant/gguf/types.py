"""GGML tensor types: number in the file, elements and bytes of one block. Facts of the GGUF format, no code.

Source: the enumeration ggml_type and the block structures of ggml (ggml.h, ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BY_NAME", "BY_NUMBER", "FILE_TYPES", "FLOATS", "GgmlType"]


@dataclass(frozen=True, slots=True)
class GgmlType:
    """block: elements that share one block along a row; size: bytes of that block."""

    name: str
    number: int
    block: int
    size: int

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k elements; k must be a multiple of `block`."""
        return k // self.block * self.size


_TYPES = (
    GgmlType("F32", 0, 1, 4),
    GgmlType("F16", 1, 1, 2),
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("IQ2_XXS", 16, 256, 66),
    GgmlType("IQ2_XS", 17, 256, 74),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ1_S", 19, 256, 50),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("BF16", 30, 1, 2),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36),
    GgmlType("Q1_0", 41, 128, 18),
    GgmlType("Q2_0", 42, 64, 18),
)

BY_NUMBER = {entry.number: entry for entry in _TYPES}
BY_NAME = {entry.name: entry for entry in _TYPES}
FLOATS = ("F32", "F16", "BF16")

# general.file_type: what most matrices of a file are (llama.cpp's llama_ftype), for the types our writer makes.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
