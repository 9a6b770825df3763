"""Small engines for the server's tests: random models over a byte tokenizer, and one that says what it is told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from dfastllm.core import ModelInfo
from dfastllm.engine import Engine, EngineConfig
from dfastllm.models import Ids, tiny
from dfastllm.text import ChatTemplates, Tokenizer

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "mask_token": "<|mask|>", "pad_token": "<|pad|>"}
TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}[assistant]"
)
VOCAB = 260


def byte_tokenizer(template: str = TEMPLATE, special: Sequence[str] = ()) -> Tokenizer:
    """One token per byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in [*SPECIAL.values(), *special]])
    return Tokenizer(backend, special_tokens=SPECIAL, templates=ChatTemplates({"default": template}))


def random_engine(family: str, *, max_len: int = 512, seed: int = 0, **config: Any) -> Engine:
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_id is not None
    mask = tokenizer.mask_id if family != "llama" else None
    ids = Ids(eos=(tokenizer.eos_id,), bos=tokenizer.bos_id, pad=tokenizer.pad_id, mask=mask)
    model = tiny(family, seed, ids=ids, vocab_size=VOCAB, max_len=max_len)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3.0  # far from uniform, so that options show in the tokens
    return Engine(model, tokenizer, EngineConfig(**{"kv_tokens": 8192, **config}))


def slow(engine: Engine, seconds: float) -> Engine:
    """Each step takes at least so long."""
    engine.subscribe(lambda _: time.sleep(seconds))
    return engine


class Parrot:
    """An autoregressive model that continues every prompt with the text it was taught, then ends."""

    dtype = torch.float32

    def __init__(self, tokenizer: Tokenizer, max_len: int = 2048) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self.begin = 0
        self.fail = False
        assert tokenizer.eos_id is not None
        self.info = ModelInfo(
            name="parrot",
            family="parrot",
            kind="ar",
            vocab_size=tokenizer.vocab_size,
            max_len=max_len,
            layers=1,
            kv_heads=1,
            head_dim=4,
            eos_ids=(tokenizer.eos_id,),
        )

    def teach(self, prompt_tokens: int, text: str) -> None:
        self.begin, self.text = prompt_tokens, text

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("the parrot is dead")
        return positions.float().unsqueeze(-1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        script = self.tokenizer.encode(self.text)
        logits = torch.zeros(len(hidden), self.info.vocab_size)
        for row, position in enumerate(hidden[:, 0].long().tolist()):
            at = position + 1 - self.begin
            logits[row, script[at] if 0 <= at < len(script) else self.info.eos_ids[0]] = 99.0
        return logits


def parrot_engine(template: str = TEMPLATE, special: Sequence[str] = (), **config: Any) -> Engine:
    tokenizer = byte_tokenizer(template, special)
    return Engine(Parrot(tokenizer), tokenizer, EngineConfig(**{"kv_tokens": 8192, **config}))
