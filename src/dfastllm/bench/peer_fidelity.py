"""What the formats of other engines cost on the same real model: `bench.fidelity`'s measure of their logits.

An engine that has a format of its own gets the model's float32 weights as a Hugging Face directory and makes its format
of them by the road that its users take; its logits of the same texts come back through a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dfastllm.bench.cpu.environment import PEERS as ENVIRONMENTS
from dfastllm.bench.cpu.wire import Peer
from dfastllm.bench.fidelity import Reference, logits_of, real_model
from dfastllm.convert.report import divergence
from dfastllm.models.checkpoint import save
from dfastllm.text.saving import save_tokenizer

__all__ = ["FORMATS", "PeerFidelity", "made_file", "peer_faithfulness"]

# (peer, its format). OpenVINO's int4 cannot be had of this model: groups of 128 do not divide its 576 channels, and
# NNCF refuses.
FORMATS = (
    ("pytorch", "bf16"),
    ("openvino-genai", "int8"),
    ("llama.cpp", "Q4_1"),
    ("llama.cpp", "Q8_0"),
    ("llama.cpp", "Q4_K_M"),  # 576 channels are no superblock: only `down` is Q4_K or Q6_K, the rest falls to Q5_0
)


@dataclass(frozen=True, slots=True)
class PeerFidelity:
    """kl: nats a token from the float32 weights. agreement: share of positions with the same best token."""

    peer: str
    format: str
    kl: float
    agreement: float
    tokens: int


def peer_faithfulness(
    reference: Reference, formats: Sequence[tuple[str, str]], cache: Path, threads: int
) -> Iterator[PeerFidelity]:
    """Each (peer, format) of FORMATS against the reference. cache: where the peers' environments and files are. Raises
    PeerError with what a peer said."""
    for peer, form in formats:
        if peer == "pytorch":
            found = _torch(reference, threads)
        elif peer == "llama.cpp":
            found = _llamacpp(reference, made_file(form, cache, threads), cache, threads)
        else:
            found = _openvino(reference, form, cache, threads)
        kl, agreement = divergence(reference.logs, [one.log_softmax(-1) for one in found])
        yield PeerFidelity(peer, form, kl, agreement, reference.tokens)


@torch.inference_mode()
def _torch(reference: Reference, threads: int) -> list[Tensor]:
    """The plain torch decoder in bfloat16: what `bench cpu pytorch` is measured against, and vLLM's arithmetic."""
    model = deepcopy(reference.model).to(torch.bfloat16)
    return [logits_of(model, one, threads) for one in reference.ids]


def made_file(form: str, cache: Path, threads: int) -> Path:
    """The model's GGUF file of a type: the published one, or made of it once by llama.cpp's own quantiser."""
    published = real_model(cache)
    if published.name.endswith(f".{form}.gguf"):
        return published
    directory = cache / "models" / "smollm2"
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"SmolLM2-135M-Instruct.{form}.gguf"
    if not target.exists():
        with Peer(ENVIRONMENTS["llama.cpp"].ensure(cache), "llamacpp") as worker:
            worker.call("quantise", source=str(published), target=str(target), form=form, threads=threads)
    return target


def _llamacpp(reference: Reference, file: Path, cache: Path, threads: int) -> list[Tensor]:
    python = ENVIRONMENTS["llama.cpp"].ensure(cache)
    with tempfile.TemporaryDirectory() as name, Peer(python, "llamacpp") as worker:
        worker.call("load", path=str(file), threads=threads)
        return [_logits(partial(worker.call, "logits"), one, Path(name) / "logits") for one in reference.ids]


def _openvino(reference: Reference, form: str, cache: Path, threads: int) -> list[Tensor]:
    python = ENVIRONMENTS["openvino-genai"].ensure(cache)
    made = cache / "models" / "openvino-smollm2" / form
    with (
        tempfile.TemporaryDirectory() as name,
        Peer(python, "openvino_genai", environment={"OMP_NUM_THREADS": str(threads)}) as worker,
    ):
        if not (made / "done").exists():
            source = Path(name) / "source"
            save(reference.model, source)
            save_tokenizer(reference.tokenizer, source)
            worker.call("export", source=str(source), target=str(made), form=form)
        worker.call("load", directory=str(made), threads=threads)
        return [_logits(partial(worker.call, "logits"), one, Path(name) / "logits") for one in reference.ids]


def _logits(ask: partial[int], ids: Sequence[int], path: Path) -> Tensor:
    """Logits float32 [len(ids), vocab] that a worker writes to a file."""
    width = ask(ids=list(ids), path=str(path))
    return torch.from_numpy(np.fromfile(path, dtype=np.float32).reshape(len(ids), width))
