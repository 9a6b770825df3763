"""Serving against vLLM's CPU server: the same bfloat16 checkpoint behind both, asked over HTTP in turns.

A wave is `in_flight` requests sent at once, each with a prompt of its own, answered to exactly `tokens` tokens. Prompts
are random token ids and never repeat, so that no prefix cache serves any of them. What a wave takes at least follows
from the machine's ceilings: every prompt's products at the peak of bfloat16, and for each further token the slower of
reading the weights and computing its products.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dfastllm.bench.cpu.ceilings import Ceilings
from dfastllm.bench.cpu.shapes import Shape
from dfastllm.bench.cpu.turns import take_turns
from dfastllm.bench.cpu.wire import PeerError
from dfastllm.bench.suite.client import Answer, Call, Client, Features
from dfastllm.bench.suite.launch import Started, started_server
from dfastllm.bench.suite.others import OTHERS, other_server
from dfastllm.metrics.stats import Ratio, Summary, paired_ratio, summarise

__all__ = ["Served", "Traffic", "against_vllm", "ensure_checkpoint", "wave_floor"]

SEED = 0
SPECIAL = ("<|end|>", "<|pad|>")


@dataclass(frozen=True, slots=True)
class Traffic:
    """prompt, tokens: of each request. in_flight: requests of a wave. rounds, seconds: see `take_turns`."""

    prompt: int = 128
    tokens: int = 64
    in_flight: int = 1
    rounds: int = 7
    seconds: float = 4.0


@dataclass(frozen=True, slots=True)
class Served:
    """One line of the record. seconds: of a wave. ratio: how many times faster we are, turn by turn. possible: how many
    times faster than the peer the floor would be; of_possible: how much of that we reach. ttft, tpot: milliseconds."""

    format: str
    in_flight: int
    ours_tok_s: float
    peer_tok_s: float
    ours_seconds: Summary
    peer_seconds: Summary
    ratio: Ratio
    floor_seconds: float
    possible: float
    of_possible: float
    ours_ttft: float
    peer_ttft: float
    ours_tpot: float
    peer_tpot: float


@dataclass
class _Side:
    """A server under test and every answer of it, those of the first waves too, which no ratio counts."""

    url: str
    pid: int
    model: str
    vocab: int
    traffic: Traffic
    draw: random.Random
    seen: list[Answer] = field(default_factory=list)

    def wave(self, runner: asyncio.Runner) -> float:
        """Seconds until the last answer of one wave is there. Raises PeerError when one is missing or too short."""
        answers = runner.run(self._answers())
        for answer in answers:
            if not answer.ok or answer.completion_tokens != self.traffic.tokens:
                raise PeerError(
                    f"{self.url} answered {answer.completion_tokens} tokens, wanted {self.traffic.tokens}: "
                    f"{answer.error}: {answer.message}."
                )
        self.seen += answers
        return max(answer.end or 0.0 for answer in answers)

    async def _answers(self) -> Sequence[Answer]:
        traffic = self.traffic
        prompts = [
            [self.draw.randrange(300, self.vocab - len(SPECIAL)) for _ in range(traffic.prompt)]
            for _ in range(traffic.in_flight)
        ]
        options = [{"prompt": ids, "ignore_eos": True} for ids in prompts]
        client = Client(self.url, self.model, features=Features(api="completions"))
        try:
            return await asyncio.gather(
                *(client.ask(Call((), max_tokens=traffic.tokens, options=one)) for one in options)
            )
        finally:
            await client.aclose()


def ensure_checkpoint(shape: Shape, cache: Path) -> Path:
    """A Hugging Face checkpoint of a Qwen2 shape in bfloat16 with random weights (deviation 0.02), made where missing,
    and a tokenizer of as many made-up words as the shape has ids."""
    directory = cache / "models" / f"hf-{shape.name}"
    if (directory / "config.json").exists():  # written last
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(_weights(shape)), directory / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(shape.vocab).save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[1],
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "eos_token_id": shape.vocab - len(SPECIAL),
        **shape.published(),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _weights(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(SEED)

    def matrix(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, generator=draw) * 0.02).bfloat16()

    hidden, inner = shape.hidden, shape.inner
    kv = hidden // shape.heads * shape.kv_heads
    ones = torch.ones(hidden).bfloat16()
    yield "model.embed_tokens.weight", matrix(shape.vocab, hidden)
    yield "model.norm.weight", ones
    if not shape.tied:
        yield "lm_head.weight", matrix(shape.vocab, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            yield f"{prefix}self_attn.{name}.weight", matrix(rows, hidden)
            yield f"{prefix}self_attn.{name}.bias", matrix(rows)
        yield f"{prefix}self_attn.o_proj.weight", matrix(hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", matrix(inner, hidden)
        yield f"{prefix}mlp.up_proj.weight", matrix(inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", matrix(hidden, inner)
        yield f"{prefix}input_layernorm.weight", ones.clone()
        yield f"{prefix}post_attention_layernorm.weight", ones.clone()


def _tokenizer(size: int) -> Tokenizer:
    """Byte-level, without merges: every id beyond the bytes is one made-up word."""
    words = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {f"t{i}": i for i in range(len(words), size - len(SPECIAL))}
    out = Tokenizer(models.BPE(vocab=words, merges=[]))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens(list(SPECIAL))
    return out


def wave_floor(shape: Shape, traffic: Traffic, ceilings: Ceilings, file_bytes: int) -> float:
    """Seconds that a wave takes at least in bfloat16: see the module's opening."""
    prompt, answered, width = traffic.prompt, traffic.tokens - 1, traffic.in_flight
    first = shape.flops(prompt * width, width, prompt // 2) / ceilings.bf16 / 1e9
    memory = shape.streamed(file_bytes) / ceilings.stream / 1e9
    compute = shape.flops(width, width, prompt + traffic.tokens // 2) / ceilings.bf16 / 1e9
    return max(first, memory) + answered * max(memory, compute)


def against_vllm(
    shape: Shape,
    formats: Sequence[str],
    traffics: Sequence[Traffic],
    threads: int,
    cache: Path,
    ceilings: Callable[[], Ceilings],
    done: Callable[[Served], None],
) -> None:
    """Measure each of our formats against vLLM's bfloat16, in each traffic, and give each line to `done`. ceilings: the
    highest seen so far. Raises PeerError and GenerationError when a server fails."""
    directory = ensure_checkpoint(shape, cache).absolute()
    size = (directory / "model.safetensors").stat().st_size
    vllm = OTHERS["vllm"]
    log = cache / "vllm" / "server.txt"
    with other_server(vllm, directory, cache, log, threads) as peer, asyncio.Runner() as runner:
        for form in formats:
            with _ours(directory, form, threads) as ours:
                for traffic in traffics:
                    sides = {
                        name: _Side(
                            started.url,
                            started.pid,
                            directory.name,
                            shape.vocab,
                            traffic,
                            random.Random(f"{name} {form}"),
                        )
                        for name, started in (("ours", ours), ("peer", peer))
                    }
                    done(_measure(shape, form, traffic, sides, runner, ceilings(), size))


def _ours(directory: Path, form: str, threads: int) -> AbstractContextManager[Started]:
    arguments = ["--model", str(directory), "--threads", str(threads), "--max-model-len", "512"]
    return started_server(arguments if form == "bf16" else [*arguments, "--quantization", form])


def _tree(root: int) -> list[int]:
    """The process and those below it (Linux; elsewhere it alone)."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            below.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += below.get(pid, [])
    return found


def _milliseconds(seconds: Iterable[float | None]) -> float:
    """Their median. Raises StatisticsError when there are none."""
    return 1e3 * median(second for second in seconds if second is not None)


def _measure(
    shape: Shape,
    form: str,
    traffic: Traffic,
    sides: Mapping[str, _Side],
    runner: asyncio.Runner,
    ceilings: Ceilings,
    size: int,
) -> Served:
    def burst(side: _Side) -> Callable[[int], Sequence[float]]:
        return lambda repeats: [side.wave(runner) for _ in range(repeats)]

    bursts = {name: burst(side) for name, side in sides.items()}
    pids = [pid for side in sides.values() for pid in _tree(side.pid)]
    turns = take_turns(bursts, [*pids, os.getpid()], rounds=traffic.rounds, spare=2, seconds=traffic.seconds)
    ours, theirs = ([turn.seconds[name] for turn in turns] for name in ("ours", "peer"))
    ratio, least = paired_ratio(theirs, ours), wave_floor(shape, traffic, ceilings, size)
    made = traffic.in_flight * traffic.tokens
    possible = median(theirs) / least
    return Served(
        format=form,
        in_flight=traffic.in_flight,
        ours_tok_s=made / median(ours),
        peer_tok_s=made / median(theirs),
        ours_seconds=summarise(ours),
        peer_seconds=summarise(theirs),
        ratio=ratio,
        floor_seconds=least,
        possible=possible,
        of_possible=ratio.median / possible,
        ours_ttft=_milliseconds(answer.first for answer in sides["ours"].seen),
        peer_ttft=_milliseconds(answer.first for answer in sides["peer"].seen),
        ours_tpot=_milliseconds(answer.tpot for answer in sides["ours"].seen),
        peer_tpot=_milliseconds(answer.tpot for answer in sides["peer"].seen),
    )
