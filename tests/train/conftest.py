from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfastllm.text.tokenizer import Tokenizer
from dfastllm.train.vocab import train_tokenizer


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory with a small tokenizer, as every run expects it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs")
    train_tokenizer(path / "tokenizer", samples=300, vocab_size=500)
    return path


@pytest.fixture(scope="session")
def tokenizer(runs: Path) -> Tokenizer:
    return Tokenizer.load(runs / "tokenizer")
