"""The whole training loop with every feature for speed, against a teacher that is mocked: no model answers, no call
leaves this process. tests/distill/test_end_to_end.py does the same with a real teacher.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dfastllm.distill.config import parse_config
from dfastllm.distill.run import run_distillation
from dfastllm.errors import ValidationError
from dfastllm.tasks import draw
from dfastllm.train.log import read_log
from tests.kit import distilled

ANSWERS = {
    sample.messages[-1]["content"]: sample.response
    for split in ("train", "validation")
    for task in ("tools", "arithmetic")
    for sample in (draw(split, 0, index, task) for index in range(40))  # type: ignore[arg-type]
}


@contextmanager
def mock_teacher() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A chat endpoint that gives each question its expected answer, without log-probabilities; its URL and what it was
    asked."""
    asked: list[dict[str, Any]] = []

    class Mock(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body)
            text = ANSWERS.get(body["messages"][-1]["content"], "I do not know.")
            message = {"role": "assistant", "content": text}
            reply = {
                "id": "mock",
                "object": "chat.completion",
                "created": 0,
                "model": "mock",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
            }
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Mock) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("loop")
    train, held_out = distilled.prompts(place, 16)
    with mock_teacher() as (url, asked):
        raw = distilled.settings(
            data={"generate": None, "train": [str(train)], "validation": [str(held_out)]},
            train={"steps": 5, "val_every": 5, "save_every": 2},
            kd={"teacher": {"base_url": url, "model": "mock", "top_logprobs": 0}},
            speed={"length_kd_mode": "survival", "measure": 1},
            eval={"samples": 0},
        )
        run_distillation(parse_config(raw), place / "run", threads=1, say=lambda line: None)
    return place / "run", asked


def figures(home: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(home / "log.jsonl") if "event" not in line]


def test_every_prompt_is_asked_once(run: tuple[Path, list[dict[str, Any]]]) -> None:
    home, asked = run
    rows = sum(
        len((home / "data" / f"{name}.answers.jsonl").read_text().splitlines()) - 1 for name in ("train", "validation")
    )
    assert len(asked) == rows == 28
    assert all(body["model"] == "mock" and "logprobs" not in body for body in asked)


def test_losses_of_all_features_are_computed(run: tuple[Path, list[dict[str, Any]]]) -> None:
    for line in figures(run[0]):
        names = {name for name in line if name.startswith("loss.")}
        assert {"loss.ce_teacher", "loss.ce_ground_truth", "loss.length_kd", "loss.early_tool"} <= names
        assert "loss.kl_div" not in names  # this teacher tells no log-probabilities
        assert math.isfinite(line["loss"])
        assert line["loss"] == pytest.approx(sum(line[name] for name in names), abs=1e-4)


def test_metrics_are_logged(run: tuple[Path, list[dict[str, Any]]]) -> None:
    last = figures(run[0])[-1]
    assert {"validation_loss", "validation_ce", "task.exact_match", "speed.ttft_ms.p50", "speed.tps.p50"} <= last.keys()
    assert {"grad_norm", "tokens", "samples", "lr", "lr_factor"} <= last.keys()
    assert (run[0] / "tensorboard").is_dir()


def test_checkpoints_are_saved(run: tuple[Path, list[dict[str, Any]]]) -> None:
    home = run[0]
    assert sorted(path.name for path in home.glob("step-*")) == ["step-4", "step-5"]
    files = {path.name for path in (home / "step-5").iterdir()}
    assert files == {"weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}
    state = json.loads((home / "step-5" / "state.json").read_text())
    assert state["step"] == 5
    assert state["work"]["qat"]["enabled"]
    assert (home / "tiny" / "model.safetensors").is_file()


def test_a_configuration_that_is_wrong_stops_before_the_teacher_is_asked(tmp_path: Path) -> None:
    with mock_teacher() as (url, asked):
        raw = distilled.settings(kd={"teacher": {"base_url": url, "model": "mock"}, "kl_weight": -1})
        with pytest.raises(ValidationError, match="kl_weight"):
            run_distillation(parse_config(raw), tmp_path)
    assert asked == []
