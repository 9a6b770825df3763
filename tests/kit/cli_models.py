"""Random models on disk with a byte tokenizer: text in, text out, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dfastllm.models import Ids, save, tiny

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "mask_token": "<|mask|>", "pad_token": "<|pad|>"}
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def write_tokenizer(directory: Path, *, chat: bool = True) -> Ids:
    """One token per byte, then the special ones. Returns their ids."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL.values()])
    backend.save(str(directory / "tokenizer.json"))
    config = {**SPECIAL, **({"chat_template": TEMPLATE} if chat else {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {role: backend.token_to_id(text) for role, text in SPECIAL.items()}
    return Ids(eos=(ids["eos_token"],), mask=ids["mask_token"], bos=ids["bos_token"], pad=ids["pad_token"])


def write_model(directory: Path, family: str, *, chat: bool = True) -> Path:
    """All share the tokenizer with its mask token: an autoregressive model may have one and is none the less causal."""
    ids = write_tokenizer(directory, chat=chat)
    model = tiny(family, ids=ids, vocab_size=260, max_len=256)
    return save(model, directory)
