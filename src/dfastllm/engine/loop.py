"""The engine: one loop for every decoder. A request joins and leaves between any two steps."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dfastllm.core import (
    CanvasUpdate,
    Commit,
    FinishReason,
    Request,
    Span,
    SpeculativeParams,
    StepEvent,
    StepStats,
)
from dfastllm.decode.registry import policy_for
from dfastllm.engine.adapters import Adapters
from dfastllm.engine.admission import Admission, Terms, admit
from dfastllm.engine.batch import pack
from dfastllm.engine.config import EngineConfig
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.prefix import PrefixCache, refusal
from dfastllm.engine.runners import Runnable, runner_for
from dfastllm.engine.runners.triton import kv_tokens_that_fit
from dfastllm.engine.scheduler import Scheduler
from dfastllm.engine.sequence import Live
from dfastllm.engine.speculate.drafting import Drafting
from dfastllm.engine.underway import Underway
from dfastllm.errors import (
    DFastLLMError,
    GenerationError,
    QueueFullError,
    TimeoutError,
    UnsupportedError,
    ValidationError,
)
from dfastllm.kernels import torch_team
from dfastllm.kernels.halt import Interrupted
from dfastllm.kernels.triton.memory import serving_error
from dfastllm.lora import Adapter, read_adapter
from dfastllm.models import Decoder, DeviceDecoder, PackedDecoder, adapter_base
from dfastllm.models.adapted import bytes_beside
from dfastllm.text import Detokenizer

if TYPE_CHECKING:
    from dfastllm.decode.draft import Drafter
    from dfastllm.decode.policy import Policy
    from dfastllm.kernels.rows import Rows
    from dfastllm.text import Tokenizer

__all__ = ["Engine"]

log = logging.getLogger("dfastllm.engine")

Chosen = Sequence[tuple[Live, Span]]


class Engine:
    """Serves many requests on one model. Not thread-safe: one thread calls add, cancel and step (see `worker`).

    tokenizer None: requests and events carry token ids only, and stop strings are refused. `dtype` is that of the K,V
    pages (default: the model's). `choose` picks the policy of a request; tests and extensions may pass their own.
    drafters: further ones by speculative method; speculative: for requests that name no method themselves.
    """

    def __init__(
        self,
        model: Runnable | PackedDecoder | DeviceDecoder,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        choose: Callable[..., Policy] = policy_for,
        drafters: Mapping[str, Drafter] | None = None,
        speculative: SpeculativeParams | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.model = model
        self.info = model.info
        self.device = device
        self.tokenizer = tokenizer
        limits = {"max_rows": self.config.max_batch_rows, "max_spans": max(256, 4 * self.config.max_sequences)}
        share = self.config.gpu_memory_utilization
        if share is not None:
            if not isinstance(model, DeviceDecoder):
                raise UnsupportedError(
                    "gpu_memory_utilization is for models on a GPU by the triton runner.",
                    param="gpu_memory_utilization",
                    hint="Give kv_tokens.",
                )
            self.config = dataclasses.replace(
                self.config, kv_tokens=kv_tokens_that_fit(model, dtype or model.dtype, share, **limits)
            )
        self.pages = Pages(math.ceil(self.config.kv_tokens / self.config.page_size), self.config.page_size)
        slots = self.pages.count * self.pages.page_size
        min_rows = self.config.min_rows or max(16, 8 * torch.get_num_threads())
        self.runner = runner_for(
            model,
            slots,
            dtype or model.dtype,
            device,
            min_rows,
            self.config.page_size,
            max_len=self.config.max_len,
            **limits,
        )
        self.prefix = self._prefix_cache()
        self.scheduler = Scheduler(self.config, self.pages, self.prefix)
        self.underway = Underway(self.scheduler, self.runner.halt)
        self.max_len = min(self.config.max_len or self.info.max_len, self.info.max_len)
        self.steps = 0
        self.choose = choose
        limit = min(self.config.prefill_chunk, self.config.max_batch_rows)
        self.drafting = Drafting(self.info, drafters or {}, speculative, limit)
        capacity = self.pages.count * self.pages.page_size
        self.adapters = Adapters(self._read_adapter, self.config.max_loras, self.config.lora_memory)
        self.terms = Terms(
            dataclasses.replace(self.info, max_len=self.max_len),
            capacity,
            tokenizer is not None,
            choose,
            self.drafting,
            self.adapters,
        )
        self._added = 0
        self._adapted = False  # whether any request had an adapter
        self._deadline = math.inf  # the earliest of all requests
        self._subscribers: list[Callable[[StepStats], None]] = []
        self._dead: list[tuple[Live, FinishReason]] = []

    def _prefix_cache(self) -> PrefixCache | None:
        if not self.config.prefix_caching:
            return None
        reason = refusal(self.info.kind)
        if reason is not None:
            log.info("prefix caching: off for %s, because %s", self.info.name, reason)
            return None
        limit = min(self.config.prefill_chunk, self.config.max_batch_rows)
        return PrefixCache(self.pages, self.info, limit, cut_free=self.runner.cut_free)

    def _read_adapter(self, path: Path) -> Adapter:
        """The adapter in a directory, for this model, its bytes being all that it takes in this process; on the thread
        of whoever asks for it. Raises AdapterError, and UnsupportedError for what this runner cannot compute."""
        model, config = self.model, self.config
        if not isinstance(model, Decoder | PackedDecoder | DeviceDecoder):
            raise UnsupportedError(f"{self.info.name} is no model that adapters can change.", param="lora")
        adapter = read_adapter(path, adapter_base(model), max_rank=config.max_lora_rank, max_bytes=config.lora_memory)
        self.runner.check_adapter(adapter)
        return dataclasses.replace(adapter, bytes=adapter.bytes + bytes_beside(model, adapter))

    @property
    def own_threads(self) -> bool:
        """Whether torch has nothing to do here but short operations: model and drafters run on threads of their own. A
        policy that is not one of ours may run what it likes."""
        runners = [self.runner, *(d.runner for d in self.drafting.drafters.values() if hasattr(d, "runner"))]
        return self.choose is policy_for and all(runner.own_threads for runner in runners)

    @property
    def has_work(self) -> bool:
        return len(self.scheduler) > 0 or bool(self._dead)

    def subscribe(self, fn: Callable[[StepStats], None]) -> None:
        """Call `fn` with the counters of every step, on the engine's thread."""
        self._subscribers.append(fn)

    def admit(self, request: Request) -> Admission:
        """The request understood: what `add` takes. Raises what `admission.admit` raises. Thread-safe: reads only."""
        return admit(request, self.terms)

    def add(self, asked: Request | Admission) -> None:
        """Queue a request. Raises ValidationError for a duplicate id, QueueFullError, and what `admit` raises unless
        that has been called."""
        admission = asked if isinstance(asked, Admission) else self.admit(asked)
        request, state = admission.request, admission.state
        self.underway.joined(admission)
        if self.scheduler.find(request.request_id) is not None:
            raise ValidationError(f"request id {request.request_id!r} is already in use.", param="request_id")
        self.check_room(request)
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(
                self.tokenizer,
                stop=state.ends.texts,
                include_stop=request.sampling.include_stop_str_in_output,
                skip_special=request.sampling.skip_special_tokens,
                shown=request.shown,
            )
        table = PageTable(self.pages)
        lease = admission.lease
        live = Live(state, admission.policy, table, detokenizer, admission.tier, self.steps, self._added, lease=lease)
        if self.prefix is not None:
            live.trail = self.prefix.trail(request.salt, state.model.kind, lease.hash if lease else b"")
        self._added += 1
        self._adapted = self._adapted or request.lora != ""
        self._deadline = min(self._deadline, _deadline(request))
        self.scheduler.add(live)
        self.drafting.admit(live)

    def check_room(self, request: Request) -> None:
        """Raises QueueFullError when the waiting queue is at its limit for the request's tenant. Thread-safe."""
        if self.scheduler.full(request.tenant, request.share):
            raise QueueFullError(f"{self.config.max_waiting} requests are waiting already.", hint="Try again later.")

    def abandon(self, error: DFastLLMError) -> list[StepEvent]:
        """End every request with `error` and start afresh; for a caller whose `step` raised, or who steps no more.
        Subscribers are told, so that nothing stands in their counters that is no more."""
        events = []
        for live in list(self.scheduler.everyone()):
            self._remove(live)
            events.append(live.fail(FinishReason.ERROR, error))
        events += [live.fail(reason, None) for live, reason in self._dead]
        self._dead = []
        if self.prefix is not None:
            self.prefix.clear()
        self._report(time.monotonic(), 0.0, 0.0, (), (), events, 0)
        return events

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> bool:
        """End a request now; its pages return at once and its Finish comes with the next step. False: not known."""
        live = self.scheduler.find(request_id)
        if live is None:
            return False
        self._remove(live)
        self._dead.append((live, reason))
        return True

    def _remove(self, live: Live) -> None:
        self.scheduler.remove(live)
        self.drafting.release(live)
        if live.lease is not None:
            live.lease.release()

    def step(self) -> list[StepEvent]:
        """One turn of the loop: draft, plan and schedule, run, absorb, commit, emit. At most one event per request."""
        began = time.monotonic()
        if (table := self.adapters.table()) is not None:  # between two steps: a step sees one table
            self.runner.adapters(table)
        self._expire(began)
        preempted = self.scheduler.preempted
        self.scheduler.admit(self.steps)
        with torch.inference_mode():
            draft_seconds = self.drafting.draft(self.scheduler.running)
        chosen: Chosen = self.scheduler.schedule(self.steps)
        with torch.inference_mode():
            chosen, rows, seconds = self._run(chosen)
            with torch_team(sum([span.wanted for _, span in chosen]) * self.info.vocab_size):
                commits = self._absorb(chosen, rows)
        canvases = self._commit(chosen, commits)
        if self.prefix is not None:
            self.prefix.record(chosen)
        events = self._emit(chosen, commits, canvases)
        if chosen:  # nothing else says what a step costs
            self.drafting.observe(chosen, commits, time.monotonic() - began - draft_seconds)
        self.steps += 1
        preempted = self.scheduler.preempted - preempted
        self._report(began, seconds, draft_seconds, chosen, commits, events, preempted)
        return events

    def _expire(self, now: float) -> None:
        if now <= self._deadline:
            return
        self._deadline = math.inf
        for live in list(self.scheduler.everyone()):
            deadline = _deadline(live.request)
            if now > deadline:
                self.cancel(live.request.request_id, FinishReason.TIMEOUT)
            else:
                self._deadline = min(self._deadline, deadline)

    def _run(self, chosen: Chosen) -> tuple[Chosen, Rows | GenerationError | None, float]:
        """What ran, its wanted rows and the seconds; an error when the forward failed: then every request in it fails,
        and no other. Nothing ran when it was given up for a newcomer. Where a device's memory ran out, the request with
        the most rows ran, and failed; the others wait for the next step."""
        if not chosen:
            return chosen, None, 0.0
        rows: Rows | GenerationError
        now = time.monotonic()
        self.underway.begins(chosen)
        try:
            items = [(span, live.table, live.state.kv_len) for live, span in chosen]
            numbers = [live.lease.number if live.lease is not None else 0 for live, _ in chosen]
            rows = self.runner.run(pack(items, self.runner.block_size, numbers))
            self.underway.charge(self.steps)
        except Interrupted:
            self.underway.interrupted()
            return (), None, time.monotonic() - now
        except torch.OutOfMemoryError as error:
            log.exception("the device's memory ran out")
            chosen, rows = [max(chosen, key=lambda one: one[1].rows)], serving_error(error)
            torch.cuda.empty_cache()
        except Exception:
            log.exception("forward pass failed")
            rows = GenerationError("the model failed on this step; see the server's log.")
        self.underway.ended()
        for live, span in chosen:
            live.ran = self.steps
            live.state.forwards += span.passes
            live.first_scheduled = live.first_scheduled or now
        return chosen, rows, time.monotonic() - now

    def _absorb(self, chosen: Chosen, rows: Rows | GenerationError | None) -> list[Commit | Exception]:
        """One commit, or the error that ends the request, per chosen sequence: one `absorb` call per policy."""
        if rows is None or isinstance(rows, GenerationError):
            return [rows for _ in chosen if rows is not None]
        policies = [live.policy for live, _ in chosen]
        if policies.count(policies[0]) == len(policies):  # nearly always
            out = _ask(policies[0], chosen, rows)
        else:
            groups: dict[int, list[int]] = {}
            for i, policy in enumerate(policies):
                groups.setdefault(id(policy), []).append(i)
            spots = _spots(chosen)
            out = [GenerationError("the decoder gave no answer.")] * len(chosen)
            for members in groups.values():
                part = rows.select([r for i in members for r in spots[i]])
                answers = _ask(policies[members[0]], [chosen[i] for i in members], part)
                for i, answer in zip(members, answers, strict=True):
                    out[i] = answer
        finite = rows.finite()  # of what the policies looked at: asking before would run the head for nobody
        if not finite.all():
            for i, spot in enumerate(_spots(chosen)):
                if not finite[spot.start : spot.stop].all():
                    out[i] = _not_finite(chosen[i][0])
        return out

    def _commit(self, chosen: Chosen, commits: Sequence[Commit | Exception]) -> list[CanvasUpdate | None]:
        return [
            live.apply(span, commit) if isinstance(commit, Commit) else None
            for (live, span), commit in zip(chosen, commits, strict=True)
        ]

    def _emit(
        self, chosen: Chosen, commits: Sequence[Commit | Exception], canvases: Sequence[CanvasUpdate | None]
    ) -> list[StepEvent]:
        events = []
        for live, reason in self._dead:
            error = TimeoutError("the request ran past its time limit.") if reason is FinishReason.TIMEOUT else None
            events.append(live.fail(reason, error))
        self._dead = []
        now = time.monotonic()
        for (live, _), commit, canvas in zip(chosen, commits, canvases, strict=True):
            if isinstance(commit, Commit):
                event = live.emit(now, canvas, commit.finish)
            else:
                event = live.fail(FinishReason.ERROR, commit if isinstance(commit, GenerationError) else None)
            if event is not None:
                events.append(event)
                if event.finish is not None:
                    self._remove(live)
        return events

    def _report(
        self,
        began: float,
        run_seconds: float,
        draft_seconds: float,
        chosen: Chosen,
        commits: Sequence[Commit | Exception],
        events: Sequence[StepEvent],
        preempted: int,
    ) -> None:
        queries, hits = self.prefix.counted() if self.prefix is not None else (0, 0)
        if not self._subscribers:
            return
        stats = StepStats(
            model=self.info.name,
            sequences=len(chosen),
            rows=sum([span.rows for _, span in chosen]),
            wanted=sum([span.wanted for _, span in chosen]),
            committed=sum([_decided(c) for c in commits if isinstance(c, Commit)]),
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            pages_used=self.pages.used,
            pages_total=self.pages.count,
            preempted=preempted,
            seconds=time.monotonic() - began,
            run_seconds=run_seconds,
            draft_seconds=draft_seconds,
            drafts=tuple([(c.drafted, c.accepted) for c in commits if isinstance(c, Commit) and c.drafted]),
            suppressed=self.drafting.suppressed,
            uncaptured=bool(chosen) and getattr(self.runner, "uncaptured", False),
            prefix_queries=queries,
            prefix_hits=hits,
            finished=tuple([e.finish for e in events if e.finish is not None]),
            running_loras=_loras(self.scheduler.running) if self._adapted else (),
            waiting_loras=_loras(self.scheduler.waiting) if self._adapted else (),
            max_loras=self.config.max_loras,
        )
        for fn in self._subscribers:
            try:
                fn(stats)
            except Exception:  # the step is done, and its events are owed to their readers
                log.exception("a subscriber of the step's counters failed")


def _not_finite(live: Live) -> GenerationError:
    """For a row whose logits are NaN or infinite. Its neighbours are not touched by it."""
    if live.lease is None:
        return GenerationError(
            "the model gave logits that are not finite.",
            hint="Its weights, or what they are computed in, do not hold this prompt; try float32 (dtype).",
        )
    return GenerationError(
        f"the model with its adapter {live.lease.name!r} gave logits that are not finite.",
        param="lora",
        hint="The adapter's numbers are too large for the model; unload it, or train it anew at a lower rate.",
    )


def _loras(lives: Iterable[Live]) -> tuple[str, ...]:
    """The names of their adapters, each once."""
    return tuple(dict.fromkeys([live.lease.name for live in lives if live.lease is not None]))


def _deadline(request: Request) -> float:
    """On time.monotonic()."""
    return math.inf if request.timeout is None else request.arrival + request.timeout


def _ask(policy: Policy, chosen: Chosen, rows: Rows) -> list[Commit | Exception]:
    """The commits of sequences of one policy; when it fails, that for each of them."""
    try:
        return [*policy.absorb([(live.state, span) for live, span in chosen], rows)]
    except Exception as error:
        log.exception("policy %s failed", policy.name)
        if isinstance(error, torch.OutOfMemoryError):
            return [serving_error(error)] * len(chosen)
        return [GenerationError(f"decoder {policy.name!r} failed: {error}")] * len(chosen)


def _spots(chosen: Chosen) -> list[range]:
    """The wanted rows of each."""
    ends = accumulate([span.wanted for _, span in chosen])
    return [range(end - span.wanted, end) for end, (_, span) in zip(ends, chosen, strict=True)]


def _decided(commit: Commit) -> int:
    """Tokens a commit decided. The last one also fills what lies beyond the end of the text; that is no decision."""
    if commit.finish is None:
        return len(commit.fixed)
    return sum(position < commit.stable for position in commit.fixed)
