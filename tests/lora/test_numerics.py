"""Adapters on every runner against PEFT's own output, alone and mixed; a row's bits whatever is beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kit.adapters import ATTENTION, LINEARS, model_of, pack, step_of, turned, wanted, with_peft
from tests.kit.convert_models import grouped
from tests.kit.device import runner_of
from tests.kit.without_native import without_native

from dfastllm import assemble
from dfastllm.convert.merge import with_adapter
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.runners import Runner
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.engine.runners.torch import TorchRunner
from dfastllm.errors import AdapterError, UnsupportedError, ValidationError
from dfastllm.kernels import native, set_threads
from dfastllm.lora import Adapter, read_adapter
from dfastllm.models import FAMILIES, Decoder, adapter_base, tiny_config
from dfastllm.models.turned import turned_adapter

LIKE = {  # families by what of them touches an adapter: one of each goes through every variant
    "llama": "plain",
    "qwen2": "biases",
    "qwen3": "norms of heads",
    "gemma2": "norms after, caps, a tied head, a scaled embedding",
    "phi3": "q, k, v and gate, up in one matrix each",
    "llada": "names of its own",
    "sdar": "block diffusion",
    "qwen3_moe": "experts",
    "llada2_moe": "experts, a shared one, q, k, v in one matrix",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "linears": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"v_proj|qkv_proj": 7, "up_proj|gate_up_proj": 3},
        "alpha_pattern": {"down_proj": 5},
    },
    "all biases": {"bias": "all", "target_modules": r".*\.(q_proj|down_proj|qkv_proj)"},
    "biases": {"bias": "lora_only", "use_dora": True, "target_modules": r".*\.(q_proj|down_proj|qkv_proj)"},
    "bias of B": {"lora_bias": True, "target_modules": ATTENTION},
    "embedding and head": {"target_modules": rf"{LINEARS}|embed|lm_head"},
    "dora of both": {"target_modules": r"embed|lm_head|.*\.o_proj", "use_dora": True},
    "saved": {"modules_to_save": ["embed", "lm_head"], "target_modules": ATTENTION},
}
SEQUENCES = ([5, 9, 11, 3, 17, 2, 8], [4, 4, 7], [3, 3], [20])
OTHERS = [f for f in sorted(FAMILIES) if f not in LIKE]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    set_threads(1)


def runners(model: Decoder) -> list[Runner]:
    made: list[Any] = [TorchRunner(model, 64, torch.float32, "cpu", 16, 16)]
    return [*made, NativeRunner(pack(model), 64, torch.float32, 16), runner_of(model, "twins", 64)]


def read(model: Decoder, directory: Path) -> Adapter:
    return read_adapter(directory, adapter_base(model))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4


def held_to_peft(model: Decoder, directory: Path, *, merged: bool, **config: Any) -> None:
    causal = model.info.kind == "ar"
    made = with_peft(model, directory, **config)
    adapter = read(model, directory)
    sequence, other = SEQUENCES[:2]
    expected, base = wanted(made, sequence, causal=causal), wanted(model, sequence, causal=causal)
    assert (expected - base).abs().max() > 1e-3  # it does something
    for runner in runners(model):
        runner.adapters([None, adapter])
        plain = runner.run(step_of([other, sequence], [0, 0], causal=causal)).logits().clone()
        rows = runner.run(step_of([other, sequence], [0, 1], causal=causal))
        close(rows.logits()[3:], expected)
        assert torch.equal(rows.logits()[:3], plain[:3])  # of the neighbour without one
        alone = runner.run(step_of([sequence], [1], causal=causal)).logits()
        assert torch.equal(alone, rows.logits()[3:])
    if not merged:
        return
    close(wanted(with_adapter(model, adapter), sequence, causal=causal), expected)  # as we merge it ourselves
    if model.config.tied:
        return  # PEFT merges an embedding's change into the head, which shares its matrix: another model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = made.merge_and_unload()
    close(alone, wanted(whole, sequence, causal=causal))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "qwen3_moe"])
def test_as_peft_computes_it(family: str, variant: str, tmp_path: Path) -> None:
    merged = variant != "bias of B"  # which PEFT cannot merge into a matrix without a bias
    held_to_peft(model_of(family), tmp_path, merged=merged, **VARIANTS[variant])


@pytest.mark.parametrize("family", [*(f for f in LIKE if f not in ("llama", "qwen2", "phi3", "qwen3_moe")), *OTHERS])
def test_every_family_as_peft_computes_it(family: str, tmp_path: Path) -> None:
    """The variants at once: DoRA on all linears, embedding and head, biases, ranks that differ."""
    everything = {**VARIANTS["patterns"], "use_dora": True, "bias": "all"}
    targets = VARIANTS["embedding and head"]["target_modules"] if not tiny_config(family).tied else rf"{LINEARS}|embed"
    held_to_peft(model_of(family), tmp_path, merged=True, **everything, target_modules=targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_types(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("llama")
    made = with_peft(model, tmp_path, dtype=dtype, target_modules=VARIANTS["embedding and head"]["target_modules"])
    adapter = read(model, tmp_path)
    assert {delta.a.dtype for delta in adapter.deltas.values() if delta.a is not None} == {dtype}
    for runner in runners(model):
        runner.adapters([None, adapter])
        close(runner.run(step_of(SEQUENCES[:1], [1])).logits(), wanted(made, SEQUENCES[0]))


def mixed(model: Decoder, tmp_path: Path) -> list[Adapter | None]:
    """A table of none and four adapters of different ranks and kinds."""
    kinds = ("linears", "dora", "embedding and head", "dora of both")
    made: list[Adapter | None] = [None]
    for i, kind in enumerate(kinds):
        with_peft(model, tmp_path / str(i), seed=i, r=(1, 4, 17, 6)[i], **VARIANTS[kind])
        made.append(read(model, tmp_path / str(i)))
    return made


@torch.inference_mode()
@pytest.mark.parametrize("quantised", [None, "w8", "w8g", "w4"])
def test_a_rows_bits_are_its_own(quantised: str | None, tmp_path: Path) -> None:
    """Alone, or in any company, at any number of threads, on float and quantised weights: the same bits; and the
    statistics are those of the logits."""
    rows_keep_their_bits(
        model_of("qwen3", hidden_size=64, intermediate_size=96, heads=2, kv_heads=1, head_dim=32), quantised, tmp_path
    )


@torch.inference_mode()
@pytest.mark.parametrize("quantised", [None, "w8", "w4"])
def test_a_rows_bits_are_its_own_in_a_mixture(quantised: str | None, tmp_path: Path) -> None:
    shape = {**grouped("llada2_moe"), "hidden_size": 64, "heads": 2, "kv_heads": 1, "head_dim": 32}
    model = model_of("llada2_moe", **shape)
    rows_keep_their_bits(model, quantised, tmp_path)


def rows_keep_their_bits(model: Decoder, quantised: str | None, tmp_path: Path) -> None:
    table = mixed(model, tmp_path)
    packed = assemble.pack(model, quantised) if quantised else pack(model)
    chosen = [NativeRunner(packed, 64, torch.float32, 16)]
    if quantised is None:
        chosen.append(TorchRunner(model, 64, torch.float32, "cpu", 16, 16))  # type: ignore[arg-type]
    for runner in chosen:
        runner.adapters(table)
        alone = [[runner.run(step_of([s], [n])).logits().clone() for n in range(5)] for s in SEQUENCES]
        for threads in (1, 2, 3) if runner.own_threads else (1,):
            set_threads(threads)
            for numbers in ([0, 1, 2, 3], [4, 0, 3, 3], [1, 1, 1, 1], [0, 0, 0, 2], [2, 4, 4, 0]):
                step = step_of(SEQUENCES, numbers)
                rows = runner.run(step)
                expected = torch.cat([alone[i][n] for i, n in enumerate(numbers)])
                assert torch.equal(rows.logits(), expected), (threads, numbers)
                stats = runner.run(step).stats(norm=True, spread=True, top=3, ban=(1,))
                some = expected.clone()
                some[:, 1] = -torch.inf
                assert stats.token.tolist() == some.argmax(dim=1).tolist()
                assert torch.allclose(torch.from_numpy(stats.norm), some.logsumexp(dim=1), atol=1e-5)
                chosen_few = runner.run(step).select([6, 0, 9]).stats(top=3, ban=(1,))
                assert chosen_few.logits.tolist() == stats.logits[[6, 0, 9]].tolist()


@pytest.mark.skipif(native() is None, reason="no native kernels")
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "qwen3_moe", "llada2_moe"])
def test_the_twin_is_the_native_forward(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    table = mixed(model, tmp_path)
    step = step_of(SEQUENCES, [3, 0, 2, 4])
    for form in (None, "w8"):
        packed = assemble.pack(model, form) if form else pack(model)
        got = []
        for _ in range(2):
            runner = NativeRunner(packed, 64, torch.float32, 16)
            runner.adapters(table)
            got.append(runner.run(step).logits())
            without_native(monkeypatch)
        monkeypatch.undo()
        assert (got[0] - got[1]).abs().max() <= (1e-4 if form is None else 5e-2)


def test_quantised_bases_keep_the_adapter_in_float(tmp_path: Path) -> None:
    """On a base of 8 bits the adapter's own part is what it is on float weights: the difference that it makes is that
    of the same adapter merged into the expanded weights."""
    model = model_of("llama", hidden_size=64, intermediate_size=96)
    with_peft(model, tmp_path, use_dora=True, r=5)
    packed = assemble.pack(model, "w8g")
    base = adapter_base(packed)
    expanded = model_of("llama", hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        for name, parameter in expanded.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(base.value(name))
    adapter, exact = read_adapter(tmp_path, base), read(expanded, tmp_path)
    assert adapter.hash == exact.hash  # DoRA's factor is of the weights as they are served
    native_runner, torch_runner = NativeRunner(packed, 64, torch.float32, 16), runners(expanded)[0]
    for runner in (native_runner, torch_runner):
        runner.adapters([None, adapter])
    step = step_of(SEQUENCES, [1, 1, 0, 1])
    difference = native_runner.run(step).logits() - torch_runner.run(step).logits()
    assert difference.abs().max() < 0.15  # what 8-bit activations cost
    plain = native_runner.run(step_of(SEQUENCES, [0] * 4)).logits()
    moved = (native_runner.run(step).logits() - plain).abs().max()
    assert moved > 1.0  # while the adapter itself moves logits by much more


def test_a_smaller_vocabulary_of_its_own(tmp_path: Path) -> None:
    """A head that was resized has no rows for the last ids: they have probability 0, capped or not."""
    from safetensors.torch import load_file, save_file

    model = model_of("llama")
    made = with_peft(model, tmp_path, **VARIANTS["saved"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    vocab = model.config.vocab_size
    for name in ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"):
        tensors[name] = tensors[name][: vocab - 3].clone()
    save_file(tensors, file)
    expected = wanted(made, SEQUENCES[0])
    for runner in runners(model):
        runner.adapters([None, read(model, tmp_path)])
        rows = runner.run(step_of(SEQUENCES[:1], [1]))
        close(rows.logits()[:, : vocab - 3], expected[:, : vocab - 3])
        assert (rows.logits()[:, vocab - 3 :] < -1e29).all()
        assert rows.finite().all()


@pytest.mark.parametrize("numbers", [[2], [7]])
def test_a_number_without_an_adapter_is_refused(numbers: list[int], tmp_path: Path) -> None:
    model = model_of("llama")
    with_peft(model, tmp_path)
    for runner in runners(model):
        runner.adapters([None, read(model, tmp_path), None])
        with pytest.raises(ValidationError, match=f"adapter {numbers[0]}"):
            runner.run(step_of(SEQUENCES[:1], numbers))
        with pytest.raises(ValidationError, match="stands for none"):
            runner.adapters([read(model, tmp_path)])


TURNED = ("llama", "qwen2", "qwen3", "phi3", "llada", "smollm3", "granite", "llada2_moe")


@pytest.mark.parametrize("variant", ["linears", "patterns", "all biases", "bias of B", "embedding and head", "saved"])
@pytest.mark.parametrize("family", TURNED)
def test_on_a_turned_base_as_peft_computes_it(family: str, variant: str, tmp_path: Path) -> None:
    """The base in another basis, in float32: the same numbers, beside a neighbour without an adapter, by the kernels
    and by their twin."""
    model = model_of(family)
    config = dict(VARIANTS[variant])
    if model.config.tied:
        config = {**config, "target_modules": ATTENTION, "modules_to_save": None}
    causal = model.info.kind == "ar"
    made = with_peft(model, tmp_path, **config)
    packed = turned(model)
    adapter = read_adapter(tmp_path, adapter_base(packed))
    assert adapter.hash == read(model, tmp_path).hash or "bias" in variant  # whose shift is computed with the base's
    sequence, other = SEQUENCES[:2]
    expected = wanted(made, sequence, causal=causal)
    assert (expected - wanted(model, sequence, causal=causal)).abs().max() > 1e-3
    runner = NativeRunner(packed, 64, torch.float32, 16)
    runner.adapters([None, adapter])
    got = runner.run(step_of([other, sequence], [0, 1], causal=causal)).logits()
    close(got[3:], expected)
    close(got[:3], wanted(model, other, causal=causal))


@pytest.mark.parametrize("variant", ["dora", "dora of both"])
def test_dora_on_a_turned_base(variant: str, tmp_path: Path) -> None:
    """Of matrices whose outputs stay, DoRA is right, its norms those of the base as it was; of others it is refused."""
    model = model_of("llama")
    packed = turned(model)
    runner = NativeRunner(packed, 64, torch.float32, 16)
    with_peft(model, tmp_path / "all", **VARIANTS[variant])
    with pytest.raises(UnsupportedError, match=r"a DoRA adapter of .* scales its outputs one by one"):
        runner.adapters([None, read_adapter(tmp_path / "all", adapter_base(packed))])
    made = with_peft(model, tmp_path / "some", use_dora=True, target_modules=r".*\.(q_proj|gate_proj|up_proj)|lm_head")
    runner.adapters([None, read_adapter(tmp_path / "some", adapter_base(packed))])
    close(runner.run(step_of(SEQUENCES[:1], [1])).logits(), wanted(made, SEQUENCES[0]))


@pytest.mark.parametrize("variant", ["linears", "all biases", "saved", "some dora"])
def test_the_copies_of_a_turned_base_count_as_memory(variant: str, tmp_path: Path) -> None:
    """A turned base computes with float32 copies: an engine counts them, and refuses an adapter that fits without."""
    model = model_of("llama")
    some = {"use_dora": True, "target_modules": r".*\.(q_proj|gate_proj)"}
    with_peft(model, tmp_path, **(some if variant == "some dora" else VARIANTS[variant]))
    packed = turned(model)
    adapter = read_adapter(tmp_path, adapter_base(packed))
    made = turned_adapter(adapter, packed.basis, packed.gains)  # type: ignore[arg-type]
    own = {tensor.data_ptr() for delta in adapter.deltas.values() for _, tensor in delta.tensors}
    new = [t for delta in made.deltas.values() for _, t in delta.tensors if t.data_ptr() not in own]
    extra = sum(tensor.nbytes for tensor in new)
    assert extra > 0
    for held, wanted_bytes in ((packed, adapter.bytes + extra), (pack(model), adapter.bytes)):
        engine = Engine(held, config=EngineConfig(lora_memory=wanted_bytes))
        named = engine.adapters.load("mine", tmp_path)
        assert named.size == engine.adapters.used == wanted_bytes
    short = Engine(packed, config=EngineConfig(lora_memory=adapter.bytes + extra - 1))
    with pytest.raises(AdapterError, match=f"takes {adapter.bytes + extra:,} bytes"):
        short.adapters.load("mine", tmp_path)


@pytest.mark.skipif(native() is None, reason="no native kernels")
def test_the_twin_of_a_turned_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2")
    with_peft(model, tmp_path, **VARIANTS["embedding and head"])
    packed = turned(model)
    adapter = read_adapter(tmp_path, adapter_base(packed))
    got = []
    for _ in range(2):
        runner = NativeRunner(packed, 64, torch.float32, 16)
        runner.adapters([None, adapter])
        got.append(runner.run(step_of(SEQUENCES, [1, 0, 1, 1])).logits())
        without_native(monkeypatch)
    monkeypatch.undo()
    close(got[0], got[1])


def test_an_adapter_of_another_models_linears_is_refused(tmp_path: Path) -> None:
    """A dense model has no experts, and a mixture no gate beside them: nothing is left out silently."""
    dense, mixture = model_of("qwen3"), model_of("qwen3_moe")
    for number, (model, other) in enumerate(((dense, mixture), (mixture, dense))):
        with_peft(model, tmp_path / str(number))
        adapter = read(model, tmp_path / str(number))
        runner = NativeRunner(pack(other), 64, torch.float32, 16)
        with pytest.raises(UnsupportedError, match=r"changes layers\.0\.mlp\..*this model has no such linear"):
            runner.adapters([None, adapter])
        with pytest.raises(UnsupportedError, match="no such linear"):
            runner.check_adapter(adapter)
