"""The loop: resumes bit for bit, warm starts, refuses what it cannot do, exports what the loader reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dfastllm.train.loop as train_loop
from dfastllm import models
from dfastllm.errors import CheckpointError, ValidationError
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.train import Init, Recipe, load_recipe, run
from dfastllm.train.checkpoint import latest, prune, read_weights
from dfastllm.train.data import Example, Stream
from dfastllm.train.fold import fold_norms
from dfastllm.train.objectives import loss, make_objective
from dfastllm.train.plan import rate
from dfastllm.train.recipes import RECIPES
from dfastllm.train.run import build_model

CURVES = Path(__file__).parents[2] / "benchmarks" / "training"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16}


def recipe(name: str, objective: str = "causal", family: str = "llama", **more: object) -> Recipe:
    values = {"steps": 6, "batch_tokens": 600, "warmup": 2, "bf16": False, **more}
    return Recipe(name, family, objective, SHAPE, **values)  # type: ignore[arg-type]


def train(recipe: Recipe, runs: Path, **more: object) -> Path:
    return run(recipe, runs=runs, validate_every=3, save_every=2, log_every=1, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objective", "family", "optimizer"),
    [("causal", "llama", "adamw"), ("masked_diffusion", "llada", "muon"), ("block_diffusion", "sdar", "muon")],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    objective: str, family: str, optimizer: str, runs: Path
) -> None:
    block = 4 if family == "sdar" else 0
    whole = recipe(f"whole-{family}", objective, family, optimizer=optimizer, block=block)
    cut = replace(whole, name=f"cut-{family}")
    a = train(whole, runs)
    assert train(cut, runs, steps=3).name == "step-3"
    b = train(cut, runs)
    assert a.name == b.name == "step-6"
    for file in ("weights.safetensors", "optimizer.safetensors"):
        left, right = load_file(a / file), load_file(b / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)
    one, other = (json.loads((p / "state.json").read_text()) for p in (a, b))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_training_lowers_the_loss_and_logs_it(runs: Path) -> None:
    home = train(recipe("learns", steps=30, lr=5e-3), runs).parent
    lines = [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["step"] == 30
    assert {"validation_loss", "tokens", "samples", "lr"} <= lines[-1].keys()


def test_warm_start_trains_its_source_first_and_grows_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New layers add nothing at first, so the grown model starts with its source's logits."""
    source = recipe("source", steps=4)
    monkeypatch.setitem(RECIPES, "source", source)  # type: ignore[arg-type]
    grown = replace(
        recipe("grown", "masked_diffusion", "llada"),
        shape={**SHAPE, "layers": 4},
        init=Init("source", 2, (0, None, 1, None)),
    )
    train(grown, runs, steps=1)
    assert (runs / "source" / "step-2").is_dir()
    tokenizer = Tokenizer.load(runs / "tokenizer")
    small, large = build_model(source, tokenizer), build_model(grown, tokenizer)
    assert read_weights(runs / "source" / "step-2", small) == []
    assert read_weights(runs / "source" / "step-2", large, grown.init.layers if grown.init else ()) == []
    ids = torch.arange(20, 40)
    attend = models.dense_attention(1, 20, "causal")
    torch.testing.assert_close(
        large.head(large(ids, torch.arange(20), attend)), small.head(small(ids, torch.arange(20), attend))
    )


def test_folding_norms_away_is_exact_where_heads_have_one_size(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With q and k of the same size at every token the folded model computes the same; in general it is close. The loop
    folds by itself when the new wiring has no norms."""
    block = recipe("block", "block_diffusion", "sdar", block=4, steps=2)
    monkeypatch.setitem(RECIPES, "block", block)  # type: ignore[arg-type]
    train(block, runs)
    tokenizer = Tokenizer.load(runs / "tokenizer")
    source = build_model(block, tokenizer)
    read_weights(runs / "block" / "step-2", source)
    for layer in source.layers:
        torch.nn.init.uniform_(layer.attn.q_norm.weight, 0.5, 2.0)  # type: ignore[union-attr, arg-type]
    rows = make_objective("causal", source).rows([Example((50,) * 6, (50,) * 6, 0)], torch.Generator())
    target = build_model(recipe("target", "masked_diffusion", "llada"), tokenizer)
    target.load_state_dict(fold_norms(source, rows))
    same = replace(rows, ids=torch.full_like(rows.ids, 50))  # one token everywhere: q and k have one size before rope
    assert loss(target, same).item() == pytest.approx(loss(source, same).item(), abs=1e-4)
    done = train(replace(recipe("unnormed", "masked_diffusion", "llada", steps=1), init=Init("block", 2)), runs)
    kept, before = load_file(done / "weights.safetensors"), load_file(runs / "block" / "step-2" / "weights.safetensors")
    assert not any("q_norm" in name for name in kept)
    assert (kept["embed.weight"] - before["embed.weight"]).abs().max() < 0.01  # one step at most from its source


def test_export_is_read_by_the_loader(runs: Path, tmp_path: Path) -> None:
    done = train(recipe("exported", "block_diffusion", "sdar", block=8, steps=2), runs, out=tmp_path)
    model = models.load(tmp_path)
    assert (model.info.kind, model.info.block, model.dtype) == ("block", 8, torch.bfloat16)
    tokenizer = Tokenizer.load(tmp_path)
    assert (model.info.mask_id, model.info.eos_ids) == (tokenizer.mask_id, tokenizer.eos_ids)
    kept = load_file(done / "weights.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, kept[name].to(torch.bfloat16))


def test_a_run_is_not_overwritten_and_a_foreign_checkpoint_is_refused(runs: Path) -> None:
    first = recipe("kept", steps=2)
    done = train(first, runs)
    with pytest.raises(ValidationError, match="earlier run"):
        train(first, runs, resume=False)
    with pytest.raises(CheckpointError, match="shape"):
        train(replace(first, shape={**SHAPE, "intermediate_size": 64}, steps=3), runs)
    with pytest.raises(CheckpointError, match=r"lr, seed differ \(lr: 0.002 there, 0.01 here\)"):
        train(replace(first, lr=0.01, seed=1), runs)
    (done / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot read"):
        train(first, runs)


def test_old_checkpoints_go_but_milestones_stay(tmp_path: Path) -> None:
    for step in (1, 5, 10, 20):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "state.json").write_text("{}")
    prune(tmp_path, 2, (1,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-10", "step-20"]
    assert latest(tmp_path) == tmp_path / "step-20"


def test_the_stream_continues_at_any_position_and_fills_its_batches(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, "train", 0, 1000)
    source = stream.at((0, 0))
    first = [next(source) for _ in range(60)]
    again = Stream(tokenizer, "train", 0, 1000).at(first[29][1])
    assert [next(again)[0] for _ in range(30)] == [batch for batch, _ in first[30:]]
    used = sum(e.length for batch, _ in first for e in batch.examples)
    padded = sum(len(batch.examples) * max(e.length for e in batch.examples) for batch, _ in first)
    assert padded <= 60 * 1000
    assert used > 0.9 * padded
    assert len({e.index for batch, _ in first for e in batch.examples}) == sum(len(b.examples) for b, _ in first)


def test_schedules() -> None:
    wsd = recipe("a", steps=100, warmup=10, decay=0.2)
    assert [round(rate(wsd, s), 3) for s in (0, 9, 50, 79, 90, 99)] == [0.1, 1.0, 1.0, 1.0, 0.5, 0.05]
    cosine = replace(wsd, schedule="cosine")
    assert rate(cosine, 50) == pytest.approx(0.51, abs=0.01)
    assert rate(cosine, 99) < 0.03
    longer = replace(wsd, steps=400)  # before its decay a longer recipe is the same run
    assert [rate(longer, s) for s in range(80)] == [rate(wsd, s) for s in range(80)]


def test_recipes_from_files(tmp_path: Path) -> None:
    for name, known in RECIPES.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(known.to_json()))
        assert load_recipe(path) == known == load_recipe(name)
    for text, message in [("{", "not JSON"), ('{"stpes": 1}', "stpes"), ('{"name": "x"}', "not a recipe")]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValidationError, match=message):
            load_recipe(tmp_path / "bad.json")
    with pytest.raises(ValidationError, match="unknown recipe"):
        load_recipe("demo-nothing")
    for wrong in ({"steps": 0}, {"optimizer": "sgd"}, {"schedule": "step"}, {"decay": 2.0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            recipe("x", **wrong)


@pytest.mark.parametrize(("name", "least"), [("weight_decay", 0.0), ("warmup", 0)])
def test_a_recipe_may_leave_out_decay_and_warm_up_but_not_turn_them_round(name: str, least: float) -> None:
    assert getattr(recipe("x", **{name: least}), name) == least
    with pytest.raises(ValidationError, match=f"^{name} must be at least 0"):
        recipe("x", **{name: -1})


@pytest.mark.parametrize("name", ["demo-ar", "demo-block", "demo-diffusion", "demo-draft"])
def test_recipes_give_the_schedules_of_the_recorded_runs(name: str) -> None:
    """The curves that the shipped models' training left behind: every stage's rate at every line."""
    lines = [json.loads(line) for line in (CURVES / f"{name}.jsonl").read_text().splitlines()]
    stages = {line["stage"] for line in lines}
    assert name in stages
    for line in lines:
        assert rate(RECIPES[line["stage"]], line["step"] - 1) == pytest.approx(line["lr"], abs=6e-6), line


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_rate_follows_the_schedule(optimizer: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Optimizer] = []
    make = train_loop.make_optimizers

    def kept(*given: Any) -> list[torch.optim.Optimizer]:
        made.extend(make(*given))
        return made

    monkeypatch.setattr(train_loop, "make_optimizers", kept)
    told = recipe(f"rates-{optimizer}", optimizer=optimizer, steps=5, warmup=4, lr=2e-3, matrix_lr=3e-3)
    train(told, runs)
    groups = [group for one in made for group in one.param_groups]
    assert sorted({group["peak"] for group in groups}) == [2e-3, 3e-3]
    assert rate(told, 4) < 1
    for group in groups:
        assert group["lr"] == pytest.approx(group["peak"] * rate(told, 4))


def test_a_log_has_a_line_at_every_so_many_steps_and_the_last(runs: Path) -> None:
    home = run(recipe("sparse", steps=7), runs=runs, validate_every=6, save_every=7, log_every=3).parent
    lines = [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert ["validation_loss" in line for line in lines] == [False, True, True]


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    """By number: step-900 comes after step-1000 in the alphabet."""
    for step in (900, 1000, 20):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "state.json").write_text("{}")
    (tmp_path / "step-5000").mkdir()  # not whole
    assert latest(tmp_path) == tmp_path / "step-1000"


@pytest.mark.parametrize("field", ["lr", "matrix_lr", "clip", "power", "steps", "batch_tokens"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_recipe_that_cannot_train_is_refused(field: str, value: float) -> None:
    if not math.isfinite(value) and field in ("steps", "batch_tokens"):
        pytest.skip("whole numbers")
    with pytest.raises(ValidationError, match=f"{field} must be"):
        recipe("bad", **{field: value})
