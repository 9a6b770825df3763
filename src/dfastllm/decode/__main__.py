"""`python -m dfastllm.decode` prints docs/decoders.md: every rule and cache with its options, from the tables they run
by."""

from __future__ import annotations

from collections.abc import Mapping

from dfastllm.decode.canvas.choice import CACHES
from dfastllm.decode.canvas.field import Option
from dfastllm.decode.canvas.rules import RULES

__all__ = ["reference"]

HEAD = """# Decoders

Made by `python -m dfastllm.decode > docs/decoders.md`; a test fails when it is stale.

An autoregressive model decodes with `ar` (greedy or sampled). A masked-diffusion model decodes with any rule and any
cache below but `sub_block`; a block-diffusion model with any rule, over exact K,V of finished blocks, and that cache
alone. In the HTTP API a rule is chosen by `rule` (or by sending `threshold` or `factor`) and its options, and those of
the cache, by `rule_options`; in Python by `DecodeParams(rule=..., options=...)`; on the command line by `--rule` and
`--options`.
"""


def reference() -> str:
    """The reference page, as Markdown."""
    lines = [HEAD, "## Rules: which masked positions a step commits", ""]
    for rule in RULES.values():
        lines += [f"### `{rule.name}`", "", f"{rule.help[0].upper()}{rule.help[1:]}.", "", *_options(rule.options)]
    lines += [ORIGIN, "| rule | published | equal, or how it differs and why | measured |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(_PUBLISHED[name])} |" for name in RULES]
    lines += ["", "## Caches: what is not computed again", ""]
    for name, options in CACHES.items():
        lines += [f"### `{name}`", "", f"{_CACHE_TEXT[name]}", "", *_options(options)]
    lines += [LOOPS, "| loop or cache | published | equal, or how it differs and why | measured |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in _LOOPS]
    return "\n".join(lines).rstrip() + "\n"


ORIGIN = """## What was published, and what is done here

A rule is done as its publication's code does it, except where that is a defect. For all of them: the mask token is
never a candidate (published loops can commit it); a step commits something; ties go to the lowest position; `steps` is
a minimum rate and the last step of a block takes what is left, where some published loops leave masks; a step that
would run the same canvas again is left out.

Confidence, entropy and margin are of the raw softmax for LLaDA; of the distribution that a token is drawn from, after
temperature, top_k and top_p, for SDAR, LLaDA2 and Fast-dLLM v2; and for Dream of that too, whose cuts count at
temperature 0 as well. The option `confidence` chooses another. Where both top_k and top_p are given top_k cuts first;
Dream's code has it the other way round.

Measured: decisions of random canvases that are those of a float64 twin written from the publication
(`python -m tests.decode.canvas.count_equal 300`); then right answers of 240 and forwards a sample on the shipped demo
models, before this was so and now (benchmarks/published.json, which also says how many tokens of random models were
those of the publications' own code). `tests/decode/test_published.py` and `test_published_rules.py` hold the loops to
the published ones token by token.
"""
_PUBLISHED: Mapping[str, tuple[str, str, str]] = {
    "schedule": (
        "LLaDA (arXiv 2502.09992), `generate.py`; SDAR (arXiv 2510.06303), static",
        "equal. Of a block that the prompt has begun the quotas are a whole block's, as in SDAR's and LLaDA2's loops; "
        "SDAR's then writes over the prompt where the quota exceeds the masks: a defect",
        "1,801 of 1,801; block diffusion at temperature 0.7, top_p 0.95: 232 right, 18.3 forwards; now 232, 17.1",
    ),
    "free_dave": (
        "FreeDave (arXiv 2510.00294)",
        "equal to `schedule` token for token; how many guesses run follows from what they are worth, no constant",
        "1,801 of 1,801",
    ),
    "dream": (
        "Dream (arXiv 2508.15487), `generation_utils.py`",
        "equal, the float32 quotas too. Points of the grid that commit nothing (the first, where there are as many "
        "points as tokens) run no forward: the canvas would be the same. `origin` and `alg_temp` draw from the same "
        "distributions by other numbers. Rows that a cut leaves one token tie at 1: which of them goes first is "
        "undefined there, the lowest here",
        "1,537 of 1,537; 64 points 231 right, 64.0 forwards; now 229, 63.0. 32 points 231, 32.0; now 230, 32.0",
    ),
    "threshold": (
        "Fast-dLLM (arXiv 2505.22618), `llada/generate.py`; SDAR, dynamic; LLaDA2, Fast-dLLM v2",
        "equal; at least the threshold for masked diffusion, more than it for block diffusion, as their loops have it. "
        "Fast-dLLM's uncached Dream loop holds a step to a quota and what earlier steps left of theirs: not offered",
        "1,427 of 1,427; block diffusion at temperature 0.7, top_p 0.95: 234 right, 5.32 forwards; now 232, 5.21",
    ),
    "factor": (
        "Fast-dLLM, dynamic",
        "differs by default: the published loop cannot tell a failure at the last rank from the end of the ranks, and "
        "takes that rank too, against the bound of its paper; `last_rank` 1 does as the code",
        "1,187 of 1,187; 229 right, 1.68 forwards; with last_rank 227, 1.53",
    ),
    "entropy_bound": (
        "EB-sampler (arXiv 2505.24857)",
        "equal, the error proxy is `order`. SDAR's strategy of that name takes the entropy of single numbers for that "
        "of a distribution: a defect",
        "1,361 of 1,361",
    ),
    "credit": ("CreditDecoding (arXiv 2510.06133), in dInfer", "equal, its tolerance of 1e-5 too", "1,254 of 1,254"),
    "hierarchy": (
        "dInfer (arXiv 2510.08666), `HierarchyDecoder`",
        "equal, but where two positions of a run are exactly as sure: there both, here the first",
        "1,444 of 1,444",
    ),
    "klass": (
        "KLASS (arXiv 2511.05664), `llada_klass.py`",
        "equal at temperature 0 with cache none or prefix: the divergence of a block's first step is from the last "
        "step before it. A cache whose steps run the block alone has no such row: there a block begins anew. Above "
        "temperature 0 the code takes the softmax of the noised exponentials: a defect, here the raw softmax. Its "
        "fallback may write over committed tokens where the quota exceeds the masks: a defect",
        "1,604 of 1,604; 226 right, 4.39 forwards; now 226, 4.38. Blocks of 16: 228, 5.88; now 227, 5.62",
    ),
    "local_leap": (
        "LocalLeap (2025), `generate.py`",
        "equal where relaxed_threshold is at most threshold",
        "1,400 of 1,400",
    ),
    "hierarchy_remask": (
        "dInfer, `get_transfer_index_hierarchy_remask`",
        "equal; fewer tokens go back where `steps` or max_parallel_tokens leave no room",
        "1,546 of 1,546; 221 right, 1.65 forwards (hierarchy: 224, 1.57)",
    ),
    "wino": (
        "WINO (arXiv 2507.18578), `decoding_wino`",
        "equal, its shadows see each other; shadows run from the first step on that has something to verify; with "
        "`steps` fewer tokens go back where the block would fall behind",
        "1,625 of 1,625; 229 right, 3.17 forwards; now 228, 3.18",
    ),
    "edit": (
        "LLaDA2.1 (2026), `generate` of its model file",
        "equal, but the defaults: there 0.95 and 0.9, and the model card's modes 0.7 and 0.5, 0.5 and 0.0",
        "2,283 of 2,283",
    ),
    "apd": (
        "APD (arXiv 2506.00413)",
        "equal at temperature 0. Above, the paper says the same noise for both draws; the code verifies with none: a "
        "defect",
        "1,493 of 1,493",
    ),
}
LOOPS = """## The loops and caches that were published, and what is done here

A loop is done as its publication's code does it, except where that is a defect. Measured: runs of 20 to 24 tokens on
tiny models that are the tokens, and the forwards or rows, of a float64 twin written from the publication
(`tests/decode/test_published.py`); then right answers of 60 test samples on the shipped demo models, and rows of an
answer of 64 tokens in 64 steps and tokens a CPU second beside cache none (benchmarks/published_caches.json).
"""
_LOOPS: tuple[tuple[str, str, str, str], ...] = (
    (
        "`none`",
        "LLaDA (arXiv 2502.09992), `generate.py`; Dream, `generation_utils.py`",
        "equal",
        "72 of 72 runs; 96.7 % at 32 steps, 93.3 % at threshold 0.9; 5,896 rows",
    ),
    (
        "`prefix`, `dual`, where a token's own row predicts it",
        "Fast-dLLM (arXiv 2505.22618), `llada/generate.py`",
        "equal; a block that its full forward finished gets no further forward, as it could change nothing",
        "72 of 72 runs; prefix 95.0 % and 93.3 %, 3,160 rows, 1.75 × the tokens; dual 95.0 % and 91.7 %, 2,168 rows, "
        "2.5 ×",
    ),
    (
        "`prefix`, `dual`, where the row before predicts: `first_token` alone",
        "Fast-dLLM, `dream/model/generation_utils_block.py`",
        "equal: the full forward of a block commits its first token, from the row before the block, and the steps "
        "after it never need that row. That is no defect (the wrong row is never read), only a token without regard to "
        "its confidence. With one step a block the published loop leaves masks: here they are filled",
        "72 of 72 runs",
    ),
    (
        "the same, `first_token` by_rule",
        "ours",
        "the full forward commits what the rule says, and every step runs the row before the block too: one row more a "
        "step, up to one forward a block less",
        "72 of 72 runs of its own twin",
    ),
    (
        "`windowed`",
        "dInfer (arXiv 2510.08666), vicinity refresh",
        "after its description; not held to its code",
        "96.7 % and 93.3 %; 3,950 rows, 1.5 ×",
    ),
    (
        "`delayed`",
        "dKV-Cache-Decode (arXiv 2505.15781), `llada_dkv_cache_decode.py`, `dream_generation_utils.py`",
        "equal for LLaDA; for Dream its shift_type un_right, but for the last position of the canvas, which there runs "
        "again where the one before it is masked. It holds for any rule and block, where the code has one of each",
        "144 of 144 runs; refresh 4, 8, 16: 96.7, 96.7, 98.3 % and 93.3 % each; 3,146, 2,673, 2,437 rows, 1.75, 2.0, "
        "2.2 ×",
    ),
    (
        "block diffusion",
        "SDAR (arXiv 2510.06303), `generate.py`: sequential, low_confidence_static, low_confidence_dynamic",
        "equal: rule `schedule` with `remasking` sequential or low_confidence, and rule `threshold`. K,V of a finished "
        "block are stored by the next block's first forward. Its entropy_bounded takes the entropy of one number and "
        "then fails: a defect; `entropy_bound` with `bound` sum is what it is meant to be",
        "36, 6 of 6 runs",
    ),
    (
        "block diffusion, where the row before predicts",
        "Fast-dLLM v2 (arXiv 2509.26328), `generation_functions.py`",
        "equal",
        "60 of 60 runs",
    ),
    (
        "`sub_block`",
        "Fast-dLLM v2, use_block_cache",
        "equal; where a token's own row predicts it (SDAR, LLaDA2) the same from each sub-block's first step on",
        "60 of 60 runs; demo-block in sub-blocks of 2: 98.3 % with and without; 246 rows for 271, 1.15 ×",
    ),
    (
        "`cfg_scale`",
        "LLaDA, `generate.py`",
        "equal, with cache none: others would need K,V of the canvas without its prompt too. Two forward passes a "
        "step. For models trained to do without a prompt at times",
        "36 of 36 runs; demo-diffusion is not such a model: 93.3 % at 0, 68.3 % at 0.5, 53.3 % at 1",
    ),
    (
        "`logits_eos_inf`, `confidence_eos_eot_inf`",
        "LLaDA, `generate.py` (appendix B.4 of the paper)",
        "equal at temperature 0. Above, the code lowers the end of text in a tensor that is not read again: a defect. "
        "Ids: the first of the model's ending tokens; all of them",
        "24 of 24 runs; in one block of 64 at 32 steps confidence_eos_eot_inf 95.0 % in 8.5 forwards, without it "
        "96.7 % in 32",
    ),
)
_CACHE_TEXT = {
    "none": "Every step runs the whole sequence. The reference.",
    "prefix": "A full forward at each block start; steps run from the block's start to the end. Approximate.",
    "dual": "A full forward at each block start; steps run the block alone, its K,V replaced in place. Approximate.",
    "windowed": "As dual, with the neighbourhood of the block, and refreshed more often. Approximate.",
    "delayed": "A step runs the masked positions and what the last step committed, wherever they lie; a full forward "
    "at a block's start, and every so often (dKV-Cache-Decode, 2025). Approximate.",
    "sub_block": "For block diffusion: steps run a sub-block of the model's block alone, the rest of it as it stood at "
    "the sub-block's first step (Fast-dLLM v2, use_block_cache). Approximate.",
}


def _options(options: Mapping[str, Option]) -> list[str]:
    if not options:
        return []
    rows = [f"| `{name}` | {option.default} | {_range(option)} | {option.help} |" for name, option in options.items()]
    return ["| option | default | range | |", "|---|---|---|---|", *rows, ""]


def _range(option: Option) -> str:
    if option.choices:
        return ", ".join(option.choices)
    return f"{option.low:g} to {option.high:g}" if option.high != float("inf") else f"at least {option.low:g}"


if __name__ == "__main__":
    print(reference(), end="")
