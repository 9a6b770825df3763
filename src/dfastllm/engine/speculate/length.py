"""How many tokens to draft: as many as make a step give the most tokens per second, which may be none.

Measured and compared: what a step costs by its rows, what a drafter costs by its sequences, how often draft tokens
stand, by position, for the request and for the method. A draft token is one row more; it is worth the chance that it
and all before it stand. So the best step of so many draft rows takes the most likely ones of all sequences, and the
best of all steps is found by trying every number of rows.

What was measured fades while it is not measured again: chances towards a hopeful guess, costs downwards. So what was
switched off is tried again now and then, and recovers when it pays; the fading sets how seldom.

Last, the whole is held against plain decoding: the seconds of the steps with drafts, everything included, against those
that as many tokens take without. If that loses, nothing is drafted for a while, each time twice as long.

Lengths found here follow from times, so they are for coupled acceptance only, where a draft changes no token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dfastllm.core import value

__all__ = ["Candidate", "Chances", "CostTable", "Pace", "best_lengths"]

Floats = NDArray[np.float64]

HOPE, HOPE_WEIGHT = 0.8, 1.0  # chance of a draft token believed before anything was measured, and for how many tries
METHOD_WEIGHT = 2.0  # what a method's chances count for those of a request
KEEP_REQUEST, KEEP_METHOD = 0.95, 0.99  # weight of the past at each draft
FADE_CHANCE, FADE_COST = 0.995, 0.9995  # at each step without one
PLAIN_EVERY = 128  # steps with drafts before one without, to measure that again
REST, LONGEST_REST = 8, 64  # steps that nothing is drafted once it was found not to pay: looking costs time too
TRIAL = 12  # steps with drafts that are held against plain ones
PAUSE, LONGEST_PAUSE = 128, 4096  # steps without drafts when they lost
REUSE = 4  # steps that lengths found stay in use while the same sequences run


class CostTable:
    """Seconds by number of rows, measured; between the measured numbers on straight lines, never falling. Noise only
    adds, so a lower figure counts more than a higher one, and one very much higher is cut."""

    def __init__(self) -> None:
        self._rows: Floats = np.empty(0)
        self._seconds: Floats = np.empty(0)
        self._belief: Floats = np.empty(0)  # 1 when just measured, less with time

    def __bool__(self) -> bool:
        return len(self._rows) > 0

    def add(self, rows: int, seconds: float) -> None:
        coarse = max(0, rows.bit_length() - 6)  # beyond 64 rows one more is less than the noise
        key = float(rows >> coarse << coarse)
        at = int(np.searchsorted(self._rows, key))
        if at == len(self._rows) or self._rows[at] != key:
            self._rows = np.insert(self._rows, at, key)
            self._seconds = np.insert(self._seconds, at, seconds)
            self._belief = np.insert(self._belief, at, 1.0)
            return
        old, self._belief[at] = self._seconds[at], 1.0
        self._seconds[at] += (0.5 if seconds < old else 0.125) * (min(seconds, 4 * old) - old)

    def seconds(self, rows: NDArray[np.int64]) -> Floats:
        """float64, the shape of rows. Beyond the highest number measured: no more than that; below the lowest: in
        proportion. Both are hopeful, so that what was never measured is tried. Nothing measured: 0."""
        if not self:
            return np.zeros(rows.shape)
        known = np.maximum.accumulate(self._seconds * self._belief)
        out: Floats = np.interp(rows, self._rows, known)
        return np.where(rows < self._rows[0], known[0] * rows / self._rows[0], out)

    def fade(self, steps: int, above: int = 0) -> None:
        """Steps went by: believe a little less of what numbers of rows above `above` cost, until it is measured."""
        self._belief[self._rows > above] *= FADE_COST**steps


class Chances:
    """How often draft tokens stand, by position, given that those before them stood. [most tokens]"""

    def __init__(self, most: int) -> None:
        self.tried = np.zeros(most)
        self.stood = np.zeros(most)

    def add(self, drafted: int, accepted: int, keep: float) -> None:
        self.fade(keep)
        reached = min(drafted, accepted + 1, len(self.tried))
        self.tried[:reached] += 1
        self.stood[:accepted] += 1

    def fade(self, keep: float) -> None:
        self.tried *= keep
        self.stood *= keep

    def given(self, prior: Floats | float, weight: float) -> Floats:
        """float64 [most]: the estimate, with a prior that counts as so many tries."""
        out: Floats = (self.stood + weight * prior) / (self.tried + weight)
        return out


@value(frozen=True, slots=True)
class Candidate:
    """A sequence that could have a draft. most: tokens, at most. worth: float64 [>= most], falling: the chance that
    the first j + 1 tokens stand. method: whose drafting costs count."""

    method: str
    most: int
    worth: Floats


def best_lengths(
    candidates: Sequence[Candidate], tokens: float, seconds: Floats, drafting: Mapping[str, Floats]
) -> list[int]:
    """Draft lengths that maximise (tokens + expected accepted) / seconds of the step.

    tokens: what the step gives without drafts. seconds [1 + sum of most]: of the step by draft rows. drafting: method
    -> [1 + most] seconds by its longest draft; methods that are not named cost nothing. Exact for one method that
    costs; of several each is chosen in turn.
    """
    caps = dict.fromkeys(drafting, 0)
    best, rate = _under(caps, candidates, tokens, seconds, drafting)
    for method in drafting:
        for cap in range(1, len(drafting[method])):
            lengths, got = _under({**caps, method: cap}, candidates, tokens, seconds, drafting)
            if got > rate:
                best, rate = lengths, got
        mine = [n for n, c in zip(best, candidates, strict=True) if c.method == method]
        caps[method] = max(mine, default=0)
    return best


def _under(
    caps: Mapping[str, int],
    candidates: Sequence[Candidate],
    tokens: float,
    seconds: Floats,
    drafting: Mapping[str, Floats],
) -> tuple[list[int], float]:
    """The best lengths when no draft of a method is longer than its cap, which is paid for; and their rate."""
    allowed = [min(c.most, caps.get(c.method, c.most)) for c in candidates]
    worth = np.concatenate([c.worth[:n] for c, n in zip(candidates, allowed, strict=True)])
    owner = np.repeat(np.arange(len(candidates)), allowed)
    order = np.argsort(-worth, kind="stable")  # of equal ones of a sequence the earlier token first
    gain = np.concatenate([[0.0], np.cumsum(worth[order])])
    paid = sum(drafting[method][cap] for method, cap in caps.items())
    rates = (tokens + gain) / np.maximum(seconds[: len(gain)] + paid, 1e-12)
    rows = int(np.argmax(rates))
    lengths = np.bincount(owner[order[:rows]], minlength=len(candidates))
    return lengths.tolist(), float(rates[rows])


class Pace:
    """What one engine has measured. most: tokens of the longest draft there can be."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.plain = CostTable()  # steps without drafts, by sequences
        self.step = CostTable()  # steps with drafts, by rows: a row of a draft costs less than a sequence
        self.drafting: dict[str, CostTable] = {}  # seconds of one forward by sequences
        self._methods: dict[str, Chances] = {}
        self._requests: dict[str, Chances] = {}
        self._since_plain = PLAIN_EVERY - 4  # the first plain step comes soon
        self._still = 0  # steps that the last answer stays good
        self._rest = 0  # steps to come without drafts
        self._next_rest, self._next_pause = REST, PAUSE
        self._gain = self._spent = 0.0  # seconds plain decoding would have taken; that it took
        self._trial = 0  # steps they are of
        self._asked: tuple[str, ...] = ()
        self._found: list[int] = []

    @property
    def curious(self) -> bool:
        """Whether a step of a rest is to be measured: a few are."""
        return self._rest % 8 == 0

    def resting(self) -> bool:
        """Whether nothing is drafted in this step, because that did not pay lately. Asked once a step."""
        self._rest = max(0, self._rest - 1)
        return self._rest > 0

    def lengths(
        self, asks: Sequence[tuple[str, str, int]], rows: int, tokens: int, passes: Mapping[str, Sequence[int]]
    ) -> list[int]:
        """Draft lengths of this step. asks: (request id, method, most tokens). rows, tokens: of the step without these
        drafts. passes: method -> [1 + most] forwards of its model by the longest draft; lookups are not named."""
        names = tuple([request for request, _, _ in asks])
        if self._since_plain >= PLAIN_EVERY:  # one step without, to measure that again
            self._since_plain = self._still = 0
            return [0] * len(asks)
        self._since_plain += 1
        if self._still and names == self._asked:
            self._still -= 1
            return [min(n, most) for n, (_, _, most) in zip(self._found, asks, strict=True)]
        before = any(self._found)
        self._asked, self._found = names, self._best(asks, rows, tokens, passes)
        if any(self._found):
            steps = REUSE if before else 1  # a try lasts one step
            self._still, self._next_rest = steps - 1, REST
        else:
            steps = self._next_rest
            self._rest, self._still, self._next_rest = steps, 0, min(LONGEST_REST, 2 * steps)
        self._fade(asks, rows, steps)
        return self._found

    def _best(
        self, asks: Sequence[tuple[str, str, int]], rows: int, tokens: int, passes: Mapping[str, Sequence[int]]
    ) -> list[int]:
        plain = self.plain.seconds(np.array([tokens]))
        priors = {method: self._method(method).given(HOPE, HOPE_WEIGHT) for _, method, _ in asks}
        candidates = []
        for request, method, most in asks:
            own = self._requests.get(request)
            chances = priors[method] if own is None else own.given(priors[method], METHOD_WEIGHT)
            worth: Floats = np.cumprod(chances[:most], dtype=np.float64)
            candidates.append(Candidate(method, most, worth))
        total = sum(most for _, _, most in asks)
        drafting = {}
        for method, counts in passes.items():
            members = sum(m == method for _, m, _ in asks)
            each = self._cost(method).seconds(np.array([members]))[0]
            drafting[method] = each * np.asarray(counts, dtype=np.float64)
        seconds = np.maximum(self.step.seconds(rows + np.arange(total + 1)), plain)
        if self.plain and rows == tokens:  # nobody else drafts
            seconds[0] = plain[0]
        return best_lengths(candidates, tokens, seconds, drafting)

    def _fade(self, asks: Sequence[tuple[str, str, int]], rows: int, steps: int) -> None:
        """What is not tried in the coming steps is believed a little less."""
        busy = {method for (_, method, _), n in zip(asks, self._found, strict=True) if n}
        for (request, _, _), n in zip(asks, self._found, strict=True):
            if not n and request in self._requests:
                self._requests[request].fade(FADE_CHANCE**steps)
        for method in {method for _, method, _ in asks} - busy:
            self._method(method).fade(FADE_CHANCE**steps)
            self._cost(method).fade(steps)
        if not busy:
            self.step.fade(steps, rows)
            self._since_plain = 0

    def drafted(self, method: str, sequences: int, passes: int, seconds: float) -> None:
        """What drafting took."""
        self._cost(method).add(sequences, seconds / max(1, passes))

    def judged(self, request: str, method: str, drafted: int, accepted: int) -> None:
        """What became of a draft."""
        self._requests.setdefault(request, Chances(self.most)).add(drafted, accepted, KEEP_REQUEST)
        self._method(method).add(drafted, accepted, KEEP_METHOD)

    def took(self, sequences: int, rows: int, tokens: int, seconds: float, drafting: float) -> None:
        """A step that read no prompts: its sequences, rows and tokens, seconds without drafting and of drafting."""
        (self.step if rows > sequences else self.plain).add(rows, seconds)
        if (rows == sequences and (self._rest or not drafting)) or not self.plain:
            return
        self._hold(tokens * self._each(sequences), seconds + drafting)

    def mixed(self, sequences: int, accepted: int, drafting: float) -> None:
        """A step that read prompts too: what it cost besides drafting says nothing, but drafters read prompts as well,
        and that is paid by what they bring."""
        if self.plain and not self._rest:
            self._hold(accepted * self._each(sequences), drafting)

    def _each(self, sequences: int) -> float:
        """Seconds of a token without drafts."""
        return float(self.plain.seconds(np.array([sequences]))[0]) / sequences

    def _hold(self, gain: float, spent: float) -> None:
        """Hold seconds that plain decoding would have taken against those that were spent."""
        self._gain, self._spent, self._trial = self._gain + gain, self._spent + spent, self._trial + 1
        if self._trial < TRIAL:
            return
        if self._gain < self._spent:
            self._rest, self._next_pause = self._next_pause, min(LONGEST_PAUSE, 2 * self._next_pause)
        else:
            self._next_pause = max(PAUSE, self._next_pause // 2)
        self._gain, self._spent, self._trial = 0.0, 0.0, 0

    def release(self, request: str) -> None:
        self._requests.pop(request, None)

    def _method(self, method: str) -> Chances:
        return self._methods.setdefault(method, Chances(self.most))

    def _cost(self, method: str) -> CostTable:
        return self.drafting.setdefault(method, CostTable())
