"""Checkpoints put together by hand: from a content, from a pickle, from records."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer

Content = dict[str, Any]


@pytest.fixture(scope="session")
def _content(model_section: Callable[..., dict[str, Any]]) -> Content:
    section = model_section("attn=favor", "attn.num_features=8", "model.depth=1", "model.dim=16", vocab_size=257)
    model = checkpoint.build(section)
    return {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "performer_lm": checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=0),
        "global_step": 3,
    }


@pytest.fixture
def content(_content: Content) -> Content:
    """Return what a checkpoint of a tiny model holds."""
    return copy.deepcopy(_content)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a zip file of a pickle and records, as `torch.save` lays them out, more or less."""

    def write(pickled: bytes, records: dict[str, bytes] | None = None, compression: int = ZIP_STORED) -> Path:
        with ZipFile(tmp_path / "a.ckpt", "w", compression) as archive:
            for name, record in {
                "data.pkl": pickled,
                "byteorder": b"little",
                "version": b"3\n",
                **(records or {}),
            }.items():
                archive.writestr(f"a/{name}", record)
        return tmp_path / "a.ckpt"

    return write


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[Path | Content, str], None]:
    """Return a function that makes sure that a file, or the file of a content, is read in no way, in one line."""

    def check(given: Path | Content, message: str) -> None:
        path = tmp_path / "a.ckpt"
        if isinstance(given, dict):
            torch.save(given, path)
        for read in (checkpoint.read, checkpoint.peek):
            with pytest.raises(ValueError, match=message) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path} ")
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 400 + len(str(path))

    return check
