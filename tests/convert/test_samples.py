"""Calibration data: users' files, the task mix, and rows as each kind of model sees them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dfastllm.convert import Options, layers, quantise_model
from dfastllm.convert.layers import walk
from dfastllm.convert.samples import rows_of, task_examples
from dfastllm.convert.source import Source
from dfastllm.errors import (
    ModelLoadError,
    UnsupportedError,
    ValidationError,
)
from dfastllm.llm import resolve
from dfastllm.models import Ids, build, describe, load, save, tiny_config
from dfastllm.models.checkpoint import skeleton
from dfastllm.quant.calibrate import InputStatistics
from dfastllm.text import Tokenizer
from dfastllm.train.objectives import loss
from dfastllm.train.texts import file_examples
from tests.kit.convert_models import write_tiny


def test_files_to_calibrate_on(llama: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(llama)
    plain = tmp_path / "text.txt"
    plain.write_text("A short line.\n" * 60)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "\n".join(
            json.dumps(value)
            for value in (
                {"text": "plain text"},
                {"prompt": "Q", "response": "answer"},
                {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]},
            )
        )
        + "\n\n"
    )
    pieces = file_examples(tokenizer, plain, 100, "text")
    assert sum(e.length for e in pieces) == len("A short line.\n") * 60
    assert bytes(t for e in pieces[:1] for t in (*e.prompt, *e.response)) is not None
    assert tokenizer.decode([*pieces[0].prompt, *pieces[0].response]).startswith("A short line.\nA short")
    assert len(file_examples(tokenizer, plain, 2, "text")) == 2
    found = file_examples(tokenizer, lines, 10, "text")
    assert [tokenizer.decode(list(e.response[:-1])) for e in found[1:]] == ["answer", "yes"]
    assert tokenizer.decode(list(found[2].prompt)) == "[user]hello[assistant]"
    for file in (plain, lines):
        quantise_model(llama, tmp_path / "out", Options("w4", calibration="gptq", text=file), force=True)
    one = load_file(tmp_path / "out" / "model.safetensors")
    quantise_model(llama, tmp_path / "out", Options("w4", calibration="gptq", samples=8), force=True)
    two = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not one[name].equal(two[name]) for name in one), "the file was not read"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.txt", None, "does not exist"),
        ("x.txt", b"\xff\xfe\x00", "cannot be read"),
        ("x.txt", b"a", "holds no text of two tokens"),
        ("x.jsonl", b'{"text": "hello"}\n{oops', "x.jsonl:2 is not JSON"),
        ("x.jsonl", b'{"text": 5}', "x.jsonl:1 must be an object with text, prompt and response"),
        ("x.jsonl", b"[1]", "x.jsonl:1 must be an object"),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}', "messages that end with the assistant's"),
    ],
)
def test_bad_calibration_files(llama: Path, tmp_path: Path, name: str, text: bytes | None, said: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ValidationError, match=said):
        quantise_model(llama, tmp_path / "out", Options("w4", calibration="aware", text=path))
    assert not (tmp_path / "out" / "config.json").exists()


def test_calibration_needs_a_tokenizer_and_room(llama: Path, tmp_path: Path) -> None:
    bare = save(load(llama), tmp_path / "bare")
    quantise_model(bare, tmp_path / "out", Options("w4"))
    with pytest.raises(ModelLoadError, match=r"calibration needs a tokenizer.*no tokenizer\.json"):
        quantise_model(bare, tmp_path / "out2", Options("w4", calibration="aware"))
    narrow = write_tiny(tmp_path / "narrow", max_len=66)
    with pytest.raises(UnsupportedError, match="no example is short enough for the context of 66"):
        quantise_model(narrow, tmp_path / "out3", Options("w4", calibration="aware", samples=3))


def test_rows_are_the_models_own_kind() -> None:
    """Canvas models see masks in random shares, autoregressive ones none; the same seed gives the same rows."""
    for name in ("demo-ar", "demo-diffusion", "demo-block"):
        source = Source(name)
        model = skeleton(source.config, source.info, torch.float32)
        examples = task_examples(Tokenizer.load(source.directory), "train", 40)
        rows = rows_of(model, examples)
        masked = [float((r.ids == source.info.mask_id).float().mean()) for r in rows]
        assert max(masked) == 0 if source.info.kind == "ar" else min(masked) > 0.02 and max(masked) > 0.1
        assert sum(r.batch for r in rows) == 40
        again = rows_of(model, examples)
        assert all(a.ids.equal(b.ids) for a, b in zip(rows, again, strict=True))
        for r in rows[:1]:
            assert float(loss(load(source.directory, dtype=torch.float32), r)) < 0.5, "not what it was trained on"


def test_the_row_before_predicts_where_the_family_shifts() -> None:
    """Dream's head is calibrated on the rows that decide a masked position: those before it."""
    config = tiny_config("dream", vocab_size=1280, max_len=512)
    tokenizer = Tokenizer.load(resolve("demo-diffusion"))
    ids = Ids(eos=tokenizer.eos_ids, mask=tokenizer.mask_id, pad=tokenizer.eos_id)
    examples = task_examples(tokenizer, "train", 4)
    straight, shifted = (
        rows_of(build(config, replace(describe("dream", config, ids), shift=shift)), examples) for shift in (0, 1)
    )
    for plain, moved in zip(straight, shifted, strict=True):
        assert torch.equal(moved.wanted, plain.wanted - 1)
        assert torch.equal(moved.ids, plain.ids)
        assert bool((plain.ids[plain.wanted] == tokenizer.mask_id).any())


def test_plain_text_is_cut_into_a_quarter_and_the_rest(tmp_path: Path) -> None:
    """Pieces of 128 tokens, the first quarter of each as its prompt, nothing lost and nothing twice."""
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    text = "The dog went home and the cat did not. " * 40
    (tmp_path / "x.txt").write_text(text)
    found = file_examples(tokenizer, tmp_path / "x.txt", 100, "text")
    assert [token for one in found for token in (*one.prompt, *one.response)] == tokenizer.encode(text)
    assert [len(one.prompt) + len(one.response) for one in found[:-1]] == [128] * (len(found) - 1)
    assert [len(one.prompt) for one in found[:-1]] == [32] * (len(found) - 1)
    last = len(found[-1].prompt) + len(found[-1].response)
    assert len(found[-1].prompt) == max(1, last // 4)
    assert [one.index for one in found] == list(range(len(found)))


def test_later_layers_are_calibrated_on_what_the_earlier_ones_have_become() -> None:
    """A layer that quantising turns to zeros changes what the next one sees."""
    source = Source("demo-ar")
    rows = rows_of(
        skeleton(source.config, source.info, torch.float32), task_examples(Tokenizer.load(source.directory), "train", 2)
    )

    def inputs(spoilt: bool) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def quantise(name: str, weight: torch.Tensor, statistics: InputStatistics | None) -> torch.Tensor:
            if statistics is not None and name.startswith(("layers.0.", "layers.1.")):
                seen[name] = statistics.square.clone()
            return torch.zeros_like(weight) if spoilt and name.startswith("layers.0.") else weight

        walked = walk(source, rows, quantise, gram=False)
        for name, _ in walked:
            if name.startswith("layers.2."):
                walked.close()
                break
        return seen

    kept, spoilt = inputs(False), inputs(True)
    first = [name for name in kept if name.startswith("layers.0.")]
    assert all(torch.equal(kept[name], spoilt[name]) for name in first)
    assert not any(torch.equal(kept[name], spoilt[name]) for name in kept if name not in first)


@pytest.mark.parametrize("limit", [1, 4096, 8192, 12288, 16384 + 4096])
def test_gram_matrices_are_taken_in_turns_that_fit(llama: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """As many at once as the limit holds to the byte (4 KiB for 32 inputs, 16 KiB for 64), and the same as when all are
    taken together."""
    source = Source(llama)
    examples = task_examples(Tokenizer.load(llama), "train", 1)
    rows = rows_of(skeleton(source.config, source.info, torch.float32), examples)
    recording = layers.recording
    turns: list[list[int]] = []

    def noted(modules: dict[str, nn.Linear], *, gram: bool) -> AbstractContextManager[dict[str, InputStatistics]]:
        turns.append([4 * module.in_features**2 for module in modules.values()])
        return recording(modules, gram=gram)

    def grams(most: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(layers, "GRAM_BYTES", most)
        seen: dict[str, torch.Tensor] = {}

        def quantise(name: str, weight: torch.Tensor, statistics: InputStatistics | None) -> torch.Tensor:
            if name.startswith("layers.0."):
                assert statistics is not None
                assert statistics.gram is not None
                seen[name] = statistics.gram.clone()
            return weight

        walked = walk(source, rows, quantise, gram=True)
        while next(walked)[0] != "layers.0.mlp.down_proj.weight":
            pass
        walked.close()
        return seen

    together = grams(1 << 30)
    monkeypatch.setattr(layers, "recording", noted)
    apart = grams(limit)
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in together)
    assert [size for turn in turns for size in turn] == [4096] * 6 + [16384]
    assert all(sum(turn) <= limit or len(turn) == 1 for turn in turns)
    assert all(sum(turn) + after[0] > limit for turn, after in pairwise(turns))
