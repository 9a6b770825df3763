"""Tokenizers in GGUF files: the metadata keys tokenizer.ggml.* and tokenizer.chat_template, read and written.

Takes and gives metadata as a mapping; the file itself is quant.gguf's.
"""

from dfastllm.text.gguf.export import tokenizer_metadata
from dfastllm.text.gguf.load import read_tokenizer

__all__ = ["read_tokenizer", "tokenizer_metadata"]
