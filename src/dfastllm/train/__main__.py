"""`python -m dfastllm.train NAME [--out DIR] [--threads N] [--device D] [--steps N] [--runs DIR]`."""

from __future__ import annotations

import argparse

from dfastllm.train.loop import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dfastllm.train", description="Train a recipe; resumes by itself.")
    parser.add_argument("recipe", help="a recipe's name or a JSON file")
    parser.add_argument("--out", help="export a Hugging Face directory here at the end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="stop early at this step")
    parser.add_argument("--runs", default="runs", help="where working files go")
    args = parser.parse_args()
    print(run(args.recipe, out=args.out, threads=args.threads, device=args.device, steps=args.steps, runs=args.runs))


if __name__ == "__main__":
    main()
