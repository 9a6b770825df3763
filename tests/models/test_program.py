"""Programs: what packing makes of them, the same numbers on every runner, and ops that a runner lacks."""

from __future__ import annotations

import re
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
from dfastllm.kernels.kv import KvCache
from dfastllm.llm import SHIPPED
from dfastllm.models.gguf import open_gguf, write_gguf
from dfastllm.models.packed import Gated, Mix, Project, Routed, Sum
from dfastllm.models.program import Experts, offsets
from dfastllm.quant import quantise
from dfastllm.text.gguf import tokenizer_metadata

WINDOWED = [name for name in sorted(models.FAMILIES) if models.tiny_config(name).window]
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


def native_logits(packed: models.PackedDecoder, ids: Tensor) -> Tensor:
    """Of a whole text, as `torch_logits`."""
    table = PageTable(Pages(8, 16))
    table.grow(len(ids))
    kind = "causal" if packed.info.kind == "ar" else "full"
    want = tuple(range(len(ids)))
    span = Span(0, tuple(ids.tolist()), kind, "keep" if kind == "causal" else "none", want=want)  # type: ignore[arg-type]
    return NativeRunner(packed, 128, torch.float32, 16).run(pack([(span, table, 0)])).logits()


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


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_packed_ops(family: str) -> None:
    """Every weight of the program is in its packed form once; a layer attends once; what can be joined is."""
    model = models.tiny(family, seed=1)
    packed = assemble.pack(model)
    norms = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 1 and not n.endswith("bias"))
    assert sum(norm.weight.numel() for norm in packed._norms()) == norms
    moe = model.config.moe
    for ops in packed.layers:
        assert sum(isinstance(op, Mix) for op in ops) == 1
        assert isinstance(ops[0], Project)
        assert isinstance(ops[1], Mix)
        mixtures = [op for op in ops if isinstance(op, Routed)]
        assert sum(isinstance(op, Gated) for op in ops) == 1 - len(mixtures)
        if mixtures and moe is not None:
            assert [len(op.blocks) for op in mixtures] == [moe.experts + bool(moe.shared_size)]
        ends = sum((isinstance(op, Project | Routed) and op.onto_stream) or isinstance(op, Sum) for op in ops)
        assert ends == 2
    assert sum(any(isinstance(op, Routed) for op in ops) for ops in packed.layers) == sum(
        any(isinstance(op, Experts) for op in ops) for ops in model.program.layers
    )
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


@pytest.mark.parametrize("family", [name for name in sorted(models.FAMILIES) if models.FAMILIES[name].gguf])
def test_a_gguf_file_packs_to_the_same_numbers(family: str, tmp_path: Path) -> None:
    model = models.tiny(family, seed=8, hidden_size=64, heads=4, layers=3).requires_grad_(False)
    ids = torch.randint(0, 90, (60,), generator=torch.Generator().manual_seed(0))
    with open_gguf(write_gguf(model, tmp_path / "m.gguf", "F32")) as opened:
        parts = ((name, value) for name, value, _ in opened.tensors())
        packed = models.pack_decoder(opened.config, opened.info, parts, torch.float32)
    got = native_logits(packed, ids)
    assert (got - torch_logits(model, ids, torch.arange(60))).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["qwen3_moe", "llada_moe"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_mixture_in_a_gguf_file(family: str, kind: str, tmp_path: Path) -> None:
    """One tensor holds the experts of a layer. Natively they are packed from the file's blocks; on torch, where asked,
    they are floats."""
    moe = replace(models.tiny_config(family).moe, intermediate_size=32)  # type: ignore[type-var]
    model = models.tiny(family, seed=8, hidden_size=64, heads=4, vocab_size=1280, moe=moe).requires_grad_(False)
    demo = SHIPPED / "demo-ar"
    path = write_gguf(model, tmp_path / "m.gguf", kind, tokenizer=tokenizer_metadata(demo, 1280))
    with open_gguf(path) as opened:
        assert opened.file.tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 32, 64)
    floats = assemble.load(path, dtype="float32", backend="torch").model
    assert isinstance(floats, models.Decoder)
    assert floats.config == model.config
    coarse = {"F32": 0.0, "Q8_0": 1 / 120, "Q4_0": 1 / 7}[kind]
    for (name, ours), (_, theirs) in zip(floats.named_parameters(), model.named_parameters(), strict=True):
        assert (ours - theirs).abs().max() <= theirs.abs().max() * coarse, name
    packed = assemble.load(path).model
    assert isinstance(packed, models.PackedDecoder)
    form = {"F32": "f32", "Q8_0": "w8g", "Q4_0": "w4g"}[kind]
    assert packed.formats[form] >= 2 * 2 * 8  # gate with up, and down, of the experts of both layers
    base = models.adapter_base(packed)  # which takes matrices out of the panels
    for name in ("layers.1.mlp.experts.5.up_proj.weight", "layers.0.mlp.router.weight"):
        assert torch.equal(base.value(name), floats.get_parameter(name))


def test_experts_of_several_formats(tmp_path: Path) -> None:
    """Experts of one layer that want their rows prepared in different ways are all held as floats."""
    model = models.tiny("qwen3_moe", seed=3, hidden_size=64, heads=4, vocab_size=96).requires_grad_(False)

    def parts(mixed: bool) -> Any:
        for name, parameter in model.named_parameters():
            if re.search(r"experts\.[02]\.", name):
                rounded = quantise(parameter, "w8", name=name)
                yield name, rounded if mixed else rounded.dequantise()
            else:
                yield name, parameter

    mixed, floats = (models.pack_decoder(model.config, model.info, parts(how), torch.float32) for how in (True, False))
    assert set(mixed.formats) == {"f32"}
    ids = torch.arange(1, 20)
    assert torch.equal(native_logits(mixed, ids), native_logits(floats, ids))


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
