"""What a draft learns of its target's answers, by its kind: an autoregressive one all its weights, a masked one a
bigram head. A lesson loads the draft, makes the training loop's work of the answers, and writes what came of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dfastllm import assemble
from dfastllm.assemble import is_gguf, model_info
from dfastllm.core import ModelInfo
from dfastllm.distill.students.align import Alignment
from dfastllm.distill.students.answers import Answer
from dfastllm.distill.students.bigram import BigramHead, Pairs
from dfastllm.distill.students.layers import small_files, tokenizer_of
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.llm import resolve
from dfastllm.models import Decoder, build, load, save
from dfastllm.models.bigram import write_bigram
from dfastllm.models.shortlist import read_shortlist
from dfastllm.text import Tokenizer
from dfastllm.train.work import Work

if TYPE_CHECKING:
    from dfastllm.distill.students.draft import Realignment

__all__ = ["RANK", "HeadOfDraft", "WholeDraft", "export", "lesson_of", "trainable"]

RANK = 16  # of a bigram head, where nothing else was asked for


def lesson_of(asked: Realignment) -> WholeDraft | HeadOfDraft:
    """What this draft learns. Raises as the two do."""
    return WholeDraft(asked) if model_info(resolve(asked.draft)).kind == "ar" else HeadOfDraft(asked)


class WholeDraft:
    """An autoregressive draft, all of which is trained. also: what beside the request for the training decides the
    weights. Raises what loading raises, and ValidationError for what means
    something with a masked one alone."""

    def __init__(self, asked: Realignment) -> None:
        if asked.rank is not None:
            raise ValidationError(
                f"rank is of the bigram head of a masked draft; {asked.draft} is autoregressive.", param="rank"
            )
        self.asked = asked
        self.also: dict[str, Any] = {}
        self.model, self.tokenizer = trainable(asked.draft, asked.device)
        self.info = self.model.info

    def work(self, target: ModelInfo, train: Sequence[Answer], held: Sequence[Answer]) -> Alignment:
        asked, model = self.asked, self.model
        teacher = trainable(asked.target, asked.device)[0].requires_grad_(False) if asked.whole else None
        return Alignment(
            model,
            teacher,
            train,
            held,
            temperature=asked.asking.temperature,
            kind=asked.kind,
            tokens=asked.tokens,
            longest=min(asked.longest, model.config.max_len),
            seed=asked.plan.seed,
            bf16=asked.bf16,
            shortlist=read_shortlist(resolve(asked.draft), model.config.vocab_size),
            frozen=asked.frozen,
        )

    def export(self, work: Work, place: Path) -> Path:
        return export(self.model, self.asked.draft, place)


class HeadOfDraft:
    """A masked draft, which gets a bigram head. Raises what loading raises, ValidationError for what means something
    with an autoregressive one alone, and UnsupportedError for a GGUF file, which has no directory for a head."""

    def __init__(self, asked: Realignment) -> None:
        self.asked, self.directory = asked, resolve(asked.draft)
        wrong = {
            "top": asked.asking.top > 0,
            "kind": asked.kind != "forward",
            "bf16": asked.bf16,
            "frozen": asked.frozen,
            "optimizer": asked.plan.optimizer != "adamw",
            "device": torch.device(asked.device).type != "cpu",
        }
        for name, given in wrong.items():
            if given:
                raise ValidationError(
                    f"{name} has no meaning for {asked.draft}: a masked draft learns a bigram head alone.", param=name
                )
        if is_gguf(self.directory):
            raise UnsupportedError(f"{asked.draft} is a GGUF file; a bigram head stands in a directory.", param="draft")
        # drafts are recorded as they are measured
        self.also = {"length": asked.measuring.length, "quantization": asked.measuring.quantization}
        loaded = assemble.load(self.directory, quantization=asked.measuring.quantization)
        self.model, self.tokenizer, self.info = loaded.model, loaded.tokenizer, loaded.model.info

    def work(self, target: ModelInfo, train: Sequence[Answer], held: Sequence[Answer]) -> Pairs:
        asked = self.asked
        return Pairs(
            self.model,
            target,
            train,
            held,
            rank=RANK if asked.rank is None else asked.rank,
            length=asked.measuring.length,
            rows=asked.tokens,
            longest=asked.longest,
            seed=asked.plan.seed,
        )

    def export(self, work: Work, place: Path) -> Path:
        """The draft's directory, with the head."""
        assert isinstance(work.model, BigramHead)  # what Pairs trains
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.directory, place, copy_function=shutil.copyfile)
        write_bigram(place, work.model.head())
        return place


def trainable(name: str | Path, device: str = "cpu") -> tuple[Decoder, Tokenizer]:
    """A model with float32 weights that want gradients, and its tokenizer. Raises what loading raises."""
    path = resolve(name)
    model = assemble.dequantised(path, "float32").model if is_gguf(path) else load(path, dtype="float32")
    assert isinstance(model, Decoder)  # what both give
    return model.to(device).requires_grad_(True), tokenizer_of(path)


def export(model: Decoder, origin: str | Path, out: Path) -> Path:
    """A Hugging Face directory, bfloat16, with the origin's tokenizer."""
    copy = build(model.config, replace(model.info, name=out.name))
    copy.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as place:
        return save(copy.to(torch.bfloat16), out, files=small_files(resolve(origin), Path(place)))
