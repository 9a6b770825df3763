"""The forward itself: packing, dense attention patterns, dtypes, gradients, and rows that ignore their neighbours."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfastllm import models
from dfastllm.errors import ValidationError
from dfastllm.models import RopeScaling
from dfastllm.models.mixture import Mixture, Router
from dfastllm.models.parts import Rotary, inverse_frequencies, rotate
from dfastllm.models.program import Attend, RopeTable

FAMILIES = sorted(models.FAMILIES)


def per_span(lengths: list[int], kinds: list[str], block: int = 4) -> models.AttendFunction:
    """Attention of sequences packed end to end, each alone."""
    alone = [
        models.dense_attention(1, n, kind, block=block if kind == "block" else 0)  # type: ignore[arg-type]
        for n, kind in zip(lengths, kinds, strict=True)
    ]

    def attend(layer: int, op: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [t.split(lengths) for t in (q, k, v)]
        return torch.cat([one(layer, op, *rows) for one, *rows in zip(alone, *parts, strict=True)])

    return attend


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str) -> None:
    """Several sequences of different lengths and attention kinds in one forward give what each gives alone."""
    model = models.tiny(family, seed=4).requires_grad_(False)
    lengths, kinds = [5, 1, 17, 8], ["causal", "full", "block", "full"]
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 90, (n,), generator=draw) for n in lengths]
    starts = [0, 30, 4, 100]
    positions = [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    packed = model(torch.cat(ids), torch.cat(positions), per_span(lengths, kinds)).split(lengths)
    for i, rows in enumerate(packed):
        alone = model(ids[i], positions[i], per_span([lengths[i]], [kinds[i]]))
        assert torch.allclose(rows, alone, atol=2e-6, rtol=1e-5), (family, i)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_bits_ignore_neighbours(family: str) -> None:
    """Batch invariance of everything but attention (each sequence's own here): equal to the last bit whatever is packed
    before and behind, from 16 rows on, which the engine pads to."""
    model = models.tiny(family, seed=4).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    lengths = [19, 33, 16, 140]
    ids = [torch.randint(0, 90, (n,), generator=draw) for n in lengths]
    alone = [model(ids[i], torch.arange(n), per_span([n], ["causal"])) for i, n in enumerate(lengths)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3], [2, 0]):
        sizes = [lengths[i] for i in order]
        at = torch.cat([torch.arange(n) for n in sizes])
        packed = model(torch.cat([ids[i] for i in order]), at, per_span(sizes, ["causal"] * len(order)))
        for i, rows in zip(order, packed.split(sizes), strict=True):
            assert torch.equal(rows, alone[i])
            assert torch.equal(model.head(rows[:16]), model.head(packed)[sum(sizes[: order.index(i)]) :][:16])


@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_chosen_rows(family: str) -> None:
    model = models.tiny(family, seed=4).requires_grad_(False)
    hidden = model(torch.arange(12), torch.arange(12), models.dense_attention(1, 12))
    assert hidden.shape == (12, 32)
    assert torch.allclose(model.head(hidden[[2, 9]]), model.head(hidden)[[2, 9]], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_gradient(family: str) -> None:
    """A parameter that the forward does not use would train nothing and load silently wrong. Selection by the sigmoid
    router's bias has no gradient by design."""
    model = models.tiny(family, seed=4)
    attend = models.dense_attention(2, 150, "causal")
    ids = torch.randint(0, 96, (300,), generator=torch.Generator().manual_seed(0))
    hidden = model(ids, torch.arange(150).repeat(2), attend)
    model.head(hidden).float().log_softmax(-1)[:, 3].sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("router.bias"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    kind=st.sampled_from(["full", "causal", "block"]),
    block=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    masked=st.booleans(),
    window=st.integers(0, 4),
    softcap=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 2**16),
)
def test_dense_attention(
    batch: int,
    length: int,
    kind: str,
    block: int,
    heads: tuple[int, int],
    masked: bool,
    window: int,
    softcap: float,
    seed: int,
) -> None:
    """Against a softmax over each row's own list of keys."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch * length, heads[0], 4, generator=draw)
    k, v = (torch.randn(batch * length, heads[1], 4, generator=draw) for _ in range(2))
    mask = torch.rand(batch, 1, length, length, generator=draw) > 0.3
    mask |= torch.eye(length, dtype=torch.bool)  # every row may see itself
    attend = models.dense_attention(
        batch,
        length,
        kind,  # type: ignore[arg-type]
        block=block if kind == "block" else 0,
        mask=mask if masked else None,
    )
    got = attend(0, Attend(*heads, 4, 0.5, window, softcap), q, k, v)
    assert got.shape == q.shape
    for b in range(batch):
        for row in range(length):
            stop = {"full": length, "causal": row + 1, "block": min(length, (row // block + 1) * block)}[kind]
            keys = [key for key in range(stop) if not masked or mask[b, 0, row, key]]
            keys = [key for key in keys if not window or row - key < window]
            for head in range(heads[0]):
                at = [b * length + key for key in keys]
                shared = head // (heads[0] // heads[1])
                scores = k[at, shared] @ q[b * length + row, head] / 2
                weights = (softcap * torch.tanh(scores / softcap) if softcap else scores).softmax(0)
                assert torch.allclose(got[b * length + row, head], weights @ v[at, shared], atol=1e-5)


def test_dense_attention_refuses_nonsense() -> None:
    with pytest.raises(ValidationError, match="full, causal or block"):
        models.dense_attention(1, 4, "sliding")  # type: ignore[arg-type]
    for kind, block in (("block", 0), ("full", 4)):
        with pytest.raises(ValidationError, match="exactly when kind is block"):
            models.dense_attention(1, 4, kind, block=block)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(shift=st.integers(0, 5000), seed=st.integers(0, 2**16), rotating=st.sampled_from([2, 4, 8]))
def test_rotary_scores_depend_on_distance_only(shift: int, seed: int, rotating: int) -> None:
    tables = Rotary(RopeTable(10000.0, rotating))
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 6, 1, 8, generator=draw)
    at = torch.arange(6)
    near = rotate(q, *tables(at))[:, 0] @ rotate(k, *tables(at))[:, 0].T
    far = rotate(q, *tables(at + shift))[:, 0] @ rotate(k, *tables(at + shift))[:, 0].T
    assert torch.allclose(near, far, atol=5e-3)
    assert torch.equal(rotate(q, *tables(at))[..., rotating:], q[..., rotating:])
    assert torch.allclose(rotate(q, *tables(at)).norm(dim=-1), q.norm(dim=-1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_stay_float32(dtype: torch.dtype) -> None:
    """Casting a model must not round its rotary frequencies: bfloat16 cannot tell position 4,001 from 4,000."""
    model, coarse = models.tiny("llama"), models.tiny("llama").to(dtype)
    far = torch.tensor([1, 4001, 100_003])
    for ours, theirs in zip(model.angles(far)[0], coarse.angles(far)[0], strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)
    rows = coarse(torch.arange(6), torch.arange(6), models.dense_attention(1, 6))
    assert rows.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_close(family: str, dtype: torch.dtype) -> None:
    model, half = models.tiny(family, seed=1), models.tiny(family, seed=1, dtype=dtype)
    ids, at, attend = torch.arange(20), torch.arange(20), models.dense_attention(1, 20)
    exact, rounded = (m.head(m(ids, at, attend)).float() for m in (model, half))
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=-1).median() > 0.995


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_a_row_of_a_mixture_ignores_its_neighbours(router: str) -> None:
    """To the last bit, however many rows share an expert with it."""
    config = models.MoEConfig(8, 2, 24, router, True, 1.5, 2, 1, 24 if router == "sigmoid" else 0)  # type: ignore[arg-type]
    mixture = Mixture(32, config).requires_grad_(False)
    for weight in mixture.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    together = mixture(x)
    for start, count in ((0, 16), (3, 17), (50, 40), (120, 64), (184, 16)):
        assert torch.equal(mixture(x[start : start + count]), together[start : start + count])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_routers_score_in_float32(kind: str) -> None:
    """A bfloat16 model routes by float32 products of its bfloat16 weights."""
    config = models.MoEConfig(16, 4, 8, kind, True)  # type: ignore[arg-type]
    router = Router(64, config).requires_grad_(False)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    router.weight.data = router.weight.data.bfloat16()
    x = (torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) / 8).bfloat16()
    weights, chosen = router(x)
    assert weights.dtype == torch.float32
    scores = x.double() @ router.weight.double().T
    exact = scores.softmax(-1) if kind == "softmax" else scores.sigmoid()
    best = exact.topk(4)
    assert torch.equal(chosen, best.indices)
    assert torch.allclose(weights.double(), best.values / best.values.sum(-1, keepdim=True), atol=1e-5)


def test_router_ties_and_groups_of_one() -> None:
    """One expert per group: a group scores its only expert."""
    router = Router(4, models.MoEConfig(4, 2, 8, "sigmoid", True, 1.0, 4, 2)).requires_grad_(False)
    router.weight.copy_(torch.eye(4))
    weights, chosen = router(torch.tensor([[3.0, -1.0, 2.0, 0.0]]))
    assert set(chosen[0].tolist()) == {0, 2}
    assert weights.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 0}, "layers must be in"),
        ({"heads": 3, "kv_heads": 2}, "multiple of kv_heads"),
        ({"rope_dim": 3}, "rope_dim must be even"),
        ({"rope_dim": 16}, "rope_dim must be even"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"max_len": 0}, "max_len"),
        ({"moe": models.MoEConfig(4, 2, 8, layers=(True,))}, "of length 2"),
    ],
)
def test_impossible_shapes(change: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        dataclasses.replace(models.tiny_config("llama"), **change)


@pytest.mark.parametrize(
    "arguments",
    [
        {"experts": 0, "top_k": 1},
        {"experts": 8, "top_k": 9},
        {"experts": 8, "top_k": 2, "groups": 3},
        {"experts": 8, "top_k": 3, "groups": 4, "groups_kept": 1},
        {"experts": 8, "top_k": 2, "groups": 4, "groups_kept": 5},
    ],
)
def test_impossible_mixtures(arguments: dict) -> None:
    with pytest.raises(ValidationError):
        models.MoEConfig(intermediate_size=8, **arguments)


@pytest.mark.parametrize(
    "scaling",
    [
        ("linear", 0.0, 0, {}),
        ("yarn", 2.0, 0, {}),
        ("yarn", 2.0, 64, {"beta_fast": 1.0, "beta_slow": 1.0}),
        ("llama3", 2.0, 64, {"low_freq_factor": 4.0, "high_freq_factor": 4.0}),
    ],
)
def test_impossible_rope_scaling(scaling: tuple) -> None:
    kind, factor, original, more = scaling
    with pytest.raises(ValidationError):
        models.RopeScaling(kind, factor, original, **more)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        RopeScaling("yarn", 4.0, 32768),
        RopeScaling("yarn", 40.0, 4096, beta_fast=32.0, beta_slow=1.0, attention_factor=1.25),
        RopeScaling("yarn", 16.0, 4096, truncate=False),
    ],
)
def test_scaled_frequencies_of_real_sizes_are_the_published_ones(scaling: RopeScaling, theta: float, dim: int) -> None:
    """Head sizes and trained lengths of published models against transformers: YaRN's range of dims is rounded
    outwards, which tiny models, whose ranges end at the edges, do not show."""
    rope = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[scaling.kind]
    config = pytest.importorskip("transformers").LlamaConfig(
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=int(scaling.factor) * (scaling.original_max_len or 4096),
        rope_parameters={
            "rope_type": scaling.kind,
            "rope_theta": theta,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_len,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
            "truncate": scaling.truncate,
        },
    )
    wanted, factor = rope(config, "cpu")
    got, ours = inverse_frequencies(RopeTable(theta, dim, scaling))
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=0)
    assert ours == pytest.approx(factor)
