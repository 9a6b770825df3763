"""Compile the GPU's kernels without a GPU: Triton brings an assembler of its own. What the interpreter lets pass and a
compiler does not shows here, and so do tiles whose registers spill.

usage: python -m scripts.gpu_compile [--arch 90] [--only attention rows linear head experts adapters] [--spills 192]

Every op runs at shapes of real models, its launches stopped behind the compiler. A line each: registers of a thread,
bytes that spill onto its stack, bytes of shared memory, and how products are made. Exit code 1 where one does not
compile, spills more bytes than allowed, or wants more shared memory than such a GPU has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.backends.nvidia
from tests.kit.interpreter import step_of
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dfastllm.kernels.packed import FORMS
from dfastllm.kernels.triton import attention, experts, head, laid, linear, low_rank, rows
from dfastllm.kernels.triton.kv import DeviceKv
from dfastllm.kernels.triton.weight import CHUNK, Weight

__all__ = ["main"]

CPU = torch.device("cpu")
FORMATS = ("f32", "bf16", "fp8", "w8", "w8g", "w4g", "w4m", "w6g", "w6m")
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SHAPES = {"qwen2-0.5b": (14, 2, 64), "qwen2-7b": (28, 4, 128), "llada-8b": (32, 32, 128), "gemma2-9b": (16, 8, 256)}
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes that a program may have
DUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


class Target:
    """What Triton asks of a driver, of a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Record:
    """Takes the launches: compiles, prints, counts what is wrong."""

    def __init__(self, spills: int, shared: int) -> None:
        self.title, self.wrong, self.spills, self.shared = "", 0, spills, shared
        self.compile: Callable[..., Any] = JITFunction.run

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = f"{self.title:44} {kernel.fn.__name__:12}"
        try:
            made = self.compile(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            self.wrong += 1
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            print(f"{name} DOES NOT COMPILE: {str(cause)[-600:]}", flush=True)
            return
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            told = subprocess.run(
                [DUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            )
        line = next(line for line in told.stdout.splitlines() if "REG:" in line)
        used = dict(part.split(":", 1) for part in line.split() if ":" in part)
        spilt, shared = int(used["STACK"]), made.metadata.shared
        bad = spilt > self.spills or shared > self.shared
        self.wrong += bad
        code = made.asm["ptx"]
        how = "wgmma" if "wgmma" in code else "mma" if "mma.sync" in code else "-"
        shared, warps = made.metadata.shared, made.metadata.num_warps
        print(
            f"{name} registers {used['REG']:>3} spilt {spilt:>4} shared {shared:>6} warps {warps:>2} {how}", flush=True
        )


def each_attention(record: Record) -> None:
    kinds = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    for name, (heads, kv_heads, dim) in SHAPES.items():
        more = [(torch.float8_e4m3fn, torch.bfloat16), (torch.int8, torch.bfloat16)] if name == "qwen2-7b" else []
        group = heads // kv_heads
        for (kv_type, dtype), height, steady in (
            (kind, height, steady) for kind in kinds + more for height in (16, 64) for steady in (False, True)
        ):
            tall = max(1, height // group)
            step = step_of([(tall, 1000, True)])
            kv = DeviceKv(1, 16 * len(step.blocks), kv_heads, dim, kv_type, CPU).layer(0)
            qkv = torch.zeros(len(step), (heads + 2 * kv_heads) * dim, dtype=dtype)
            facts = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "scale": dim**-0.5, "invariant": steady}
            facts |= {"window": 500, "softcap": 50.0} if name == "gemma2-9b" else {}
            title = f"{name} {tall} rows K {_short(kv_type)} q {_short(dtype)}" + " invariant" * steady
            for split in (False, True) if not steady else (False,):
                record.title = title + " split" * split
                attention.attention(qkv, kv, laid.on(CPU, step, tall), **facts, split=split)


def each_rows(record: Record) -> None:
    for k in (896, 3584, 8192):
        for kind in rows.KINDS:
            record.title = f"{kind} of {k}"
            more = torch.zeros(2, k, dtype=torch.bfloat16)
            rows.add_norm(torch.zeros(2, k), more, torch.ones(k), 1e-6, kind=kind, post=(torch.ones(k), 1e-6))
            rows.gate(torch.zeros(2, 6 * k, dtype=torch.bfloat16), "gelu_tanh", kind)
    record.title = "turned in stretches of 256"
    rows.gate(torch.zeros(2, 2 * 18944), "silu", "row8", block=256)
    step = step_of([(2, 100, True)])
    for kv_type in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        for name, (heads, kv_heads, dim) in SHAPES.items():
            for half, norm in ((dim // 2, 0), (dim // 4, dim), (dim // 2, heads * dim), (0, 0)):
                record.title = f"{name} K {_short(kv_type)} rotated {2 * half} norm {norm}"
                kv = DeviceKv(1, 16 * len(step.blocks), kv_heads, dim, kv_type, CPU).layer(0)
                qkv = torch.zeros(2, (heads + 2 * kv_heads) * dim, dtype=torch.bfloat16)
                angles = [torch.zeros(2, half) if half else None] * 2
                k_norm = torch.ones(norm if norm <= dim else kv_heads * dim) if norm else None
                facts = {"q_norm": torch.ones(norm) if norm else None, "k_norm": k_norm, "eps": 1e-6}
                facts |= {"heads": heads, "kv_heads": kv_heads, "dim": dim}
                rows.rope_write(qkv, laid.on(CPU, step, 2), *angles, kv, **facts)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(n: int, k: int, *many: int) -> Iterator[tuple[str, str, Weight]]:
    """(name, how it wants its inputs, a weight) of every format; many: so many of them in one."""
    for name in FORMATS:
        format = {"w4m": "w4g", "w6m": "w6g"}.get(name, name)
        if name in FLOATS:
            side = torch.empty(*many, n) if name == "fp8" else None
            yield name, name, Weight(name, n, k, torch.empty(*many, n, k, dtype=FLOATS[name]), side)
            continue
        form = FORMS[format]
        wide = {"w8": k, "w8g": k}.get(format, -(-k // CHUNK) * CHUNK * form.bits // 8)
        data = torch.empty(*many, n, wide, dtype=torch.int8 if wide == k else torch.uint8)
        shape = (*many, k // form.group, n) if form.group else (*many, n)
        sides = torch.empty(shape, dtype=torch.float16 if form.group else torch.float32)
        yield name, form.inputs, Weight(format, n, k, data, sides, sides if name.endswith("m") else None)


def each_linear(record: Record) -> None:
    for n, k in ((3584, 18944), (37888, 3584)):
        for name, kind, weight in _weights(n, k):
            for count in (1, 32, 64, 256) if kind in ("row8", "group8") else (1,):
                record.title = f"{name} {n} x {k}, {count} rows"
                x = rows.empty(kind, count, k, CPU)
                linear.linear(x, weight, torch.zeros(n), out=torch.float32, invariant=True)


def each_head(record: Record) -> None:
    sets, which = torch.zeros(1, 19008, dtype=torch.uint8), torch.zeros(64, dtype=torch.int32)
    for name, kind, weight in _weights(152064, 896):
        for count, top in ((1, 0), (64, 8)):
            record.title = f"{name}, {count} rows, the best {top}"
            x = rows.empty(kind, count, 896, CPU)
            asked = {"barred": sets, "which": which, "cap": 30.0} if top else {}
            head.head_stats(x, weight, ban=torch.tensor([-1]), top=top, **asked)


def each_experts(record: Record) -> None:
    for count in (1, 64, 512):
        for (name, kind, gated), (_, _, down) in zip(_weights(192, 2048, 128), _weights(2048, 96, 128), strict=True):
            record.title = f"{name}, {count} rows, 8 of 128 experts"
            chosen = torch.zeros(count, 8, dtype=torch.int32)
            x = rows.empty(kind, count, 2048, CPU)
            experts.experts(x, chosen, torch.zeros(count, 8), gated, down, kind=kind)


def each_adapters(record: Record) -> None:
    record.title = "rank 16, 3584 inputs"
    x, number = torch.zeros(4, 3584, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32)
    a = torch.zeros(3, 16, 3584, dtype=torch.bfloat16)
    low_rank.add_low_rank(x.clone(), x, number, a, a, torch.zeros(3), torch.ones(3, 3584), torch.ones(3, 3584))


PARTS = {name.removeprefix("each_"): part for name, part in list(globals().items()) if name.startswith("each_")}


def main(argv: list[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_compile")
    parser.add_argument("--arch", type=int, default=90, choices=SHARED, help="compute capability, such as 90 for 9.0")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--spills", type=int, default=192, help="bytes of a thread that may spill")
    asked = parser.parse_args(argv)
    driver.set_active(Target(asked.arch))
    record = Record(asked.spills, SHARED[asked.arch])
    JITFunction.run = lambda kernel, *args, **options: record(kernel, *args, **options)
    print(f"triton {triton.__version__}, compute capability {asked.arch / 10}")
    with torch.inference_mode():
        for name in asked.only:
            PARTS[name](record)
    print(f"{record.wrong} wrong")
    return int(record.wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
