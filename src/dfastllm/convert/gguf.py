"""`dfastllm quantize --format gguf-...`: a Hugging Face directory into one GGUF file that llama.cpp reads too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dfastllm.convert.source import Source
from dfastllm.errors import ValidationError
from dfastllm.models.gguf.export import write_gguf
from dfastllm.text.gguf.export import tokenizer_metadata

__all__ = ["GGUF_FORMATS", "quantise_gguf"]

GGUF_FORMATS = {"gguf-q8_0": "Q8_0", "gguf-q4_0": "Q4_0"}


def quantise_gguf(
    model: str | Path,
    out: str | Path,
    format: str,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `out`, a .gguf file, with the source's tokenizer inside if it has one; returns its path. progress: bytes
    done, bytes in all.

    Raises ValidationError for another format, an `out` that is a directory, or one that exists when `force` is not
    given; and as the source, `models.gguf.export.write_gguf` and the tokenizer's export do.
    """
    if format not in GGUF_FORMATS:
        raise ValidationError(f"format must be {', '.join(GGUF_FORMATS)}, got {format!r}.", param="format")
    path = Path(out)
    if path.is_dir() or path.suffix != ".gguf":
        raise ValidationError(f"out must be a file name that ends in .gguf, got {path}.", param="out")
    if path.exists() and not force:
        raise ValidationError(f"{path} exists.", param="out", hint="Give --force to write over it, or another name.")
    source = Source(model)
    tokenizer = None
    if (source.directory / "tokenizer.json").is_file():
        tokenizer = tokenizer_metadata(source.directory, source.config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_gguf(
        source.directory,
        path,
        GGUF_FORMATS[format],
        tokenizer=tokenizer,
        name=source.info.name,
        progress=progress,
    )
