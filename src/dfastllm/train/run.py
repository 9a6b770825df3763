"""Recipes, run: the model and tokenizer of a recipe, its warm start, and the work that the training loop is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dfastllm import models
from dfastllm.models.decoder import Decoder
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.train.checkpoint import latest, read_weights, require_same
from dfastllm.train.data import Batch, Stream
from dfastllm.train.fold import fold_norms
from dfastllm.train.loop import fit, refuse_earlier
from dfastllm.train.objectives import loss, make_objective
from dfastllm.train.plan import Plan
from dfastllm.train.recipes import Recipe, load_recipe
from dfastllm.train.vocab import MAX_LEN, train_tokenizer
from dfastllm.train.work import Losses, Value, Work

__all__ = ["RecipeWork", "build_model", "export", "plan_of", "run"]

RUNS = Path("runs")
VALIDATION_TOKENS = 12_000


def run(
    recipe: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    device: str = "cpu",
    threads: int = 1,
    steps: int | None = None,
    runs: str | Path = RUNS,
    validate_every: int = 250,
    save_every: int = 250,
    log_every: int = 25,
) -> Path:
    """Train a recipe (a name in RECIPES, a JSON file, or a Recipe) and return the directory of its last checkpoint.

    Working files go to runs/<name>: checkpoints, log.jsonl, and the tokenizer that all runs share in runs/tokenizer.
    out: also export a Hugging Face directory there (bfloat16). resume: go on from the newest checkpoint, else start
    afresh (an old run of that name is then refused, not overwritten). steps: stop early at this step (for warm starts
    and tests); the schedule stays the recipe's. Raises ValidationError, CheckpointError, TrainingError.
    """
    torch.set_num_threads(threads)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    home = Path(runs) / recipe.name
    if not resume:
        refuse_earlier(home)
    tokenizer = shared_tokenizer(Path(runs))
    model = build_model(recipe, tokenizer).to(device)
    if latest(home) is None and recipe.init is not None:
        warm_start(model, recipe, Path(runs), tokenizer, device, threads)
    require_same(home, "recipe.json", recipe.to_json())
    every: dict[str, Any] = {"validate_every": validate_every, "save_every": save_every, "log_every": log_every}
    done = fit(RecipeWork(recipe, model, tokenizer), plan_of(recipe, **every), home, stop=steps)
    if out is not None:
        export(model, Path(runs) / "tokenizer", Path(out))
    return done


def plan_of(recipe: Recipe, **every: Any) -> Plan:
    """The plan of a recipe; every: validate_every, save_every, log_every."""
    names = ("name", "steps", "lr", "matrix_lr", "optimizer", "weight_decay", "warmup", "schedule", "decay", "clip")
    more = {name: getattr(recipe, name) for name in (*names, "seed", "milestones")}
    return Plan(**more, **every)


def shared_tokenizer(runs: Path) -> Tokenizer:
    """The tokenizer of all demo models, trained on first use."""
    path = runs / "tokenizer"
    if not (path / "tokenizer_config.json").is_file():
        train_tokenizer(path)
    return Tokenizer.load(path)


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> Decoder:
    """The recipe's model with random weights (seeded), float32."""
    config = models.DecoderConfig(
        vocab_size=tokenizer.vocab_size, max_len=MAX_LEN, qk_norm=recipe.family == "sdar", **recipe.shape
    )
    mask = None if models.find_family(recipe.family).kind == "ar" else tokenizer.mask_id
    ids = models.Ids(eos=tokenizer.eos_ids, mask=mask, bos=tokenizer.bos_id, pad=tokenizer.pad_id)
    info = models.describe(recipe.family, config, ids, name=recipe.name, block=recipe.block or None)
    return models.build(config, replace(info, defaults={"temperature": 0.0}), seed=recipe.seed)


def warm_start(model: Decoder, recipe: Recipe, runs: Path, tokenizer: Tokenizer, device: str, threads: int) -> None:
    """Weights from the recipe's init, training that first where its checkpoint is missing. Norms of q and k that the
    source lacks keep their initial value; those that only the source has are folded into its projections."""
    assert recipe.init is not None
    checkpoint = runs / recipe.init.recipe / f"step-{recipe.init.step}"
    if not (checkpoint / "state.json").is_file():
        run(recipe.init.recipe, runs=runs, steps=recipe.init.step, device=device, threads=threads)
    before = load_recipe(recipe.init.recipe)
    source = build_model(before, tokenizer)
    if source.config.qk_norm and not model.config.qk_norm:
        read_weights(checkpoint, source)
        objective = make_objective(before.objective, source, before.slack, before.power)
        batch, _ = next(Stream(tokenizer, "train", 0, before.batch_tokens, objective.cost).at((0, 0)))
        rows = objective.rows(batch.examples, torch.Generator().manual_seed(0))
        model.load_state_dict(fold_norms(source, rows))
    else:
        read_weights(checkpoint, model, recipe.init.layers)


def export(model: Decoder, tokenizer: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A Hugging Face directory: config.json, weights in `dtype`, and the tokenizer files of this directory."""
    copy = models.build(model.config, model.info)
    copy.load_state_dict(model.state_dict())
    files = [tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json"]
    models.save(copy.to(dtype), out, files=files)


class RecipeWork(Work):
    """One objective on the generated task mix. Noise is keyed by the recipe's seed and the batch's number."""

    start = (0, 0)

    def __init__(self, recipe: Recipe, model: Decoder, tokenizer: Tokenizer) -> None:
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.objective = make_objective(recipe.objective, model, recipe.slack, recipe.power)

    def batches(self, position: Any) -> Iterator[tuple[Batch, tuple[int, int]]]:
        recipe = self.recipe
        stream = Stream(self.tokenizer, "train", recipe.seed, recipe.batch_tokens, self.objective.cost, recipe.mix)
        window, number = position
        return stream.at((window, number))

    def losses(self, batch: Batch, step: int) -> Losses:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + batch.number)
        rows = self.objective.rows(batch.examples, generator).to(str(self.model.device))
        value = loss(self.model, rows, bf16=self.recipe.bf16)
        return Losses({"loss": value}, tokens=rows.batch * rows.length, samples=len(batch.examples))

    @torch.no_grad()
    def validate(self, step: int) -> Mapping[str, Value]:
        """The objective on the first batches of the validation stream, with the same noise every time; nats."""
        total, count = 0.0, 0
        for batch in self.validation:
            generator = torch.Generator().manual_seed(batch.number)
            rows = self.objective.rows(batch.examples, generator).to(str(self.model.device))
            total += loss(self.model, rows, bf16=self.recipe.bf16).item() * len(batch.examples)
            count += len(batch.examples)
        return {"validation_loss": total / count}

    @cached_property
    def validation(self) -> list[Batch]:
        stream = Stream(self.tokenizer, "validation", 0, self.recipe.batch_tokens, self.objective.cost)
        enough = max(1, VALIDATION_TOKENS // self.recipe.batch_tokens)
        return [batch for batch, _ in islice(stream.at((0, 0)), enough)]
