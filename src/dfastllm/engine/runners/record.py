"""Recorded runs: every step that a runner ran from empty K,V on, with the logits of the wanted rows, in one file.

A recorded run replays on any runner of the same model, so a new runner, a new kernel or another machine can be held to
the numbers of the one that recorded. DFASTLLM_RECORD_STEPS=FILE records what an engine runs; a second model of the
same process (one that drafts) records into FILE.2, and so on. `python -m dfastllm.engine.runners FILE --model MODEL`
replays.

The file: a line that names the format, a header (length as 4 bytes, then JSON), and for every step its words and the
logits, each with its length before it, and the CRC-32 of both. Everything little endian. Nothing in it is executed.
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

__all__ = ["Recorder", "Recording", "recorded", "replay"]

FORMAT = b"dfastllm recorded steps 1\n"
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
        info, module = runner.info, native()
        header = {
            "model": info.name,
            "family": info.family,
            "vocab": info.vocab_size,
            "runner": type(runner).__name__,
            "isa": None if module is None else module.isa(),
            **about,
        }
        self._file: IO[bytes] = Path(path).open("wb")  # noqa: SIM115  (closed with the process; flushed every step)
        text = json.dumps(header).encode()
        self._file.write(FORMAT + struct.pack("<I", len(text)) + text)
        self._file.flush()

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
        check = zlib.crc32(values, zlib.crc32(words))
        self._file.write(struct.pack("<II", len(words), len(values)) + words + values + struct.pack("<I", check))
        self._file.flush()
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
        try:
            header = json.loads(self._exactly(file, length))
        except ValueError as error:
            raise self._damaged(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict) or not isinstance(header.get("vocab"), int):
            raise self._damaged("its header names no vocabulary")
        return header, file.tell()

    def __iter__(self) -> Iterator[tuple[Step, Floats]]:
        vocab, size = self.header["vocab"], self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(self._start)
            while file.tell() < size:
                words, values = struct.unpack("<II", self._exactly(file, 8))
                if words % 4 or file.tell() + words + values + 4 > size:
                    raise self._damaged(f"a step of {words} + {values} bytes does not fit into what is left")
                first, second = self._exactly(file, words), self._exactly(file, values)
                (check,) = struct.unpack("<I", self._exactly(file, 4))
                if check != zlib.crc32(second, zlib.crc32(first)):
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


def replay(recording: Recording, runner: Runner) -> Iterator[tuple[Step, Floats, Floats]]:
    """(step, recorded logits, the runner's) of every step, float32 [wanted, vocab]. The runner must be of the same
    model and have fresh K,V. Raises ValidationError for another vocabulary or block size, and what `Recording` and
    `Runner.run` raise."""
    vocab = recording.header["vocab"]
    if vocab != runner.info.vocab_size:
        raise ValidationError(
            f"{recording.path} was recorded with a vocabulary of {vocab}; {runner.info.name} has "
            f"{runner.info.vocab_size}.",
            param="model",
        )
    for step, wanted in recording:
        if step.block_size != runner.block_size:
            raise ValidationError(
                f"{recording.path} has blocks of {step.block_size} positions, this runner of {runner.block_size}.",
                param="block_size",
            )
        yield step, wanted, runner.run(step).logits().cpu().float().numpy()
