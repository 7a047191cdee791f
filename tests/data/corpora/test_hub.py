"""The hub's data sets, tested on local folders of the same form: there is no network."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from performer_lm.data.corpora.collection import Collection
from performer_lm.data.corpora.hub import Hub, import_datasets

STORIES = [f"story {number}" for number in range(12)]


@pytest.fixture
def stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a folder that holds a data set with two splits."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, texts in {"train": STORIES, "validation": ["held out", "held out too"]}.items():
        rows = [json.dumps({"text": text, "length": len(text)}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub cache")
    monkeypatch.chdir(tmp_path)
    return "stories"


def hub(name: str | None, **changes: Any) -> Hub:
    options: dict[str, Any] = {"config": None, "split": "train", "validation_split": None, "text_column": "text"}
    return Hub(name=name, **{**options, **changes})


def test_the_rows_of_a_split_are_documents_in_their_order(stories):
    found = list(hub(stories).documents())
    assert [document.text.decode() for document in found] == STORIES
    assert [document.name for document in found[:2]] == ["train#0", "train#1"]
    assert all(document.held_out is None for document in found)
    assert list(hub(stories).documents()) == found
    assert len(list(hub(stories, split="train[:25%]").documents())) == 3


def test_a_validation_split_is_held_out(stories):
    found = list(hub(stories, validation_split="validation").documents())
    assert [document.text for document in found if document.held_out] == [b"held out", b"held out too"]
    assert [document.text.decode() for document in found if document.held_out is False] == STORIES


def test_a_validation_split_without_text_is_refused(stories):
    Path("stories/validation.jsonl").write_text('{"text": "", "length": 0}\n' * 2)
    collection = Collection({"": hub(stories, validation_split="validation")}, errors="strict")
    message = "data.validation_split=validation of data.name=stories has no text: 2 documents, all empty or left out"
    with pytest.raises(ValueError, match=re.escape(message)):
        list(collection.documents())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (None, {}, "data.name is not given: data=hf needs data.name=NAME"),
        (
            "stories",
            {"split": "trian"},
            "stories has none of that name; did you mean data.split=train?",
        ),
        (
            "stories",
            {"text_column": "txt"},
            "data.name=stories has no column 'txt'; did you mean",
        ),
        ("stories", {"text_column": "length"}, "data.name=stories: column 'length' holds int64, not text"),
        ("stories", {"config": "defualt"}, "did you mean data.config=default? (choices: default)"),
        ("storeis", {}, "the hub cannot be reached; at hand on this machine: data.name=stories"),
        (
            "someone/unlike",
            {},
            "is not in the local cache, and the hub cannot be reached; data=files",
        ),
    ],
)
def test_a_set_that_cannot_be_opened_is_one_line_with_the_nearest_choice(stories, name, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        list(hub(name, **changes).documents())
    assert "\n" not in str(caught.value)


def test_name_config_split_and_revision_are_what_the_hub_is_asked_for(monkeypatch):
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_dict({"body": ["a", "b"], "id": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = hub("org/set", config="en", split="train[:1%]", text_column="body", revision="v2")
    assert [document.text for document in corpus.documents()] == [b"a", b"b"]
    assert asked == [(("org/set", "en"), {"split": "train[:1%]", "streaming": False, "revision": "v2"})]


def test_the_cache_s_own_readers_are_no_data_sets(tmp_path, monkeypatch):
    for name in ("json", "parquet", "someone___stories"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"at hand on this machine: data\.name=someone/stories$"):
        list(hub("someone/storeis").documents())
    with pytest.raises(ValueError, match=r"the hub cannot be reached; data=files reads local files$"):
        list(hub("jsom").documents())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hub data need the package 'datasets': pip install datasets"):
        import_datasets()


def test_a_text_may_lie_inside_a_column(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"meta": [{"text": "a", "n": 1}, {"text": None, "n": 2}], "id": [1, 2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    assert [document.text for document in hub("set", text_column="meta.text").documents()] == [b"a", b""]
    with pytest.raises(ValueError, match=r"data.name=set has no column 'meta.txt'; did you mean data.text_column=meta"):
        list(hub("set", text_column="meta.txt").documents())
