"""Small data, and trainers that remember what they were given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from performer_lm.data.corpora.files import Files
from performer_lm.data.text import TextData
from performer_lm.data.tokenizer.recipes import Bytes


def build_text_data(folder: Path, **changes: Any) -> TextData:
    """Return a dozen short documents as data of 8 windows of 16 tokens a step."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for index in range(12):
            (text / f"{index}.txt").write_text(f"document {index}: {index * index} " * (index + 3))
    options: dict[str, Any] = {
        "corpora": {"texts": Files(path=str(text), include=["*.txt"])},
        "weights": None,
        "tokenizer": Bytes(),
        "context": 16,
        "batch_size": 8,
        "documents": "stream",
        "errors": "strict",
        "validation_fraction": 0.2,
        "validation_bytes": 500,
        "cache_dir": str(folder / "cache"),
        "tokenizing_threads": 2,
        "device_resident": False,
        "seed": 5,
        "num_workers": 0,
        "start_method": None,
    }
    return TextData(**{**options, **changes})


@pytest.fixture
def text_data(tmp_path: Path) -> Callable[..., TextData]:
    """Return a function from changed options to `build_text_data` in this test's folder."""
    return lambda **changes: build_text_data(tmp_path, **changes)
