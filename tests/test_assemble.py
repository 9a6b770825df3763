"""From a path to a model: which backend it gets, quantising while loading, and what cannot go together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfastllm import assemble
from dfastllm.core import SamplingParams
from dfastllm.errors import (
    CheckpointError,
    ModelLoadError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedError,
    ValidationError,
)
from dfastllm.kernels import native
from dfastllm.llm import LLM, SHIPPED, load_engine, resolve
from dfastllm.models import Decoder, DeviceDecoder, PackedDecoder, pack_decoder, save, tiny
from dfastllm.models.gguf import write_gguf
from dfastllm.quant.formats import FORMATS
from dfastllm.text.gguf import tokenizer_metadata
from tests.kit.device import DEVICE, NO_TRITON, ops_of

DEMO = SHIPPED / "demo-ar"


def test_backend_auto_takes_the_kernels_where_they_are_built() -> None:
    model = assemble.load(DEMO).model
    assert isinstance(model, PackedDecoder if native() is not None else Decoder)
    assert isinstance(assemble.load(DEMO, backend="torch").model, Decoder)
    forced = assemble.load(DEMO, backend="native").model
    assert isinstance(forced, PackedDecoder)
    assert forced.formats == {"bf16": sum(forced.formats.values())}


@pytest.mark.parametrize("weights", ["w8", "w8r", "w8g", "w8gr", "w6", "w4m", "w4", "w4r"])
def test_a_shipped_model_quantised_while_loading_still_answers(weights: str) -> None:
    sums = [(3, 4), (12, 30), (21, 17), (40, 50), (8, 9), (33, 25)]
    with LLM("demo-ar", quantization=weights) as llm:
        model = llm.engine.model
        assert isinstance(model, PackedDecoder)
        assert set(model.formats) <= {"w8", "w8g", "w6g", "w4g", "w4s"}
        prompts = [llm.render([{"role": "user", "content": f"What is {a} + {b}?"}]) for a, b in sums]
        answers = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32))
    right = sum(f"Answer: {a + b}" in answer.text for (a, b), answer in zip(sums, answers, strict=True))
    assert right >= 4


def test_packed_and_plain_give_the_same_greedy_tokens() -> None:
    prompts = ["The", "Once upon a time", "What is 7 + 5?"]
    answers = []
    for backend in ("torch", "native"):
        with LLM("demo-ar", dtype="float32", backend=backend) as llm:  # type: ignore[arg-type]
            out = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24))
            answers.append([o.outputs[0].token_ids for o in out])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "fast"}, ValidationError, "backend must be"),
        ({"quantization": "w5"}, ValidationError, "quantization must be"),
        ({"dtype": "int7"}, ValidationError, "dtype must be"),
        ({"quantization": "w8", "backend": "torch"}, UnsupportedError, "native backend"),
        ({"quantization": "w8", "device": "meta"}, UnsupportedError, "on a CPU, not on meta"),
        ({"backend": "native", "device": "meta"}, UnsupportedError, "on a CPU, not on meta"),
    ],
)
def test_what_cannot_go_together_is_named(options: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        assemble.load(DEMO, **options)  # type: ignore[arg-type]
    if "quantization" in options and error is UnsupportedError:
        assert caught.value.hint == "Load a float checkpoint, without quantization."
        assemble.load(DEMO, **{**options, "quantization": None})  # type: ignore[arg-type]


def test_engine_options_are_checked() -> None:
    with pytest.raises(ValidationError, match="kv_cache_dtype must be"):
        load_engine("demo-ar", kv_cache_dtype="int3")
    with pytest.raises(UnsupportedError, match="native backend"):
        load_engine("demo-ar", backend="torch", kv_cache_dtype="int8")


def test_a_file_that_is_not_gguf_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML")
    with pytest.raises(ModelLoadError, match=r"model\.gguf is neither a GGUF file nor a directory"):
        resolve(path)
    with pytest.raises(ModelNotFoundError, match="neither a directory nor a GGUF file"):
        resolve(tmp_path / "absent.gguf")


def test_parameters_that_do_not_fit_are_named() -> None:
    model = tiny("qwen2")
    parts = dict(model.named_parameters())

    def build(changed: dict[str, torch.Tensor]) -> None:
        pack_decoder(model.config, model.info, changed.items(), torch.float32)

    build(parts)
    with pytest.raises(CheckpointError, match=r"missing parameter.*q_proj\.bias"):
        build({k: v for k, v in parts.items() if not k.endswith("q_proj.bias")})
    with pytest.raises(CheckpointError, match=r"unexpected parameter layers\.9"):
        build({**parts, "layers.9.attn_norm.weight": parts["norm.weight"]})
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape"):
        build({**parts, "norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"embed\.weight holds .*NaN or infinity"):
        build({**parts, "embed.weight": torch.full_like(parts["embed.weight"], torch.nan)})


def test_float16_weights_are_held_as_float32_and_it_says_so(tmp_path: Path) -> None:
    files = [DEMO / "tokenizer.json", DEMO / "tokenizer_config.json"]
    save(tiny("llama", vocab_size=assemble.model_info(DEMO).vocab_size).half(), tmp_path, files=files)
    model = assemble.load(tmp_path, backend="native").model
    assert isinstance(model, PackedDecoder)
    assert set(model.formats) == {"f32"}
    assert any("float16" in note for note in model.notes)


@pytest.mark.parametrize("quantization", [None, "w8"])
def test_a_gguf_file_with_another_models_tokenizer_is_refused(quantization: str | None, tmp_path: Path) -> None:
    path = write_gguf(tiny("llama"), tmp_path / "m.gguf", "F32", tokenizer=tokenizer_metadata(DEMO, 1280))
    with pytest.raises(TokenizerError, match="ids reach 1279, but the model has only 96 embeddings"):
        assemble.load(path, quantization=quantization)


def test_a_model_is_called_as_asked_and_else_as_its_directory(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "here")
    assert assemble.model_info(tmp_path / "here").name == "here"
    assert assemble.model_info(tmp_path / "here", "other").name == "other"
    assert assemble.model_info(tmp_path / "here", "other").kind == "ar"


@pytest.mark.parametrize("quantization", [None, "w4"])
def test_kv_of_a_quantised_model_is_held_in_half_the_bytes(quantization: str | None) -> None:
    """bfloat16 whatever its float parts were stored in; a float model's are its own."""
    packed = assemble.pack(tiny("llama", hidden_size=64, heads=4, intermediate_size=64), quantization)
    assert packed.dtype == (torch.float32 if quantization is None else torch.bfloat16)


@pytest.mark.parametrize("name", ["w4", "w4m", "w6", "w8"])
def test_embedding_and_head_take_the_formats_own_form_for_them(name: str) -> None:
    """Rare tokens cost little memory and much accuracy: a format of few bits holds them in more."""
    model = tiny("llama", hidden_size=64, heads=4, intermediate_size=64, tied=False)
    packed = assemble.pack(model, name)
    format = FORMATS[name]
    outer = FORMATS[format.head].kind if format.head else format.kind
    assert packed.embed.format == packed.head_weights.format == outer
    assert {w.packed.format for w in packed._linears()} == {format.kind}


@pytest.mark.skipif(NO_TRITON is not None or DEVICE.type != "cpu", reason="triton's interpreter")
def test_files_load_for_a_device_as_for_a_cpu(tmp_path: Path) -> None:
    """A directory, a quantised one and a GGUF file: the same formats, and nearly the same logits, by the twins."""
    from dfastllm.engine.runners.native import NativeRunner
    from dfastllm.engine.runners.triton import TritonRunner
    from tests.kit.adapters import step_of

    gguf = write_gguf(DEMO, tmp_path / "m.gguf", "Q8_0", tokenizer=tokenizer_metadata(DEMO, 1280))
    step = step_of([[5, 9, 11, 3, 17, 2, 8], [4, 4, 7]], [0, 0])
    for path, quantization in ((DEMO, None), (DEMO, "w4m"), (DEMO, "w8r"), (gguf, None)):
        there = assemble.load(path, backend="triton", quantization=quantization, dtype="float32").model
        here = assemble.load(path, backend="native", quantization=quantization, dtype="float32").model
        assert isinstance(there, DeviceDecoder)
        assert isinstance(here, PackedDecoder)
        assert set(there.formats) == set(here.formats)
        got = TritonRunner(there, 64, torch.float32, 16, max_rows=16, ops=ops_of("twins")).run(step).logits()
        wanted = NativeRunner(here, 64, torch.float32, 16).run(step).logits()
        assert float((got - wanted).norm() / wanted.norm()) < 0.02, (path, quantization)
