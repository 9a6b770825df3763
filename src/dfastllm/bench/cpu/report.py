"""Records as tables: for the terminal, and RESULTS.md generated from the JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dfastllm.bench.cpu.ceilings import Ceilings, floor_seconds
from dfastllm.bench.faithful import HEADING, LESS, Faithfulness

__all__ = ["as_json", "faithful_rows", "markdown", "plain_table", "table", "write_results"]

COLUMNS = (
    "format",
    f"{HEADING}, ours / peer",
    "case",
    "ours ms",
    "peer ms",
    "tok/s",
    "times faster",
    "with logits",
    "aim",
    "GB/s of weights",
    "GFLOP/s",
    "of the floor",
)


def _cells(row: Mapping[str, Any], ceilings: Ceilings, faithful: Faithfulness) -> list[str]:
    def spread(summary: Mapping[str, float]) -> str:
        return f"{1e3 * summary['median']:.1f} ({1e3 * summary['q1']:.1f}–{1e3 * summary['q3']:.1f})"

    def times(ratio: Mapping[str, float]) -> str:
        return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"

    ours, peer = row["ours_seconds"]["median"], row["peer_seconds"]["median"]
    floor, bound = floor_seconds(ceilings, row["ours_streamed"], row["flops"])
    formats = (row["ours"], row["peer"], "bf16" if row["peer"] == "pytorch" else row["format"])
    fair = faithful.may_compare(*formats, shape=row["shape"])
    judged = row["verdict"] if fair else "not judged"
    return [
        row["format"] if row["format"] == row["ours"] else f"{row['format']}, ours {row['ours']}",
        faithful.both(*formats, shape=row["shape"]),
        row["case"],
        spread(row["ours_seconds"]),
        spread(row["peer_seconds"]),
        f"{row['tokens'] / ours:,.0f} / {row['tokens'] / peer:,.0f}",
        times(row["ratio"]) if fair else LESS,
        times(row["made_ratio"]) if fair else LESS,
        "" if row["aim"] is None else f"{row['aim']:g} {judged}",
        f"{row['ours_streamed'] / ours / 1e9:.1f} / {row['peer_streamed'] / peer / 1e9:.1f}",
        f"{row['flops'] / ours / 1e9:,.0f} / {row['flops'] / peer / 1e9:,.0f}",
        f"{floor / ours:.0%} ({bound})",
    ]


def table(rows: Sequence[Mapping[str, Any]], ceilings: Ceilings, title: str, faithful: Faithfulness) -> Table:
    """For the terminal; `Row`s as dicts."""
    out = Table(title=title)
    for name in COLUMNS:
        out.add_column(name, justify="left" if name in ("format", "case") else "right")
    for row in rows:
        out.add_row(*_cells(row, ceilings, faithful))
    return out


def plain_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Rows of any record, a column per key of any row; a Summary or a Ratio as its median with its range."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = Table(title=title)
    for name in names:
        out.add_column(name.replace("_", " "))
    for row in map(as_json, rows):
        out.add_row(*(_plain(row.get(name)) for name in names))
    return out


# Records whose rows are set against one format of one peer: that, and which of their keys are ratios to it.
_RIVALS = {"cpu vllm": ("vllm", "bf16", ("ratio",)), "cpu diffusion": ("pytorch", "bf16", ("times_plain",))}


def faithful_rows(
    record: str, rows: Sequence[Mapping[str, Any]], faithful: Faithfulness
) -> Sequence[Mapping[str, Any]]:
    """The rows of a record, by its name, as they are shown: with the KL of their formats, and without a ratio to what
    is more faithful. Records of models as they are stored stay as they are."""
    if record not in _RIVALS:
        return rows
    peer, form, ratios = _RIVALS[record]
    plain = [row for row in rows if str(row.get("side", "")).startswith("torch")]
    ours = [row if "format" in row else {"format": _native(row["side"]), **row} for row in rows if row not in plain]
    told = faithful.against(ours, peer, form, ratios)
    return [*faithful.of_peer(({"format": form, **row} for row in plain), peer), *told]


def _native(side: str) -> str:
    """The format of a side of a diffusion record: "native w8g, dual"; one made before sides named theirs was w8."""
    words = side.partition(",")[0].split()
    return words[1] if len(words) > 1 else "w8"


def as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its Summaries and Ratios as dicts."""
    return {name: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for name, v in row.items()}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        low, high = (value["low"], value["high"]) if "low" in value else (value["q1"], value["q3"])
        return f"{value['median']:,.4g} ({low:,.4g}–{high:,.4g})"
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]


def markdown(record: Mapping[str, Any], faithful: Faithfulness) -> list[str]:
    """One record as a section."""
    machine, rows = record["machine"], faithful_rows(record["name"], record["results"], faithful)
    title = record["name"] + (f", {record['shape']}" if "shape" in record else "")
    where = (
        f"{record['utc']}, {machine['cpu']}, {record['threads']} threads, dfastllm {machine['commit']}, "
        f"kernels {record['kernels']}."
    )
    if "ceilings" not in record:
        names = list(dict.fromkeys(name for row in rows for name in row))
        body = _lines([n.replace("_", " ") for n in names], [[_plain(row.get(n)) for n in names] for row in rows])
        return [f"## {title}", "", where, "", *body, ""]
    ceilings = Ceilings(**record["ceilings"])
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items() if name != "compiled")
    loads = [row["foreign_most"] for row in rows if row["foreign_most"] is not None]
    busy = f" Other processes used at most {max(loads):.0%} of the machine in any turn." if loads else ""
    return [
        f"## {title}",
        "",
        f"{where} {versions}.{busy} Ceilings: {ceilings.stream:.1f} GB/s; f32 {ceilings.f32:,.0f}, bf16 "
        f"{ceilings.bf16:,.0f}, int8 {ceilings.int8:,.0f} GFLOP/s.",
        "",
        *_lines(COLUMNS, [_cells(row, ceilings, faithful) for row in rows]),
        "",
    ]


def _faithful(path: Path) -> list[str]:
    """What the formats whose speed stands below cost on a real model, where that is on record."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    rows = [
        [name, f"{1e3 * row['kl']:.3g}", f"{row['agreement']:.1%}"]
        for name, row in (
            *((row["format"], row) for row in record["results"]),
            *((f"{row['peer']}, {row['format']}", row) for row in record.get("peers", ())),
        )
    ]
    return [
        f"Speed has a price. On a real model ({record['model']}, {record['results'][0]['tokens']:,} tokens, "
        f"`python -m dfastllm.bench fidelity`, dfastllm {record['machine']['commit']}), KL from float32 and how "
        "often the best token is the same:",
        "",
        *_lines(("format", "KL, 1e-3 nats a token", "best token equal"), rows),
        "",
    ]


def write_results(directory: Path) -> Path:
    """RESULTS.md beside the `cpu` records of `directory`."""
    faithful = Faithfulness.read(directory.parent)
    lines = [
        "# CPU records",
        "",
        "Generated by `python -m dfastllm.bench cpu report`; README.md says how to read it.",
        "",
        *_faithful(directory.parent / "fidelity.json"),
    ]
    for path in sorted(directory.glob("*.json")):
        record = json.loads(path.read_text())
        if record["name"].startswith("cpu "):
            lines += markdown(record, faithful)
    target = directory / "RESULTS.md"
    target.write_text("\n".join(lines).rstrip() + "\n")
    return target
