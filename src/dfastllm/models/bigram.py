"""The bigram head of a drafting masked model: `bigram.safetensors` beside its weights.

A masked model fills all positions of a draft in one forward, so its tokens do not know each other, and where a text can
go on in several ways neighbours are of different ways. A term for each pair of a token and the one before it, added to
the logits when the tokens are chosen from left to right, makes them agree; of low rank it is two small matrices (the
Markov head of DSpark's block drafter). Answers cannot change: the target judges every draft.

The file has two tensors, `before` and `after`, [vocabulary, rank] each; the term of a pair is their rows' product. The
model's own weights are untouched, so the directory is a model like any other wherever the file is not known.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dfastllm.core import value
from dfastllm.errors import CheckpointError, ModelLoadError, StorageError, ValidationError
from dfastllm.quant.header import read_header
from dfastllm.quant.partial import part_of
from dfastllm.quant.stream import read_tensor

__all__ = ["FILE", "Bigram", "read_bigram", "write_bigram"]

FILE = "bigram.safetensors"
NAMES = ("before", "after")


@value(frozen=True, slots=True)
class Bigram:
    """A term for each pair of tokens: before[first] . after[second].

    before, after  float32 [vocabulary, rank], finite. Raises ValidationError for anything else.
    """

    before: Tensor
    after: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(x.shape) for x in (self.before, self.after)]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
            raise ValidationError(
                f"a bigram head has two matrices [vocabulary, rank]; got before {list(shapes[0])} and after "
                f"{list(shapes[1])}.",
                param="bigram",
            )
        wrong = [name for name, x in zip(NAMES, (self.before, self.after), strict=True) if not bool(x.isfinite().all())]
        if wrong:
            raise ValidationError(f"a bigram head's {wrong[0]} holds numbers that are not finite.", param="bigram")

    @property
    def vocabulary(self) -> int:
        return len(self.before)

    @property
    def rank(self) -> int:
        return self.before.shape[1]


def read_bigram(directory: Path, vocabulary: int) -> Bigram | None:
    """The head; None where the directory has no such file (a GGUF file has none). Raises ModelLoadError for a file that
    is none, and for one of another vocabulary."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        entries = read_header(path)
        if set(entries) != set(NAMES):
            raise ValidationError(f"it has the tensors {', '.join(sorted(entries)) or 'none'}.", param="bigram")
        found = Bigram(*(read_tensor(entries[name], name).float() for name in NAMES))
    except (CheckpointError, ValidationError) as error:
        raise ModelLoadError(
            f"{path} must hold `before` and `after`, [vocabulary, rank] each: {error}",
            param="bigram",
            hint="Remove it, or train it again.",
        ) from error
    if found.vocabulary != vocabulary:
        raise ModelLoadError(
            f"{path} is of a vocabulary of {found.vocabulary} tokens; the model beside it has {vocabulary}.",
            param="bigram",
            hint="Remove it, or train one for this model.",
        )
    return found


def write_bigram(directory: Path, head: Bigram, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the file, which appears whole or not at all, and return its path. Raises StorageError."""
    path = directory / FILE
    tensors = {
        name: x.detach().to(dtype).contiguous() for name, x in zip(NAMES, (head.before, head.after), strict=True)
    }
    partial = part_of(path)
    try:
        save_file(tensors, partial)
        partial.chmod(0o644)  # it was made for its owner alone
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error}.") from error
    return path
