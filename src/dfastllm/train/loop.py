"""The training loop: one for every objective. Resumes exactly: a resumed run equals the uninterrupted one bit for bit
on the same machine, thread count and library versions."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dfastllm import models
from dfastllm.errors import ValidationError
from dfastllm.models.decoder import Decoder
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.train.checkpoint import latest, prune, read_checkpoint, read_weights, write_checkpoint
from dfastllm.train.data import Batch, Example, Stream
from dfastllm.train.fold import fold_norms
from dfastllm.train.objectives import Objective, loss, make_objective
from dfastllm.train.recipes import Recipe, load_recipe
from dfastllm.train.vocab import MAX_LEN, train_tokenizer

__all__ = ["build_model", "run"]

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
    and tests); the schedule stays the recipe's. Raises ValidationError, CheckpointError.
    """
    torch.set_num_threads(threads)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    home = Path(runs) / recipe.name
    newest = latest(home)
    if newest is not None and not resume:
        raise ValidationError(f"{home} holds an earlier run; remove it or resume it.", param="resume")
    tokenizer = shared_tokenizer(Path(runs))
    model = build_model(recipe, tokenizer).to(device)
    optimizers = make_optimizers(model, recipe)
    objective = make_objective(recipe.objective, model, recipe.slack, recipe.power)
    state: dict[str, Any] = {"step": 0, "position": [0, 0], "tokens": 0, "samples": 0, "seconds": 0.0}
    if newest is not None:
        state = read_checkpoint(newest, model, optimizers)
    elif recipe.init is not None:
        warm_start(model, recipe, Path(runs), tokenizer, device, threads)
    home.mkdir(parents=True, exist_ok=True)
    (home / "recipe.json").write_text(json.dumps(recipe.to_json(), indent=1) + "\n")
    loop = Loop(recipe, model, optimizers, objective, tokenizer, state, home, device)
    loop.go(min(steps or recipe.steps, recipe.steps), validate_every, save_every, log_every)
    done = latest(home)
    assert done is not None  # go() saves at its end
    if out is not None:
        export(model, Path(runs) / "tokenizer", Path(out))
    return done


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


def export(model: Decoder, tokenizer: Path, out: Path) -> None:
    """A Hugging Face directory: config.json, bfloat16 weights, tokenizer files."""
    copy = models.build(model.config, model.info)
    copy.load_state_dict(model.state_dict())
    files = [tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json"]
    models.save(copy.to(torch.bfloat16), out, files=files)


def make_optimizers(model: Decoder, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW on the embedding, head and norms; on matrices of layers Muon (Jordan et al. 2024), scaled to AdamW's update
    size (Liu et al. 2025, arXiv 2502.16982), or AdamW too."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = {"betas": (0.9, 0.98), "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "adamw":
        groups = [{"params": rest, "lr": recipe.lr}, {"params": matrices, "lr": recipe.matrix_lr}]
        found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **adamw)]  # type: ignore[arg-type]
    else:
        found = [
            torch.optim.AdamW(rest, lr=recipe.lr, **adamw),  # type: ignore[arg-type]
            torch.optim.Muon(
                matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
        ]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def rate(recipe: Recipe, step: int) -> float:
    """Factor on the learning rates at this step (0-based), in (0, 1]."""
    warm = min(1.0, (step + 1) / max(recipe.warmup, 1))
    if recipe.schedule == "cosine":
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
    falling = max(recipe.steps * recipe.decay, 1)
    return warm * min(1.0, (recipe.steps - step) / falling)


@dataclass
class Loop:
    """One run in progress. `state` is what a checkpoint keeps: step (done), position in the data, counters."""

    recipe: Recipe
    model: Decoder
    optimizers: Sequence[torch.optim.Optimizer]
    objective: Objective
    tokenizer: Tokenizer
    state: dict[str, Any]
    home: Path
    device: str

    def go(self, stop: int, validate_every: int, save_every: int, log_every: int) -> None:
        """Run up to step `stop`; log.jsonl gets a line every `log_every` steps and at every validation."""
        recipe = self.recipe
        cost = self.objective.cost
        stream = Stream(self.tokenizer, "train", recipe.seed, recipe.batch_tokens, cost, recipe.mix)
        window, number = self.state["position"]
        batches = stream.at((window, number))
        begun, before = time.monotonic(), self.state["seconds"]
        losses: list[float] = []
        with progress(self.recipe.name, self.recipe.steps) as show:
            while self.state["step"] < stop:
                batch, position = next(batches)
                losses.append(self.step(batch.examples, batch.number))
                self.state["step"] += 1
                self.state["position"] = list(position)
                self.state["samples"] += len(batch.examples)
                self.state["seconds"] = round(before + time.monotonic() - begun, 1)
                step = self.state["step"]
                if step % log_every == 0 or step == stop:
                    line = {"loss": sum(losses) / len(losses), "lr": rate(self.recipe, step - 1)}
                    if step % validate_every == 0 or step == stop:
                        line["validation_loss"] = self.validation_loss()
                    self.log(line)
                    show(step, line)
                    losses = []
                if step % save_every == 0 or step == stop or step in self.recipe.milestones:
                    write_checkpoint(self.home, step, self.model, self.optimizers, self.state)
                    prune(self.home, 2, self.recipe.milestones)

    def step(self, examples: Sequence[Example], number: int) -> float:
        """One optimizer step; the loss in nats."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + number)
        rows = self.objective.rows(examples, generator).to(self.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(self.recipe, self.state["step"])
        value = loss(self.model, rows, bf16=self.recipe.bf16)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.state["tokens"] += rows.batch * rows.length
        return value.item()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The objective on the first batches of the validation stream, with the same noise every time; nats."""
        total, count = 0.0, 0
        for batch in self.validation:
            generator = torch.Generator().manual_seed(batch.number)
            rows = self.objective.rows(batch.examples, generator).to(self.device)
            total += loss(self.model, rows, bf16=self.recipe.bf16).item() * len(batch.examples)
            count += len(batch.examples)
        return total / count

    @cached_property
    def validation(self) -> list[Batch]:
        stream = Stream(self.tokenizer, "validation", 0, self.recipe.batch_tokens, self.objective.cost)
        enough = max(1, VALIDATION_TOKENS // self.recipe.batch_tokens)
        return [batch for batch, _ in islice(stream.at((0, 0)), enough)]

    def log(self, values: dict[str, Any]) -> None:
        kept = {k: self.state[k] for k in ("step", "tokens", "samples", "seconds")}
        with (self.home / "log.jsonl").open("a") as file:
            file.write(json.dumps({**kept, **{k: round(v, 5) for k, v in values.items()}}) + "\n")


@contextmanager
def progress(name: str, steps: int) -> Iterator[Any]:
    """show(step, values): a bar on a terminal, a plain line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:

        def line(step: int, values: dict[str, Any]) -> None:
            text = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
            print(f"{name} {step}/{steps}  {text}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task(name, total=steps, note="")

        def move(step: int, values: dict[str, Any]) -> None:
            bar.update(task, completed=step, note="  ".join(f"{k} {v:.3f}" for k, v in values.items()))

        yield move
