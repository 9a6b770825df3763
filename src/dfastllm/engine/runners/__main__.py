"""python -m dfastllm.engine.runners FILE --model MODEL [--runner native|torch]: replay a recorded run, and say how far
the logits are from the recorded ones. Exit status 1 when they are further than --within."""

from __future__ import annotations

import argparse
import sys

import torch

from dfastllm import assemble
from dfastllm.engine.runners import runner_for
from dfastllm.engine.runners.record import Recording, difference, replay
from dfastllm.errors import DFastLLMError, ValidationError
from dfastllm.lora import Adapter, Base, read_adapter
from dfastllm.models import adapter_base

KV = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dfastllm.engine.runners", description=__doc__)
    parser.add_argument("file", help="what DFASTLLM_RECORD_STEPS wrote")
    parser.add_argument("--model", required=True, help="the model's directory or GGUF file")
    parser.add_argument("--runner", choices=("native", "torch"), default="native")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16; default as stored")
    parser.add_argument(
        "--lora",
        metavar="NUMBER=DIR",
        action="append",
        default=[],
        help="the adapter of a number of the steps; repeatable",
    )
    parser.add_argument("--within", type=float, default=1e-4, help="largest difference of a logit; default 1e-4")
    given = parser.parse_args()
    try:
        recording = Recording(given.file)
        model = assemble.load(given.model, device=given.device, dtype=given.dtype, backend=given.runner).model
        slots = 1 + max((int(step.slot.max(initial=0)) for step, _ in recording), default=0)
        size = next((step.block_size for step, _ in recording), 16)
        kv = KV.get(recording.header["kv"])
        if kv is None:
            raise ValidationError(f"{given.file} has K,V of {recording.header['kv']!r}; known: {', '.join(KV)}.")
        runner = runner_for(model, -(-slots // size) * size, kv, given.device, 16, size)
        if given.lora:
            runner.adapters(_table(given.lora, adapter_base(model)))
        steps, rows, worst = 0, 0, 0.0
        for step, wanted, got in replay(recording, runner):
            steps, rows = steps + 1, rows + len(step)
            worst = max(worst, difference(wanted, got))
    except (DFastLLMError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{steps} steps, {rows} rows: {f'logits differ by up to {worst:.3g}' if worst else 'the same bits'}")
    if not steps:
        print("error: the file holds no step.", file=sys.stderr)
        return 2
    return 0 if worst <= given.within else 1


def _table(pairs: list[str], base: Base) -> list[Adapter | None]:
    """NUMBER=DIR by number. Raises ValidationError, AdapterError."""
    table: list[Adapter | None] = [None]
    for pair in pairs:
        number, mark, path = pair.partition("=")
        if not mark or not number.isdigit() or not 0 < int(number) < 1 << 16:
            raise ValidationError(f"--lora must be NUMBER=DIR with a number from 1 on, got {pair!r}.", param="lora")
        table += [None] * (int(number) + 1 - len(table))
        table[int(number)] = read_adapter(path, base)
    return table


if __name__ == "__main__":
    sys.exit(main())
