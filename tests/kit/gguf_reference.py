"""llama.cpp as the reference: logits, token ids and quantised files through llama-cpp-python's C interface.

Import it only below `pytest.importorskip("llama_cpp")`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """llama.cpp says much on standard error."""


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


class Reference:
    """A loaded file. Causal or not as the file says; the cache is emptied before every evaluation."""

    def __init__(self, path: Path, *, vocab_only: bool = False, context: int = 128) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.context = None
        if not vocab_only:
            options = llama_cpp.llama_context_default_params()
            options.n_ctx = options.n_batch = options.n_ubatch = context
            options.n_threads = options.n_threads_batch = 1
            options.flash_attn_type = 0
            options.type_k = options.type_v = 0  # float32 K,V: the comparison is of weights
            self.context = llama_cpp.llama_init_from_model(self.model, options)

    def close(self) -> None:
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[len(ids), vocabulary]"""
        memory = llama_cpp.llama_get_memory(self.context)
        if memory:
            llama_cpp.llama_memory_clear(memory, True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        batch.n_tokens = len(ids)
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        assert status == 0
        size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        found = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, shape=(len(ids) * size,)).reshape(len(ids), size).copy()

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[-count:]

    def tokenize(self, text: str, *, special: bool = True, add_special: bool = False) -> list[int]:
        data = text.encode()
        out = (llama_cpp.llama_token * (len(data) + 16))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), add_special, special)
        assert count >= 0
        return list(out[:count])

    def detokenize(self, ids: Sequence[int]) -> bytes:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
        count = llama_cpp.llama_detokenize(self.vocab, array, len(ids), buffer, len(buffer), False, True)
        assert count >= 0
        return buffer.raw[:count]


def quantise(source: Path, target: Path, ftype: int, matrices: dict[str, int]) -> bool:
    """Write `target` with every matrix of type `ftype`, its importance matrix all ones (matrices: name -> columns; some
    types are refused without one). False where llama.cpp does not write this type."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = ftype, 1, True
    keep = [np.ones(k, np.float32) for k in matrices.values()]
    entry = llama_cpp.llama_cpp.llama_model_imatrix_data
    entries = (entry * (len(matrices) + 1))()
    for slot, name, values in zip(entries, matrices, keep, strict=False):
        slot.name = name.encode()
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.size = len(values)
    params.imatrix = entries
    return llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
