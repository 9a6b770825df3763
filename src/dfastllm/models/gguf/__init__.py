"""Models in GGUF files: shapes, names and row orders of llama.cpp's architectures, read and written.

The container and its blocks are quant.gguf's, tokenizers text.gguf's.
"""

from dfastllm.models.gguf.export import write_gguf
from dfastllm.models.gguf.load import GgufModel, open_gguf

__all__ = ["GgufModel", "open_gguf", "write_gguf"]
