"""The process in which `sides` measures another commit: run as a file, not imported, with that commit's source tree as
its argument. Uses only what every commit has: LLM, SamplingParams, render, generate.

One JSON object per line in, one out: {"op": "load", model, prompts, max_tokens}, then {"op": "once"} as often as
wanted, whose result is seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

__all__ = ["main"]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    source = sys.argv[1]
    # An editable installation redirects the package's name before any path is looked at.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
    sys.path.insert(0, source)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            result = _load(state, source, asked) if asked["op"] == "load" else _once(state)
            answer = {"ok": True, "result": result}
        except Exception as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _load(state: dict[str, Any], source: str, asked: dict[str, Any]) -> str:
    import dfastllm
    from dfastllm.core import DecodeParams, SamplingParams
    from dfastllm.llm import LLM

    where = os.path.realpath(dfastllm.__file__)
    if not where.startswith(os.path.realpath(source)):
        raise RuntimeError(f"loaded {where}, which is not the commit's")
    llm = LLM(asked["model"])
    state["llm"] = llm
    state["prompts"] = [llm.render(messages) for messages in asked["prompts"]]
    tokens = asked["max_tokens"]
    state["sampling"] = SamplingParams(temperature=0.0, max_tokens=tokens)
    canvas = llm.info.kind == "diffusion"  # every option said: the two commits' defaults may differ
    state["decode"] = DecodeParams(cache="dual", block_length=32, steps=-(-tokens // 32) * 32) if canvas else None
    return where


def _once(state: dict[str, Any]) -> float:
    began = time.perf_counter()
    for prompt in state["prompts"]:
        state["llm"].generate([prompt], state["sampling"], state["decode"])
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
