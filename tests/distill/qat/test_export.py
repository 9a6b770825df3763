"""What is exported is what was trained: files, codes, scales and outputs to the bit, and the tokens of the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dfastllm import LLM, assemble
from dfastllm.convert import Options, quantise_model
from dfastllm.core import SamplingParams, Span
from dfastllm.distill.qat import Qat, QatConfig, prepare_qat
from dfastllm.distill.qat.linear import QatHead, QatLinear
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.errors import ModelLoadError
from dfastllm.kernels import linear as kernels
from dfastllm.kernels.activations import act_kind
from dfastllm.kernels.packed import Packed, QTensor, unpack_panels
from dfastllm.llm import resolve
from dfastllm.models import PackedDecoder, load, save
from dfastllm.models.packed import Gated, Project
from dfastllm.models.program import Linear
from dfastllm.tasks import draw
from dfastllm.text import Tokenizer
from dfastllm.train.data import encode
from tests.kit.cli_models import write_tokenizer
from tests.kit.qat_students import logits, texts, trained

STUDENTS = [
    ("w8", "llama", False),
    ("w8g", "llama", True),
    ("w4", "llama", False),
    ("w4", "qwen3", True),
    ("w8", "qwen2", True),
    ("w4", "phi3", False),
    ("w4m", "gemma3", True),
    ("w6", "granite", True),
]


def exported(qat: Qat, directory: Path) -> Path:
    write_tokenizer(directory / "tokenizer")
    return qat.export(directory / "out", sorted((directory / "tokenizer").iterdir()))


def matrices(served: PackedDecoder) -> Iterator[tuple[str, Packed, Tensor | None, Tensor | None]]:
    """(name of the op's first matrix, its panels, its bias, rows of it in the order of the model's matrices; None: as
    they lie) of every linear op; several panels of one op one after the other."""
    for i, (ops, packed) in enumerate(zip(served.program.layers, served.layers, strict=True)):
        linears = [op for op in ops if isinstance(op, Linear)]
        joined = [op for op in packed if isinstance(op, Project | Gated)]
        for op, found in zip(linears, joined, strict=True):
            names = [f"layers.{i}.{m.name}" for m in op.matrices]
            if isinstance(found, Gated):
                panels = found.weights.packed.n // 64
                order = torch.arange(64 * panels).view(panels, 2, 32).transpose(0, 1).reshape(2, -1)
                rows = order[:, : found.width].reshape(-1)
                yield "+".join(names), found.weights.packed, found.weights.bias, rows
                continue
            assert len(found.weights) == 1
            yield "+".join(names), found.weights[0].packed, found.weights[0].bias, None


def same(found: QTensor, wanted: QTensor) -> bool:
    parts = ("codes", "scales", "mins")
    pairs = [(getattr(found, part), getattr(wanted, part)) for part in parts]
    return found.format == wanted.format and all(a is b is None or a.equal(b) for a, b in pairs)


@pytest.mark.parametrize(("format", "family", "tied"), STUDENTS)
def test_every_layer_to_the_bit(format: str, family: str, tied: bool, tmp_path: Path) -> None:
    """Codes and scales in the engine's panels are those of the training forward, and the engine's kernel gives that
    forward's outputs for its inputs."""
    qat = trained(format, family, tied=tied)
    model = qat.model
    served = assemble.load(exported(qat, tmp_path)).model
    assert isinstance(served, PackedDecoder)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QatLinear | QatHead):
            module.register_forward_hook(
                lambda _, inputs, out, name=name: seen.update({name: (inputs[0].detach(), out.detach())})
            )
    logits(model, texts(7))
    weights = qat.convert()
    checked = 0
    for names, panels, bias, rows in matrices(served):
        natural = unpack_panels(panels)
        parts = [weights[f"{name}.weight"] for name in names.split("+")]
        assert same(natural if rows is None else natural.rows(rows), QTensor.stack(parts)), names
        x = seen[names.split("+")[0]][0]
        y = kernels.linear(kernels.prepare(x, act_kind(panels.format)), panels, bias)
        y = y if rows is None else y[:, rows]
        assert y.equal(torch.cat([seen[name][1] for name in names.split("+")], dim=1)), names
        checked += len(parts)
    head = served.head_weights
    x, y = seen["lm_head"]
    factor = model.program.logits_factor
    assert same(unpack_panels(head), weights["embed.weight" if tied else "lm_head.weight"])
    found = kernels.linear(kernels.prepare(x * factor, act_kind(head.format)), head)
    assert found.equal(y) if factor == 1 else torch.allclose(found, y * factor, rtol=3e-7, atol=0)
    assert same(unpack_panels(served.embed), weights["embed.weight"])
    assert checked + (1 if tied else 2) == len(weights)


def engine_logits(served: PackedDecoder, ids: Tensor) -> Tensor:
    """[T, vocabulary] through the engine's runner, K,V in float32."""
    table = PageTable(Pages(8, 16))
    table.grow(len(ids))
    span = Span(0, tuple(ids.tolist()), "causal", "keep", want=tuple(range(len(ids))))
    return NativeRunner(served, 128, torch.float32, 16).run(pack([(span, table, 0)])).logits()


@pytest.mark.parametrize(("format", "family", "tied"), STUDENTS)
def test_the_whole_student_agrees(format: str, family: str, tied: bool, tmp_path: Path) -> None:
    """Norms, attention and activations are float32 on both sides, in other orders of summation: now and then an input
    falls to the neighbouring code, so logits agree within a small part of what rounding itself changes."""
    qat = trained(format, family, tied=tied)
    served = assemble.load(exported(qat, tmp_path)).model
    assert isinstance(served, PackedDecoder)
    ids = texts(8, count=1, length=40)
    with torch.no_grad():
        shown = logits(qat.model, ids)[0]
        qat.disable()
        float_ = logits(qat.model, ids)[0]
    found = engine_logits(served, ids[0])
    rounding = (shown - float_).abs().mean()
    assert (found - shown).abs().mean() < 0.03 * rounding
    assert (found - shown).abs().max() < 0.02 * float(shown.abs().max())


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize(("format", "tied"), [("w8", False), ("w8g", True), ("w4", False), ("w4m", True)])
def test_files_are_those_of_quantize(format: str, tied: bool, search: bool, tmp_path: Path) -> None:
    """`dfastllm quantize` of the trained float weights writes the same tensors, bit for bit, and the same config."""
    qat = trained(format, tied=tied, search=search, steps=2)
    out = exported(qat, tmp_path)
    save(qat.model, tmp_path / "float", files=(tmp_path / "tokenizer").iterdir())
    quantise_model(tmp_path / "float", tmp_path / "wanted", Options(format, search=search))
    found, wanted = (load_file(path / "model.safetensors") for path in (out, tmp_path / "wanted"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name
    configs = [json.loads((path / "config.json").read_text()) for path in (out, tmp_path / "wanted")]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["format"] == format
    names = [{p.name for p in path.iterdir()} - {"quantization_report.json"} for path in (out, tmp_path / "wanted")]
    assert names[0] == names[1]
    before = load(out)
    assert all(p.equal(q) for p, q in zip(before.parameters(), load(tmp_path / "wanted").parameters(), strict=True))


def test_export_again_and_missing_files(tmp_path: Path) -> None:
    qat = trained("w4", steps=0)
    with pytest.raises(ModelLoadError, match=r"gone\.json: no such file"):
        qat.export(tmp_path / "out", [tmp_path / "gone.json"])
    assert not (tmp_path / "out").exists()
    first = load_file(exported(qat, tmp_path) / "model.safetensors")
    with torch.no_grad():
        qat.model.layers[0].mlp.up_proj.weight.mul_(2)
    again = load_file(exported(qat, tmp_path) / "model.safetensors")
    changed = {name for name in first if not first[name].equal(again[name])}
    assert changed == {"model.layers.0.mlp.up_proj.weight.scales"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def greedy(qat: Qat, prompt: tuple[int, ...], count: int) -> list[int]:
    """By the training forward alone, the whole text again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(logits(qat.model, torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] in qat.model.info.eos_ids:
                break
    return ids[len(prompt) :]


def test_greedy_tokens_through_the_engine(tmp_path: Path) -> None:
    """A shipped model in w4: the engine answers token for token what the training forward does."""
    directory = resolve("demo-ar")
    tokenizer = Tokenizer.load(directory)
    qat = prepare_qat(load(directory, dtype=torch.float32), QatConfig(enabled=True, format="w4"))
    qat.enable()
    files = [directory / name for name in ("tokenizer.json", "tokenizer_config.json")]
    out = qat.export(tmp_path / "out", files)
    prompts = [encode(tokenizer, draw("test", 3, i)).prompt for i in range(10)]
    wanted = [greedy(qat, prompt, 16) for prompt in prompts]
    with LLM(out, kv_cache_dtype="float32") as llm:
        found = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16))
    for got, tokens in zip(found, wanted, strict=True):
        ids = list(got.outputs[0].token_ids)
        assert ids == [token for token in tokens if token not in qat.model.info.eos_ids][: len(ids)]
        assert len(tokens) - len(ids) <= 1  # the end token may be left out
