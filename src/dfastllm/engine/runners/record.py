"""Recorded runs: every step that a runner ran from empty K,V on, with the logits of the wanted rows, in one file.

A recorded run replays on any runner of the same model, so a new runner, a new kernel or another machine can be held to
the numbers of the one that recorded. DFASTLLM_RECORD_STEPS=FILE records what an engine runs; a second model of the
same process (one that drafts) records into FILE.2, and so on. `python -m dfastllm.engine.runners FILE --model MODEL`
replays.

The file: a line that names the format, a header (length as 4 bytes, then JSON), and for every step its words and the
logits, each with its length before it, and the CRC-32 of both and of all steps before. At the end, where the next step
overwrites it, a mark: two zeros and how many steps there are, so that a file cut between two steps is known. Everything
little endian. Nothing in it is executed.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dfastllm.core import ModelInfo
from dfastllm.errors import ValidationError
from dfastllm.kernels.extension import native
from dfastllm.kernels.step import Step

if TYPE_CHECKING:
    from dfastllm.engine.runners import Runner
    from dfastllm.kernels.rows import Rows

__all__ = ["Recorder", "Recording", "difference", "recorded", "replay"]

FORMAT = b"dfastllm recorded steps 2\n"
VARIABLE = "DFASTLLM_RECORD_STEPS"
MOST_HEADER = 1 << 20
_counter = itertools.count(1)

Floats = NDArray[np.float32]


def recorded(runner: Runner, **about: Any) -> Runner:
    """The runner itself, or one that records where DFASTLLM_RECORD_STEPS says so. about: as for `Recorder`."""
    path = os.environ.get(VARIABLE)
    if not path:
        return runner
    number = next(_counter)
    return Recorder(runner, path if number == 1 else f"{path}.{number}", **about)


class Recorder:
    """A runner that writes down what another one computes. Wants fresh K,V: a run is replayed from its first step.

    path   of the file, which is overwritten.
    about  what is known of the model beside its name and family: JSON values (seed, slots, ...).

    A forward gives the logits of all wanted rows, so recording at a large vocabulary is slow.
    """

    def __init__(self, runner: Runner, path: str | Path, **about: Any) -> None:
        self.inner = runner
        self.block_size = runner.block_size
        self.cut_free = runner.cut_free
        self.own_threads = runner.own_threads
        info, module = runner.info, native()
        header = {
            "model": info.name,
            "family": info.family,
            "vocab": info.vocab_size,
            "runner": type(runner).__name__,
            "isa": None if module is None else module.isa(),
            **about,
        }
        try:
            self._file: IO[bytes] = Path(path).open("wb")  # noqa: SIM115  (closed with the process; flushed every step)
        except OSError as error:
            raise ValidationError(
                f"{VARIABLE}: {path} cannot be written: {error.strerror}.", param=VARIABLE, hint="Name another file."
            ) from error
        self._steps = self._check = 0
        text = json.dumps(header).encode()
        self._file.write(FORMAT + struct.pack("<I", len(text)) + text)
        self._end()

    def _end(self) -> None:
        """The end mark, where the next step will be."""
        self._file.write(struct.pack("<III", 0, 0, self._steps))
        self._file.flush()
        self._file.seek(-12, os.SEEK_CUR)

    @property
    def info(self) -> ModelInfo:
        return self.inner.info

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, step: Step) -> Rows:
        """As the runner, and one more record in the file."""
        rows = self.inner.run(step)
        logits = rows.logits().detach().cpu().float().numpy()
        words, values = step.words.astype("<i4").tobytes(), logits.astype("<f4").tobytes()
        self._check = zlib.crc32(values, zlib.crc32(words, self._check))
        self._file.write(struct.pack("<II", len(words), len(values)) + words + values + struct.pack("<I", self._check))
        self._steps += 1
        self._end()
        return rows


class Recording:
    """A recorded run. header: what is known of it; iterate for (step, logits float32 [wanted, vocab]). Raises
    ValidationError for a file that is cut, damaged, of another version, or none of ours."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            self.header, self._start = self._read_header(file)

    def _read_header(self, file: IO[bytes]) -> tuple[Mapping[str, Any], int]:
        line = file.read(len(FORMAT))
        if line != FORMAT:
            raise ValidationError(
                f"{self.path} is no recorded run of this version: it begins with {line[:32]!r}, wanted {FORMAT!r}.",
                param="path",
                hint="Record it again.",
            )
        (length,) = struct.unpack("<I", self._exactly(file, 4))
        if length > MOST_HEADER:
            raise self._damaged(f"a header of {length} bytes, wanted at most {MOST_HEADER}")
        text = self._exactly(file, length)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        for name, kind in (("model", str), ("vocab", int), ("kv", str), ("slots", int)):
            if not isinstance(header.get(name), kind):
                raise self._damaged(f"{name} in its header must be {kind.__name__}, got {header.get(name)!r:.40}")
        return header, file.tell()

    def __iter__(self) -> Iterator[tuple[Step, Floats]]:
        vocab, size, steps, running = self.header["vocab"], self.path.stat().st_size, 0, 0
        with self.path.open("rb") as file:
            file.seek(self._start)
            while True:
                words, values = struct.unpack("<II", self._exactly(file, 8))
                if not words:
                    (count,) = struct.unpack("<I", self._exactly(file, 4))
                    if count != steps or file.tell() != size:
                        raise self._damaged(f"its end mark is of {count} steps, not of the {steps} before it")
                    return
                if words % 4 or file.tell() + words + values + 4 > size:
                    raise self._damaged(f"a step of {words} + {values} bytes does not fit into what is left")
                first, second = self._exactly(file, words), self._exactly(file, values)
                (check,) = struct.unpack("<I", self._exactly(file, 4))
                steps, running = steps + 1, zlib.crc32(second, zlib.crc32(first, running))
                if check != running:
                    raise self._damaged("the checksum of a step is wrong")
                step = Step(np.frombuffer(first, dtype="<i4").astype(np.int32))
                logits = np.frombuffer(second, dtype="<f4").astype(np.float32)
                if len(logits) != len(step.want) * vocab:
                    raise self._damaged(f"{len(logits)} logits, wanted {len(step.want)} rows of {vocab}")
                yield step, logits.reshape(-1, vocab)

    def _exactly(self, file: IO[bytes], count: int) -> bytes:
        data = file.read(count)
        if len(data) != count:
            raise self._damaged(f"it ends {count - len(data)} bytes too early")
        return data

    def _damaged(self, how: str) -> ValidationError:
        return ValidationError(f"{self.path} is damaged: {how}.", param="path", hint="Record it again.")


def difference(wanted: Floats, got: Floats) -> float:
    """The largest difference of two arrays of logits; infinite where one has a NaN or an infinity that the other has
    not, 0 where both hold the same bits."""
    same = wanted.view(np.int32) == got.view(np.int32)
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(wanted - got)[~same]
    return float(apart.max()) if np.isfinite(apart).all() else float("inf")


def replay(recording: Recording, runner: Runner) -> Iterator[tuple[Step, Floats, Floats]]:
    """(step, recorded logits, the runner's) of every step, float32 [wanted, vocab]. The runner must be of the same
    model and have fresh K,V. Raises ValidationError for another vocabulary, family or block size, and what `Recording`
    and `Runner.run` raise."""
    vocab, info = recording.header["vocab"], runner.info
    for what, was, now in (
        ("a vocabulary of", vocab, info.vocab_size),
        ("a model of family", recording.header["family"], info.family),
    ):
        if was != now:
            raise ValidationError(
                f"{recording.path} was recorded with {what} {was}; {info.name} has {now}.",
                param="model",
                hint=f"It was the model {recording.header['model']!r}.",
            )
    for step, wanted in recording:
        if step.block_size != runner.block_size:
            raise ValidationError(
                f"{recording.path} has blocks of {step.block_size} positions, this runner of {runner.block_size}.",
                param="block_size",
            )
        yield step, wanted, runner.run(step).logits().cpu().float().numpy()
