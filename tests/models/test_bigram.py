"""The file of a bigram head: what is written is read, and what is no head, or another model's, is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dfastllm import assemble
from dfastllm.errors import ModelLoadError, StorageError, ValidationError
from dfastllm.models.bigram import FILE, Bigram, read_bigram, write_bigram
from tests.kit.convert_models import write_tiny

VOCAB, RANK = 20, 3


def head(vocab: int = VOCAB, rank: int = RANK) -> Bigram:
    before, after = torch.randn(2, vocab, rank, generator=torch.Generator().manual_seed(0))
    return Bigram(before, after)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_bigram(tmp_path, VOCAB) is None
    given = head()
    for dtype in (torch.float32, torch.bfloat16):
        write_bigram(tmp_path, given, dtype)
        found = read_bigram(tmp_path, VOCAB)
        assert found is not None
        assert torch.equal(found.before, given.before.to(dtype).float())
        assert torch.equal(found.after, given.after.to(dtype).float())
        assert (found.vocabulary, found.rank) == (VOCAB, RANK)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o644
    with pytest.raises(StorageError, match="cannot be written"):
        write_bigram(tmp_path / "nowhere", given)


def test_a_head_that_is_none() -> None:
    good = head()
    with pytest.raises(ValidationError, match=r"before \[20, 3\] and after \[20, 4\]"):
        Bigram(good.before, head(rank=4).after)
    with pytest.raises(ValidationError, match="two matrices"):
        Bigram(good.before[0], good.after[0])
    with pytest.raises(ValidationError, match="after holds numbers that are not finite"):
        Bigram(good.before, good.after / 0)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    good = head()
    path = tmp_path / FILE
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"before": good.before}, "it has the tensors before"),
        ({"before": good.before, "after": good.after[:5].clone()}, r"before \[20, 3\] and after \[5, 3\]"),
        ({"before": good.before, "after": good.after.clone().fill_(torch.inf)}, "not finite"),
    ]
    for tensors, message in wrong:
        save_file(tensors, path)
        with pytest.raises(ModelLoadError, match=message) as error:
            read_bigram(tmp_path, VOCAB)
        assert str(path) in str(error.value)
    write_bigram(tmp_path, good)
    with pytest.raises(ModelLoadError, match="of a vocabulary of 20 tokens; the model beside it has 21"):
        read_bigram(tmp_path, VOCAB + 1)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelLoadError, match="truncated"):
        read_bigram(tmp_path, VOCAB)


@pytest.mark.parametrize(("family", "comes"), [("llada", True), ("llama", False)])
def test_it_comes_with_a_masked_model_that_drafts(family: str, comes: bool, tmp_path: Path) -> None:
    place = write_tiny(tmp_path / "model", family=family)
    vocab = assemble.model_info(place).vocab_size
    write_bigram(place, head(vocab))
    for backend in ("native", "torch"):
        assert (assemble.load(place, backend=backend, drafting=True).bigram is not None) is comes  # type: ignore[arg-type]
    assert assemble.load(place).bigram is None, "a model that is served has no use for it"
    write_bigram(place, head(vocab + 1))
    assemble.load(place)
    if comes:
        with pytest.raises(ModelLoadError, match="of a vocabulary of"):
            assemble.load(place, drafting=True)
