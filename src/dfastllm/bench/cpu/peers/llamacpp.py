"""llama.cpp worker: makes GGUF files of a random model with llama.cpp's own quantiser and times `llama_decode`.

Low-level calls of llama-cpp-python only, so that a sample is one forward of exactly the rows asked for. The library's
defaults hold for everything but sizes and threads (f16 K,V, flash attention where the library chooses it)."""

# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call"
from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from .serve import serve_session, timed

__all__ = ["main"]

FTYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama_ftype of llama.h


def _vocabulary(size: int) -> tuple[list[str], list[int]]:
    """Byte-level BPE tokens: the 256 bytes in GPT-2's printable spelling, then made-up words, the last one a control
    token. Ids are fed directly, so only its size matters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*spelled, "ab", *(f"w{i}" for i in range(size - 258)), "<|endoftext|>"]
    return words, [1] * (size - 1) + [3]  # gguf.TokenType: NORMAL, CONTROL


def write_base(shape: dict[str, Any], path: Path, seed: int) -> None:
    """A float16 GGUF of `shape` (fields of a Hugging Face config, `architecture` qwen2, llama or qwen3moe) with weights
    drawn from N(0, 0.02), norms of one and small biases."""
    import gguf

    architecture = shape["architecture"]
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv = hidden // heads * shape["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_file_type(1)
    experts = shape.get("num_experts", 0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(shape["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(shape["moe_intermediate_size"])
        writer.add_key_length(hidden // heads)
        writer.add_value_length(hidden // heads)
    tokens, types = _vocabulary(shape["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(shape["vocab_size"] - 1)
    writer.add_add_bos_token(False)

    random = np.random.default_rng(seed)

    def matrix(name: str, *size: int) -> None:
        weight = random.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", weight.astype(np.float16))

    def vector(name: str, size: int, mean: float, deviation: float) -> None:
        writer.add_tensor(name, (mean + deviation * random.standard_normal(size)).astype(np.float32))

    matrix("token_embd", shape["vocab_size"], hidden)
    vector("output_norm.weight", hidden, 1.0, 0.0)
    if not shape["tie_word_embeddings"]:
        matrix("output", shape["vocab_size"], hidden)
    for i in range(shape["num_hidden_layers"]):
        vector(f"blk.{i}.attn_norm.weight", hidden, 1.0, 0.0)
        vector(f"blk.{i}.ffn_norm.weight", hidden, 1.0, 0.0)
        for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
            matrix(f"blk.{i}.{name}", rows, hidden)
            if architecture == "qwen2":
                vector(f"blk.{i}.{name}.bias", rows, 0.0, 0.1)
        matrix(f"blk.{i}.attn_output", hidden, hidden)
        if experts:
            vector(f"blk.{i}.attn_q_norm.weight", hidden // heads, 1.0, 0.0)
            vector(f"blk.{i}.attn_k_norm.weight", hidden // heads, 1.0, 0.0)
            router = random.standard_normal((experts, hidden), dtype=np.float32) * np.float32(0.02)
            writer.add_tensor(f"blk.{i}.ffn_gate_inp.weight", router)
        for name, *size in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            matrix(f"blk.{i}.ffn_{name}{'_exps' if experts else ''}", *((experts, *size) if experts else size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(shape: dict[str, Any], directory: str, formats: list[str], seed: int, threads: int) -> dict[str, int]:
    """Write `<format>.gguf` for each format that is not there yet. Returns bytes of the files."""
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    base = root / "F16.gguf"
    missing = [name for name in formats if not (root / f"{name}.gguf").exists()]
    if missing:
        write_base(shape, base, seed)
    for name in missing:
        quantise(str(base), str(root / f"{name}.gguf"), name, threads)
    base.unlink(missing_ok=True)
    return {name: (root / f"{name}.gguf").stat().st_size for name in formats}


def quantise(source: str, target: str, form: str, threads: int) -> None:
    """Write a GGUF file of another type, of a file that may be quantised itself (its floats are rounded again)."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = FTYPES[form], threads, True
    part = Path(f"{target}.part")
    failed = llama_cpp.llama_model_quantize(source.encode(), str(part).encode(), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama_model_quantize to {form} failed with {failed}")
    part.rename(target)


class Session:
    """One GGUF file at one thread count, and the context last used."""

    def __init__(self) -> None:
        self.model: Any = None
        self.context: Any = None
        self.prepared = (0, 0, 0)  # sequences, positions each holds, positions each has room for
        self.threads = 0
        self.vocab = 0

    def load(self, path: str, threads: int) -> dict[str, Any]:
        """Map the file; frees what was loaded before. Returns the library's version and what it was compiled for."""
        import llama_cpp

        self._free()
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = threads
        compiled = llama_cpp.llama_print_system_info().decode()
        return {"llama_cpp_python": llama_cpp.__version__, "compiled": compiled}

    def _free(self) -> None:
        import llama_cpp

        if self.context:
            llama_cpp.llama_free(self.context)
            self.context = None
        if self.model:
            llama_cpp.llama_model_free(self.model)
            self.model = None

    def _cached(self, sequences: int, cached: int, room: int) -> Any:
        """A context whose `sequences` hold `cached` positions each and have room for `room` more; made anew only when
        it is another than last time."""
        import llama_cpp

        wanted = (sequences, cached, -(-(cached + room) // 256) * 256)
        if self.context and wanted == self.prepared:
            self._forget(sequences, cached)
            return self.context
        if self.context:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * wanted[2]
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.prepared = wanted
        for sequence in range(sequences if cached else 0):
            self._decode(self._prompt(sequence, cached))
        return self.context

    def _forget(self, sequences: int, cached: int) -> None:
        """Remove the K,V of positions from `cached` on."""
        import llama_cpp

        memory = llama_cpp.llama_get_memory(self.context)
        for sequence in range(sequences):
            llama_cpp.llama_memory_seq_rm(memory, sequence, cached, -1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One llama_decode of rows (token, position, sequence, wants logits), waiting for its end."""
        import llama_cpp

        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        failed = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode of {len(rows)} rows returned {failed}")

    def _argmax(self, row: int) -> int:
        import llama_cpp

        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def _prompt(self, sequence: int, length: int) -> list[tuple[int, int, int, bool]]:
        ids = np.random.default_rng(sequence).integers(0, self.vocab - 1, length)
        return [(int(token), at, sequence, at == length - 1) for at, token in enumerate(ids)]

    def forward(self, rows: int, cached: int, repeats: int, every_row: bool, grow: bool) -> list[float]:
        """Seconds of `repeats` forwards of `rows` tokens after `cached` positions. grow: causal and their K,V stay,
        each is the next decode step, fed its own argmax; else every row sees the whole block (unless nothing is
        cached: a causal prefill) and the K,V of the block are removed again outside the clock."""
        import llama_cpp

        context = self._cached(1, cached, rows * (repeats if grow else 1))
        prompt = self._prompt(0, cached + rows)
        block = [(token, at, 0, every_row or at == cached + rows - 1) for token, at, _, _ in prompt[cached:]]
        llama_cpp.llama_set_causal_attn(context, grow or not cached)

        def step() -> None:
            nonlocal block
            self._decode(block)
            if grow:
                following = self._argmax(rows - 1)
                block = [(following, at + rows, 0, wanted) for _, at, _, wanted in block]

        def undo() -> None:
            if not grow:
                self._forget(1, cached)

        seconds = timed(step, repeats, undo)
        llama_cpp.llama_set_causal_attn(context, True)
        return seconds

    def logits(self, ids: list[int], path: str) -> int:
        """Write the logits of every position of a causal prefill of `ids` to `path`, float32 as they lie in memory.
        Returns the width of a row."""
        import llama_cpp

        context = self._cached(1, 0, len(ids))
        llama_cpp.llama_set_causal_attn(context, True)
        with open(path, "wb") as out:
            for first in range(0, len(ids), 512):  # of a batch of the context
                rows = [(token, first + i, 0, True) for i, token in enumerate(ids[first : first + 512])]
                self._decode(rows)
                for i in range(len(rows)):
                    row = llama_cpp.llama_get_logits_ith(context, i)
                    np.ctypeslib.as_array(row, shape=(self.vocab,)).tofile(out)
        self._forget(1, 0)
        return self.vocab

    def concurrent(self, sequences: int, cached: int, repeats: int) -> list[float]:
        """Seconds of `repeats` decodes of one greedy token for every one of `sequences`, each `cached` long before."""
        self._cached(sequences, cached, repeats)
        rows = [(sequence, cached, sequence, True) for sequence in range(sequences)]

        def step() -> None:
            nonlocal rows
            self._decode(rows)
            rows = [(self._argmax(i), at + 1, sequence, True) for i, (_, at, sequence, _) in enumerate(rows)]

        return timed(step, repeats)


def main() -> None:
    session = Session()
    serve_session(make, session, quantise=quantise, logits=session.logits)


if __name__ == "__main__":
    main()
