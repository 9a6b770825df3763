"""README's table: what the records say, and nothing where a ratio would be unfair or unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dfastllm.bench.cpu.summary import BEGIN, END, refresh, summary, write_summary

ROOT = Path(__file__).parents[2]


def write(root: Path, name: str, form: str, own: str, case: str, *, ours: float, peer: float) -> None:
    row: dict[str, Any] = {"shape": "qwen2.5-0.5b", "peer": name, "format": form, "ours": own, "case": case}
    row |= {"ours_seconds": {"median": ours}, "peer_seconds": {"median": peer}, "ratio": {"median": peer / ours}}
    path = root / "cpu" / f"{name}-qwen2.5-0.5b.json"
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text())["results"] if path.exists() else []
    record = {"utc": "2026-11-28T10:00:00Z", "threads": 2, "machine": {"cpu": "AMD EPYC"}, "results": [*old, row]}
    path.write_text(json.dumps(record))


def test_ratios_and_times_in_their_places(tmp_path: Path) -> None:
    write(tmp_path, "llama.cpp", "Q8_0", "Q8_0", "decode, batch 1", ours=0.02, peer=0.03)
    write(tmp_path, "llama.cpp", "Q8_0", "Q8_0", "block of 32, all rows", ours=0.02, peer=0.1)
    write(tmp_path, "openvino-genai", "int8", "w8r", "prefill 512", ours=0.5, peer=0.75)
    write(tmp_path, "openvino-genai", "int8", "w8", "prefill 512", ours=0.4, peer=0.75)  # not in README
    figures = {
        "results": [{"format": "Q8_0, as stored", "kl": 0.006}, {"format": "w8r", "kl": 0.0056}],
        "peers": [{"peer": "llama.cpp", "format": "Q8_0", "kl": 0.0044}],
    }
    (tmp_path / "fidelity.json").write_text(json.dumps(figures))
    assert summary(tmp_path / "cpu") == [
        "| against | KL, ours / theirs | decode 1 | decode 16 | prompt 512 | block 32 |",
        "|---|---|---|---|---|---|",
        "| llama.cpp Q8_0 | 6 / 4.4 | less faithful: 20.0 / 30.0 ms |  |  | less faithful: 20.0 / 100.0 ms |",
        "| OpenVINO int8, ours `w8r` | 5.6 / not measured |  |  | 1.5 |  |",
        "",
        "2 threads of an AMD EPYC, Qwen2.5-0.5B shape, records of 2026-11-28.",
    ]


def test_it_is_put_between_the_marks_as_often_as_one_likes(tmp_path: Path) -> None:
    write(tmp_path, "llama.cpp", "Q8_0", "Q8_0", "decode, batch 1", ours=0.02, peer=0.03)
    readme = tmp_path / "README.md"
    readme.write_text("before\n")
    assert not write_summary(readme, tmp_path / "cpu")
    assert readme.read_text() == "before\n"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert write_summary(readme, tmp_path / "cpu")
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| llama.cpp Q8_0 | not measured | 1.5 |") == 1


def test_all_that_shows_the_figures_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "cpu").mkdir(parents=True)
    results = tmp_path / "benchmarks" / "cpu" / "RESULTS.md"
    assert refresh(results.parent) == [results]
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert refresh(results.parent) == [results, readme]
    assert results.exists()
    assert "| against |" in readme.read_text()


def test_readme_says_what_the_records_say() -> None:
    """Whoever makes a record anew makes the report too."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert table.strip() == "\n".join(summary(ROOT / "benchmarks" / "cpu"))
