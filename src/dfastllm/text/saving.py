"""A loaded tokenizer as the files of a Hugging Face directory, whatever it was read from (a GGUF file has none).

Writes tokenizer.json and tokenizer_config.json, with the chat templates in the latter. Knows no models: further ids
that end a text are in generation_config.json, which belongs to the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dfastllm.text.tokenizer import Tokenizer

__all__ = ["save_tokenizer"]


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> list[Path]:
    """Write the files into a directory that exists and return their paths. `Tokenizer.load` reads the same tokenizer
    back, but for `eos_ids` beyond its own EOS; transformers reads it as PreTrainedTokenizerFast."""
    place = Path(directory)
    templates = {name: tokenizer.templates.source(name) for name in tokenizer.templates.names}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens,
        "clean_up_tokenization_spaces": False,
    }
    if templates:
        listed = [{"name": name, "template": source} for name, source in templates.items()]
        config["chat_template"] = templates["default"] if set(templates) == {"default"} else listed
    files = {
        "tokenizer.json": tokenizer.backend.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in files.items():
        (place / name).write_text(text, encoding="utf-8")
    return [place / name for name in files]
