"""What a run says of its trajectories and of certainty forcing: keys, ranges, defaults.

`kd.trajectory` makes the student one that decodes its canvas in fewer forwards: it learns the teacher's answers from
intermediate states of their decoding, and `kd.certainty` makes it sure of what it already has right.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["CertaintySettings", "TrajectorySettings"]

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CertaintySettings(_Settings):
    """Certainty forcing (Chen et al. 2025, dParallel, arXiv 2509.26488); the defaults are its published code's.

    weight       of the entropy of what is right; 0: cross entropy alone.
    temperature  at which that entropy is taken. Below 1 it is small where one token leads, so that the rows which are
                 still undecided carry the gradient.
    """

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5


class TrajectorySettings(_Settings):
    """Where trajectories come from, and which of their states are put in.

    file        JSONL of recorded trajectories; None: the teacher (kd.local_teacher, or the student before training)
                answers the prompts of `data` when the run begins.
    decode      options of the teacher's decoder, as DecodeParams names them. The default is one token a step, best
                first, so that its order is known exactly.
    max_tokens  canvas of a recorded answer; a longer answer is left out.
    wrong       what becomes of an answer that its grader refuses: left out (drop), or replaced by the row's own
                expected text, whose order is not known (truth).
    order       which positions of a window are shown: those that the teacher decided first (teacher), or each by its
                own chance (random).
    masked      (begin, end, high): the share masked is uniform between a lower bound, which rises from begin to end
                while training goes on, and high. d3LLM: (0, .8, .8) in teacher's order; dParallel: (.5, .5, .5) at
                random.
    whole       share of windows put in wholly masked, as each is when its decoding begins (not published).
    windows     sizes of the window that is asked about, growing from one to the next in equal parts of the run, the
                last one held in the last part; what lies behind the window is masked and not asked (d3LLM: 16, 24, 32;
                dParallel: 32). Of a block-diffusion model the window is its block; leave it out.
    complement  each state is put in a second time with masked and shown exchanged inside the window, so that every
                token is asked (both papers).
    canvases    sizes of the canvas, taken in turns: n >= 0 is the tightest multiple of 32 and n times 32 more, -1 the
                tightest multiple of 8. Of masked diffusion alone.
    tail        weight of an end token after the first.
    every       optimizer steps between two recordings of the student's own answers; 0: none.
    fresh       prompts that it answers each time, the next ones of `data`; its right answers are learnt from.
    kept        share of the first recordings that stay beside them, drawn anew each time.
    quick       options of the decoder that the student shall be quick with: its own answers are recorded with it, and
                it is measured with it.
    """

    file: str | None = None
    decode: dict[str, Any] = {"rule": "schedule"}
    max_tokens: Count = 64
    wrong: Literal["drop", "truth"] = "drop"
    order: Literal["teacher", "random"] = "teacher"
    masked: tuple[Share, Share, Share] = (0.0, 0.8, 0.8)
    whole: Share = 0.0
    windows: tuple[Count, ...] = ()
    complement: bool = True
    canvases: tuple[Annotated[int, Field(ge=-1)], ...] = (-1, 0, 1)
    tail: Share = 0.2
    every: Annotated[int, Field(ge=0)] = 0
    fresh: Count = 1000
    kept: Share = 0.5
    quick: dict[str, Any] = {"factor": 1.0}

    @model_validator(mode="after")
    def _in_order(self) -> TrajectorySettings:
        begin, end, high = self.masked
        if not begin <= end <= high:
            raise ValueError(f"masked must rise (begin, end, high), got {list(self.masked)}")
        if not high and not self.whole:
            raise ValueError("masked and whole are 0: nothing would be masked, and nothing learnt")
        if list(self.windows) != sorted(self.windows):
            raise ValueError(f"windows must not shrink, got {list(self.windows)}")
        if not self.canvases:
            raise ValueError("canvases must name at least one size")
        return self
