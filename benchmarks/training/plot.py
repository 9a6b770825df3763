"""Training curves: per demo model a PNG, and the log lines that hold a validation loss as JSONL.

Run: python benchmarks/training/plot.py [RUNS].
Reads RUNS/<recipe>/log.jsonl (default: runs) of each model and of the stages it started from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
STAGES = {
    "demo-draft": ["demo-draft"],
    "demo-ar": ["demo-draft", "demo-ar-base", "demo-ar"],
    "demo-diffusion": ["demo-draft", "demo-ar-base", "demo-block", "demo-diffusion-base", "demo-diffusion"],
    "demo-block": ["demo-draft", "demo-ar-base", "demo-block"],
}


def lines_of(log: Path) -> list[dict[str, float]]:
    """One line per step: a resumed run repeats those after its checkpoint, with the same values."""
    by_step = {line["step"]: line for line in map(json.loads, log.read_text().splitlines())}
    return [by_step[step] for step in sorted(by_step)]


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    for model, stages in STAGES.items():
        logs = {
            stage: lines_of(runs / stage / "log.jsonl") for stage in stages if (runs / stage / "log.jsonl").exists()
        }
        figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
        before = 0.0
        for stage, lines in logs.items():
            tokens = [(before + line["tokens"]) / 1e6 for line in lines]
            (drawn,) = axis.plot(tokens, [line["loss"] for line in lines], alpha=0.35, linewidth=0.8)
            held = [
                (t, line["validation_loss"]) for t, line in zip(tokens, lines, strict=True) if "validation_loss" in line
            ]
            axis.plot(*zip(*held, strict=True), "o-", color=drawn.get_color(), markersize=3, label=stage)
            before += lines[-1]["tokens"]
        axis.set(xlabel="million rows (padding and canvas included)", ylabel="loss, nats", yscale="log", title=model)
        axis.legend(title="dots: validation")
        figure.savefig(HERE / f"{model}.png", dpi=80)
        plt.close(figure)
        kept = [
            {"stage": stage, **line} for stage, lines in logs.items() for line in lines if "validation_loss" in line
        ]
        (HERE / f"{model}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


if __name__ == "__main__":
    main()
