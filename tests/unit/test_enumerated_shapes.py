"""Enumerated shapes, as the distillation document names its tests: the draw, and cutting a batch to a shape."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dfastllm.distill import sample_enumerated_shape, truncate_batch_to_shape
from dfastllm.errors import ValidationError

LENGTHS = (512, 1024, 2048, 4096)


def shares(lengths: tuple[int, ...], steps: range, **options: object) -> list[float]:
    counts = Counter(sample_enumerated_shape(lengths, step=step, **options) for step in steps)  # type: ignore[arg-type]
    return [counts[length] / len(steps) for length in lengths]


class TestSampleEnumeratedShape:
    def test_default_production_mix_4_shapes(self) -> None:
        found = shares(LENGTHS, range(2000), periodic_upweight_rare=False)
        assert found == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.003)

    def test_default_production_mix_3_and_2_shapes(self) -> None:
        assert shares(LENGTHS[:3], range(2000), periodic_upweight_rare=False) == pytest.approx(
            [0.6, 0.3, 0.1], abs=0.003
        )
        assert shares(LENGTHS[:2], range(2000), periodic_upweight_rare=False) == pytest.approx([0.7, 0.3], abs=0.003)

    def test_custom_shape_probs(self) -> None:
        found = shares(LENGTHS[:3], range(2000), shape_probs=[0.1, 0.2, 0.7], periodic_upweight_rare=False)
        assert found == pytest.approx([0.1, 0.2, 0.7], abs=0.003)
        with pytest.raises(ValidationError, match="2 shares for 3 lengths"):
            sample_enumerated_shape(LENGTHS[:3], [0.5, 0.5], step=0)

    def test_periodic_upweight_rare(self) -> None:
        """At every hundredth step the least likely shape counts twice, 0.05 of 1 becomes 0.1 of 1.05."""
        raised = shares(LENGTHS, range(0, 200_000, 100))
        assert raised == pytest.approx([share / 1.05 for share in (0.5, 0.3, 0.15, 0.1)], abs=0.003)
        plain = shares(LENGTHS, range(0, 200_000, 100), periodic_upweight_rare=False)
        assert plain == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.003)


class TestTruncateBatchToShape:
    @staticmethod
    def batch() -> dict[str, object]:
        ids = torch.arange(2 * 16).reshape(2, 16)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.clone(),
            "teacher_logits": torch.randn(2, 16, 7),
            "tool_should_be_used": torch.tensor([True, False]),
            "required_fields_present": torch.tensor([False, True]),
            "teacher_prefix_ids": torch.arange(2 * 16).reshape(2, 16),
            "metadata": [{"id": "a"}, {"id": "b"}],
        }

    def test_truncate_sequence_keys(self) -> None:
        batch = self.batch()
        cut = truncate_batch_to_shape(batch, 8)
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(cut[name], batch[name][:, :8])  # type: ignore[index]
        assert truncate_batch_to_shape(batch, 64)["input_ids"].shape == (2, 16)

    def test_truncate_sequence_vocab_keys(self) -> None:
        batch = self.batch()
        cut = truncate_batch_to_shape(batch, 8)
        assert torch.equal(cut["teacher_logits"], batch["teacher_logits"][:, :8, :])  # type: ignore[index]

    def test_preserve_metadata_keys(self) -> None:
        batch = self.batch()
        cut = truncate_batch_to_shape(batch, 8)
        assert cut.keys() == batch.keys()
        for name in ("tool_should_be_used", "required_fields_present", "teacher_prefix_ids", "metadata"):
            assert cut[name] is batch[name]
