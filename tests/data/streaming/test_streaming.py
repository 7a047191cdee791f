"""Streams, from local folders in the hub's form: there is no network."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from performer_lm.data import sources
from performer_lm.data.corpora.hub import Hub
from performer_lm.data.loader import BatchShare
from performer_lm.data.streaming.batches import DocumentStream, Place, StreamBatches
from performer_lm.data.streaming.data import StreamData
from performer_lm.data.survey import digest_of
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.data.tokenizer.recipes import Bytes
from performer_lm.data.windows import IGNORE
from performer_lm.objectives import shift

STORIES = [f"story {number} of {number * number}" for number in range(60)]


@pytest.fixture
def stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a folder that holds a data set with two splits."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, texts in {"train": STORIES, "validation": ["held out", STORIES[3]]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    monkeypatch.chdir(tmp_path)
    return "stories"


def hub(name: str, validation_split: str | None = None) -> Hub:
    return Hub(name=name, config=None, split="train", validation_split=validation_split, text_column="text")


def stream(name: str, *, shuffle_buffer: int = 16, held_out: frozenset[bytes] = frozenset()) -> DocumentStream:
    options: dict[str, Any] = {"errors": "strict", "seed": 3, "shuffle_buffer": shuffle_buffer, "held_out": held_out}
    return DocumentStream(hub(name), "train", **options)


@pytest.fixture
def stream_data(stories: str) -> Callable[..., StreamData]:
    """Return a function from changed options to streaming data."""

    def build(**changes: Any) -> StreamData:
        options: dict[str, Any] = {
            **{"name": stories, "config": None, "split": "train", "validation_split": None, "text_column": "text"},
            **{"revision": None, "streaming": True, "shuffle_buffer": 16, "head_bytes": 400, "tokenizer": Bytes()},
            **{"documents": "stream", "errors": "strict", "validation_fraction": 0.3, "validation_bytes": 60},
            **{"cache_dir": "unused", "tokenizing_threads": None, "device_resident": False, "context": 16},
            **{"batch_size": 4, "seed": 3, "num_workers": 0, "start_method": None},
        }
        data = sources.hub(**{**options, **changes})
        assert isinstance(data, StreamData)
        return data

    return build


def test_epochs_hold_all_documents_each_in_an_order_of_its_own(stories):
    found = [text.decode() for text, _ in islice(stream(stories).read(Place(0, 0)), 180)]
    epochs = [found[first : first + 60] for first in range(0, 180, 60)]
    assert all(sorted(epoch) == sorted(STORIES) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert found == [text.decode() for text, _ in islice(stream(stories).read(Place(0, 0)), 180)]
    in_order = [text.decode() for text, _ in islice(stream(stories, shuffle_buffer=1).read(Place(0, 0)), 60)]
    assert in_order == STORIES


@pytest.mark.parametrize("taken", [1, 17, 59, 60, 61, 130])
def test_a_stream_goes_on_with_the_next_document(stories, taken):
    whole = list(islice(stream(stories).read(Place(0, 0)), 150))
    place = whole[taken - 1][1]
    assert [text for text, _ in islice(stream(stories).read(place), 20)] == [text for text, _ in whole[taken:][:20]]


def batches(name: str, *, ranks: int = 1, rank: int = 0, accumulation: int = 1, steps: int = 5) -> StreamBatches:
    share = BatchShare(batch_size=4, accumulation=accumulation, ranks=ranks, rank=rank)
    return StreamBatches(stream(name), ByteTokenizer(), share, context=16, steps=steps)


def all_rows(found: StreamBatches) -> list[Tensor]:
    return [found[index][0] for index in range(len(found))]


def test_windows_run_on_from_each_other_and_hold_the_documents_in_order(stories):
    found = batches(stories)
    rows = torch.cat(all_rows(found))
    assert rows.shape == (4 * len(found), 17)
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    ids = torch.cat((rows[0, :1], rows[:, 1:].flatten())).tolist()
    texts = [text for text, _ in islice(stream(stories).read(Place(0, 0)), 60)]
    wanted = [256, *(token for text in texts for token in [*text, 256])]
    assert ids == wanted[: len(ids)]


def test_ranks_and_accumulation_share_out_the_same_batches(stories):
    whole = all_rows(batches(stories))
    parts = [all_rows(batches(stories, ranks=2, rank=rank, accumulation=2)) for rank in (0, 1)]
    together = [torch.cat([parts[rank][2 * step + part] for part in (0, 1) for rank in (0, 1)]) for step in range(5)]
    assert all(torch.equal(one, other) for one, other in zip(whole, together, strict=True))


def test_what_is_held_out_is_in_no_batch(stream_data):
    for options in ({}, {"validation_split": "validation"}):
        data = stream_data(**options)
        data.prepare()
        targets = shift(data.validation.rows(np.arange(len(data.validation))))[1]
        held_out = data.tokenizer.decode(targets[targets != IGNORE].tolist())
        assert held_out
        assert data._stream is not None
        trained = {text.decode() for text, _ in islice(data._stream.read(Place(0, 0)), 200)}
        assert len(trained) > 50
        assert not any(text in held_out for text in trained if len(text) > 12)


def test_it_is_said_aloud_that_resuming_is_approximate(stream_data, capsys):
    stream_data().prepare()
    assert "streaming: a resumed run goes on about where it stopped (approximate resume)" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
def test_packed_documents_have_a_separator(stream_data, packed):
    data = stream_data(documents="packed" if packed else "stream")
    data.prepare()
    assert data.separator == (256 if packed else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 2}, r"data.num_workers \(2\) must be 0 or 1 with data.streaming=true"),
        ({"documents": "cropped"}, "data.streaming=true takes neither"),
        ({"device_resident": True}, "data.streaming=true takes neither"),
        ({"shuffle_buffer": 0}, r"shuffle_buffer must be at least 1, got 0"),
        ({"name": "nowhere"}, "the hub cannot be reached"),
        ({"split": "trian"}, "did you mean data.split=train"),
        ({"text_column": "txt"}, "did you mean data.text_column=text"),
    ],
)
def test_what_a_stream_cannot_do_is_one_line(stream_data, changes, message):
    with pytest.raises(ValueError, match=message):
        stream_data(**changes).prepare()


def test_a_set_with_nothing_left_to_train_on_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one").mkdir()
    Path("one/train.jsonl").write_text('{"text": "the only one"}\n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"data\.name=one has no document to train on in data\.split=train"):
        list(stream("one", held_out=frozenset([digest_of(b"the only one")])).read(Place(0, 0)))


def test_a_stream_keeps_no_whole_text(stream_data):
    with pytest.raises(ValueError, match=r"data\.streaming=true keeps no text to measure; data\.streaming=false reads"):
        stream_data().prepare_held_out(whole=True)
