"""How a token is drawn from a row of logits.

One order everywhere: penalties -> logit_bias -> allowed_token_ids -> min_tokens -> temperature -> top_k -> top_p
-> min_p -> draw. Every row has its own parameters, and a row's result depends on nothing but the row, its parameters
and (seed, step, position): a counter-based hash gives the noise, so neighbours in a batch never change a draw.

Greedy rows without edits cost one argmax and no copy of the logits. Options that only bar ids (allowed_token_ids,
min_tokens) are a set of ids for whoever picks the best token by other means (`barred`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dfastllm.core import Ends, SamplingParams
from dfastllm.kernels.statistics import best_tokens, row_chunks
from dfastllm.kernels.token_set import TokenSet

__all__ = [
    "Draw",
    "barred",
    "distribution",
    "draw",
    "edits",
    "gumbel",
    "penalised",
    "row_keys",
    "take",
    "tempered",
    "uniform",
]

_U64 = np.uint64


@dataclass(frozen=True, slots=True)
class Draw:
    """Consecutive rows of one sequence and how to draw them.

    positions  absolute position each row decides.
    prompt     ids that count for the repetition penalty only.
    output     generated ids so far: they count for all three penalties.
    first      absolute position of the first generated token; rows before first + min_tokens may not end the text.
    enders     ids that are not drawn before that position.
    salt       kind of draw, see `row_keys`.
    """

    sampling: SamplingParams
    positions: Sequence[int]
    seed: int
    step: int
    first: int
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    enders: tuple[int, ...] = ()
    salt: int = 0

    @property
    def edits(self) -> bool:
        """Whether logits change before the draw."""
        s = self.sampling
        early = s.min_tokens and any(p < self.first + s.min_tokens for p in self.positions)
        return bool(early) or s.allowed_token_ids is not None or edits(s)


def edits(s: SamplingParams) -> bool:
    """Whether the options change logits otherwise than by barring ids."""
    return bool(s.logit_bias) or penalised(s)


def barred(s: SamplingParams, ends: Ends, position: int, vocab: int) -> TokenSet | None:
    """The ids of a vocabulary that the options bar at an absolute position, None for none: what allowed_token_ids does
    not name, and before min_tokens what would end the text."""
    early = ends.barred if s.min_tokens and position < ends.first else ()
    return None if s.allowed_token_ids is None and not early else _token_set(s.allowed_token_ids, early, vocab)


@functools.lru_cache(maxsize=64)  # every step of a request asks for the same one
def _token_set(allowed: tuple[int, ...] | None, early: tuple[int, ...], vocab: int) -> TokenSet:
    """Of a drafting model with fewer ids than the target too: those that it does not have are not in the set."""
    ending = TokenSet([i for i in early if i < vocab], vocab)
    return ending if allowed is None else ending | TokenSet.outside([i for i in allowed if i < vocab], vocab)


def penalised(s: SamplingParams) -> bool:
    """Whether what stands in the text already changes the logits."""
    return bool(s.repetition_penalty != 1.0 or s.presence_penalty or s.frequency_penalty)


# ---- keyed noise ----------------------------------------------------------------------------------------------------


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014). x: uint64, any shape; wraps by design."""
    with np.errstate(over="ignore"):
        x = x + _U64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    out: np.ndarray = x ^ (x >> _U64(31))
    return out


def _words(values: int | Sequence[int]) -> np.ndarray:
    """uint64 [n] (or [1] of a single value): the low 64 bits of each."""
    many = [values] if isinstance(values, int) else values
    return np.asarray([v & 0xFFFFFFFFFFFFFFFF for v in many], dtype=_U64)


def row_keys(
    seed: int | Sequence[int], step: int | Sequence[int], positions: Sequence[int], salt: int = 0
) -> np.ndarray:
    """uint64 [len(positions)]: one key per (seed, step, position); seed and step are one for all, or one each.

    `salt` separates kinds of draws (0: tokens). Each part is mixed in by a round of its own, so that no two triples of
    small numbers meet."""
    key = _splitmix64(_words(seed))
    for part in (step, salt, positions):
        key = _splitmix64(key ^ _words(part))
    return key


def uniform(keys: np.ndarray) -> np.ndarray:
    """float64 in (0, 1), one per key."""
    return ((_splitmix64(keys) >> _U64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix32(x: Tensor) -> Tensor:
    """A full-avalanche 32-bit mix (Wellons' "lowbias32" family), in place on int32; masks make the shifts logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x21F0AAAD
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x735A2D97
    x ^= (x >> 15) & 0x1FFFF
    return x


def gumbel(keys: np.ndarray, vocab: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise float32 [len(keys), vocab], a pure function of (key, column).

    With V uniform in (0, 1), -log(-log1p(-V)) is Gumbel; V small is where the noise is large, and there float32 keeps
    its full relative precision, so the upper tail is right down to 2^-32 (with U = 1 - V it would stop at 2^-24).
    """
    halves = np.ascontiguousarray(keys).view(np.int32).reshape(len(keys), 2)  # low and high words
    low = torch.from_numpy(halves[:, 0].copy()).to(device)[:, None]
    high = torch.from_numpy(halves[:, 1].copy()).to(device)[:, None]
    column = torch.arange(vocab, dtype=torch.int32, device=device)[None, :] * -1640531527  # 0x9E3779B9 as int32
    out = torch.empty(len(keys), vocab, device=device)
    for rows in row_chunks(out):
        bits = _mix32(_mix32(column + low[rows]).bitwise_xor_(high[rows]))
        v = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
        out[rows] = v.neg_().log1p_().neg_().log_().neg_()
    return out


# ---- the draw -------------------------------------------------------------------------------------------------------


def _edit(logits: Tensor, d: Draw, positions: Sequence[int]) -> None:
    """Penalties, bias, allowed ids and min_tokens, in place on one sequence's rows [rows, vocab]."""
    s, vocab, device = d.sampling, logits.shape[1], logits.device
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*d.prompt, *d.output}), dtype=torch.long, device=device)
        picked = logits[:, seen]
        logits[:, seen] = torch.where(picked > 0, picked / s.repetition_penalty, picked * s.repetition_penalty)
    if d.output and (s.frequency_penalty or s.presence_penalty):
        counts = torch.bincount(torch.tensor(d.output, dtype=torch.long, device=device), minlength=vocab)
        logits -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
    if s.logit_bias:
        ids = torch.tensor(list(s.logit_bias), dtype=torch.long, device=device)
        logits[:, ids] += torch.tensor(list(s.logit_bias.values()), dtype=logits.dtype, device=device)
    if s.allowed_token_ids is not None:
        allowed = torch.zeros(vocab, dtype=torch.bool, device=device)
        allowed[torch.tensor(s.allowed_token_ids, dtype=torch.long, device=device)] = True
        logits.masked_fill_(~allowed, float("-inf"))
    early = [r for r, p in enumerate(positions) if p < d.first + s.min_tokens]
    if early and d.enders:
        rows = torch.tensor(early, dtype=torch.long, device=device)
        ids = torch.tensor(d.enders, dtype=torch.long, device=device)
        logits[rows[:, None], ids[None, :]] = float("-inf")


def _filter(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """A copy in which what lies outside top_k, then top_p, then min_p is -inf. logits [rows, vocab], not yet divided by
    temperature float32 [rows]; top_k int64 [rows] (vocab: off), top_p, min_p float64 [rows] (1 and 0: off). Of equal
    values the lowest ids stay."""
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    keep = rank[None, :] < top_k[:, None]
    scaled = (ranked - ranked[:, :1]).double() / temperature.double()[:, None]
    probs = torch.softmax(scaled.masked_fill(~keep, float("-inf")), dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the better tokens
    keep &= (before < top_p[:, None]) | (top_p >= 1)[:, None]
    keep &= probs >= min_p[:, None] * probs[:, :1]
    keep[:, 0] = True
    return torch.empty_like(logits).scatter_(1, order, ranked.masked_fill(~keep, float("-inf")))


def _filtered(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits [rows, vocab], overwritten: -inf outside top_k, top_p and min_p. Returns temperature float32 [rows]."""
    device = logits.device
    temperature = torch.tensor([s.temperature for s in params], dtype=torch.float32, device=device)
    filtered = [i for i, s in enumerate(params) if s.top_k > 0 or s.top_p < 1 or s.min_p > 0]
    if filtered:
        at = torch.tensor(filtered, dtype=torch.long, device=device)
        few = [params[i] for i in filtered]
        logits[at] = _filter(
            logits[at],
            temperature[at],
            torch.tensor([s.top_k if s.top_k > 0 else logits.shape[1] for s in few], device=device),
            torch.tensor([s.top_p for s in few], dtype=torch.float64, device=device),
            torch.tensor([s.min_p for s in few], dtype=torch.float64, device=device),
        )
    return temperature


def _draw_hot(logits: Tensor, rows: Sequence[tuple[Draw, int]]) -> Tensor:
    """Tokens int64 [rows] at temperature > 0. `rows` names (draw, index into its positions) per row; logits
    [rows, vocab] are overwritten."""
    temperature = _filtered(logits, [d.sampling for d, _ in rows])
    keys = np.empty(len(rows), dtype=_U64)
    for salt in {d.salt for d, _ in rows}:
        some = [i for i, (d, _) in enumerate(rows) if d.salt == salt]
        of = [rows[i] for i in some]
        keys[some] = row_keys([d.seed for d, _ in of], [d.step for d, _ in of], [d.positions[i] for d, i in of], salt)
    # argmax(logits / T + g) written as argmax(logits + T g): no overflow at tiny temperatures
    return best_tokens(logits + temperature[:, None] * gumbel(keys, logits.shape[1], logits.device))


@torch.inference_mode()
def distribution(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """What `draw` draws from, float64 [rows, vocab], every draw at temperature > 0. logits float32, unchanged; rows in
    the order of `draws`."""
    rows = [(d, i) for d in draws for i in range(len(d.positions))]
    edited = logits.clone()
    _edit_all(edited, rows)
    temperature = _filtered(edited, [d.sampling for d, _ in rows])
    scaled = (edited - edited.amax(dim=-1, keepdim=True)).double() / temperature.double()[:, None]
    return torch.softmax(scaled, dim=-1)


@torch.inference_mode()
def tempered(logits: Tensor, draws: Sequence[Draw], *, cut_greedy: bool) -> Tensor:
    """The logits, float32 [rows, vocab], whose softmax a token is drawn from: edited, cut by top_k, top_p and min_p,
    divided by the temperature. logits float32, unchanged; rows in the order of `draws`. At temperature 0 nothing is
    divided, and the cut is made only if `cut_greedy`."""
    rows = [(d, i) for d in draws for i in range(len(d.positions))]
    edited = logits.clone()
    _edit_all(edited, rows)
    seen: dict[int, SamplingParams] = {}
    for d in draws:
        s = d.sampling
        if s.temperature == 0:
            s = (
                replace(s, temperature=1.0)
                if cut_greedy
                else replace(s, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
            )
        seen[id(d)] = s
    temperature = _filtered(edited, [seen[id(d)] for d, _ in rows])
    scaled = (edited - edited.amax(dim=-1, keepdim=True)).double() / temperature.double()[:, None]
    return scaled.float()


def take(weights: Tensor, keys: np.ndarray) -> Tensor:
    """One index per row with probability proportional to weights float64 [rows, vocab], int64 [rows]; keys uint64
    [rows]. A row of zeros gives index 0."""
    return best_tokens(weights.log() + gumbel(keys, weights.shape[1], weights.device))


@torch.inference_mode()
def draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token id per row, int64 [rows]. logits float32 [rows, vocab], unchanged; rows in the order of `draws`."""
    tokens = best_tokens(logits)
    rows: list[tuple[Draw, int]] = []
    special: list[int] = []
    for d in draws:
        if d.sampling.temperature > 0 or d.edits:
            special += range(len(rows), len(rows) + len(d.positions))
        rows += ((d, i) for i in range(len(d.positions)))
    for part in row_chunks(logits[: len(special)]):
        some = special[part]
        where = torch.tensor(some, dtype=torch.long, device=logits.device)
        edited = logits[where]
        _edit_all(edited, [rows[r] for r in some])
        hot = [i for i, r in enumerate(some) if rows[r][0].sampling.temperature > 0]
        chosen = best_tokens(edited)
        if hot:
            which = torch.tensor(hot, dtype=torch.long, device=logits.device)
            chosen[which] = _draw_hot(edited[which], [rows[some[i]] for i in hot])
        tokens[where] = chosen
    return tokens


def _edit_all(logits: Tensor, rows: Sequence[tuple[Draw, int]]) -> None:
    """`_edit` on each run of rows that belong to the same draw, in place."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or rows[stop][0] is not rows[start][0]:
            d = rows[start][0]
            if d.edits:
                _edit(logits[start:stop], d, [d.positions[i] for _, i in rows[start:stop]])
            start = stop
