"""`python -m tests.soak`, which scripts/soak runs: options in, a table out, exit code 1 where something is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from tests.soak.soak import HEALTH, Plan, Result, soak

WIDTH = 80
SHOWN = 3  # of each kind of fault


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of traffic after the warm-up (default: 20)")
    parser.add_argument("--clients", type=int, default=12, help="that ask at a time (default: 12)")
    parser.add_argument("--questions", type=int, default=90, help="different requests (default: 90)")
    parser.add_argument("--threads", type=int, default=2, help="of the server's forward passes (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of questions and of what is done with them (default: 1)")
    given = parser.parse_args()
    plan = Plan(
        seconds=given.minutes * 60,
        warm=min(60.0, max(10.0, given.minutes * 60 * 0.15)),
        questions=given.questions,
        clients=given.clients,
        threads=given.threads,
        seed=given.seed,
    )
    result = soak(plan, lambda text: print(text, file=sys.stderr, flush=True))
    print("\n".join(table(result)))
    return 1 if result.faults() else 0


def table(result: Result) -> Iterator[str]:
    """The figures, in lines of at most 80 columns."""
    found, before, after = result.found, result.before, result.after
    health = sorted(result.health) or [float("nan")]

    def at(part: float) -> str:
        return f"{health[min(len(health) - 1, int(part * len(health)))] * 1000:.1f}"

    asked = ", ".join(f"{count} {way}" for way, count in found.asked.most_common())
    attacks = ", ".join(f"{count} {name}" for name, count in result.attacks.most_common())
    rows = [
        ("seconds", f"{result.seconds:.0f}"),
        ("asked", f"{found.asked.total()}: {asked}"),
        ("attacks", f"{result.attacks.total()}: {attacks}"),
        ("compared", f"{found.compared} answers with what each is alone"),
        ("differ, lost, failed", f"{len(found.differ)}, {len(found.lost)}, {len(found.failed)}"),
        ("attacks not met", f"{len(result.at_fault)}"),
        ("cancelled, refused", f"{found.cancelled}, {found.refused} (429, 503)"),
        ("preemptions", f"{result.preemptions:.0f}"),
        ("/health, ms", f"p50 {at(0.5)}, p99 {at(0.99)}, slowest {at(1)} of {len(health)} (bound {HEALTH * 1000:.0f})"),
        ("memory, MB", f"{before.rss:.0f} after warm-up, {after.rss:.0f} at the end"),
        ("files, threads", f"{before.files}, {before.threads}; at the end {after.files}, {after.threads}"),
        ("lines of /metrics", f"{before.series}; at the end {after.series}"),
        ("running, waiting, pages", f"{after.busy:g}; connections {after.connections:g}"),
        ("server's log", f"{result.log_bytes} bytes"),
    ]
    for name, text in rows:
        yield from _wrapped(name, text)
    for kind in (found.differ, found.lost, found.failed, result.at_fault, result.slow):
        yield from (f"! {text}" for text in kind[:SHOWN])
    faults = result.faults()
    yield "bad: " + "; ".join(faults) if faults else "good"


def _wrapped(name: str, text: str) -> Iterator[str]:
    line = f"{name:<25}"
    for word in text.split(" "):
        if len(line) + len(word) + 1 > WIDTH:
            yield line.rstrip()
            line = " " * 25
        line += word + " "
    yield line.rstrip()


if __name__ == "__main__":
    sys.exit(main())
