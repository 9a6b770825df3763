"""What a run says of a draft that it re-aligns (kd.draft): keys, ranges, defaults."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dfastllm.quant.formats import EIGHT_BITS, FORMATS, require_format

__all__ = ["DraftSettings"]

Count = Annotated[int, Field(ge=1)]


class DraftSettings(BaseModel):
    """A draft model (model.student) that learns its target (kd.local_teacher) on the target's own answers to the
    prompts of `data`. An autoregressive one is trained itself, and kd.divergence is taken at the temperature of the
    answers. A masked one stays as it is and gets a bigram head: then top, frozen and kd.divergence are refused.

    temperature   of the answers; 0: greedy, and then the divergence is taken at 1.
    max_tokens    of an answer.
    top           the target's likeliest tokens, as they come with the answers, are learned from: so many, at most 20;
                  0: its whole distributions, from a forward of its weights at every step.
    given         the rows' teacher_text are the target's answers; none are made. With top, those rows' teacher_topk are
                  learned from, and rows without one are left out.
    frozen        the draft's embedding, and a head that is tied to it, stay as they are.
    held_out      share of the prompts that is only measured on.
    batch_tokens  of a step, padding included; of a bigram head, draft tokens.
    rank          of the bigram head; None: 16.
    length        draft tokens at most, when drafts are measured.
    repeats       of the timed runs.
    quantization  of the drafts when they are measured: a format of `dfastllm quantize`, or 8bit; None: as stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_tokens: Count = 128
    top: Annotated[int, Field(ge=0, le=20)] = 0
    given: bool = False
    frozen: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    batch_tokens: Count = 2048
    rank: Count | None = None
    length: Annotated[int, Field(ge=1, le=64)] = 5
    repeats: Count = 3
    quantization: str | None = None

    @field_validator("quantization")
    @classmethod
    def _is_a_format(cls, value: str | None) -> str | None:
        if value is not None:
            require_format(value, (*FORMATS, EIGHT_BITS), "quantization")
        return value
