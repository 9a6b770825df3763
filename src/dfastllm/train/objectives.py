"""Training objectives: what is put in, which rows are asked, and what each answer weighs.

An objective turns a Batch into `Rows` (flat ids, positions, an attention mask, and the rows with targets and weights);
`loss` runs the model. Randomness comes from a generator keyed by the batch: nothing else is drawn.

- causal: every response token from the tokens before it.
- masked diffusion (LLaDA, Nie et al. 2025, arXiv 2502.09992): the response is padded with EOS to a canvas, a uniformly
  drawn share of it is masked, masked tokens are predicted with full attention, weighted by one over the share.
- block diffusion (BD3-LM, Arriola et al. 2025, arXiv 2503.09573; SDAR): every block is masked on its own and sees
  itself noisy and the blocks before it clean; all blocks in one pass over [clean, noisy].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.models.decoder import Decoder
from dfastllm.models.parts import AttendFunction, softcapped
from dfastllm.models.program import Attend
from dfastllm.train.data import Example

__all__ = [
    "CANVAS",
    "OBJECTIVES",
    "BlockDiffusion",
    "Causal",
    "Line",
    "MaskedDiffusion",
    "Objective",
    "Rows",
    "block_rows",
    "block_span",
    "canvas_rows",
    "canvas_size",
    "loss",
    "make_objective",
    "short_attention",
]

OBJECTIVES = {"ar": "causal", "diffusion": "masked_diffusion", "block": "block_diffusion"}  # by kind of model
CANVAS = 32  # canvases are multiples of this, as the default block of masked diffusion


@dataclass(frozen=True)
class Rows:
    """One forward pass. `batch` sequences of `length` rows each, flat.

    ids, positions [batch * length] int64; mask [batch, 1, length, length] bool, True = may attend, or None: causal;
    wanted [rows] int64 indices into the flat rows, ascending; targets [rows] int64; weights [rows] float32, their sum
    is 1 on average, so the loss is a mean.
    """

    batch: int
    length: int
    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    wanted: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: str) -> Rows:
        mask = None if self.mask is None else self.mask.to(device)
        ids, positions, wanted = self.ids.to(device), self.positions.to(device), self.wanted.to(device)
        targets, weights = self.targets.to(device), self.weights.to(device)
        return Rows(self.batch, self.length, ids, positions, mask, wanted, targets, weights)


class Objective(Protocol):
    """`cost`: rows of one example. `rows`: the forward pass of a batch."""

    def cost(self, example: Example) -> int: ...

    def rows(self, examples: Sequence[Example], generator: torch.Generator) -> Rows: ...


def loss(model: Decoder, rows: Rows, *, bf16: bool = False) -> Tensor:
    """Weighted mean cross entropy in nats, float32 scalar. bf16: matrix products in bfloat16 (autocast)."""
    with torch.autocast(rows.ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model(rows.ids, rows.positions, short_attention(rows))
        logits = model.head(hidden[rows.wanted])
    return (F.cross_entropy(logits.float(), rows.targets, reduction="none") * rows.weights).sum()


def short_attention(rows: Rows) -> AttendFunction:
    """Attention by plain matrix products. For rows this short it takes a fifth of the time of the fused CPU kernel,
    whose backward pass is slow (measured: 11 ms against 57 ms for 91 sequences of 45)."""
    mask = rows.mask
    if mask is None:
        mask = torch.ones(rows.length, rows.length, dtype=torch.bool, device=rows.ids.device).tril()
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e30)
    places = rows.positions.view(rows.batch, 1, rows.length)
    distance = places[..., :, None] - places[..., None, :]  # [batch, 1, length, length]

    def attend(layer: int, op: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, dim = q.shape[1:]
        shape = (rows.batch, rows.length, -1, dim)
        q4, k4, v4 = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        if heads != k4.shape[1]:
            k4, v4 = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k4, v4))
        scores = softcapped((q4 * op.scale) @ k4.transpose(-1, -2), op.softcap)  # [batch, heads, length, length]
        seen = bias if not op.window else bias.masked_fill(distance >= op.window, -1e30)
        out: Tensor = (scores.float() + seen).softmax(-1).to(v4.dtype) @ v4
        return out.transpose(1, 2).reshape(-1, heads, dim)

    return attend


def _padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])


@dataclass(frozen=True)
class Causal:
    """Next-token prediction on the response."""

    pad: int

    def cost(self, example: Example) -> int:
        return example.length - 1  # the last token is only a target

    def rows(self, examples: Sequence[Example], generator: torch.Generator) -> Rows:
        length = max(map(self.cost, examples))
        ids = _padded([(*e.prompt, *e.response[:-1]) for e in examples], length, self.pad)
        wanted: list[int] = []
        targets: list[int] = []
        for at, e in enumerate(examples):
            start = at * length + len(e.prompt) - 1
            wanted += range(start, start + len(e.response))
            targets += e.response
        weights = torch.full((len(wanted),), 1 / len(wanted))
        positions = torch.arange(length).repeat(len(examples))
        return Rows(
            len(examples), length, ids.flatten(), positions, None, torch.tensor(wanted), torch.tensor(targets), weights
        )


def draw_masked(count: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
    """A mask of `count` positions [count] bool: k uniform in 1..count of them, uniformly chosen. The exact-count form
    of "t uniform, each position with probability t": the same expectation under weight 1/k as under 1/t, with less
    variance (Ou et al. 2024, arXiv 2406.03736), and never empty. power > 1 skews the share to 1 - (1 - u)^power, u
    uniform: more of what must be worked out, less of what can be copied from the rest of the answer."""
    if power == 1.0:
        k = int(torch.randint(1, count + 1, (), generator=generator))
    else:
        u = torch.rand((), generator=generator, dtype=torch.float64).item()
        k = max(1, math.ceil(count * (1 - (1 - u) ** power)))
    masked = torch.zeros(count, dtype=torch.bool)
    masked[torch.randperm(count, generator=generator)[:k]] = True
    return masked


@dataclass(frozen=True)
class Line:
    """One example of a canvas objective.

    prompt   tokens before the canvas, always shown.
    clean    [n] int64: the canvas as it shall become.
    masked   [n] bool: shown as the mask id.
    asked    [n] bool: positions whose tokens are asked for; all of them masked.
    weights  [n] float32: what the answer at a position weighs, read where it is asked.
    """

    prompt: Sequence[int]
    clean: Tensor
    masked: Tensor
    asked: Tensor
    weights: Tensor


def canvas_rows(lines: Sequence[Line], mask: int, pad: int) -> Rows:
    """The forward pass of masked diffusion: each line is its prompt and its canvas under full attention."""
    length = max(len(line.prompt) + len(line.clean) for line in lines)
    shown = [[*line.prompt, *line.clean.masked_fill(line.masked, mask).tolist()] for line in lines]
    real = torch.tensor([len(line) for line in shown])
    keys = torch.arange(length)[None, :] < real[:, None]  # [batch, length]
    return Rows(
        len(lines),
        length,
        _padded(shown, length, pad).flatten(),
        torch.arange(length).repeat(len(lines)),
        keys[:, None, None, :].expand(-1, 1, length, -1),
        torch.cat([line.asked.nonzero()[:, 0] + at * length + len(line.prompt) for at, line in enumerate(lines)]),
        torch.cat([line.clean[line.asked] for line in lines]),
        torch.cat([line.weights[line.asked] for line in lines]),
    )


def canvas_size(response: int, slack: int) -> int:
    """Positions of a canvas for a response of so many tokens: n >= 0 is the tightest multiple of CANVAS and n CANVASes
    more, -1 the tightest multiple of 8."""
    return -(-response // 8) * 8 if slack < 0 else (-(-response // CANVAS) + slack) * CANVAS


@dataclass(frozen=True)
class MaskedDiffusion:
    """LLaDA's objective on the response, padded to a canvas with EOS. Examples take turns in `slack`, so that a model
    knows canvases of several sizes (see `canvas_size`). power: see `draw_masked`. tail: weight of an EOS after the
    first, which carries little to learn."""

    mask: int
    eos: int
    pad: int
    slack: tuple[int, ...] = (-1, 0, 1)
    power: float = 1.0
    tail: float = 0.2

    def canvas(self, example: Example) -> int:
        return canvas_size(len(example.response), self.slack[example.index % len(self.slack)])

    def cost(self, example: Example) -> int:
        return len(example.prompt) + self.canvas(example)

    def rows(self, examples: Sequence[Example], generator: torch.Generator) -> Rows:
        lines = []
        for e in examples:
            size, tight = self.canvas(e), len(e.response)
            clean = torch.tensor([*e.response, *[self.eos] * (size - tight)])
            weight = torch.ones(size)
            weight[tight:] = self.tail
            masked = draw_masked(size, generator, self.power)
            share = masked.sum() / size
            lines.append(Line(e.prompt, clean, masked, masked, weight / weight.sum() / share / len(examples)))
        return canvas_rows(lines, self.mask, self.pad)


def block_span(prompt: int, response: int, block: int) -> tuple[int, int, int]:
    """(rows of the clean copy, first position of the noisy copy, end of the last block) for so many tokens."""
    stop = -(-(prompt + response) // block) * block
    return stop - block, prompt // block * block, stop


def block_rows(lines: Sequence[Line], block: int, mask: int, pad: int) -> Rows:
    """The forward pass of block diffusion: for each line the clean sequence (all blocks but the last), then the noisy
    copies of the blocks that hold canvas tokens. A line's canvas ends with a whole block; prompt tokens of its first
    block stay clean."""
    spans = [block_span(len(line.prompt), len(line.clean), block) for line in lines]
    length = max(clean + stop - first for clean, first, stop in spans)
    ids = torch.full((len(lines), length), pad)
    positions = torch.zeros(len(lines), length, dtype=torch.long)
    allowed = torch.zeros(len(lines), 1, length, length, dtype=torch.bool)
    wanted = []
    for at, (line, (clean, first, stop)) in enumerate(zip(lines, spans, strict=True)):
        used = clean + stop - first
        whole = torch.cat((torch.tensor(line.prompt, dtype=torch.long), line.clean))
        noisy = torch.cat((whole[first : len(line.prompt)], line.clean.masked_fill(line.masked, mask)))
        ids[at, :used] = torch.cat((whole[:clean], noisy))
        positions[at, :used] = torch.cat((torch.arange(clean), torch.arange(first, stop)))
        allowed[at, 0, :used, :used] = block_mask(positions[at, :used] // block, torch.arange(used) >= clean)
        wanted.append(line.asked.nonzero()[:, 0] + at * length + clean + len(line.prompt) - first)
    allowed |= torch.eye(length, dtype=torch.bool)  # padding rows see themselves: no empty softmax
    return Rows(
        len(lines),
        length,
        ids.flatten(),
        positions.flatten(),
        allowed,
        torch.cat(wanted),
        torch.cat([line.clean[line.asked] for line in lines]),
        torch.cat([line.weights[line.asked] for line in lines]),
    )


@dataclass(frozen=True)
class BlockDiffusion:
    """BD3-LM's objective: rows are the clean sequence (all blocks but the last), then the noisy copies of the blocks
    that hold response tokens. Blocks are aligned to absolute position 0; the last is filled with EOS."""

    mask: int
    eos: int
    pad: int
    block: int

    def cost(self, example: Example) -> int:
        clean, first, stop = block_span(len(example.prompt), len(example.response), self.block)
        return clean + stop - first

    def rows(self, examples: Sequence[Example], generator: torch.Generator) -> Rows:
        lines = []
        for e in examples:
            _, first, stop = block_span(len(e.prompt), len(e.response), self.block)
            size, skip = stop - len(e.prompt), len(e.prompt) - first
            clean = torch.tensor([*e.response, *[self.eos] * (size - len(e.response))])
            masked, weight = (t[skip:] for t in self._noise(len(e.prompt), first, stop, generator))
            lines.append(Line(e.prompt, clean, masked, masked, weight / size / len(examples)))
        return block_rows(lines, self.block, self.mask, self.pad)

    def _noise(self, prompt: int, first: int, stop: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """masked [stop - first] bool and weights [stop - first]: (block's tokens) / (masked ones) in each block. The
        prompt's tokens in the first block stay clean."""
        masked = torch.zeros(stop - first, dtype=torch.bool)
        weight = torch.zeros(stop - first)
        for start in range(first, stop, self.block):
            low, high = max(start, prompt) - first, start + self.block - first
            drawn = draw_masked(high - low, generator)
            masked[low:high] = drawn
            weight[low:high] = (high - low) / drawn.sum()
        return masked, weight


def block_mask(blocks: Tensor, noisy: Tensor) -> Tensor:
    """blocks [rows] int64, noisy [rows] bool -> [rows, rows] bool. A clean row sees clean rows of its block and those
    before; a noisy row sees the noisy rows of its block and the clean rows of the blocks before."""
    row, key = blocks[:, None], blocks[None, :]
    clean_row = ~noisy[:, None] & ~noisy[None, :] & (key <= row)
    noisy_row = noisy[:, None] & torch.where(noisy[None, :], key == row, key < row)
    return clean_row | noisy_row


def _ids(model: Decoder) -> tuple[int, int, int]:
    """(mask, eos, pad); models without a mask or pad get their EOS there, which nothing then reads."""
    info = model.info
    eos = info.eos_ids[0]
    return (eos if info.mask_id is None else info.mask_id, eos, eos if info.pad_id is None else info.pad_id)


def make_objective(name: str, model: Decoder, slack: tuple[int, ...] = (-1, 0, 1), power: float = 1.0) -> Objective:
    """causal, masked_diffusion (which alone reads `slack` and `power`) or block_diffusion, with the model's ids."""
    mask, eos, pad = _ids(model)
    makers: dict[str, Callable[[], Objective]] = {
        "block_diffusion": lambda: BlockDiffusion(mask, eos, pad, model.info.block),
        "causal": lambda: Causal(pad),
        "masked_diffusion": lambda: MaskedDiffusion(mask, eos, pad, slack, power),
    }
    return makers[name]()
