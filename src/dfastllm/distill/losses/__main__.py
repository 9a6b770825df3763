"""`python -m dfastllm.distill.losses`: the memory that the losses take beyond their inputs and the gradient.

Each form runs in a process of its own, with more and more rows: a chunked form takes the same for all of them. Reads
the peak of the resident memory (on CUDA the allocator's), and prints a table. `--plain` adds the same loss written
plainly in torch, which holds several arrays of the logits' size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.distill.losses import Hidden, Sparse, Student, combined_kd_loss

TOP = 20  # ids that the sparse teacher lists
WARM: list[int] = []  # the peak before the first measured pass


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dfastllm.distill.losses", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048], help="rows (tokens), ascending")
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--hidden", type=int, default=896, help="width of the hidden rows of form hidden")
    parser.add_argument("--chunk", type=int, default=None, help="rows of a chunk; the losses' own by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=["dense", "sparse", "hidden"])
    parser.add_argument("--plain", action="store_true", help="also the form plain")
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # measure in this process
    given = parser.parse_args()
    if given.here:
        for rows in sorted(given.rows):
            print(json.dumps(measure(given.forms[0], rows, given)), flush=True)
        return
    if not given.json:
        print(f"{given.vocab:,} ids, {given.dtype}, {given.device}; MB")
        print(f"{'form':8} {'rows':>6} {'inputs':>8} {'gradient':>8} {'beyond':>8} {'seconds':>8}")
    for form in [*given.forms, *(["plain"] if given.plain else [])]:
        command = [sys.executable, "-m", "dfastllm.distill.losses", *passed_on(given), "--forms", form, "--here"]
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for line in process.stdout.splitlines():
            found = json.loads(line)
            print(line if given.json else row(found), flush=True)


def passed_on(given: argparse.Namespace) -> list[str]:
    """The arguments of the measuring process."""
    chunk = [] if given.chunk is None else ["--chunk", str(given.chunk)]
    sizes = ["--vocab", str(given.vocab), "--hidden", str(given.hidden), "--rows", *map(str, given.rows)]
    return [*sizes, *chunk, "--dtype", given.dtype, "--device", given.device]


def row(found: dict[str, float | str]) -> str:
    sizes = " ".join(f"{float(found[name]) / 1e6:8.1f}" for name in ("inputs", "gradient", "beyond"))
    return f"{found['form']:8} {found['rows']:6} {sizes} {found['seconds']:8.1f}"


def measure(form: str, rows: int, given: argparse.Namespace) -> dict[str, float | str]:
    """Bytes of inputs and gradient of one forward and backward pass, and what the peak holds beside them."""
    dtype = getattr(torch, given.dtype)
    before = peak(given.device)
    if not WARM:  # what the first pass loads is not what a pass takes
        FORMS[form](*inputs(form, 2, 64, 8, dtype, given.device), 1)
        WARM.append(max(before, peak(given.device)))
    tensors = inputs(form, rows, given.vocab, given.hidden, dtype, given.device)
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    begun = time.perf_counter()
    FORMS[form](*tensors, given.chunk)
    seconds = time.perf_counter() - begun
    sizes = [sum(tensor.nbytes for tensor in some) for some in (tensors, trained)]
    assert all(tensor.grad is not None for tensor in trained)
    beyond = peak(given.device) - WARM[0] - sum(sizes)
    return {"form": form, "rows": rows, "inputs": sizes[0], "gradient": sizes[1], "beyond": beyond, "seconds": seconds}


def peak(device: str) -> int:
    """Bytes of the largest resident memory of this process so far; on CUDA of what was allocated."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # what getrusage says may be the parent's
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def inputs(form: str, rows: int, vocab: int, hidden: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Targets, then what the form takes, all of it wanted by the loss."""

    def numbers(a: int, b: int) -> Tensor:  # an outer product, for randn would take longer than the loss
        x, y = torch.randn(a, dtype=dtype, device=device), torch.randn(b, dtype=dtype, device=device)
        return torch.outer(x, y)

    targets = torch.arange(rows, device=device) % vocab
    listed = [torch.arange(TOP, device=device).repeat(rows, 1), torch.full((rows, TOP), -4.0, device=device)]
    if form == "hidden":
        return [targets, numbers(rows, hidden).requires_grad_(), numbers(vocab, hidden).requires_grad_(), *listed]
    logits = numbers(rows, vocab).requires_grad_()
    return [targets, logits, *(listed if form == "sparse" else [numbers(rows, vocab)])]


def combined(student: Student, teacher: Tensor | Sparse, targets: Tensor, chunk: int | None) -> None:
    losses = combined_kd_loss(student, teacher, targets, targets, targets, chunk=chunk)
    losses["total"].backward()  # type: ignore[no-untyped-call]


def dense(targets: Tensor, logits: Tensor, teacher: Tensor, chunk: int | None) -> None:
    combined(logits, teacher, targets, chunk)


def sparse(targets: Tensor, logits: Tensor, ids: Tensor, logprobs: Tensor, chunk: int | None) -> None:
    combined(logits, Sparse(ids, logprobs), targets, chunk)


def hidden(targets: Tensor, rows: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, chunk: int | None) -> None:
    combined(Hidden.linear(rows, weight), Sparse(ids, logprobs), targets, chunk)


def plain(targets: Tensor, logits: Tensor, teacher: Tensor, chunk: int | None) -> None:
    """The loss of `dense` as it is usually written."""
    log_q = F.log_softmax(logits.float() / 2, -1)
    log_p = F.log_softmax(teacher.float() / 2, -1)
    loss = 0.4 * 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    for weight in (0.2, 0.2, 0.15):
        loss = loss + weight * F.cross_entropy(logits.float(), targets)
    loss.backward()  # type: ignore[no-untyped-call]


FORMS: dict[str, Callable[..., None]] = {"dense": dense, "sparse": sparse, "hidden": hidden, "plain": plain}

if __name__ == "__main__":
    main()
