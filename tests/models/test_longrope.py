"""longrope: which factors, by the context that a model is loaded for; its files; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfastllm import LLM, SamplingParams, models
from dfastllm.engine import EngineConfig
from dfastllm.errors import CheckpointError, ModelLoadError, ValidationError
from dfastllm.llm import load_engine
from dfastllm.models import RopeScaling
from dfastllm.models.gguf import open_gguf, write_gguf
from dfastllm.quant.gguf import GgufFile, Planned, to_float, write_file
from tests.models.test_gguf import DEMO, expanded, same

TRAINED, WHOLE = 64, 256
SHORT = (1.0, 1.05, 1.5, 2.5)
LONG = (1.25, 2.1, 6.0, 30.0)
SCALING = RopeScaling("longrope", WHOLE / TRAINED, TRAINED, short=SHORT, long=LONG)


def tiny(family: str = "phi3", scaling: RopeScaling = SCALING, **shape: Any) -> models.Decoder:
    return models.tiny(family, seed=5, max_len=WHOLE, rope_scaling=scaling, **{"head_dim": 8, **shape})


def logits(model: models.Decoder, ids: Tensor) -> Tensor:
    attend = models.dense_attention(1, len(ids), "causal")
    return model.head(model(ids, torch.arange(len(ids)), attend)).detach()


def some(length: int) -> Tensor:
    return torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(length))


def with_fields(directory: Path, **fields: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return directory


# Against transformers


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Any]:
    transformers = pytest.importorskip("transformers")
    models.save(tiny(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    return tmp_path, theirs


@pytest.mark.parametrize(("max_len", "length"), [(TRAINED, 9), (TRAINED, TRAINED), (None, TRAINED + 1), (None, 200)])
def test_texts_of_the_length_that_the_context_is_for(
    max_len: int | None, length: int, published: tuple[Path, Any]
) -> None:
    directory, theirs = published
    ours = models.load(directory, max_len=max_len)
    assert ours.info.max_len == (max_len or WHOLE)
    ids = some(length)
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
    assert (logits(ours, ids) - wanted).abs().max() <= 1e-4


def test_greedy_tokens_of_short_texts(published: tuple[Path, Any]) -> None:
    directory, theirs = published
    ours, ids = models.load(directory, max_len=TRAINED), some(20)
    wanted = theirs.generate(ids[None], max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
    for _ in range(40):
        ids = torch.cat([ids, logits(ours, ids)[-1:].argmax(-1)])
    assert ids.tolist() == wanted.tolist()


def test_one_rule_for_texts_of_every_length(published: tuple[Path, Any]) -> None:
    """In the whole context a short text has the long factors, so the same text gives the same row wherever it ends;
    transformers gives the first rows of a longer text others than those of the short text."""
    directory, theirs = published
    ours, ids = models.load(directory), some(100)
    first = logits(ours, ids[:50])
    assert torch.allclose(first, logits(ours, ids)[:50], atol=1e-5)
    with torch.no_grad():
        assert (theirs(ids[None]).logits[0, :50] - first).abs().max() <= 1e-4
        assert (theirs(ids[None, :50]).logits[0] - first).abs().max() > 0.01
    assert (logits(models.load(directory, max_len=TRAINED + 1), ids[:50]) - first).abs().max() == 0


def test_old_config_files(published: tuple[Path, Any]) -> None:
    """Phi-3's first files: kind su, the trained length beside the scaling, no factor."""
    directory, _ = published
    now = models.load(directory).config
    old = {"type": "su", "short_factor": list(SHORT), "long_factor": list(LONG)}
    for fields in ({"rope_scaling": old}, {"rope_scaling": {**old, "type": "yarn"}}):
        assert models.load(with_fields(directory, **fields)).config == now


# The served context chooses


@pytest.mark.parametrize("kind", ["directory", "gguf"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_engine_takes_the_factors_of_its_context(backend: str, kind: str, tmp_path: Path) -> None:
    if kind == "gguf" and backend == "torch":
        pytest.skip("a GGUF file is served packed")
    model = models.tiny("phi3", seed=5, vocab_size=1280, max_len=WHOLE, rope_scaling=SCALING, head_dim=8)
    files = [DEMO / name for name in ("tokenizer.json", "tokenizer_config.json")]
    path = models.save(model, tmp_path / "model", files=files)
    if kind == "gguf":
        from dfastllm.text.gguf import tokenizer_metadata

        path = write_gguf(path, tmp_path / "m.gguf", "F32", tokenizer=tokenizer_metadata(DEMO, 1280))
    texts = [some(length).tolist() for length in (5, 20, 41)]
    answers = {}
    for limit in (WHOLE, TRAINED, TRAINED + 1):
        config = EngineConfig(max_len=limit)
        engine = load_engine(path, backend=backend, kv_cache_dtype="float32", config=config)  # type: ignore[arg-type]
        assert engine.max_len == limit
        with LLM(engine=engine) as llm:
            batch = llm.generate(texts, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        answers[limit] = [output.outputs[0].token_ids for output in batch]
        plain = models.Decoder(model.config.within(limit), model.info)
        plain.load_state_dict(model.state_dict())
        for text, answer in zip(texts, answers[limit], strict=True):
            ids = torch.tensor(text)
            for _ in range(20):
                ids = torch.cat([ids, logits(plain, ids)[-1:].argmax(-1)])
            assert list(answer) == ids[len(text) :].tolist()
    assert answers[WHOLE] == answers[TRAINED + 1] != answers[TRAINED]


# GGUF


@pytest.mark.parametrize("family", ["phi3", "granite"])
@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_a_gguf_file_comes_back(family: str, attention_factor: float | None, tmp_path: Path) -> None:
    model = tiny(family, replace(SCALING, attention_factor=attention_factor))
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    same(model, expanded(path))
    with GgufFile.open(path) as file:
        assert file.metadata[f"{family}.rope.scaling.original_context_length"] == TRAINED
        wanted = attention_factor or (1 + 2 / 6) ** 0.5  # 1 + ln 4 / ln 64
        assert file.metadata[f"{family}.rope.scaling.attn_factor"] == pytest.approx(wanted)
        assert to_float(file, file.tensors["rope_factors_short.weight"]).tolist() == pytest.approx(SHORT)
        assert to_float(file, file.tensors["rope_factors_long.weight"]).tolist() == pytest.approx(LONG)
    with open_gguf(path, max_len=TRAINED) as opened:
        assert opened.config == replace(model.config, max_len=TRAINED)


def test_a_partly_rotated_head_in_gguf(tmp_path: Path) -> None:
    scaling = replace(SCALING, short=SHORT[:3], long=LONG[:3])
    model = tiny("phi3", scaling, rope_dim=6, window=16)
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    same(model, expanded(path))
    with GgufFile.open(path) as file:
        assert file.metadata["phi3.rope.dimension_count"] == 6
        assert file.metadata["phi3.attention.sliding_window"] == 16


@pytest.mark.parametrize("served", [256, 512])
def test_logits_against_llama_cpp(served: int, llama: Any, tmp_path: Path) -> None:
    """It chooses by its context, too, which it makes a multiple of 256."""
    scaling = replace(SCALING, original_max_len=256)
    model = models.tiny("phi3", hidden_size=64, heads=4, rope_dim=8, max_len=1024, rope_scaling=scaling)
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    reference = llama.Reference(path, context=served)
    ids = some(40)
    wanted = torch.from_numpy(reference.logits(ids.tolist()))
    reference.close()
    for limit in (256, 512):
        with open_gguf(path, max_len=limit) as opened:
            ours = models.Decoder(opened.config, opened.info)
        ours.load_state_dict(model.state_dict())
        apart = (logits(ours, ids) - wanted).abs().max()
        assert apart <= 1e-3 if limit == served else apart > 0.01


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"long_factor": [1.0, 2.0]}, "two lists of positive numbers, of one length"),
        ({"long_factor": [1.0], "short_factor": [1.0]}, "longrope factors must be of length 4, got 1"),
        ({"short_factor": [1.0, 0.0, 1.0, 1.0]}, "positive numbers"),
        ({"short_factor": [1.0, float("inf"), 1.0, 1.0]}, "positive numbers"),
        ({"short_factor": [1.0, float("nan"), 1.0, 1.0]}, "positive numbers"),
        ({"short_factor": [1.0, "2", 1.0, 1.0]}, "short_factor must be a list of numbers"),
        ({"short_factor": None}, "'short_factor' is missing"),
        ({"long_factor": 4.0}, "'long_factor' must be list"),
        ({"rope_type": "dynamic"}, "'dynamic' is not supported; supported: default, longrope"),
        ({"factor": 0.0}, "factor must be greater than 0"),
    ],
)
def test_config_files_that_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    models.save(tiny(), tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_scaling"]
    with pytest.raises(ModelLoadError, match=said):
        models.load(with_fields(tmp_path, rope_scaling={**rope, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 0}, "sliding_window must be at least 1, or null for none, got 0"),
        ({"original_max_position_embeddings": 1}, "original_max_len must be greater than 1"),
        ({"original_max_position_embeddings": 0}, "original_max_len must be at least 1"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)
def test_fields_beside_the_scaling_that_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=said):
        models.load(with_fields(models.save(tiny(), tmp_path), **changes))


@pytest.mark.parametrize("scaling", [RopeScaling("linear", 4.0), RopeScaling("yarn", 4.0, 64)])
def test_phi3_has_no_other_scaling(scaling: RopeScaling) -> None:
    with pytest.raises(ModelLoadError, match=r"not supported|short_factor"):
        tiny("phi3", scaling)


def test_a_context_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="max_len must be in"):
        models.load(models.save(tiny(), tmp_path), max_len=0)


def changed(tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor | None]) -> Path:
    with GgufFile.open(write_gguf(tiny(), tmp_path / "sound.gguf", "F32")) as file:
        values = {name: to_float(file, tensor) for name, tensor in file.tensors.items()} | tensors
        planned = [Planned(n, tuple(v.shape), "F32", lambda v=v: v) for n, v in values.items() if v is not None]
        return write_file(tmp_path / "changed.gguf", {**file.metadata, **metadata}, planned)


@pytest.mark.parametrize(
    ("metadata", "tensors", "error", "said"),
    [
        ({}, {"rope_factors_long.weight": None}, CheckpointError, "the file has rope_factors_short"),
        ({}, {"rope_freqs.weight": torch.ones(4)}, CheckpointError, "no other rotary factors"),
        ({}, {"rope_factors_long.weight": torch.ones(3)}, CheckpointError, r"has shape \[3\], wanted \[4\]"),
        ({}, {"rope_factors_long.weight": torch.zeros(4)}, ModelLoadError, "positive numbers"),
        ({"phi3.rope.scaling.type": "yarn"}, {}, ModelLoadError, "'yarn' is not supported"),
        ({"phi3.rope.scaling.factor": 4.0}, {}, ModelLoadError, r"factor=4\.0 is not supported"),
    ],
)
def test_gguf_files_that_are_refused(
    metadata: dict[str, Any], tensors: dict[str, Tensor | None], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        open_gguf(changed(tmp_path, metadata, tensors))


def test_an_architecture_that_has_no_longrope(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="does not compute longrope rope scaling in architecture olmo2"):
        write_gguf(tiny("olmo2"), tmp_path / "m.gguf")
