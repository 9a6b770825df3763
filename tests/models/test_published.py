"""Checkpoints that other programs quantised, loaded: the floats are those of the method, to the last bit, and the
logits of the packed model are those of a float model with these weights."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfastllm import assemble, models
from dfastllm.core import SamplingParams, Span
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.kernels.packed import QTensor
from dfastllm.llm import LLM, SHIPPED
from dfastllm.models.check import check
from dfastllm.models.checkpoint import read_stored
from dfastllm.models.family import find_family
from tests.kit.published_weights import METHODS, publish

DEMO = SHIPPED / "demo-ar"
EXACT = ("gptq", "gptq-8", "w4a16", "w8a8", "int8", "mlx")  # held as they are; the others with a note
IDS = [3, 9, 27, 81, 243, 729, 5, 15, 45, 135]


def saved(path: Path, family: str = "qwen3") -> models.Decoder:
    """A tiny float checkpoint with a tokenizer, and its model."""
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "heads": 4, "kv_heads": 2}
    model = models.tiny(family, vocab_size=assemble.model_info(DEMO).vocab_size, tied=False, **sizes)
    models.save(model, path, files=[DEMO / "tokenizer.json", DEMO / "tokenizer_config.json"])
    return model


def with_weights(model: models.Decoder, meant: dict[str, Tensor]) -> models.Decoder:
    """The float model with these weights in place of its own."""
    names = find_family(model.info.family).names
    for name, value in meant.items():
        parent, _, leaf = names.own(name).rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    return model


def plain(model: models.Decoder) -> Tensor:
    with torch.no_grad():
        hidden = model(torch.tensor(IDS), torch.arange(len(IDS)), models.dense_attention(1, len(IDS), "causal"))
        return model.head(hidden)


def served(model: models.PackedDecoder) -> Tensor:
    table = PageTable(Pages(8, 16))
    table.grow(len(IDS))
    span = Span(0, tuple(IDS), "causal", "keep", want=tuple(range(len(IDS))))
    return NativeRunner(model, 128, torch.float32, 16).run(pack([(span, table, 0)])).logits()


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / math.sqrt(float((a * a).sum() * (b * b).sum())))


@pytest.mark.parametrize("method", METHODS)
def test_logits(method: str, tmp_path: Path) -> None:
    model = saved(tmp_path, "llama" if method in ("awq", "nf4") else "qwen3")
    meant = publish(tmp_path, method, embedding=method == "mlx")
    right = plain(with_weights(model, meant))
    assert torch.equal(plain(models.load(tmp_path, dtype="float32")), right)

    loaded = assemble.load(tmp_path, backend="native").model
    assert isinstance(loaded, models.PackedDecoder)
    assert bool(loaded.notes) == (method not in EXACT)
    if method not in EXACT:  # told when it is loaded, in a line
        assert [note.partition(": ")[0] for note in loaded.info.notes] == [f"{len(meant)} matrices"]
    assert cosine(served(loaded), right) > 0.999
    assert check(tmp_path).ok


@pytest.mark.parametrize("method", METHODS)
def test_weights_stay_as_they_are(method: str, tmp_path: Path) -> None:
    model = saved(tmp_path)
    meant = publish(tmp_path, method)
    family = find_family(model.info.family)
    notes: list[str] = []
    read = {family.names.published(own): v for own, v in read_stored(tmp_path, family, model, notes=notes)}
    for name, right in meant.items():
        value = read[name]
        assert isinstance(value, QTensor)
        if method in EXACT:
            assert torch.equal(value.dequantise(), right), name
        else:
            assert (value.dequantise() - right).abs().max() <= right.abs().max() / 250, name
    left = sorted(name for name in read if name not in meant)
    assert all(isinstance(read[name], Tensor) for name in left)
    assert any("down_proj" in name for name in left) == (method in ("w4a16", "w8a8"))  # as `ignore` says
    assert len(notes) == (0 if method in EXACT else len(meant))


def test_it_answers(tmp_path: Path) -> None:
    saved(tmp_path)
    publish(tmp_path, "gptq")
    with LLM(tmp_path) as llm:
        assert llm.generate(["Hello"], SamplingParams(max_tokens=4))[0].outputs[0].token_ids


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of floating-point tensors of more than `least` float32 elements that were alive at once."""

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.least, self.now, self.most = least, 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.element_size() >= 2:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if size <= 4 * self.least or key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("method", METHODS)
def test_never_two_matrices_in_float(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted eight rows at a time, no float tensor larger than half of the smallest matrix is ever there."""
    from dfastllm.quant.published import matrix

    model = saved(tmp_path)
    meant = publish(tmp_path, method)
    family = find_family(model.info.family)
    monkeypatch.setattr(matrix, "CHUNK", 8 * 64)
    most: dict[str, int] = {}
    with Peak(64 * 32 // 2) as peak:
        parts = read_stored(tmp_path, family, model)
        for name, _ in model.named_parameters():
            peak.most = peak.now
            own, value = next(parts)
            assert own == name
            most[family.names.published(own)] = peak.most
            del value
    assert most["model.embed_tokens.weight"] > 0  # floats in the file: the count sees them
    assert {name for name in meant if most[name]} == set()


def index(value: int, count: int = 64) -> Tensor:
    return torch.full((count,), value, dtype=torch.int32)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "scales without codes": ("gptq", {"qweight": None}, r"qweight is missing; GPTQ wants I32 .* beside "),
    "codes without scales": ("awq", {"scales": None}, r"scales is missing; AWQ wants"),
    "index out of range": ("gptq", {"g_idx": index(9)}, r"holds groups from 9 to 9; there are 2"),
    "negative index": ("gptq", {"g_idx": index(-1)}, r"groups from -1 to -1"),
    "index of another length": ("gptq", {"g_idx": index(0, 3)}, r"g_idx is I32 \[3\]; GPTQ wants"),
    "another dtype": ("gptq", {"qweight": torch.zeros(8, 64)}, r"qweight is F32 \[8, 64\]; GPTQ wants I32"),
    "another shape": ("awq", {"qzeros": torch.zeros(3, 3, dtype=torch.int32)}, r"qzeros is I32 \[3, 3\]; AWQ wants"),
    "another matrix": ("w8a8", {"weight": torch.zeros(8, 64, dtype=torch.int8)}, r"weight_scale is F32 \[64, 1\]"),
    "a shape that lies": ("w4a16", {"weight_shape": torch.tensor([64, 10**12])}, r"the codes of weight_shape"),
    "eight-bit floats alone": ("fp8", {"weight_scale_inv": None}, r"weight_scale is missing; FP8 wants the scales"),
    "scales of other blocks": ("fp8", {"weight_scale_inv": torch.ones(1, 1)}, r"wants .*\[2, 2\]"),
    "scales that are no numbers": ("gptq", {"scales": torch.full((2, 64), math.nan).half()}, r"NaN or inf"),
    "floats that are none": ("fp8", {"weight": torch.full((64, 64), math.nan).to(torch.float8_e4m3fn)}, r"NaN"),
    "no state": ("nf4", {"weight.quant_state.bitsandbytes__nf4": None}, r"is missing; bitsandbytes wants"),
    "a state of no JSON": (
        "nf4", {"weight.quant_state.bitsandbytes__nf4": torch.tensor([91] * 40000, dtype=torch.uint8)}, r"it is none"),
    "a huge state": (
        "nf4", {"weight.quant_state.bitsandbytes__nf4": torch.zeros(70000, dtype=torch.uint8)}, r"at most 65536 bytes"),
    "too few codes": ("nf4", {"weight": torch.zeros(9, 1, dtype=torch.uint8)}, r"the codes of 64 x 64 weights"),
    "another layout": ("int8", {"weight_format": torch.tensor(1, dtype=torch.uint8)}, r"rows one after the other; it"),
    "what activations are scaled by": ("torchao", {"_weight_act_pre_scale": torch.ones(64)}, r"is not computed here"),
    "words without scales": ("mlx", {"scales": None, "biases": None}, r"scales is missing; MLX wants"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_named(case: str, tmp_path: Path) -> None:
    """The file, the tensor, what it is and what was wanted, and the way out."""
    method, changes, said = BAD[case]
    saved(tmp_path)
    publish(tmp_path, method)
    path = tmp_path / "model.safetensors"
    owner = "model.layers.0.self_attn.q_proj"
    tensors = {**load_file(path), **{f"{owner}.{part}": value for part, value in changes.items()}}
    with_metadata = json.dumps({"_type": "Int4Tensor"})
    metadata = {f"{name.removesuffix('._weight_qdata')}.weight": with_metadata for name in tensors}
    save_file({name: value for name, value in tensors.items() if value is not None}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=said) as caught:
        models.load(tmp_path)
    assert str(path) in str(caught.value)
    assert owner in str(caught.value)
    assert caught.value.hint


CONFIGS: dict[str, tuple[Any, str]] = {
    "three bits": ({"quant_method": "gptq", "bits": 3, "group_size": 32}, r"bits is 3; supported: 2 or 4 or 8"),
    "bits in words": ({"quant_method": "gptq", "bits": "4", "group_size": 32}, r"bits is '4'"),
    "no bits": ({"quant_method": "awq", "group_size": 32}, r"bits is None; supported: 4"),
    "a group of nothing": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, r"group_size is 0; supported: -1 or"),
    "another layout": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "x"}, r"version is 'x'"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "group_size": 1, "checkpoint_format": "marlin"}, r"_format is 'm"),
    "a sparse file": (
        {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}}, r"format is 'marlin-24'"),
    "no groups": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"config_groups is None"),
    "a pattern that is none": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": {"g": {"targets": ["re:("], "weights": {"num_bits": 4}}}}, r"regular expressions"),
    "blocks of three": ({"quant_method": "fp8", "weight_block_size": [1, 2, 3]}, r"supported: \[rows, columns\]"),
    "seven bits of MLX": ({"bits": 7, "group_size": 64}, r"bits is 7"),
    "another mode of MLX": ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, r"mode is 'mxfp4'; supported: 'affine'"),
    "a method that is not read": ({"quant_method": "aqlm"}, r"by 'aqlm' are not supported; supported: dfastllm,"),
    "no object": ([1], r"must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_that_are_not_read_are_named(case: str, tmp_path: Path) -> None:
    raw, said = CONFIGS[case]
    saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": raw}))
    with pytest.raises(ModelLoadError, match=said) as caught:
        models.load(tmp_path)
    assert str(file) in str(caught.value)
    assert caught.value.param == "quantization_config"
    assert not check(tmp_path).ok


@pytest.mark.parametrize(("method", "group"), [("gptq", 48), ("awq", 48), ("w4a16", 48)])
def test_groups_that_do_not_divide_are_named(method: str, group: int, tmp_path: Path) -> None:
    saved(tmp_path)
    publish(tmp_path, method)
    file = tmp_path / "config.json"
    text = file.read_text().replace('"group_size": 32', f'"group_size": {group}')
    file.write_text(text)
    with pytest.raises(CheckpointError, match=rf"inputs that groups of {group} divide"):
        models.load(tmp_path)


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_settings_beside_config_json(name: str, method: str, tmp_path: Path) -> None:
    """As AutoGPTQ and AutoAWQ once wrote them."""
    model = saved(tmp_path)
    right = plain(with_weights(model, publish(tmp_path, method)))
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    said = raw.pop("quantization_config")
    del said["quant_method"]
    file.write_text(json.dumps(raw))
    (tmp_path / name).write_text(json.dumps(said))
    assert torch.equal(plain(models.load(tmp_path, dtype="float32")), right)


@pytest.mark.parametrize("method", ["w4a16", "w8a8", "fp8", "mlx"])
def test_tensors_that_need_settings_which_are_nowhere(method: str, tmp_path: Path) -> None:
    saved(tmp_path)
    publish(tmp_path, method)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in raw.items() if "quantization" not in key}))
    with pytest.raises(CheckpointError, match=r"has no quantization_config, which says how they are laid out"):
        models.load(tmp_path)
    assert not check(tmp_path).ok


def test_biases_of_zeros_beside_gptq(tmp_path: Path) -> None:
    """AutoGPTQ writes one for every layer; one that is not of zeros is no such thing."""
    saved(tmp_path)
    publish(tmp_path, "gptq")
    path = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.bias"
    before = models.load(tmp_path)
    save_file({**load_file(path), name: torch.zeros(64).half()}, path)
    assert torch.equal(plain(models.load(tmp_path)), plain(before))
    save_file({**load_file(path), name: torch.ones(64).half()}, path)
    with pytest.raises(CheckpointError, match=r"unexpected tensor .*q_proj.bias"):
        models.load(tmp_path)


def test_other_bits_for_some_modules(tmp_path: Path) -> None:
    """MLX's own settings of a module, and GPTQModel's patterns."""
    saved(tmp_path)
    publish(tmp_path, "mlx")
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization"]["model.layers.0.self_attn.q_proj"] = {"group_size": 32, "bits": 8}
    raw["quantization"]["lm_head"] = False
    file.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"q_proj.scales is F16 \[64, 2\]; MLX wants .*\[64, 1\]"):
        models.load(tmp_path)
    raw["quantization"]["model.layers.0.self_attn.q_proj"] = {"group_size": 32, "bits": 4}
    file.write_text(json.dumps(raw))
    models.load(tmp_path)


def median_cosine(a: Tensor, b: Tensor) -> float:
    """Of the rows: rounded activations choose another expert here and there, where two are nearly equal."""
    return float(torch.nn.functional.cosine_similarity(a, b).median())


def moe(path: Path) -> models.Decoder:
    sizes: Any = {"hidden_size": 64, "intermediate_size": 64, "heads": 4, "kv_heads": 2}
    rows = assemble.model_info(DEMO).vocab_size
    experts = replace(models.tiny_config("qwen3_moe").moe, intermediate_size=32)  # type: ignore[type-var]
    model = models.tiny("qwen3_moe", vocab_size=rows, tied=True, moe=experts, **sizes)
    models.save(model, path, files=[DEMO / "tokenizer.json", DEMO / "tokenizer_config.json"])
    return model


def test_experts_that_mlx_stacks(tmp_path: Path) -> None:
    """All experts of a layer in one tensor, the router and a tied embedding quantised too."""
    model = moe(tmp_path)
    right = plain(with_weights(model, publish(tmp_path, "mlx", embedding=True)))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    stacks: dict[str, dict[int, Tensor]] = {}
    for name in sorted(tensors):
        before, found, after = name.partition(".experts.")
        if found:
            number, _, end = after.partition(".")
            stacks.setdefault(f"{before}.switch_mlp.{end}", {})[int(number)] = tensors.pop(name)
    assert len(stacks) == 2 * 3 * 3
    stacked = {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in stacks.items()}
    save_file({**tensors, **stacked}, path)
    assert torch.equal(plain(models.load(tmp_path, dtype="float32")), right)
    loaded = assemble.load(tmp_path, backend="native").model
    assert isinstance(loaded, models.PackedDecoder)
    assert median_cosine(served(loaded), right) > 0.999


@pytest.mark.parametrize("method", ["gptq", "fp8", "nf4"])
def test_mixtures(method: str, tmp_path: Path) -> None:
    model = moe(tmp_path)
    right = plain(with_weights(model, publish(tmp_path, method)))
    assert torch.equal(plain(models.load(tmp_path, dtype="float32")), right)
    loaded = assemble.load(tmp_path, backend="native").model
    assert isinstance(loaded, models.PackedDecoder)
    assert median_cosine(served(loaded), right) > 0.999


def test_static_scales_of_activations_and_attention_are_not_used(tmp_path: Path) -> None:
    model = saved(tmp_path)
    right = plain(with_weights(model, publish(tmp_path, "fp8")))
    path = tmp_path / "model.safetensors"
    layer = "model.layers.0.self_attn"
    more = {f"{layer}.{end}": torch.tensor(0.5) for end in ("q_proj.input_scale", "k_scale", "v_scale")}
    save_file({**load_file(path), **more}, path)
    assert torch.equal(plain(models.load(tmp_path, dtype="float32")), right)
