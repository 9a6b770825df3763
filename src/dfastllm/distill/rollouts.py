"""The student's own answers, drawn by the engine that will serve it: what the length loss looks at on policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dfastllm.core import SamplingParams
from dfastllm.distill.probe import in_engine
from dfastllm.distill.sampler import Batch
from dfastllm.engine import EngineConfig
from dfastllm.models.decoder import Decoder
from dfastllm.text import Tokenizer

__all__ = ["Rollouts", "prompts_of", "rollout_batch"]


def prompts_of(batch: Batch) -> list[list[int]]:
    """The prompts of a batch, as ids."""
    starts = batch["response_start"].tolist()
    return [ids[:start] for ids, start in zip(batch["input_ids"].tolist(), starts, strict=True)]


class Rollouts:
    """Answers that the student draws itself to a batch's prompts, at temperature 1, keyed by seed and step: what a
    resumed run draws is what an uninterrupted one would have drawn.

    max_tokens: of an answer, its end not counted; one that is cut there has no end.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, seed: int = 0) -> None:
        self.tokenizer, self.max_tokens, self.seed = tokenizer, max_tokens, seed

    def draw(
        self, model: Decoder, prompts: Sequence[Sequence[int]], step: int, *, quantization: str | None = None
    ) -> list[list[int]]:
        """The ids of an answer to each prompt, with the end of text where it came. quantization: see `in_engine`."""
        most = max(map(len, prompts)) + self.max_tokens + 32
        room = min(len(prompts), 64) * most
        plain = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=self.max_tokens)
        sampling = [replace(plain, seed=_seed(self.seed, step, row)) for row in range(len(prompts))]
        config = EngineConfig(kv_tokens=room)
        with in_engine(model, self.tokenizer, quantization=quantization, config=config) as llm:
            found = llm.generate([list(prompt) for prompt in prompts], sampling)
        eos = self.tokenizer.eos_id
        assert eos is not None  # of every tokenizer that a student has
        outputs = [output.outputs[0] for output in found]
        return [[*one.token_ids, *([eos] if one.finish_reason == "stop" else [])] for one in outputs]


def _seed(seed: int, step: int, row: int) -> int:
    return (seed * 1_000_003 + step * 4099 + row) % 2**31


def rollout_batch(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """input_ids [B, T] int64 of prompts and answers, labels and attention_mask [B, T], response_start [B]; as
    `collate_kd_batch` makes them."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for at, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        labels[at, len(prompt) : len(row)] = ids[at, len(prompt) : len(row)]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (torch.arange(length)[None] < torch.tensor(list(map(len, rows)))[:, None]).long(),
        "response_start": torch.tensor(list(map(len, prompts))),
    }
