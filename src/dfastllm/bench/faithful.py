"""How far from float a format is on the real model, to stand beside every speed of it.

The figures are those of benchmarks/fidelity.json (`bench fidelity`). A speed is worth nothing where it is bought with
accuracy: what is told of two formats, a ratio or that ours is less faithful, is decided here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfastllm.bench.cpu.shapes import SHAPES

__all__ = ["HEADING", "LESS", "RANDOM", "UNKNOWN", "Faithfulness", "Form", "comparable"]

Form = Callable[[Mapping[str, Any]], str]  # a row -> its format
HEADING = "KL on the real model, 1e-3"  # nats a token
LESS, RANDOM, UNKNOWN = "less faithful", "random weights", "not measured"
# Figures nearer to each other than this are equal: other texts of this length change their order.
MARGIN = 1.05
KINDS = {"w4g": "w4", "w6g": "w6", "w4s": "w4r"}  # of the kernels, which know no minima -> a format made of them
_JUDGED = ("verdict", "possible", "of_possible")  # keys of rows that say something of a ratio
# Whose figures hold for a peer that is not measured itself: a build of the same program, the same arithmetic.
SAME = {"llama.cpp-avx2": "llama.cpp", "llama.cpp-avx-vnni": "llama.cpp", "vllm": "pytorch"}


def comparable(ours: float | None, peer: float | None) -> bool:
    """Whether a speed of ours may be set against a peer's, by the KL of both formats, None: not measured. Not where the
    peer's is known to be nearer to float."""
    if peer is None:
        return True
    return ours is not None and ours <= MARGIN * peer


class Faithfulness:
    """KL in nats a token by format; of a record that is not there, nothing is known."""

    def __init__(self, record: Mapping[str, Any] | None) -> None:
        self._ours: dict[str, float] = {"f32": 0.0}
        self._peers: dict[tuple[str, str], float] = {("pytorch", "float32"): 0.0}
        if record is not None:
            self._ours |= {row["format"]: row["kl"] for row in record["results"]}
            self._peers |= {(row["peer"], row["format"]): row["kl"] for row in record.get("peers", ())}

    @classmethod
    def read(cls, directory: Path) -> Faithfulness:
        """directory: benchmarks/, which has fidelity.json or not."""
        path = directory / "fidelity.json"
        return cls(json.loads(path.read_text()) if path.exists() else None)

    def ours(self, form: str) -> float | None:
        """Of a format of ours, a kind of kernel, or a GGUF type whose file is run as it is stored."""
        return self._ours.get(f"{form}, as stored", self._ours.get(KINDS.get(form, form)))

    def peer(self, peer: str, form: str) -> float | None:
        return self._peers.get((SAME.get(peer, peer), form))

    def said(self, form: str) -> str:
        """A cell of the column: of one format of ours."""
        return _shown(self.ours(form))

    def both(self, ours: str, peer: str, form: str, *, shape: str | None = None) -> str:
        """A cell of the column: ours / the peer's. shape: a mixture has no real model to be measured on."""
        if _is_mixture(shape):
            return RANDOM
        found = (_shown(self.ours(ours)), _shown(self.peer(peer, form)))
        return UNKNOWN if set(found) == {UNKNOWN} else " / ".join(found)

    def may_compare(self, ours: str, peer: str, form: str, *, shape: str | None = None) -> bool:
        """Whether a ratio is told. Of a mixture both sides' formats are known on no model."""
        if _is_mixture(shape):
            return True
        return comparable(self.ours(ours), self.peer(peer, form))

    def beside(self, rows: Iterable[Mapping[str, Any]], form: str | Form | None = None) -> list[dict[str, Any]]:
        """Rows of ours with the column. form: theirs, one for all or a row's; None: their key `format`."""

        def of(row: Mapping[str, Any]) -> str:
            return row["format"] if form is None else form if isinstance(form, str) else form(row)

        return [_with_column(row, self.said(of(row))) for row in rows]

    def against(
        self,
        rows: Iterable[Mapping[str, Any]],
        peer: str,
        form: str | Form,
        ratios: Sequence[str],
    ) -> list[dict[str, Any]]:
        """Rows of a record whose key `format` is ours, set against a format of a peer (form: one for all, or a row's),
        with the column, and where the peer's is more faithful with that in the place of the `ratios` and of what was
        judged by them."""
        found = []
        for row in rows:
            told, theirs = dict(row), form if isinstance(form, str) else form(row)
            if not self.may_compare(row["format"], peer, theirs):
                told |= dict.fromkeys(ratios, LESS)
                told |= {name: "" for name in _JUDGED if name in row}
            found.append(_with_column(told, self.both(row["format"], peer, theirs)))
        return found

    def of_peer(self, rows: Iterable[Mapping[str, Any]], peer: str) -> list[dict[str, Any]]:
        """A peer's own rows, whose key `format` is its format, with the column."""
        return [_with_column(row, _shown(self.peer(peer, row["format"]))) for row in rows]


def _is_mixture(shape: str | None) -> bool:
    return shape is not None and shape in SHAPES and SHAPES[shape].experts > 0


def _shown(kl: float | None) -> str:
    return UNKNOWN if kl is None else f"{1e3 * kl:.3g}"


def _with_column(row: Mapping[str, Any], cell: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    names = list(row)
    place = names.index("format") if "format" in row else 0
    for at, name in enumerate(names):
        out[name] = row[name]
        if at == place:
            out[HEADING] = cell
    return out
