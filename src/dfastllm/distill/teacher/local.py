"""A teacher in this process: one of our models. Its answers come from the engine, its distributions from a plain
forward over whole batches, with every logit or the best ones.

Nothing here is differentiated, and no more than one chunk of logits is held unless all of them are asked for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfastllm.assemble import dequantised, is_gguf
from dfastllm.core import FinishReason, SamplingParams
from dfastllm.distill.data.collate import to_rows
from dfastllm.distill.losses.divergence import Dense, Sparse
from dfastllm.distill.teacher.answer import Alternative, Answer, TokenRecord
from dfastllm.distill.teacher.client import Counts, Reply
from dfastllm.errors import ContextLengthError, UnsupportedError, ValidationError
from dfastllm.llm import LLM, Completion, resolve
from dfastllm.models import Decoder, dense_attention, load
from dfastllm.text import ParsedMessage, Tokenizer

__all__ = ["LocalTeacher", "check_same_vocabulary"]

TOKENS = 8192  # of one forward
ROWS = 1024  # of one product with the head


def check_same_vocabulary(teacher: Tokenizer, teacher_width: int, student: Tokenizer, student_width: int) -> None:
    """Raises UnsupportedError unless an id means the same token to both, and their logits are equally wide. Mask tokens
    may differ: nobody says one."""
    if teacher_width != student_width:
        raise UnsupportedError(
            f"The teacher's logits have a vocabulary of {teacher_width}, the student's of {student_width}.",
            param="kd.teacher",
            hint="Distributions need one vocabulary; take a teacher of the student's tokenizer, or set kl_weight: 0.",
        )
    masks = {id for id in (teacher.mask_id, student.mask_id) if id is not None}
    wrong = student.differing_ids(teacher, masks)
    if wrong:
        raise UnsupportedError(
            f"{len(wrong)} ids mean other tokens to the teacher, the first is {wrong[0]}: "
            f"{teacher.id_to_token(wrong[0])!r} against {student.id_to_token(wrong[0])!r}.",
            param="kd.teacher",
            hint="Distributions need one vocabulary; take a teacher of the student's tokenizer, or set kl_weight: 0.",
        )


class LocalTeacher:
    """A model that answers and that says how likely each token was to it. Thread-safe in what it answers.

    model, tokenizer   of the teacher; an autoregressive one for distributions.
    path               where the engine loads it for answers; None: it only gives distributions.
    max_tokens, temperature, seed, top_logprobs   of answers, as in `TeacherSettings`.
    rows               rows that are multiplied with the head at once.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        path: Path | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = 0,
        top_logprobs: int = 20,
        rows: int = ROWS,
    ) -> None:
        if rows < 1:
            raise ValidationError(f"rows must be at least 1, got {rows}.", param="rows")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.path = path
        # The engine's log-probabilities of a canvas are of the step that fixed a token: no distribution of a next one.
        top = top_logprobs if model.info.kind == "ar" else None
        self.sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, logprobs=top)
        self.rows = rows
        self.counts = Counts()
        self._llm: LLM | None = None
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        student: Tokenizer | None = None,
        student_vocab: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        **answers: Any,
    ) -> LocalTeacher:
        """A teacher from a shipped model's name, a directory or a GGUF file. student, student_vocab: the tokenizer and
        the width of the logits that its distributions are for. dtype None: float32 on a CPU, else as stored. answers:
        see the class. Raises UnsupportedError for other vocabularies, and as loading does."""
        where = resolve(path)
        kind = torch.float32 if dtype is None and device == "cpu" else dtype
        if is_gguf(where):
            loaded = dequantised(where, kind)
            if not isinstance(loaded.model, Decoder):
                raise UnsupportedError(f"{where} has no plain form to teach from.", param="kd.teacher")
            model, tokenizer = loaded.model.to(device), loaded.tokenizer
        else:
            model, tokenizer = load(where, device=device, dtype=kind), Tokenizer.load(where)
        if student is not None:
            width = student.vocab_size if student_vocab is None else student_vocab
            check_same_vocabulary(tokenizer, model.config.vocab_size, student, width)
        return cls(model, tokenizer, path=where, **answers)

    def close(self) -> None:
        """End the engine, where one was started."""
        with self._lock:
            if self._llm is not None:
                self._llm.close()
            self._llm = None

    def __enter__(self) -> LocalTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- distributions

    def logits(self, batch: Mapping[str, Any], rows: Tensor | None = None) -> Dense:
        """All logits of the wanted rows: Dense [R, V] in the model's dtype, on its device.

        batch  of `collate_kd_batch`: input_ids [B, T], right-padded, and labels [B, T].
        rows   [B, T] bool, which rows of the logits are wanted, row t being what predicts the token at t + 1; None:
               those that predict a labelled token. R counts them, row by row.
        Raises UnsupportedError for a teacher that is not autoregressive, ContextLengthError, ValidationError.
        """
        hidden = self._hidden(batch, rows)
        with torch.no_grad():
            return Dense(torch.cat([self.model.head(part) for part in torch.split(hidden, self.rows)]))

    def topk(self, batch: Mapping[str, Any], k: int, rows: Tensor | None = None) -> Sparse:
        """The k best tokens of the wanted rows: Sparse [R, k], float32 log-probabilities at temperature 1. They are
        normalised over the whole vocabulary, so what they leave to 1 is the mass of all others. Otherwise as `logits`.
        """
        width = self.model.config.vocab_size
        if not 1 <= k <= width:
            raise ValidationError(f"k must be in 1..{width}, got {k}.", param="k")
        ids, values = [], []
        with torch.no_grad():
            for part in torch.split(self._hidden(batch, rows), self.rows):
                logits = self.model.head(part).float()
                best = logits.topk(k, dim=-1)
                ids.append(best.indices)
                values.append(best.values - logits.logsumexp(-1, keepdim=True))
        return Sparse(torch.cat(ids), torch.cat(values))

    def _hidden(self, batch: Mapping[str, Any], rows: Tensor | None) -> Tensor:
        """The rows before the head [R, hidden], some sequences at a time."""
        info = self.model.info
        if info.kind != "ar":
            raise UnsupportedError(
                f"{info.name} is of kind {info.kind}; distributions of next tokens come from autoregressive teachers.",
                param="kd.teacher",
                hint="Take its answers alone (kl_weight: 0), or another teacher.",
            )
        ids: Tensor = batch["input_ids"]
        length = ids.shape[1]
        if length > info.max_len:
            raise ContextLengthError(
                f"The batch has rows of {length} tokens, and {info.name} reads {info.max_len}.",
                param="data.max_seq_length",
            )
        wanted = to_rows(batch)["labels"] != -100 if rows is None else rows.bool()
        if wanted.shape != ids.shape:
            raise ValidationError(
                f"rows has the shape {tuple(wanted.shape)}, input_ids {tuple(ids.shape)}.", param="rows"
            )
        with torch.no_grad():
            parts = list(self._forwards(ids.to(self.model.device), wanted.to(self.model.device)))
        return torch.cat(parts)

    def _forwards(self, ids: Tensor, wanted: Tensor) -> Iterator[Tensor]:
        size = max(1, TOKENS // ids.shape[1])
        for some, rows in zip(torch.split(ids, size), torch.split(wanted, size), strict=True):
            count, length = some.shape
            positions = torch.arange(length, device=some.device).repeat(count)
            hidden = self.model(some.flatten(), positions, dense_attention(count, length, "causal"))
            yield hidden[rows.flatten()]

    # -- answers

    def describe(self) -> dict[str, Any]:
        """What answers follow from, for the head of a file."""
        sampling = self.sampling
        params = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "seed": sampling.seed}
        return {"local": self.model.info.name, "params": {**params, "top_logprobs": sampling.logprobs}}

    async def ask(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Reply:
        """An answer of the engine; questions that are asked at once are answered in one batch. Raises as `LLM.chat`."""
        return await asyncio.to_thread(self._ask, messages, tools)

    def _ask(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Reply:
        llm = self._engine()
        completion = llm.chat(messages, self.sampling, tools=tools or None)[0].outputs[0]
        self.counts.sent += 1
        self.counts.answered += 1
        return Reply(_answer(llm, completion, tools), "", False)

    def _engine(self) -> LLM:
        with self._lock:
            if self._llm is None:
                if self.path is None:
                    raise UnsupportedError(
                        "this teacher was made without a path, so it gives no answers.", param="path"
                    )
                self._llm = LLM(self.path, device=str(self.model.device))
            return self._llm


def _answer(llm: LLM, completion: Completion, tools: Sequence[Mapping[str, Any]]) -> Answer:
    parsed = llm.parse_calls(completion.text, tools) if tools else ParsedMessage(completion.text)
    ended = {FinishReason.STOP: "tool_calls" if parsed.tool_calls else "stop", FinishReason.LENGTH: "length"}
    records = tuple(
        TokenRecord(
            Alternative(record.token, None, record.logprob), tuple(Alternative(id, None, p) for id, p in record.top)
        )
        for record in completion.logprobs
    )
    usage = completion.usage
    return Answer(
        parsed.content,
        parsed.tool_calls,
        ended.get(completion.finish_reason, str(completion.finish_reason)),
        usage.prompt_tokens,
        usage.completion_tokens,
        completion.token_ids,
        records,
    )
