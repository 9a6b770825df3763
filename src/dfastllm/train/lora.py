"""Adapters, trained: low-rank changes of a frozen model's linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685).

What is learnt is the task mix, in a style, or a user's own texts; how is the training loop's business (`train.loop`).
The result is a directory that PEFT reads. Experts of a mixture, the embedding and the head are left alone.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dfastllm import assemble
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.models import Decoder, find_family, load
from dfastllm.models.parts import Projection
from dfastllm.text import Tokenizer
from dfastllm.train.checkpoint import content, require_same
from dfastllm.train.data import Batch, Example, Stream, buckets
from dfastllm.train.loop import fit, refuse_earlier
from dfastllm.train.objectives import OBJECTIVES, Rows, loss, make_objective
from dfastllm.train.plan import Plan
from dfastllm.train.styles import STYLES, styled
from dfastllm.train.texts import file_examples
from dfastllm.train.work import Losses, Value, Work

__all__ = ["AdapterWork", "LowRank", "LowRanks", "Recipe", "export", "train_adapter"]

VALIDATION_TOKENS = 6_000
MOST_EXAMPLES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. Raises ValidationError for impossible values.

    base     of the model, as `adapter_config.json` will name it.
    rank     of the changes. alpha: they are scaled by alpha / rank.
    targets  ends of the names of the layers that change, in the model's own or PEFT's words; empty: all linear ones.
    style    of the task mix's answers, see `styles`.
    data     texts to learn in place of the task mix, see `texts`.
    mix      factors on the tasks' shares.
    """

    base: str
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    style: str = "plain"
    data: Path | None = None
    mix: Mapping[str, float] | None = None
    steps: int = 200
    batch_tokens: int = 2048
    lr: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValidationError(f"{name} must be at least 1, got {getattr(self, name)}.", param=name)
        for name in ("alpha", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValidationError(f"{name} must be above 0 and finite, got {getattr(self, name)}.", param=name)
        if self.style not in STYLES:
            raise ValidationError(f"style must be {', '.join(STYLES)}, got {self.style!r:.80}.", param="style")
        if self.data is not None and (self.style != "plain" or self.mix):
            raise ValidationError(
                "style and mix are of the task mix; texts of one's own are taken as they are.", param="data"
            )


class LowRank(nn.Module):
    """A frozen linear layer and what it learns: base(x) + scale * B A x. a [rank, in] normal, b [out, rank] zeros: at
    first nothing changes. The base is not part of the module, so checkpoints do not hold it."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, draw: torch.Generator) -> None:
        super().__init__()
        self._base = (base,)
        self.scale = scale
        device = base.weight.device
        self.a = nn.Parameter((torch.randn(rank, base.in_features, generator=draw) * base.in_features**-0.5).to(device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the base's dtype; the change is computed in float32."""
        change = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b)
        y: Tensor = self._base[0](x)
        return y + (change * self.scale).to(y.dtype)


class LowRanks(nn.Module):
    """The changes of a model's layers, in their places in it until `remove`.

    names      own module name of each. published: the same as the model's family writes it.
    target_modules  what PEFT calls them together: the last words of their names, or all names where these say more.
    """

    def __init__(self, model: Decoder, recipe: Recipe) -> None:
        super().__init__()
        self._model = (model.requires_grad_(False),)
        self.names = targets(model, recipe.targets)
        family = find_family(model.info.family)
        called = {name: family.names.published(f"{name}.weight").removesuffix(".weight") for name in targets(model)}
        leaves = {called[name].rpartition(".")[2] for name in self.names}
        by_leaf = [name for name in called if called[name].rpartition(".")[2] in leaves]
        self.published = {name: called[name] for name in self.names}
        self.target_modules = sorted(leaves) if by_leaf == self.names else list(self.published.values())
        draw = torch.Generator().manual_seed(recipe.seed)
        for name in self.names:
            parent, _, leaf = name.rpartition(".")
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            change = LowRank(base, recipe.rank, recipe.alpha / recipe.rank, draw)
            self.add_module(name.replace(".", "/"), change)
            setattr(model.get_submodule(parent), leaf, change)

    @property
    def base(self) -> Decoder:
        return self._model[0]

    def changes(self) -> Iterator[tuple[str, LowRank]]:
        """(own module name, its change)."""
        for name in self.names:
            module = self.get_submodule(name.replace(".", "/"))
            assert isinstance(module, LowRank)
            yield name, module

    def remove(self) -> None:
        """Give the model its own layers back."""
        for name, change in self.changes():
            parent, _, leaf = name.rpartition(".")
            setattr(self.base.get_submodule(parent), leaf, change._base[0])


def targets(model: Decoder, wanted: Sequence[str] = ()) -> list[str]:
    """Own module names of the linear layers that these name; none: of all. Raises ValidationError for one that names
    none."""
    family = find_family(model.info.family)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Projection) and re.match(r"layers\.\d+\.(?!.*\.(experts|shared)\.)", name)
    ]
    if not wanted:
        return linear
    called = {name: (name, family.names.published(f"{name}.weight").removesuffix(".weight")) for name in linear}

    def has(name: str, target: str) -> bool:
        return any(each == target or each.endswith(f".{target}") for each in called[name])

    for target in wanted:
        if not any(has(name, target) for name in linear):
            leaves = sorted({each.rpartition(".")[2] for names in called.values() for each in names})
            raise ValidationError(
                f"no linear layer of {model.info.name} is called {target!r:.80}.",
                param="targets",
                hint=f"There are {', '.join(leaves)}.",
            )
    return [name for name in linear if any(has(name, target) for target in wanted)]


class Data(Protocol):
    """Endless batches, a pure function of the position."""

    def at(self, position: tuple[int, int]) -> Iterator[tuple[Batch, tuple[int, int]]]: ...


class Rounds:
    """The same examples again and again, each round in another order; a position is (round, batch of it)."""

    def __init__(self, examples: Sequence[Example], seed: int, tokens: int, cost: Any) -> None:
        self.batches = buckets(sorted(examples, key=lambda e: (cost(e), e.index)), cost, tokens)
        self.seed = seed

    def at(self, position: tuple[int, int]) -> Iterator[tuple[Batch, tuple[int, int]]]:
        round, start = position
        while True:
            order = list(range(len(self.batches)))
            random.Random(f"round/{self.seed}/{round}").shuffle(order)
            for i in range(start, len(order)):
                after = (round, i + 1) if i + 1 < len(order) else (round + 1, 0)
                yield Batch(self.batches[order[i]], round * len(order) + order[i]), after
            round, start = round + 1, 0


class AdapterWork(Work):
    """The model's own objective on the texts of a recipe. Noise is keyed by the seed and the batch's number."""

    start = (0, 0)

    def __init__(self, recipe: Recipe, model: Decoder, tokenizer: Tokenizer) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.model: LowRanks = LowRanks(model, recipe)
        self.objective = make_objective(OBJECTIVES[model.info.kind], model)
        self.examples = self._examples()

    def _examples(self) -> list[Example]:
        """A user's texts, as far as they fit the context; every tenth is for validation. Empty: the task mix."""
        if self.recipe.data is None:
            return []
        found = file_examples(self.tokenizer, self.recipe.data, MOST_EXAMPLES, "data")
        most = self.model.base.info.max_len
        fitting = [example for example in found if self.objective.cost(example) <= most]
        if not fitting:
            raise ValidationError(f"no text of {self.recipe.data} fits the context of {most} tokens.", param="data")
        return fitting

    def _data(self, *, validation: bool) -> Data:
        recipe, cost = self.recipe, self.objective.cost
        if self.examples:
            held = self.examples[9::10] or self.examples
            rest = [e for e in self.examples if e.index % 10 != 9] or self.examples
            return Rounds(held if validation else rest, recipe.seed, recipe.batch_tokens, cost)
        style = functools.partial(styled, recipe.style)
        split, seed = ("validation", 0) if validation else ("train", recipe.seed)
        return Stream(self.tokenizer, split, seed, recipe.batch_tokens, cost, recipe.mix, style)  # type: ignore[arg-type]

    def batches(self, position: Any) -> Iterator[tuple[Batch, tuple[int, int]]]:
        first, second = position
        return self._data(validation=False).at((first, second))

    def _rows(self, batch: Batch, seed: int) -> Rows:
        info = self.model.base.info
        rows = self.objective.rows(batch.examples, torch.Generator().manual_seed(seed))
        if info.shift and info.kind == "diffusion":
            rows = replace(rows, wanted=rows.wanted - info.shift)  # the row before predicts
        return rows.to(str(self.model.base.device))

    def losses(self, batch: Batch, step: int) -> Losses:
        rows = self._rows(batch, self.recipe.seed * 1_000_003 + batch.number)
        value = loss(self.model.base, rows)
        return Losses({"loss": value}, tokens=rows.batch * rows.length, samples=len(batch.examples))

    @torch.no_grad()
    def validate(self, step: int) -> Mapping[str, Value]:
        """The objective on held-out texts, with the same noise every time; nats."""
        total, count = 0.0, 0
        for batch in self.validation:
            total += loss(self.model.base, self._rows(batch, batch.number)).item() * len(batch.examples)
            count += len(batch.examples)
        return {"validation_loss": total / count}

    @cached_property
    def validation(self) -> list[Batch]:
        enough = max(1, VALIDATION_TOKENS // self.recipe.batch_tokens)
        found: list[Batch] = []
        for batch, after in islice(self._data(validation=True).at((0, 0)), enough):
            found.append(batch)
            if self.examples and after[0]:  # a round is all there is
                break
        return found


def train_adapter(
    recipe: Recipe, model: Path, out: Path, home: Path, *, resume: bool = True, device: str = "cpu", threads: int = 1
) -> Path:
    """Train an adapter for the model at a path and write it to `out`, a directory that PEFT reads. home: of checkpoints
    and the log. resume: go on from its newest checkpoint, else an earlier run there is refused. Returns `out`. Raises
    ValidationError, UnsupportedError, what loading raises, CheckpointError (a run of another recipe or other texts),
    TrainingError."""
    torch.set_num_threads(threads)
    if not resume:
        refuse_earlier(home)
    loaded = assemble.dequantised(model, torch.float32) if assemble.is_gguf(model) else None
    built = load(model, dtype=torch.float32) if loaded is None else loaded.model
    tokenizer = Tokenizer.load(model) if loaded is None else loaded.tokenizer
    if not isinstance(built, Decoder) or not built.info.eos_ids or tokenizer.eos_id is None:
        raise UnsupportedError(f"{model} cannot be trained on answers: it has no end-of-text token.", param="model")
    work = AdapterWork(recipe, built.to(device), tokenizer)
    every = max(1, recipe.steps // 4)
    plan = Plan(
        recipe.base, recipe.steps, lr=recipe.lr, matrix_lr=recipe.lr, weight_decay=0.0, warmup=recipe.steps // 10,
        schedule="linear", seed=recipe.seed, validate_every=every, save_every=every, log_every=max(1, every // 5),
    )  # fmt: skip
    texts = {} if recipe.data is None else {"texts": content(recipe.data)}  # the same file may hold others by now
    require_same(home, "recipe.json", asdict(recipe) | texts)
    fit(work, plan, home)
    return export(work.model, recipe, out)


def export(changes: LowRanks, recipe: Recipe, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT does."""
    tensors: dict[str, Tensor] = {}
    for name, change in changes.changes():
        published = changes.published[name]
        for part, value in (("lora_A", change.a), ("lora_B", change.b)):
            tensors[f"base_model.model.{published}.{part}.weight"] = value.detach().to("cpu", dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": recipe.base,
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "target_modules": changes.target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):  # each whole at any moment: a server may read it
        written = out / f".{name}.part"
        if name.endswith(".json"):
            written.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        else:
            save_file(tensors, written, metadata={"format": "pt"})
        written.replace(out / name)
    return out
