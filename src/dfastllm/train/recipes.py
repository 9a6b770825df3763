"""Recipes: everything that decides a trained model, as frozen data. The demo models' are here; others: JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dfastllm.errors import ValidationError

__all__ = ["RECIPES", "Init", "Recipe", "load_recipe"]


@dataclass(frozen=True)
class Init:
    """Warm start from another recipe's weights after `step` of its steps (trained first if they are not there).

    layers: for each layer of the new model the source's layer it starts from, or None for a new one that adds nothing
    at first (its projections into the residual stream are 0; Wu et al. 2024, arXiv 2401.02415). Empty: as they are.
    """

    recipe: str
    step: int
    layers: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """shape: fields of models.DecoderConfig but vocab_size and max_len. steps: optimizer steps. batch_tokens: padded
    rows a step. lr: of AdamW (embedding, head, norms); matrix_lr: of Muon on the layers' matrices, or of AdamW there
    too when `optimizer` is "adamw". schedule: "wsd" holds the rate and falls linearly to 0 over the last `decay` share
    of the steps; "cosine" falls from the warm-up on. bf16: autocast. block: of block diffusion.
    slack, power: canvas sizes and shares masked in masked diffusion (see MaskedDiffusion). mix: factors on the tasks'
    shares. Raises ValidationError for impossible values."""

    name: str
    family: str
    objective: str
    shape: Mapping[str, Any]
    steps: int
    batch_tokens: int = 4096
    lr: float = 2e-3
    matrix_lr: float = 2e-3
    optimizer: str = "muon"
    weight_decay: float = 0.01
    warmup: int = 100
    schedule: str = "wsd"
    decay: float = 0.25
    clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    init: Init | None = None
    block: int = 0
    slack: tuple[int, ...] = (-1, 0, 1)
    power: float = 1.0
    mix: Mapping[str, float] = field(default_factory=dict)
    milestones: tuple[int, ...] = ()  # steps whose weights are kept, for warm starts

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValidationError(f"{name} must be at least 1, got {getattr(self, name)}.", param=name)
        for name in ("lr", "matrix_lr", "clip", "power"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValidationError(f"{name} must be above 0 and finite, got {getattr(self, name)}.", param=name)
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValidationError(f"{name} must be at least 0 and finite, got {getattr(self, name)}.", param=name)
        choices = {
            "objective": ("causal", "masked_diffusion", "block_diffusion"),
            "optimizer": ("muon", "adamw"),
            "schedule": ("wsd", "cosine"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValidationError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.", param=name)
        if not 0 <= self.decay <= 1:
            raise ValidationError(f"decay must be in [0, 1], got {self.decay}.", param="decay")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by name, or from a JSON file with the fields of Recipe. Raises ValidationError naming what is wrong."""
    if str(name) in RECIPES:
        return RECIPES[str(name)]
    path = Path(name)
    if not path.is_file():
        raise ValidationError(
            f"unknown recipe {str(name)!r}; there are {', '.join(sorted(RECIPES))}, or give a JSON file.",
            param="recipe",
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValidationError(f"{path} is not JSON: {error}.", param="recipe") from error
    known = {field.name for field in fields(Recipe)}
    if not isinstance(raw, dict) or not raw.keys() <= known:
        wrong = sorted(raw.keys() - known) if isinstance(raw, dict) else raw
        raise ValidationError(f"{path}: unknown recipe fields {wrong}; known are {sorted(known)}.", param="recipe")
    try:
        init = raw.pop("init", None)
        init = Init(**{**init, "layers": tuple(init.get("layers", ()))}) if init else None
        lists = {name: tuple(raw[name]) for name in ("milestones", "slack") if name in raw}
        return Recipe(**{**raw, "init": init, **lists})
    except TypeError as error:
        raise ValidationError(f"{path} is not a recipe: {error}.", param="recipe") from error


SMALL = {"hidden_size": 128, "intermediate_size": 352, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 32}
BODY = {**SMALL, "layers": 6}
GROWN = Init("demo-draft", 3000, (0, None, None, 1, None, None))

BASE = Init("demo-ar-base", 1500)
CANVASES = (-1, -1, 0, 0, 0, 0, 1, 3)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("demo-draft", "llama", "causal", SMALL, steps=3000),
        Recipe("demo-ar-base", "llama", "causal", BODY, steps=1500, seed=1, init=GROWN),
        Recipe("demo-ar", "llama", "causal", BODY, steps=1500, seed=4, init=BASE),
        Recipe(
            "demo-diffusion-base",
            "llada",
            "masked_diffusion",
            BODY,
            steps=3300,
            seed=6,
            init=Init("demo-block", 2600),
            decay=0.5,
            slack=CANVASES,
            power=2.0,
            mix={"arithmetic": 2.5},
        ),
        Recipe(
            "demo-diffusion",
            "llada",
            "masked_diffusion",
            BODY,
            steps=600,
            lr=8e-4,
            matrix_lr=8e-4,
            warmup=30,
            seed=7,
            init=Init("demo-diffusion-base", 3300),
            decay=1.0,
            slack=CANVASES,
            power=2.0,
            mix={"arithmetic": 1.5, "prose": 8.0},
        ),
        Recipe("demo-block", "sdar", "block_diffusion", BODY, steps=2600, seed=3, block=4, init=BASE),
    )
}
