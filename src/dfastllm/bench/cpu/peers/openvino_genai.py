"""OpenVINO worker: makes int8 and int4 IR of a random model and times its forwards and its continuous batching.

The IR is optimum-intel's export with NNCF weight compression, the usual road of an OpenVINO user. Single-sequence
measures infer the stateful IR itself (K,V in its states, any rows' logits); concurrent decodes go through
openvino-genai's ContinuousBatchingPipeline, one `step` per sample. K,V precision, dynamic quantisation and the
inference precision are OpenVINO's own defaults for the processor."""

# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, arg-type"
from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .serve import serve_session, timed

__all__ = ["main"]


# What NNCF is asked for. int8: per channel; int4: symmetric, groups of 128, all layers.
COMPRESSION: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0},
}


def make(shape: dict[str, Any], directory: str, formats: list[str], seed: int) -> dict[str, int]:
    """Write one IR directory per format of COMPRESSION under `directory`. Returns bytes of weights per format."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    root = Path(directory)
    source = root / "source"
    sizes = {}
    for name in formats:
        target = root / name
        if not (target / "done").exists():
            if not (source / "config.json").exists():
                torch.manual_seed(seed)
                with torch.device("cpu"):
                    model = Qwen2ForCausalLM(Qwen2Config(**shape)).to(torch.bfloat16)
                model.save_pretrained(source)
                del model
            export(str(source), str(target), name)
        sizes[name] = (target / "openvino_model.bin").stat().st_size
    shutil.rmtree(source, ignore_errors=True)
    return sizes


def export(source: str, target: str, form: str) -> None:
    """Write the IR of the Hugging Face directory `source`, compressed to a format of COMPRESSION, into `target`."""
    from optimum.intel.openvino import OVModelForCausalLM, OVWeightQuantizationConfig

    config = OVWeightQuantizationConfig(**COMPRESSION[form])
    exported = OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=config)
    exported.save_pretrained(target)
    del exported
    gc.collect()
    (Path(target) / "done").touch()


class Session:
    """One IR at one thread count: the stateful model with all rows' logits, and its twin with the last row's."""

    def __init__(self) -> None:
        self.requests: dict[bool, Any] = {}
        self.directory = Path()
        self.threads = 0
        self.vocab = 0
        self.pipeline: Any = None

    def load(self, directory: str, threads: int) -> dict[str, Any]:
        """Forget what was loaded; models are compiled when a measure first needs them."""
        import openvino
        import openvino_genai

        self.requests.clear()
        self.pipeline = None
        gc.collect()
        self.directory, self.threads = Path(directory), threads
        described = openvino.Core().read_model(self.directory / "openvino_model.xml")
        self.vocab = int(described.output("logits").partial_shape[-1].get_length())
        return {"openvino": openvino.get_version(), "openvino_genai": openvino_genai.__version__}

    def _request(self, every_row: bool) -> Any:
        """Infer request of the IR giving logits of every row or of the last one only (the head sees one row)."""
        if every_row in self.requests:
            return self.requests[every_row]
        import openvino
        from openvino import opset13 as ops

        core = openvino.Core()
        model = core.read_model(self.directory / "openvino_model.xml")
        head = model.output("logits").node.input_value(0).node  # the head's MatMul, behind Result
        if not every_row:
            hidden = head.input_value(0)
            last = ops.gather(hidden, np.array([-1], dtype=np.int64), np.array(1, dtype=np.int64))
            head.input(0).replace_source_output(last.output(0))
        compiled = core.compile_model(
            model, "CPU", {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
        )
        self.requests[every_row] = compiled.create_infer_request()
        return self.requests[every_row]

    def _infer(self, request: Any, ids: np.ndarray, start: int) -> None:
        n = len(ids)
        request.infer(
            {
                "input_ids": ids[None],
                "attention_mask": np.ones((1, start + n), dtype=np.int64),
                "position_ids": np.arange(start, start + n, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )

    def _ids(self, n: int) -> np.ndarray:
        return np.random.default_rng(n).integers(0, self.vocab, n, dtype=np.int64)

    def forward(self, rows: int, cached: int, repeats: int, every_row: bool, grow: bool) -> list[float]:
        """Seconds of `repeats` forwards of `rows` tokens after `cached` positions. grow: K,V stay, so each forward is
        the next decode step (with its argmax); else the states are set back outside the clock."""
        request = self._request(every_row)
        ids = self._ids(cached + rows)
        request.reset_state()
        if cached:
            self._infer(request, ids[:cached], 0)
        position = cached
        saved = None
        if cached and not grow:
            import openvino

            saved = [openvino.Tensor(np.array(state.state.data)) for state in request.query_state()]

        def step() -> None:
            nonlocal position
            self._infer(request, ids[cached:], position)
            if grow:
                int(request.get_tensor("logits").data[0, -1].argmax())
                position += rows

        def undo() -> None:
            if saved is None:
                if not grow:
                    request.reset_state()
                return
            for state, value in zip(request.query_state(), saved, strict=True):
                state.state = value

        return timed(step, repeats, undo)

    def logits(self, ids: list[int], path: str) -> int:
        """Write the logits of every position of one forward of `ids` to `path`, float32 as they lie in memory. Returns
        the width of a row."""
        request = self._request(True)
        request.reset_state()
        self._infer(request, np.array(ids, dtype=np.int64), 0)
        found = request.get_tensor("logits").data[0].astype(np.float32)
        found.tofile(path)
        return int(found.shape[1])

    def concurrent(self, sequences: int, cached: int, repeats: int) -> list[float]:
        """Seconds of `repeats` steps of continuous batching, each one greedy token for every one of `sequences`."""
        import openvino
        import openvino_genai

        if self.pipeline is None:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.cache_size = 1
            scheduler.max_num_seqs = 64
            scheduler.max_num_batched_tokens = 4096  # all prompts in one step: the sequences then decode in step
            scheduler.enable_prefix_caching = True  # the same prompts every time: only the first pays for them
            self.pipeline = openvino_genai.ContinuousBatchingPipeline(
                str(self.directory), scheduler, "CPU", {"INFERENCE_NUM_THREADS": self.threads}
            )
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = repeats + 8
        config.eos_token_id = self.vocab - 1
        config.stop_token_ids = {self.vocab - 1}
        config.ignore_eos = True
        handles = []
        for i in range(sequences):
            ids = np.random.default_rng(i).integers(0, self.vocab, (1, cached), dtype=np.int64)
            handles.append(self.pipeline.add_request(i, openvino.Tensor(ids), config))
        waiting = handles
        while waiting:  # until every prompt is in the cache and has its first token
            self.pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        seconds = timed(self.pipeline.step, repeats)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        return seconds


def main() -> None:
    session = Session()
    serve_session(make, session, export=export, logits=session.logits)


if __name__ == "__main__":
    main()
