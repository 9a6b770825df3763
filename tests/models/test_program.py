"""Programs: what packing makes of them, the same numbers on every runner, and ops that a runner lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfastllm import assemble, models
from dfastllm.core import Request, SamplingParams, Span, SpeculativeParams
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.kv import KvCache
from dfastllm.llm import SHIPPED
from dfastllm.models.gguf import open_gguf, write_gguf
from dfastllm.models.packed import Gated, Mix, Project, Sum
from dfastllm.models.program import Experts, offsets
from dfastllm.text.gguf import tokenizer_metadata

WINDOWED = [name for name in sorted(models.FAMILIES) if models.tiny_config(name).window]
DENSE = [name for name in sorted(models.FAMILIES) if models.tiny_config(name).moe is None]
ROPES = {
    "none": None,
    "linear": models.RopeScaling("linear", 4.0),
    "llama3": models.RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": models.RopeScaling("yarn", 8.0, 4096),
    "yarn-tuned": models.RopeScaling("yarn", 4.0, 4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3),
    "longrope-short": models.RopeScaling("longrope", 4.0, 65536, short=(1.5,) * 32, long=(9.0,) * 32),
    "longrope-long": models.RopeScaling("longrope", 4.0, 4096, short=(1.5,) * 32, long=tuple(map(float, range(1, 33)))),
}


def torch_logits(model: models.Decoder, ids: Tensor, positions: Tensor) -> Tensor:
    kind = "causal" if model.info.kind == "ar" else "full"
    with torch.no_grad():
        return model.head(model(ids, positions, models.dense_attention(1, len(ids), kind)))  # type: ignore[arg-type]


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_the_same_on_every_runner(rope: str) -> None:
    """Torch, the twin and the native forward, at positions far beyond the trained length, heads of 64."""
    model = models.tiny("llama", seed=2, hidden_size=128, heads=2, kv_heads=1, max_len=32768, rope_scaling=ROPES[rope])
    packed = assemble.pack(model)
    ids = torch.randint(0, 90, (24,), generator=torch.Generator().manual_seed(0))
    for first in (0, 5000, 20000):
        positions = torch.arange(first, first + 24)
        wanted = torch_logits(model, ids, positions)
        table = PageTable(Pages(4, 16))
        table.grow(24)
        step = pack([(Span(0, tuple(ids.tolist()), "causal", "keep", want=tuple(range(24))), table, 0)])
        step.positions[:] = positions.numpy()
        caches = KvCache(2, 4, 1, 64), KvCache(1, 4, 1, 64)
        for hidden in (packed.forward(step, *caches), packed._run_plain(step, *caches, None, None)):
            assert (packed.logits(hidden) - wanted).abs().max() <= 2e-4
    if rope != "none":
        plain = models.tiny("llama", seed=2, hidden_size=128, heads=2, kv_heads=1, max_len=32768)
        assert (torch_logits(plain, ids, positions) - wanted).abs().max() > 0.01  # it matters here


@pytest.mark.parametrize("family", DENSE)
def test_packed_ops(family: str) -> None:
    """Every weight of the program is in its packed form once; a layer attends once; what can be joined is."""
    model = models.tiny(family, seed=1)
    packed = assemble.pack(model)
    norms = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 1 and not n.endswith("bias"))
    assert sum(norm.weight.numel() for norm in packed._norms()) == norms
    for ops in packed.layers:
        assert sum(isinstance(op, Mix) for op in ops) == 1
        assert isinstance(ops[0], Project)
        assert isinstance(ops[1], Mix)
        assert sum(isinstance(op, Gated) for op in ops) == 1
        ends = sum((isinstance(op, Project) and op.onto_stream) or isinstance(op, Sum) for op in ops)
        assert ends == 2
    if family == "gemma2":
        assert packed.norm.weight.tolist() == [1.0] * 32  # stored as 0, the distance from 1
        assert len(offsets(model.program)) == norms // 32


def tokens(model: Any, prompt: list[int], count: int, config: EngineConfig, **options: Any) -> list[int]:
    engine = Engine(model, config=config, dtype=torch.float32)
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    engine.add(Request("r", tuple(prompt), sampling, None, **options))
    found: list[int] = []
    while engine.has_work:
        for event in engine.step():
            found += event.token_ids
    return found


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_windows_in_the_engine(family: str, backend: str) -> None:
    """A prompt three windows long, read whole and in chunks, alone and with drafts to verify: the same greedy tokens,
    which are those of one dense forward a token."""
    model = models.tiny(family, seed=6, max_len=256, layers=3).requires_grad_(False)
    # A short cycle: the drafts of an n-gram table are often right, so spans of several rows are stored.
    prompt = [5, 9, 31, 7, 44] * 15
    wanted, ids = [], list(prompt)
    for _ in range(12):
        ids.append(int(torch_logits(model, torch.tensor(ids), torch.arange(len(ids)))[-1].argmax()))
    wanted = ids[len(prompt) :]
    served: Any = assemble.pack(model) if backend == "native" else model
    whole = EngineConfig(kv_tokens=512, page_size=16)
    assert tokens(served, prompt, 12, whole) == wanted
    assert tokens(served, prompt, 12, replace(whole, prefill_chunk=16, max_batch_rows=48)) == wanted
    drafts = SpeculativeParams("ngram", 4, adaptive=False)
    assert tokens(served, prompt, 12, whole, speculative=drafts) == wanted
    unbounded = models.tiny(family, seed=6, max_len=256, layers=3, window=255).requires_grad_(False)
    assert (
        torch_logits(unbounded, torch.tensor(prompt), torch.arange(75))
        - torch_logits(model, torch.tensor(prompt), torch.arange(75))
    ).abs().max() > 0.01  # the window matters


@pytest.mark.parametrize("family", [name for name in sorted(models.FAMILIES) if name not in DENSE])
def test_an_op_that_a_runner_lacks(family: str) -> None:
    model = models.tiny(family)
    layer = next(i for i, ops in enumerate(model.program.layers) if any(isinstance(op, Experts) for op in ops))
    said = rf"op experts \(layer {layer}, a mixture of experts\) runs on the torch runner; the native runner lacks it"
    with pytest.raises(UnsupportedError, match=said) as caught:
        assemble.pack(model)
    assert caught.value.hint == "Load float weights with backend torch or auto."


@pytest.mark.parametrize("family", [name for name in DENSE if models.FAMILIES[name].gguf])
def test_a_gguf_file_packs_to_the_same_numbers(family: str, tmp_path: Path) -> None:
    model = models.tiny(family, seed=8, hidden_size=64, heads=4, layers=3).requires_grad_(False)
    ids = torch.randint(0, 90, (60,), generator=torch.Generator().manual_seed(0))
    with open_gguf(write_gguf(model, tmp_path / "m.gguf", "F32")) as opened:
        parts = ((name, value) for name, value, _ in opened.tensors())
        packed = models.pack_decoder(opened.config, opened.info, parts, torch.float32)
    table = PageTable(Pages(8, 16))
    table.grow(60)
    kind = "causal" if model.info.kind == "ar" else "full"
    span = Span(0, tuple(ids.tolist()), kind, "keep" if kind == "causal" else "none", want=tuple(range(60)))  # type: ignore[arg-type]
    got = NativeRunner(packed, 128, torch.float32, 16).run(pack([(span, table, 0)])).logits()
    assert (got - torch_logits(model, ids, torch.arange(60))).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["qwen3_moe", "llada_moe"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_mixture_in_a_gguf_file(family: str, kind: str, tmp_path: Path) -> None:
    """One tensor holds the experts of a layer; they are floats on torch, and the native runner says what it lacks."""
    moe = replace(models.tiny_config(family).moe, intermediate_size=32)  # type: ignore[type-var]
    model = models.tiny(family, seed=8, hidden_size=64, heads=4, vocab_size=1280, moe=moe).requires_grad_(False)
    demo = SHIPPED / "demo-ar"
    path = write_gguf(model, tmp_path / "m.gguf", kind, tokenizer=tokenizer_metadata(demo, 1280))
    with open_gguf(path) as opened:
        assert opened.file.tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 32, 64)
    loaded = assemble.load(path, dtype="float32").model
    assert isinstance(loaded, models.Decoder)
    assert loaded.config == model.config
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert (ours - theirs).abs().max() <= (0 if kind == "F32" else theirs.abs().max() / 120), name
    for options in ({"backend": "native"}, {"quantization": "w8"}):
        with pytest.raises(UnsupportedError, match=r"op experts \(layer 0"):
            assemble.load(path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["order", "width", "table", "activation"])
def test_a_list_of_ops_that_does_not_fit(wrong: str) -> None:
    """What the native forward checks of the ops it is given, whoever made them."""
    packed = assemble.pack(models.tiny("llama"))
    ops = list(packed.layers[1])
    if wrong == "order":
        ops = ops[1:]
    if wrong == "width":
        ops[2] = ops[4]
    if wrong == "table":
        ops[1] = replace(ops[1], table=1)
    if wrong == "activation":
        ops[3] = replace(ops[3], activation="relu")
    packed.layers = (packed.layers[0], tuple(ops))
    if models.packed.native() is None:
        pytest.skip("no native kernels")
    said = {
        "order": "attention takes",
        "width": "takes",
        "table": "no such rotary table",
        "activation": "no activation",
    }
    with pytest.raises(ValueError, match=said[wrong]):
        NativeRunner(packed, 64, torch.float32, 16).model._compile(KvCache(2, 4, 2, 8))
