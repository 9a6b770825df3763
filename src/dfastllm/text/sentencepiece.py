"""tokenizer.model: the message that SentencePiece writes, read by hand (sentencepiece_model.proto; no library needed).

Protocol buffers are a list of (field number, wire type, value). Every length is checked against the bytes that are
there, so a damaged file ends in a TokenizerError.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dfastllm.core.filetype import mistaken_bytes
from dfastllm.errors import TokenizerError

__all__ = ["BPE", "CONTROL", "UNIGRAM", "UNKNOWN", "USER_DEFINED", "Piece", "PieceModel", "read_piece_model"]

UNIGRAM, BPE = 1, 2  # TrainerSpec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ROLES = {"unk_token": "unk_id", "bos_token": "bos_id", "eos_token": "eos_id", "pad_token": "pad_id"}


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(slots=True)
class PieceModel:
    """pieces in order of id. charsmap: how characters are normalised, for `normalizers.Precompiled`. prefix: a text
    begins with a space. strips: spaces at the ends and repeated ones are taken away."""

    pieces: list[Piece]
    kind: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    prefix: bool = True
    strips: bool = True
    ids: dict[str, int] = field(default_factory=lambda: {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1})

    @property
    def vocabulary(self) -> dict[str, int]:
        return {piece.text: id for id, piece in enumerate(self.pieces)}

    @property
    def unknown(self) -> str | None:
        return next((piece.text for piece in self.pieces if piece.type == UNKNOWN), None)

    def roles(self) -> dict[str, str]:
        """Role -> token, of the ids that the file names."""
        found = {role: self.ids[name] for role, name in _ROLES.items()}
        return {role: self.pieces[id].text for role, id in found.items() if 0 <= id < len(self.pieces)}


def read_piece_model(path: Path, hint: str) -> PieceModel:
    """Raises TokenizerError for a file that is something else. hint: the way out then."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}.") from error
    if (found := mistaken_bytes(data[:512])) is not None:
        raise TokenizerError(f"{path} is no SentencePiece model but {found.what}.", hint=found.hint)
    try:
        model = _read(data)
    except (ValueError, struct.error) as error:
        kind = "a list of tokens as tiktoken writes it" if data[:256].isascii() else f"something else ({error})"
        raise TokenizerError(f"{path} is no SentencePiece model but {kind}.", hint=hint) from error
    texts = [piece.text for piece in model.pieces]
    if len(set(texts)) != len(texts) or not all(math.isfinite(piece.score) for piece in model.pieces):
        raise TokenizerError(f"{path} has the same piece twice, or a score that is no number.", hint=hint)
    return model


def _read(data: bytes) -> PieceModel:
    model = PieceModel([])
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_piece(_bytes(value)))
        elif number == 2:
            _trainer(model, _bytes(value))
        elif number == 3:
            _normalizer(model, _bytes(value))
    if not model.pieces:
        raise ValueError("no pieces")
    return model


def _piece(data: bytes) -> Piece:
    text, score, type = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode("utf-8")
        elif number == 2:
            score = struct.unpack("<f", _bytes(value))[0]
        elif number == 3:
            type = _number(value)
    return Piece(text, score, type)


def _trainer(model: PieceModel, data: bytes) -> None:
    names = {40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
    for number, value in _fields(data):
        if number == 3:
            model.kind = _number(value)
        elif number == 35:
            model.byte_fallback = bool(_number(value))
        elif number in names:
            id = _number(value)
            model.ids[names[number]] = id - (1 << 64) if id >= 1 << 63 else id


def _normalizer(model: PieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = _bytes(value)
        elif number == 3:
            model.prefix = bool(_number(value))
        elif number == 4:
            model.strips = bool(_number(value))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int of a varint, the bytes of anything else. Raises ValueError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES:
            size, at = _varint(data, at)
        if size is None or number == 0 or at + size > len(data):
            raise ValueError(f"no message at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError(f"no number at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes are wanted")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number is wanted")
    return value
