"""README's one table: times faster than the peers, by case, made of the records and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfastllm.bench.cpu.report import write_results
from dfastllm.bench.faithful import LESS, Faithfulness

__all__ = ["refresh", "summary", "write_summary"]

BEGIN, END = "<!-- speeds: made by `python -m dfastllm.bench cpu report` -->", "<!-- /speeds -->"
CASES = {
    "decode, batch 1": "decode 1",
    "decode, 16 concurrent": "decode 16",
    "prefill 512": "prompt 512",
    "block of 32, all rows": "block 32",
}
# (the record, the peer's name, its format, ours)
ROWS = (
    ("llama.cpp-qwen2.5-0.5b", "llama.cpp", "Q8_0", "Q8_0"),
    ("llama.cpp-qwen2.5-0.5b", "llama.cpp", "Q4_0", "Q4_0"),
    ("llama.cpp-qwen2.5-0.5b", "llama.cpp", "Q4_K_M", "Q4_K_M"),
    ("openvino-genai-qwen2.5-0.5b", "OpenVINO", "int8", "w8r"),
    ("openvino-genai-qwen2.5-0.5b", "OpenVINO", "int8", "w8g"),
    ("openvino-genai-qwen2.5-0.5b", "OpenVINO", "int4", "w4r"),
    ("openvino-genai-qwen2.5-0.5b", "OpenVINO", "int4", "w4"),
    ("pytorch-qwen2.5-0.5b", "torch", "bf16", "bf16"),
)


def summary(directory: Path) -> list[str]:
    """Lines of the table and of what it is of; rows that no record has are left out. directory: of the `cpu`
    records."""
    faithful = Faithfulness.read(directory.parent)
    found: list[str] = []
    dates: set[str] = set()
    about = ""
    for file, peer, form, own in ROWS:
        path = directory / f"{file}.json"
        record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": []}
        rows = {row["case"]: row for row in record["results"] if (row["format"], row["ours"]) == (form, own)}
        if not rows:
            continue
        name = f"{peer} {form}" + ("" if own == form else f", ours `{own}`")
        first = next(iter(rows.values()))
        cells = [_cell(rows[case], faithful) if case in rows else "" for case in CASES]
        found.append(" | ".join([f"| {name}", faithful.both(own, first["peer"], form), *cells]) + " |")
        dates.add(record["utc"][:10])
        about = f"{record['threads']} threads of an {record['machine']['cpu']}"
    header = " | ".join(["| against", "KL, ours / theirs", *CASES.values()]) + " |"
    when = " and ".join(sorted(dates))
    return [header, "|---" * (2 + len(CASES)) + "|", *found, "", f"{about}, Qwen2.5-0.5B shape, records of {when}."]


def _cell(row: Mapping[str, Any], faithful: Faithfulness) -> str:
    if faithful.may_compare(row["ours"], row["peer"], row["format"], shape=row["shape"]):
        return f"{row['ratio']['median']:.1f}"
    ours, peer = (1e3 * row[f"{side}_seconds"]["median"] for side in ("ours", "peer"))
    return f"{LESS}: {ours:.1f} / {peer:.1f} ms"


def write_summary(readme: Path, directory: Path) -> bool:
    """Put the table between the two marks of a README. False: it has none."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    lines = "\n".join(summary(directory))
    readme.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{after}", encoding="utf-8")
    return True


def refresh(directory: Path) -> list[Path]:
    """RESULTS.md beside the `cpu` records of a directory, and the table of the README two directories up where it has
    one, made anew. Returns what was written."""
    written, readme = [write_results(directory)], directory.resolve().parents[1] / "README.md"
    return [*written, readme] if write_summary(readme, directory) else written
