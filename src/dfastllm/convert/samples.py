"""Rows of text that a model runs on to be calibrated and measured: the generated task mix, or a user's file.

Every kind of model gets the inputs it will see when it serves: causal rows, canvases with a random share masked, or
blocks with theirs; the training objectives say how, seeded, so the same call gives the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dfastllm.errors import UnsupportedError
from dfastllm.models.decoder import Decoder
from dfastllm.tasks import Split, draw
from dfastllm.text import Tokenizer
from dfastllm.train.data import Example, encode
from dfastllm.train.objectives import OBJECTIVES, MaskedDiffusion, Objective, Rows, make_objective

__all__ = ["rows_of", "task_examples"]

BATCH = 16  # examples of one forward


def task_examples(tokenizer: Tokenizer, split: Split, count: int, seed: int = 0) -> list[Example]:
    """From the whole mix. Raises UnsupportedError for a tokenizer without an end token or a chat template."""
    if tokenizer.eos_id is None:
        raise UnsupportedError(
            "the task mix needs a tokenizer with an end-of-text token.",
            hint="Give your own text with --calibration-file.",
        )
    return [encode(tokenizer, draw(split, seed, index), index) for index in range(count)]


def rows_of(model: Decoder, examples: Sequence[Example], *, seed: int = 0) -> list[Rows]:
    """Forward passes over these examples, in batches of similar length; a model's skeleton will do. Weights of the rows
    sum to 1 in each forward, all tokens of a canvas alike. Raises UnsupportedError when no example fits the context."""
    info = model.info
    if not info.eos_ids and info.kind != "ar":
        raise UnsupportedError(f"{info.name} has no end-of-text id, which fills its canvases.")
    objective = _objective(model)
    fitting = [e for e in examples if objective.cost(e) <= info.max_len and e.length <= info.max_len - 64]
    if not fitting:
        raise UnsupportedError(f"no example is short enough for the context of {info.max_len} tokens.")
    fitting.sort(key=lambda e: (objective.cost(e), e.index))
    generator = torch.Generator().manual_seed(seed)
    found = [objective.rows(fitting[at : at + BATCH], generator) for at in range(0, len(fitting), BATCH)]
    if info.shift and info.kind == "diffusion":
        found = [replace(rows, wanted=rows.wanted - info.shift) for rows in found]  # the row before predicts
    return found


def _objective(model: Decoder) -> Objective:
    if not model.info.eos_ids:
        from dfastllm.train.objectives import Causal

        return Causal(0)
    objective = make_objective(OBJECTIVES[model.info.kind], model, slack=(0,))
    return replace(objective, tail=1.0) if isinstance(objective, MaskedDiffusion) else objective
