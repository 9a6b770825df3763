"""KDDataset: a distillation set on disk as samples for one student.

Reads the whole file once, checks every row by itself, and keeps token ids. What was left out, and why, is counted. In
which order samples come, and how a run resumes, is the loop's work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch.utils.data import Dataset

from dfastllm.distill.data.collate import collate_kd_batch
from dfastllm.distill.data.encode import SPANS, Example, PrefixFrom, RowEncoder
from dfastllm.distill.data.rows import LONGEST_LINE, BadRow, RowFile, Skips, check_row
from dfastllm.errors import DataError, ValidationError
from dfastllm.text import Tokenizer

__all__ = ["KDDataset"]


class KDDataset(Dataset[dict[str, Any]]):
    """Samples, in the order of their lines. `dataset[i]` is a dict of token-aligned tensors and the row's metadata
    (`Example.sample`), which `collate_kd_batch` makes batches of.

    header     what the file says of how it was made.
    skipped    how many lines were left out, by reason; `skips` also knows the first of each.
    cut        how many prompts lost their beginning to max_seq_length.
    dropped    fields that rows had and could not keep, by name.
    pad_id     the tokenizer's padding id, 0 where it has none: labels and masks say what is padding.
    """

    header: Mapping[str, Any]
    skips: Skips
    cut: int
    dropped: Mapping[str, int]
    pad_id: int

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        tokenizer: Tokenizer | None = None,
        *,
        tokenizer_path: str | Path | None = None,
        max_seq_length: int = 2048,
        prefix_tokens: int = 25,
        prefix_from: PrefixFrom = "response",
        raw_prompts: bool = False,
        limit: int | None = None,
        longest_line: int = LONGEST_LINE,
    ) -> None:
        """path: a file of JSON lines, or several. tokenizer_path: a directory or a shipped model's name, in place of a
        tokenizer. limit: read no further than so many usable rows of all. The others: see `RowEncoder` and `RowFile`.
        Raises DataError for a file that is not there and for one without a usable row, saying why each was left out;
        ValidationError unless there is one of tokenizer and tokenizer_path; TokenizerError."""
        paths = [path] if isinstance(path, str | Path) else list(path)
        files = [RowFile(one, longest_line=longest_line) for one in paths]
        encoder = RowEncoder(
            _tokenizer(tokenizer, tokenizer_path),
            max_seq_length=max_seq_length,
            prefix_tokens=prefix_tokens,
            prefix_from=prefix_from,
            raw_prompts=raw_prompts,
        )
        self._begin(encoder.tokenizer)
        for file in files:
            for row in file:
                if len(self._examples) == limit:
                    break
                try:
                    self._examples.append(encoder(row))
                except BadRow as error:
                    file.skip(row.line, error)
            self.skips.merge(file.skips)
            self.header = self.header or file.header
        self._finish(encoder, ", ".join(map(str, paths)))

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], encoder: RowEncoder) -> KDDataset:
        """Of rows in memory, as the lines of a file would be. Raises DataError when none can be used."""
        found = cls.__new__(cls)
        found._begin(encoder.tokenizer)
        for line, value in enumerate(rows, 1):
            try:
                found._examples.append(encoder(check_row(value, line)))
            except BadRow as error:
                found.skips.add(f"row {line}", error)
        found._finish(encoder, "the list of rows")
        return found

    def _begin(self, tokenizer: Tokenizer) -> None:
        self._examples: list[Example] = []
        self.header = {}
        self.skips = Skips()
        self.pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id

    def _finish(self, encoder: RowEncoder, what: str) -> None:
        self.cut = encoder.cut
        self.dropped = dict(encoder.dropped)
        if not self._examples:
            raise DataError(
                f"{what} has no row that can be used; left out: {self.skips}.",
                param="data",
                hint="A row is a JSON object with prompt and teacher_text.",
            )

    @property
    def skipped(self) -> dict[str, int]:
        return dict(self.skips.counts)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._examples[index].sample()

    def lengths(self) -> list[int]:
        """Tokens of each sample, prompt and response, to sort or bucket by."""
        return [example.length for example in self._examples]

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`collate_kd_batch` with this tokenizer's padding id: the `collate_fn` of a DataLoader."""
        return collate_kd_batch(samples, self.pad_id)

    def summary(self) -> dict[str, Any]:
        """What was read, in figures that JSON knows: rows, lines left out by reason with the first of each, prompts
        that were cut, fields that were dropped, medians of tokens, and how many rows have what.

        teacher_right is the share of right answers among the `graded` ones, None where no row has a grader."""
        examples = self._examples
        graded = [example.right for example in examples if example.right is not None]
        has = Counter(name for example in examples for name in example.spans)
        return {
            "rows": len(examples),
            "skipped": self.skipped,
            "first_skipped": dict(self.skips.first),
            "cut_prompts": self.cut,
            "dropped_fields": dict(self.dropped),
            "median_prompt_tokens": median(len(example.prompt) for example in examples),
            "median_response_tokens": median(len(example.response) for example in examples),
            "longest": max(self.lengths()),
            "tool_should_be_used": sum(example.tool_should_be_used for example in examples),
            "teacher_prefix_ids": sum(example.prefix is not None for example in examples),
            "teacher_topk": sum(example.topk is not None for example in examples),
            "required_fields_present": sum(bool(example.required_fields_present) for example in examples),
            "spans": {name: has[name] for name in SPANS},
            "graded": len(graded),
            "teacher_right": sum(graded) / len(graded) if graded else None,
        }


def _tokenizer(tokenizer: Tokenizer | None, path: str | Path | None) -> Tokenizer:
    if (tokenizer is None) == (path is None):
        raise ValidationError(
            "KDDataset takes one of tokenizer and tokenizer_path.",
            param="tokenizer",
            hint="tokenizer_path is a directory with tokenizer.json, or a shipped model's name.",
        )
    if tokenizer is not None:
        return tokenizer
    from dfastllm.llm import resolve  # brings the engine, which who has a tokenizer does not need

    return Tokenizer.load(resolve(str(path)))
