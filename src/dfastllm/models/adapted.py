"""Adapters on the models here: what reading one needs of its base, and the two forms that runners compute with.

A packed decoder's linears hold several matrices of the program each, side by side or alternating, so a delta is put to
where its matrix lies there. The torch module has the matrices under their own names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.kernels.extension import native
from dfastllm.kernels.low_rank import LowRank, Place, add_low_rank, steady_product
from dfastllm.kernels.packed import PANEL, unpack_panels
from dfastllm.kernels.step import Step
from dfastllm.lora import EMBED, HEAD, Adapter, Base, Delta
from dfastllm.models.decoder import Decoder
from dfastllm.models.device import DeviceDecoder, held_value
from dfastllm.models.family import find_family
from dfastllm.models.packed import Gated, PackedDecoder, Project, Routed, Weights
from dfastllm.models.turned import require_turnable, turned_adapter, turned_bytes

__all__ = [
    "NEVER",
    "AdaptedRows",
    "PackedAdapters",
    "Places",
    "PlainRows",
    "Site",
    "adapter_base",
    "bytes_beside",
    "on_device",
    "placed_table",
    "require_numbers",
    "sites",
]

NEVER = -1e30  # a logit of probability 0 with which sums of logits stay finite
HALF = PANEL // 2
Places = Mapping[str, tuple[Place, ...]]  # own matrix name -> where its outputs lie in a linear


def adapter_base(model: Decoder | PackedDecoder | DeviceDecoder) -> Base:
    """The model as `lora.read_adapter` takes it."""
    return _Base(model)


def bytes_beside(model: Decoder | PackedDecoder | DeviceDecoder, adapter: Adapter) -> int:
    """Bytes that an adapter takes in a table of the model's besides its own: of a turned model, the turned one."""
    return turned_bytes(adapter) if not isinstance(model, Decoder) and model.basis is not None else 0


class _Base:
    """See `lora.Base`."""

    def __init__(self, model: Decoder | PackedDecoder | DeviceDecoder) -> None:
        self.model = model
        self.name = model.info.name
        basis = None if isinstance(model, Decoder) else model.basis
        self.tied = model.config.tied if basis is None else basis.tied
        self._names = find_family(model.info.family).names
        with torch.device("meta"):
            shell = model if isinstance(model, Decoder) else Decoder(model.config, model.info)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in shell.named_parameters()
        }

    def own(self, published: str) -> str:
        """Names as another class of the same model has them, the body alone or inside one that also sees pictures, are
        understood too."""
        for name in (
            published,
            f"model.{published}",
            f"language_model.{published}",
            published.replace("model.language_model.", "language_model.model.", 1),
            published.replace("language_model.", "", 1),
        ):
            try:
                return self._names.own(name)
            except KeyError:
                continue
        raise KeyError(published)

    def value(self, own: str) -> Tensor:
        if isinstance(self.model, Decoder):
            return self.model.get_parameter(own).detach().to("cpu", torch.float32)
        return _packed_value(self.model, own)


def _packed_value(model: PackedDecoder | DeviceDecoder, own: str) -> Tensor:
    """A matrix or bias of packed weights; of a turned model turned back."""
    value = _held_value(model, own) if isinstance(model, PackedDecoder) else held_value(model, own)
    if model.basis is None:
        return value
    gain = model.basis.sides[own.rpartition(".")[0]].gain
    return model.basis.back(own, value, None if gain is None else model.gains[gain].cpu())


def _held_value(model: PackedDecoder, own: str) -> Tensor:
    """A matrix or bias out of the panels."""
    module, _, leaf = own.rpartition(".")
    if module in (EMBED, HEAD):
        return unpack_panels(model.embed if module == EMBED else model.head_weights).dequantise()
    for site in sites(model):
        if module not in site.places:
            continue
        columns = torch.cat([place.columns for place in site.places[module]])
        if leaf == "bias":
            parts = [torch.zeros(w.packed.n) if w.bias is None else w.bias for w in site.weights]
        elif site.router is not None:
            parts = [site.router.float()]
        else:
            parts = [unpack_panels(w.packed).dequantise() for w in site.weights]
        return torch.cat(parts)[columns]
    raise KeyError(own)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A linear that an adapter may change, in the order in which a forward comes to them.

    places   where the outputs of the program's matrices lie in it.
    weights  what it is made of.
    router   its matrix in place of them, where the linear is a router.
    """

    places: Places
    weights: tuple[Weights, ...] = ()
    router: Tensor | None = None


def sites(model: PackedDecoder) -> Iterator[Site]:
    """The linears of all layers in their order."""
    for i, layer in enumerate(model.layers):
        for op in layer:
            if isinstance(op, Routed):
                yield from _sites_of_mixture(op, f"layers.{i}.{op.source.name}")
            elif isinstance(op, Project | Gated):
                places: dict[str, tuple[Place, ...]] = {}
                column = 0
                for matrix in op.source.matrices:
                    first, found = 0, []
                    for size in matrix.outputs:
                        # Gate and up alternate by 32 channels, which part it is comes from the order of both.
                        gated = isinstance(op, Gated)
                        found.append(Place(first, size, HALF * column, PANEL) if gated else Place(first, size, column))
                        first += size
                        column += 1 if gated else size
                    places[f"layers.{i}.{matrix.name}"] = tuple(found)
                yield Site(places, op.weights if isinstance(op, Project) else (op.weights,))


def _sites_of_mixture(op: Routed, name: str) -> Iterator[Site]:
    """name: of the mixture. In the order of native/experts.h."""
    yield Site({f"{name}.router": (Place(0, len(op.router), 0),)}, router=op.router)
    for j, block in enumerate(op.blocks):
        own = f"{name}.experts.{j}" if j < len(op.experts) else f"{name}.shared"
        gate, up = Place(0, block.width, 0, PANEL), Place(0, block.width, HALF, PANEL)
        yield Site({f"{own}.gate_proj": (gate,), f"{own}.up_proj": (up,)}, (block.gated,))
        yield Site({f"{own}.down_proj": (Place(0, block.down.packed.n, 0),)}, (block.down,))


def _present(numbers: Tensor) -> list[int]:
    """The adapters' numbers that occur, ascending, without 0."""
    return sorted(set(numbers.tolist()) - {0})


def _part(delta: Delta) -> LowRank:
    return LowRank(delta.a, delta.natural_b, delta.scale, delta.factor, delta.shift)


def _arguments(delta: Delta) -> dict[str, Any]:
    return {
        "a": delta.a,
        "b": delta.b,
        "scale": delta.scale,
        "factor": delta.factor,
        "shift": delta.shift,
    }


def require_numbers(step: Step, table: Sequence[Adapter | None]) -> None:
    """Raises ValidationError for a number in a step that no adapter has."""
    for number in np.unique(step.adapter).tolist():
        if number and (number >= len(table) or table[number] is None):
            raise ValidationError(f"the step asks for adapter {number}, which is not in the table.", param="step")


class PackedAdapters:
    """A table of adapters for a packed decoder: their native forms, or what the plain twin adds.

    Nothing is copied: the kernels read an adapter's matrices where they lie. A turned model gets turned ones, float32.
    """

    def __init__(self, model: PackedDecoder) -> None:
        self._places = [site.places for site in sites(model)]
        self._hidden, self._vocab = model.config.hidden_size, model.config.vocab_size
        self._basis, self._gains = model.basis, model.gains
        self.table: tuple[Adapter | None, ...] = (None,)  # as they were given
        self._held: tuple[Adapter | None, ...] = (None,)  # as they are computed with
        self.handles: list[Any] = [None]

    def set(self, table: Sequence[Adapter | None]) -> None:
        """See `engine.runners.Runner.adapters`. Raises ValidationError, UnsupportedError."""
        if not table or table[0] is not None:
            raise ValidationError("number 0 of a table of adapters stands for none.", param="adapter")
        known = {
            id(given): (held, handle) for given, held, handle in zip(self.table, self._held, self.handles, strict=True)
        }
        for adapter in table:
            if adapter is not None and id(adapter) not in known:
                self.require(adapter)
        made: list[tuple[Adapter | None, Any]] = [
            (None, None) if adapter is None else known.get(id(adapter)) or self._made(adapter) for adapter in table
        ]
        self._held = tuple(held for held, _ in made)
        self.handles = [handle for _, handle in made]
        self.table = tuple(table)

    def _made(self, adapter: Adapter) -> tuple[Adapter, Any]:
        """What the twin and what the kernels compute with."""
        held = adapter if self._basis is None else turned_adapter(adapter, self._basis, self._gains)
        return held, None if native() is None else self._handle(held)

    def require(self, adapter: Adapter) -> None:
        """Raises UnsupportedError for an adapter of matrices that these linears have not."""
        known = {name for places in self._places for name in places} | {EMBED, HEAD}
        if unknown := sorted(adapter.deltas.keys() - known):
            raise UnsupportedError(
                f"the adapter changes {unknown[0]}; this model has no such linear.",
                param="lora",
                hint="It is for another model.",
            )
        if self._basis is not None:
            require_turnable(adapter, self._basis)

    def _handle(self, adapter: Adapter) -> Any:
        made = native().Adapter(len(self._places))
        for site, places in enumerate(self._places):
            for name, where in places.items():
                if (delta := adapter.deltas.get(name)) is None:
                    continue
                at = [(place.first, place.count, place.column, place.stride) for place in where]
                made.add(site, sum(place.count for place in where), places=at, **_arguments(delta))
        if (embed := adapter.deltas.get(EMBED)) is not None:
            made.embed(self._hidden, full=embed.full, **_arguments(embed))
        if (head := adapter.deltas.get(HEAD)) is not None:
            rows = head.outputs or self._vocab
            made.head(rows, full=head.full, **_arguments(head))
        return made

    def of_head(self, numbers: Tensor) -> Tensor:
        """int64 [rows] of adapters' numbers -> the same, 0 for those that leave the head as it is."""
        heads = [adapter is not None and HEAD in adapter.deltas for adapter in self.table]
        return numbers * torch.tensor(heads)[numbers]

    def logits(self, hidden: Tensor, logits: Tensor, numbers: Tensor) -> None:
        """Change logits float32 [rows, vocab], the base's before any cap, of hidden float32 [rows, hidden] to those of
        the rows' adapters, in place."""
        for number in _present(numbers):
            rows = (numbers == number).nonzero()[:, 0]
            some, adapter = logits[rows], self._held[number]
            assert adapter is not None
            if (handle := self.handles[number]) is not None:
                handle.logits(hidden[rows].contiguous(), some)
            else:
                some = _head_rows(adapter.deltas[HEAD], hidden[rows], some)
            logits[rows] = some

    def never(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """The logits, those of ids that a row's own head has no row for at NEVER."""
        for number in _present(numbers):
            adapter = self.table[number]
            if adapter is not None and (full := adapter.deltas[HEAD].full) is not None and len(full) < logits.shape[1]:
                logits[(numbers == number).nonzero()[:, 0], len(full) :] = NEVER
        return logits

    def rows_of(self, step: Step) -> PlainRows | None:
        """What the plain twin adds in a step; None: no row has an adapter. Raises ValidationError for a number without
        one."""
        if not step.adapter.any():
            return None
        require_numbers(step, self.table)
        return PlainRows(self._held, self._places, step)


class PlainRows:
    """What a native forward does with the adapters of a step, in plain torch: called at its linears in their order."""

    def __init__(self, table: Sequence[Adapter | None], places: Sequence[Places], step: Step) -> None:
        self._table = table
        self._places = iter(places)
        self._ids = torch.from_numpy(step.ids).long()
        self._numbers = torch.from_numpy(step.adapter).long()
        self._product: Tensor | None = None

    def _groups(self, of: Tensor | None = None) -> Iterator[tuple[Adapter, Tensor]]:
        """The adapters among all rows, or those of the step that `of` names, and which of them have each."""
        numbers = self._numbers if of is None else self._numbers[of]
        for number in _present(numbers):
            if (adapter := self._table[number]) is not None:
                yield adapter, (numbers == number).nonzero()[:, 0]

    def embed(self, x: Tensor) -> None:
        """x [rows, hidden], the base's embeddings, in place."""
        for adapter, rows in self._groups():
            if (delta := adapter.deltas.get(EMBED)) is not None:
                x[rows] = _embedded(delta, self._ids[rows], x[rows])

    def add(self, y: Tensor, x: Tensor | None) -> Tensor:
        """What the next linear gives, y [rows, columns], changed in place. x [rows, inputs]; None: `keep_product`'s."""
        inputs = self._product if x is None else x
        assert inputs is not None
        return self.change(next(self._places), y, inputs)

    def next_places(self, count: int) -> list[Places]:
        """Of the next linears, which are passed by."""
        return [next(self._places) for _ in range(count)]

    def change(self, places: Places, y: Tensor, x: Tensor, of: Tensor | None = None) -> Tensor:
        """What the linear of these places gives, y [rows, columns], changed in place. x [rows, inputs]. of: which rows
        of the step they are, int64 [rows]; None: all."""
        for name, where in places.items():
            for adapter, rows in self._groups(of):
                if (delta := adapter.deltas.get(name)) is not None:
                    at = rows[:, None], torch.cat([place.columns for place in where])[None, :]
                    y[at] = add_low_rank(y[at], x[rows], _part(delta))
        return y

    def keep_product(self, product: Tensor) -> Tensor:
        """What a gate made, for the linear that follows."""
        self._product = product
        return product

    def take(self, rows: Tensor) -> None:
        """From now on these rows only, in this order."""
        self._numbers = self._numbers[rows]


def _embedded(delta: Delta, ids: Tensor, x: Tensor, least: int = 1) -> Tensor:
    """Rows of the embedding as an adapter has them, float32 [rows, hidden]; x: the base's."""
    x = x.float()
    if delta.full is not None:
        known = ids < len(delta.full)
        x = torch.where(known[:, None], delta.full[ids.clamp(max=len(delta.full) - 1)].float(), x)
    part = _part(delta)
    b = delta.natural_b
    if delta.a is not None and b is not None:
        known = ids < delta.a.shape[1]
        column = delta.a[:, ids.clamp(max=delta.a.shape[1] - 1)].float().T * known[:, None]
        x = x + steady_product(column * delta.scale, b.T, least)
        part = LowRank(None, None, 1.0, delta.factor, delta.shift)
    return add_low_rank(x, x, part)


def _head_rows(delta: Delta, hidden: Tensor, logits: Tensor, least: int = 1) -> Tensor:
    """Logits as an adapter has them; logits: the base's."""
    logits = logits.float()
    if delta.full is not None:
        whole = steady_product(hidden, delta.full, least)
        logits = torch.cat((whole, logits[:, len(delta.full) :]), dim=1)
    known = delta.outputs or logits.shape[1]
    return torch.cat((add_low_rank(logits[:, :known], hidden, _part(delta), least), logits[:, known:]), dim=1)


def on_device(adapter: Adapter, device: torch.device) -> Adapter:
    """The adapter with its tensors there; itself on the CPU."""
    if device.type == "cpu":
        return adapter

    deltas = {name: delta.moved(lambda tensor: tensor.to(device)) for name, delta in adapter.deltas.items()}
    return dataclasses.replace(adapter, deltas=deltas)


def placed_table(
    table: Sequence[Adapter | None],
    before: Sequence[Adapter | None],
    placed: Sequence[Adapter | None],
    place: Callable[[Adapter], Adapter],
) -> list[Adapter | None]:
    """A runner's table of adapters, where it computes with them. before, placed: the last table and what became of it,
    which is used again; place: makes a new adapter's. Raises ValidationError, and what `place` raises."""
    if not table or table[0] is not None:
        raise ValidationError("number 0 of a table of adapters stands for none.", param="adapter")
    moved = {id(adapter): there for adapter, there in zip(before, placed, strict=True)}
    for adapter in table:
        if adapter is not None and id(adapter) not in moved:
            moved[id(adapter)] = place(adapter)
    return [None if adapter is None else moved[id(adapter)] for adapter in table]


class AdaptedRows:
    """The rows of one forward of the torch module by adapter, grouped: what the module calls after each matrix.

    table    adapters by number, on the module's device.
    numbers  int64 [rows], the adapter of each; on the module's device.
    least    rows of a product, at least: see `kernels.low_rank`.
    """

    def __init__(self, table: Sequence[Adapter | None], numbers: Tensor, least: int) -> None:
        self._table = table
        self._numbers = numbers
        self._least = least
        self._groups = {number: (numbers == number).nonzero()[:, 0] for number in _present(numbers)}

    def _found(self, name: str, rows: Tensor | None) -> Iterator[tuple[Delta, Tensor]]:
        """(delta, int64 rows of x and y) of the adapters that have one for this matrix."""
        for number, all_rows in self._groups.items():
            adapter = self._table[number]
            assert adapter is not None
            if (delta := adapter.deltas.get(name)) is None:
                continue
            index = all_rows if rows is None else (self._numbers[rows] == number).nonzero()[:, 0]
            if len(index):
                yield delta, index

    def __call__(self, name: str, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        """y [rows, out], what the base's matrix gives for x [rows, in], as the rows' adapters have it. rows: which rows
        of the forward these are, None: all in order; more rows of x and y than that are padding."""
        for delta, index in self._found(name, rows):
            y[index] = add_low_rank(y[index], x[index], _part(delta), self._least).to(y.dtype)
        return y

    def embed(self, ids: Tensor, x: Tensor) -> Tensor:
        """x [rows, hidden], the embedding's rows of ids, as the adapters have them."""
        for delta, index in self._found(EMBED, None):
            x[index] = _embedded(delta, ids[index], x[index], self._least).to(x.dtype)
        return x

    def head(self, hidden: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits [rows, vocab] of hidden rows, before any factor or cap."""
        for delta, index in self._found(HEAD, rows):
            logits[index] = _head_rows(delta, hidden[index], logits[index], self._least).to(logits.dtype)
        return logits

    def never(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The finished logits, those of ids that a row's own head has no row for at NEVER."""
        for delta, index in self._found(HEAD, rows):
            if delta.full is not None and len(delta.full) < logits.shape[1]:
                logits[index, len(delta.full) :] = NEVER
        return logits
