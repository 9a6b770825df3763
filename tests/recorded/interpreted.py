"""Every recorded run whole, by the kernels under Triton's interpreter: `python -m tests.recorded.interpreted [FAMILY]`
with TRITON_INTERPRET=1. Takes about an hour of a core; the suite replays the first steps of a few. Exit code 1 where a
logit is more than 1e-4 from the recorded one."""

from __future__ import annotations

import sys
import time

from dfastllm.engine.runners.record import Recording
from tests.kit.device import NO_TRITON, runner_of
from tests.recorded.runs import Run, runs
from tests.recorded.test_recorded import SLOTS, worst

__all__ = ["main"]


def main(families: list[str]) -> int:
    if NO_TRITON is not None:
        print(NO_TRITON, file=sys.stderr)
        return 2
    wrong = 0
    for run in runs():
        if families and run.family not in families:
            continue
        began = time.monotonic()
        runner = runner_of(Run(run.family, native=False).model(), "kernels", SLOTS)
        most, _ = worst(Recording(run.path), runner)
        wrong += not most <= 1e-4
        print(f"{run.family}: within {most:.2g}, {time.monotonic() - began:.0f} s, {dict(runner.counts)}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
