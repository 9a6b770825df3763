"""The facade: load a model, generate, stream, chat. One engine thread behind it, the same that the server uses.

llm = LLM("demo-diffusion")
print(llm.chat([{"role": "user", "content": "What is 12 + 30?"}])[0].text)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dfastllm import assemble
from dfastllm.assemble import Backend, Loaded
from dfastllm.core import (
    DecodeParams,
    FinishReason,
    Kind,
    ModelInfo,
    Request,
    SamplingParams,
    SpeculativeConfig,
    SpeculativeParams,
    StepEvent,
    TokenLogprob,
    Usage,
)
from dfastllm.decode.canvas.scorer import ModelScorer
from dfastllm.decode.draft import Drafter
from dfastllm.decode.policy import Policy
from dfastllm.decode.registry import policy_for
from dfastllm.engine import Engine, EngineConfig, Stream, Worker
from dfastllm.engine.adapters import Named
from dfastllm.engine.admission import Admission
from dfastllm.engine.speculate import check_vocabulary, model_drafter
from dfastllm.errors import (
    AdapterNotFoundError,
    AdaptersBusyError,
    ContextLengthError,
    ModelLoadError,
    TokenizerError,
    UnsupportedError,
    ValidationError,
)
from dfastllm.hub import SHIPPED, find_model, shipped_models, title
from dfastllm.models import load
from dfastllm.settings import Settings
from dfastllm.text import CallReading, ChatTemplates, ParsedMessage, Tokenizer, call_reading, chat_prompt, read_text

__all__ = [
    "LLM",
    "Completion",
    "RequestOutput",
    "load_engine",
    "model_kind",
    "model_options",
    "resolve",
    "resolve_adapter",
    "shipped_adapters",
    "shipped_models",
]

Params = TypeVar("Params", SamplingParams, DecodeParams)
KV_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}

log = logging.getLogger("dfastllm.load")

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Speculation = str | SpeculativeConfig | Sequence[SpeculativeConfig] | None


def resolve(model: str | Path) -> Path:
    """Where a model lies, see `hub.find_model`."""
    return find_model(model)


def shipped_adapters() -> list[str]:
    """Names of the LoRA adapters that come with the package."""
    return sorted(p.parent.name for p in SHIPPED.glob("adapters/*/adapter_config.json"))


def resolve_adapter(adapter: str | Path) -> Path:
    """Where a LoRA adapter lies: a shipped one's name or a directory. Raises AdapterNotFoundError naming what there
    is."""
    if str(adapter) in shipped_adapters():
        return SHIPPED / "adapters" / str(adapter)
    if Path(adapter).is_dir():
        return Path(adapter)
    raise AdapterNotFoundError(
        f"no adapter {str(adapter)!r}: it is neither a directory nor a shipped adapter"
        f" ({', '.join(shipped_adapters()) or 'there are none'}).",
        param="lora",
    )


def model_kind(model: str | Path) -> Kind:
    """ar, diffusion or block, from the model's config alone. Raises ModelNotFoundError, ModelLoadError."""
    return assemble.model_info(resolve(model)).kind


def model_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of `load_engine` and LLM: how settings say a model is loaded."""
    return {
        "device": settings.device,
        "dtype": settings.dtype,
        "backend": settings.backend,
        "batch_invariant": settings.batch_invariant,
        "quantization": settings.quantization,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "speculative": settings.speculative_config,
        "chat_template": settings.chat_template,
        "chat_template_kwargs": json.loads(settings.default_chat_template_kwargs or "{}"),
        "chat_parse_special": settings.chat_parse_special,
        "edits": settings.edits,
        "trained_block": settings.trained_block,
    }


def load_engine(
    model: str | Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    backend: Backend = "auto",
    batch_invariant: bool = False,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    config: EngineConfig | None = None,
    draft: str | Path | None = None,
    speculative: Speculation = None,
    chat_template: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    template_variables: Mapping[str, Any] | None = None,
    chat_parse_special: bool = False,
    edits: str = "auto",
    trained_block: int | None = None,
) -> Engine:
    """An engine over a checkpoint and its tokenizer. dtype: a torch dtype or its name; None or "auto": as stored.
    backend, quantization, batch_invariant: see `assemble.load`. kv_cache_dtype: float32, bfloat16, int8 (native and
    triton backends), fp8 (triton) or auto.
    draft: a small autoregressive model of the same vocabulary, the second opinion of rule `apd` (canvas models only).
    speculative: how requests of an autoregressive model draft, `SpeculativeConfig`s or their JSON (the first is the
    default); other models have no use for it. chat_template: a file in place of the checkpoint's own.
    chat_template_kwargs: what the template sees unless a conversation says otherwise (template_variables is an older
    name of it). chat_parse_special: special tokens that people spell in messages become those tokens, unless a
    conversation says otherwise. edits: auto, yes or no, whether the model was trained to overwrite what it committed.
    trained_block: the block length of a block-diffusion model. Raises UnsupportedError for a draft that does not fit or
    a combination that cannot be, ValidationError, ModelNotFoundError, ModelLoadError, CheckpointError,
    TokenizerError."""
    path = resolve(model)
    if dtype == "auto":
        dtype = None
    if kv_cache_dtype not in KV_DTYPES:
        raise ValidationError(
            f"kv_cache_dtype must be {', '.join(KV_DTYPES)}, got {kv_cache_dtype!r}.", param="kv_cache_dtype"
        )
    file = None if chat_template is None else Path(chat_template)
    template = None if file is None else read_text(file)
    variables = _either(chat_template_kwargs, template_variables)
    ChatTemplates({}).chosen(template, variables, file)  # what is wrong is told before a model is read
    configs = _speculation(speculative)
    served = None if config is None else config.max_len
    _require_context(path, served)
    loaded = assemble.load(
        path,
        device=device,
        dtype=dtype,
        backend=backend,
        quantization=quantization,
        max_len=served,
        invariant=batch_invariant,
    )
    built, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.templates = tokenizer.templates.chosen(template, variables, file)
    tokenizer.chat_parse_special = chat_parse_special
    own_name = title(model) or (path.stem if path.is_file() else path.name)
    built.info = _as_trained(dataclasses.replace(built.info, name=name or own_name), str(model), edits, trained_block)
    choose: Callable[..., Policy] = policy_for
    if draft is not None:
        choose = functools.partial(policy_for, scorer=_scorer(draft, built.info, device, dtype))
    configs = configs if built.info.kind == "ar" else ()
    engine = Engine(
        built,
        tokenizer,
        config,
        dtype=KV_DTYPES[kv_cache_dtype],
        device=device,
        choose=choose,
        drafters=_drafters(configs, loaded, device, config or EngineConfig()),
        speculative=configs[0].params if configs else None,
    )
    _check_defaults(engine, path)
    for note in built.info.notes:
        log.warning("%s: %s", built.info.name, note)
    return engine


def _require_context(path: Path, served: int | None) -> None:
    """Raise ValidationError for a limit above the model's own context, which would be cut without a word."""
    if served is None:
        return
    info = assemble.model_info(path)
    if served > info.max_len:
        raise ValidationError(
            f"max_model_len is {served}, above the context of {info.name}, {info.max_len}.",
            param="max_model_len",
            hint="Lower it, or leave it out. Longer contexts need a recipe in config.json: yarn's rope_scaling.",
        )


def _as_trained(info: ModelInfo, model: str, edits: str, block: int | None) -> ModelInfo:
    """What the files of published models do not say of how they were trained. Raises ValidationError for a word that is
    no choice, UnsupportedError for a model that has no blocks."""
    if edits not in ("auto", "yes", "no"):
        raise ValidationError(f"edits must be auto, yes or no, got {edits!r}.", param="edits")
    for param, asked in (("edits", edits == "yes"), ("trained_block", block is not None)):
        if asked and info.kind != "block":
            raise UnsupportedError(f"{info.name} is of kind {info.kind}; {param} is for block diffusion.", param=param)
    twenty_one = info.family == "llada2_moe" and re.search(r"llada2\.1", f"{model} {info.name}", re.IGNORECASE)
    if edits != "auto":
        info = dataclasses.replace(info, edit=edits == "yes")
    elif twenty_one and not info.edit:
        note = "taken for LLaDA2.1 by its name: it may overwrite what it committed (--edits no where it may not)."
        info = dataclasses.replace(info, edit=True, notes=(*info.notes, note))
    return info if block is None else dataclasses.replace(info, block=block)


def _either(kwargs: Mapping[str, Any] | None, older: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Variables of the template under the name of the HTTP API, or under the older one."""
    if kwargs is not None and older is not None:
        raise ValidationError(
            "chat_template_kwargs and template_variables are one thing; got both.",
            param="template_variables",
            hint="Give chat_template_kwargs alone.",
        )
    return kwargs if older is None else older


def _check_defaults(engine: Engine, path: Path) -> None:
    """What the model's file says of requests must serve one that says nothing itself. Raises ModelLoadError naming the
    file, the option and the model's kind."""
    info = engine.info
    if not info.defaults:
        return
    try:
        engine.admit(Request("defaults", (int(info.mask_id == 0),)))
    except ContextLengthError:  # of a very short context or few K,V: not what the file says
        return
    except (ValidationError, UnsupportedError) as error:
        where = path / "generation_config.json" if path.is_dir() else path
        raise ModelLoadError(
            f"{where}: {error.param} does not serve this model, of kind {info.kind}: {error}",
            param=error.param,
            hint=error.hint,
        ) from error


def _speculation(given: Speculation) -> tuple[SpeculativeConfig, ...]:
    """Raises ValidationError for JSON that is none or names what does not exist."""
    if given is None:
        return ()
    if isinstance(given, str):
        return SpeculativeConfig.parse(given)
    return (given,) if isinstance(given, SpeculativeConfig) else tuple(given)


def _drafters(
    configs: Sequence[SpeculativeConfig], target: Loaded, device: str, config: EngineConfig
) -> dict[str, Drafter]:
    """The drafters that need a model, by method. Raises UnsupportedError for a model that does not fit the target, and
    what loading raises."""
    drafters: dict[str, Drafter] = {}
    for each in configs:
        if each.model is None:
            continue
        method = each.params.method
        if method in drafters:
            raise ValidationError(f"speculative_config names two models for {method}.", param="speculative_config")
        loaded = assemble.load(resolve(each.model), device=device, drafting=True)
        check_vocabulary(target.model.info, target.tokenizer, loaded.model.info, loaded.tokenizer)
        drafters[method] = model_drafter(method, loaded.model, config, bigram=loaded.bigram, device=device)
    return drafters


def _scorer(draft: str | Path, info: ModelInfo, device: str, dtype: str | torch.dtype | None) -> ModelScorer:
    if info.kind == "ar":
        raise UnsupportedError(f"{info.name} is autoregressive; a draft model serves canvas models.", param="draft")
    model = load(resolve(draft), device=device, dtype=dtype)
    if model.info.vocab_size != info.vocab_size:
        raise UnsupportedError(
            f"the draft's vocabulary has {model.info.vocab_size} ids, that of {info.name} {info.vocab_size}.",
            param="draft",
        )
    return ModelScorer(model, device)


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` holds no end token; `stop` is the stop string or token id that ended it, if one did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | int | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt: n of them, `outputs[i].index == i`."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    outputs: tuple[Completion, ...]

    @property
    def text(self) -> str:
        return self.outputs[0].text


class LLM:
    """A loaded model. Thread-safe; use as a context manager, or call `close`, to end its engine thread.

    model: a name of `dfastllm list`, a directory, a GGUF file, or ORG/NAME of a hub (`hub.find_model`). device: cpu,
    cuda, cuda:N or mps. engine: limits, or a
    ready engine (then no other argument is read). speculative: see `load_engine`; a request may choose among what is
    loaded with `SpeculativeParams` of its own. lora_modules: LoRA adapters by the names that requests choose them by,
    shipped ones or PEFT directories; more by `load_adapter`. Text prompts are
    encoded with the tokenizer's own special tokens; token ids are taken as they are. What a request does not say is
    taken from the model's generation_config.json, else from the table of options (docs/options.md). Each call raises
    ValidationError, UnsupportedError or ContextLengthError for what cannot be honoured, TimeoutError or GenerationError
    for what went wrong underway.
    """

    def __init__(
        self,
        model: str | Path = "demo-diffusion",
        *,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        backend: Backend = "auto",
        batch_invariant: bool = False,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        engine: EngineConfig | Engine | None = None,
        draft: str | Path | None = None,
        speculative: Speculation = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        chat_parse_special: bool = False,
        edits: str = "auto",
        trained_block: int | None = None,
        lora_modules: Mapping[str, str | Path] | None = None,
    ) -> None:
        if not isinstance(engine, Engine):
            engine = load_engine(
                model,
                device=device,
                dtype=dtype,
                backend=backend,
                batch_invariant=batch_invariant,
                quantization=quantization,
                kv_cache_dtype=kv_cache_dtype,
                config=engine,
                draft=draft,
                speculative=speculative,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
                template_variables=template_variables,
                chat_parse_special=chat_parse_special,
                edits=edits,
                trained_block=trained_block,
            )
        self.engine = engine
        self.info = self.engine.info
        for lora, path in (lora_modules or {}).items():
            self.load_adapter(lora, path)
        self.worker = Worker({self.info.name: self.engine}).start()

    @property
    def tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise TokenizerError("this model was built without a tokenizer; give token ids.")
        return self.engine.tokenizer

    def close(self) -> None:
        self.worker.stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def adapters(self) -> list[Named]:
        """The adapters that requests can choose, by name."""
        return self.engine.adapters.named()

    def load_adapter(self, name: str, adapter: str | Path, *, replace: bool = False) -> Named:
        """Load a LoRA adapter, a shipped one or a PEFT directory, under a name. replace: in place of one of that name;
        requests that run go on with the one they have. Raises AdapterNotFoundError, AdapterError, ValidationError."""
        return self.engine.adapters.load(name, resolve_adapter(adapter), replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run on it end as they would have. Raises AdapterNotFoundError."""
        self.engine.adapters.unload(name)

    def encode(self, prompt: Prompt, *, add_special: bool = True, parse_special: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt. parse_special False: special tokens that a text spells out stay text."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special=add_special, parse_special=parse_special))
        return tuple(prompt)

    def _require_fits(self, *prompts: Prompt) -> None:
        """Refuse a text that has more tokens than the context whatever they are, before it is encoded: one of millions
        of characters takes seconds and gigabytes. Raises ContextLengthError."""
        tokenizer = self.engine.tokenizer
        for prompt in prompts:
            least = tokenizer.fewest(prompt) if tokenizer is not None and isinstance(prompt, str) else 0
            if least > self.engine.max_len:
                raise ContextLengthError(
                    f"the prompt has at least {least:,} tokens; the context of {self.info.name} is "
                    f"{self.engine.max_len:,}.",
                    param="prompt",
                    hint="Shorten the prompt.",
                )

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        decode: DecodeParams | None = None,
        *,
        suffix: Prompt = (),
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
        speculative: SpeculativeParams | None = None,
        shown: Sequence[int] = (),
        lora: str = "",
    ) -> Stream:
        """Queue one sequence (n must be 1) and return its stream of events. cache_salt, speculative, shown, lora: see
        `core.Request`. Where requests hold all the adapters that may be in memory, it waits for one of them to end."""
        self._require_fits(prompt, suffix)
        request = Request(
            request_id or uuid.uuid4().hex,
            self.encode(prompt),
            SamplingParams() if sampling is None else _of(sampling, SamplingParams, "sampling"),
            decode if decode is None else _of(decode, DecodeParams, "decode"),
            self.encode(suffix, add_special=False),
            priority=priority,
            timeout=timeout,
            cache_salt=cache_salt,
            speculative=speculative,
            shown=tuple(shown),
            lora=lora,
        )
        return self.worker.submit(self.info.name, self._admitted(request) if lora else request)

    def _admitted(self, request: Request) -> Admission:
        """Raises what `Engine.admit` raises; AdaptersBusyError only where the request's time is over or nothing runs
        that could end."""
        while True:
            try:
                return self.engine.admit(request)
            except AdaptersBusyError:
                late = request.timeout is not None and time.monotonic() > request.arrival + request.timeout
                if late or not self.worker.is_alive:
                    raise
            time.sleep(0.01)

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, decode: DecodeParams | None = None, **options: Any
    ) -> Iterator[StepEvent]:
        """Events of one sequence as they come; options as in `submit`. Closing the iterator cancels the request."""
        stream = self.submit(prompt, sampling, decode, **options)
        try:
            yield from stream
        finally:
            if not stream.done:
                stream.cancel()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        decode: DecodeParams | Sequence[DecodeParams | None] | None = None,
        *,
        suffixes: Sequence[Prompt] | None = None,
        timeout: float | None = None,
        cache_salt: str = "",
        speculative: SpeculativeParams | None = None,
        shown: Sequence[int] = (),
        lora: str | Sequence[str] = "",
    ) -> list[RequestOutput]:
        """Answers to all prompts, batched together, in order. A single prompt is a list of one. sampling, decode and
        lora: one for all or one per prompt. shown, lora: see `core.Request`. If any request fails the others are
        cancelled and its error is raised."""
        texts = _as_batch(prompts)
        self._require_fits(*texts)
        batch = [self.encode(prompt) for prompt in texts]
        samplings = _per_prompt(SamplingParams() if sampling is None else sampling, len(batch), "sampling")
        samplings = [_of(one, SamplingParams, "sampling") for one in samplings]
        decodes = _per_prompt(decode, len(batch), "decode")
        loras = [lora] * len(batch) if isinstance(lora, str) else _per_prompt(lora, len(batch), "lora")
        tails = list(suffixes) if suffixes is not None else [()] * len(batch)
        if len(tails) != len(batch):
            raise ValidationError(
                f"suffixes: got {len(tails)}, wanted one per prompt ({len(batch)}).", param="suffixes"
            )
        jobs = [
            (i, prompt, single, decodes[i], tails[i], loras[i])
            for i, prompt in enumerate(batch)
            for single in split_choices(samplings[i])
        ]
        results: list[list[Completion]] = [[] for _ in batch]
        window = self.engine.config.max_waiting
        for at in range(0, len(jobs), window):
            part = jobs[at : at + window]
            self._run(part, results, timeout=timeout, cache_salt=cache_salt, speculative=speculative, shown=shown)
        return [
            RequestOutput(uuid.uuid4().hex, prompt, tuple(done)) for prompt, done in zip(batch, results, strict=True)
        ]

    def _run(
        self, jobs: Sequence[tuple[int, Any, Any, Any, Any, str]], results: list[list[Completion]], **options: Any
    ) -> None:
        streams: list[Stream] = []
        try:
            for _, prompt, sampling, decode, suffix, lora in jobs:
                streams.append(self.submit(prompt, sampling, decode, suffix=suffix, lora=lora, **options))
            for (i, *_), stream in zip(jobs, streams, strict=True):
                results[i].append(collect(stream, index=len(results[i])))
        finally:
            for stream in streams:
                if not stream.done:
                    stream.cancel()

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template, ready for the assistant's turn.

        messages: OpenAI's form; a field that does not exist is refused. chat_template_kwargs: variables of the
        template. parse_special: whether special tokens that messages spell out become those tokens; None: as the model
        was loaded, and there they stay text if nothing else was said.
        """
        text = chat_prompt(
            self.tokenizer,
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            variables=chat_template_kwargs,
            parse_special=parse_special,
        )
        return tuple(self.tokenizer.encode(text))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        decode: DecodeParams | Sequence[DecodeParams | None] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool | None = None,
        timeout: float | None = None,
        cache_salt: str = "",
        speculative: SpeculativeParams | None = None,
        lora: str | Sequence[str] = "",
    ) -> list[RequestOutput]:
        """The assistant's next message of a conversation, or of each of several: one RequestOutput each, as vLLM's.
        messages: OpenAI form (role, content, tool_calls, ...), or a list of such lists. tools: OpenAI's; `parse_calls`
        finds their calls in a text. chat_template_kwargs, parse_special: see `render`."""
        talks: list[Any] = list(messages) if messages and not isinstance(messages[0], Mapping) else [messages]
        how: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "parse_special": parse_special}
        prompts = [self.render(talk, tools, **how) for talk in talks]
        shown = self._reading(tools).taught.shown_ids(self.tokenizer) if tools else ()
        options: dict[str, Any] = {"timeout": timeout, "cache_salt": cache_salt, "speculative": speculative}
        options["lora"] = lora
        return self.generate(prompts, sampling, decode, shown=shown, **options)

    def parse_calls(self, text: str, tools: Sequence[Mapping[str, Any]]) -> ParsedMessage:
        """Content and tool calls of an answer that `chat` gave with these tools. Raises UnsupportedError where the
        chat template teaches no form of calls that is read."""
        return self._reading(tools).parse(text)

    def _reading(self, tools: Sequence[Mapping[str, Any]]) -> CallReading:
        return call_reading(self.tokenizer, {str(tool.get("function", tool).get("name")) for tool in tools})


def collect(stream: Iterable[StepEvent], index: int = 0) -> Completion:
    """Read a stream to its end. Raises what the request ended with if it did not end by itself."""
    ids: list[int] = []
    text: list[str] = []
    logprobs: list[TokenLogprob] = []
    for event in stream:
        ids += event.token_ids
        text.append(event.text)
        logprobs += event.logprobs
        if event.finish is not None:
            end = event.finish
    return Completion(index, "".join(text), tuple(ids), end.reason, end.usage, tuple(logprobs), end.stop)


def split_choices(sampling: SamplingParams) -> list[SamplingParams]:
    """n choices are n independent sequences; with a seed, choice i draws with a seed of its own (choice 0 with
    `seed`)."""
    if sampling.n == 1:
        return [sampling]
    return [
        dataclasses.replace(sampling, n=1, seed=None if sampling.seed is None else sampling.seed + i)
        for i in range(sampling.n)
    ]


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]
    return items


def _per_prompt(value: Any, n: int, name: str) -> list[Any]:
    if isinstance(value, Sequence):
        if len(value) != n:
            raise ValidationError(f"{name}: got {len(value)}, wanted one for all or one per prompt ({n}).", param=name)
        return list(value)
    return [value] * n


def _of(value: Any, wanted: type[Params], name: str) -> Params:
    """`value`, of the wanted class. Raises ValidationError for another one, such as a dict of the fields."""
    if isinstance(value, wanted):
        return value
    raise ValidationError(
        f"{name} must be {wanted.__name__}, got {type(value).__name__}.",
        param=name,
        hint=f"Pass {wanted.__name__}(...) with the fields as keywords.",
    )
