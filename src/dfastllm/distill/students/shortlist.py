"""Which tokens a draft model will say: those that the target's answers have most often (FR-Spec, Zhao et al. 2025,
arXiv 2502.14856).

`python -m dfastllm.distill.students.shortlist DRAFT ANSWERS.jsonl... [--size 8192]` writes shortlist.json into the
draft's directory. Make it before the draft is aligned: it then learns these tokens alone, and training is quicker too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dfastllm.assemble import model_info
from dfastllm.distill.students.answers import given_answers
from dfastllm.distill.students.prompts import read_prompts
from dfastllm.errors import DFastLLMError, ValidationError
from dfastllm.llm import resolve
from dfastllm.models.shortlist import write_shortlist
from dfastllm.text import Tokenizer

__all__ = ["covered", "frequent"]

HELD_OUT = 0.1  # answers that are not counted, to see what the list covers of answers that it was not made of


def frequent(answers: Iterable[Sequence[int]], size: int, vocabulary: int, always: Iterable[int] = ()) -> list[int]:
    """`size` ids, ascending: those of `always`, then the most frequent of the answers, then the lowest (a tokenizer
    that merges numbers its tokens by frequency). Raises ValidationError unless 1 <= size <= vocabulary."""
    if not 1 <= size <= vocabulary:
        raise ValidationError(f"size must be in [1, {vocabulary}], got {size}.", param="size")
    counts = Counter(id for ids in answers for id in ids)
    order = [*always, *sorted(counts, key=lambda id: (-counts[id], id)), *range(vocabulary)]
    return sorted(list(dict.fromkeys(order))[:size])


def covered(answers: Iterable[Sequence[int]], ids: Iterable[int]) -> float:
    """The share of the answers' tokens that are in the list."""
    listed = set(ids)
    tokens = [id in listed for answer in answers for id in answer]
    return sum(tokens) / max(len(tokens), 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.students.shortlist", description="The tokens that a draft model will say."
    )
    parser.add_argument("draft", type=Path, help="the draft's directory")
    parser.add_argument("answers", nargs="+", help="files of JSON lines with the target's answers (teacher_text)")
    parser.add_argument("--size", type=int, default=8192)
    args = parser.parse_args(argv)
    try:
        path = resolve(args.draft)
        info, tokenizer = model_info(path), Tokenizer.load(path)
        prompts = read_prompts(args.answers, HELD_OUT)
        train, held = (
            [answer.ids for answer in given_answers(tokenizer, part)[0]] for part in (prompts.train, prompts.held)
        )
        ids = frequent(train, args.size, info.vocab_size, info.eos_ids)
        written = write_shortlist(path, ids, info.vocab_size)
    except DFastLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{written}: {len(ids)} of {info.vocab_size} tokens; of other answers it has {covered(held, ids):.2%} of the "
        f"tokens"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
