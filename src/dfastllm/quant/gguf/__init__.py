"""GGUF: the container, its quantised blocks, and the packed formats they become.

Reads any GGML type that the `gguf` package decodes, writes the float types and the 32-element block types. Knows
metadata as keys and values; which model (models.gguf) and which tokenizer (text.gguf) they describe is decided above.
"""

from dfastllm.quant.gguf.convert import to_float, to_qtensor
from dfastllm.quant.gguf.ids import SpecialIds, special_ids, tokens_of
from dfastllm.quant.gguf.reader import GgufFile, GgufTensor
from dfastllm.quant.gguf.types import BY_NAME, FILE_TYPES, FLOATS, GgmlType
from dfastllm.quant.gguf.writer import Planned, encode, type_for, write_file

__all__ = [
    "BY_NAME",
    "FILE_TYPES",
    "FLOATS",
    "GgmlType",
    "GgufFile",
    "GgufTensor",
    "Planned",
    "SpecialIds",
    "encode",
    "special_ids",
    "to_float",
    "to_qtensor",
    "tokens_of",
    "type_for",
    "write_file",
]
