import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from performer_lm.data import build as build_room
from performer_lm.data.cache import TokenCache, open_cache
from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.collection import Collection
from performer_lm.data.tokenizer import ByteTokenizer, TokenizerRecipe
from performer_lm.data.tokenizer.recipes import BytePairs, Bytes, Restored, TokenizerFile

TEXTS = {f"{index}.txt": (f"{index} times {index} is {index * index}\n" * (5 + index)).encode() for index in range(20)}
BYTES = Bytes()
PAIRS = BytePairs(vocab_size=300, train_bytes=10**6)


class Listening(TokenizerRecipe):
    """Remembers the texts it was given."""

    learns = True

    def __init__(self) -> None:
        self.seen: list[list[bytes]] = []

    def build(self, texts, *, num_bytes):
        self.seen.append(list(texts))
        assert list(texts) == self.seen[-1]
        assert sum(map(len, self.seen[-1])) <= num_bytes
        return ByteTokenizer()

    def key(self):
        return {}


class Texts(Corpus):
    label = "texts"

    def __init__(self, texts: dict[str, bytes]) -> None:
        self.texts = texts

    def documents(self) -> Iterator[Document]:
        for name, text in self.texts.items():
            yield Document(name, text, True if name.startswith("held out") else None)


def build(
    folder: Path,
    *texts: dict[str, bytes],
    recipe: TokenizerRecipe = BYTES,
    fraction: float | None = 0.2,
    threads: int = 2,
    errors="strict",
) -> TokenCache:
    collection = Collection({str(index): Texts(each) for index, each in enumerate(texts or [TEXTS])}, errors=errors)
    return open_cache(collection, recipe, validation_fraction=fraction, cache_dir=str(folder), threads=threads)


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and path.name != "tokenizers")


def documents(cache: TokenCache, ids: np.ndarray) -> list[bytes]:
    ends = pairwise(np.flatnonzero(ids == cache.tokenizer.end_id))
    return [cache.tokenizer.decode_bytes(ids[first + 1 : last]) for first, last in ends]


def same(left: TokenCache, right: TokenCache) -> bool:
    arrays = all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in ("train", "validation", "validation_sizes")
    )
    plain = left.tokenizer.to_dict() == right.tokenizer.to_dict()
    bounds = (left.train_bounds, left.validation_bounds) == (right.train_bounds, right.validation_bounds)
    return bool(arrays and plain and bounds and left[-3:] == right[-3:])


@pytest.mark.parametrize("recipe", [BYTES, PAIRS])
def test_both_sides_together_hold_every_document_once_between_end_tokens(tmp_path, recipe):
    cache = build(tmp_path, recipe=recipe)
    end = cache.tokenizer.end_id
    for ids, bounds in ((cache.train, cache.train_bounds), (cache.validation, cache.validation_bounds)):
        assert ids[0] == ids[-1] == end
        assert bounds == [0, len(ids) - 1]
    assert sorted(documents(cache, cache.train) + documents(cache, cache.validation)) == sorted(TEXTS.values())
    assert cache.validation_sizes.tolist() == list(map(len, documents(cache, cache.validation)))
    assert len(cache.validation) > 2
    assert cache.train.dtype == np.uint16
    assert cache.is_exact


def test_ids_take_the_least_bytes_that_hold_them(tmp_path):
    class Few(Bytes):
        def build(self, texts, *, num_bytes):
            from performer_lm.data.tokenizer import CharacterTokenizer

            return CharacterTokenizer(alphabet="0123456789 imest\n", fallback=False)

    assert build(tmp_path, recipe=Few()).train.dtype == np.uint8


def test_corpora_follow_one_another_and_share_the_end_between_them(tmp_path):
    more = {f"more {name}": text.upper() for name, text in TEXTS.items()}
    cache = build(tmp_path, TEXTS, more)
    alone = [build(tmp_path / str(index), texts) for index, texts in enumerate((TEXTS, more))]
    for name in ("train", "validation"):
        bounds, ids = getattr(cache, f"{name}_bounds"), getattr(cache, name)
        for corpus, (first, last) in enumerate(pairwise(bounds)):
            assert np.array_equal(ids[first : last + 1], getattr(alone[corpus], name))
    assert cache.validation_sizes.tolist() == [*alone[0].validation_sizes, *alone[1].validation_sizes]


def test_held_out_documents_stand_in_the_order_of_their_names_hashes_whatever_the_corpus_s(tmp_path):
    forwards = build(tmp_path / "forwards", TEXTS)
    backwards = build(tmp_path / "backwards", dict(reversed(TEXTS.items())))
    assert documents(forwards, forwards.validation) == documents(backwards, backwards.validation)
    assert documents(forwards, forwards.train) == documents(backwards, backwards.train)[::-1]


def test_a_text_that_stands_in_training_is_not_held_out(tmp_path, capsys):
    texts = {**TEXTS, "held out 1": TEXTS["3.txt"], "held out 2": b"new", "copy.txt": TEXTS["5.txt"]}
    cache = build(tmp_path, texts)
    assert documents(cache, cache.validation) == [b"new"]
    assert documents(cache, cache.train).count(TEXTS["3.txt"]) == 1
    assert "1 documents were not held out, for their text also stands in training" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [BYTES, PAIRS])
def test_the_number_of_threads_changes_nothing(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(build_room, "BATCH_BYTES", 300)
    built = [build(tmp_path / str(threads), recipe=recipe, threads=threads) for threads in (1, 2, 7)]
    assert same(built[0], built[1])
    assert same(built[0], built[2])


def test_a_tokenizer_learns_from_the_training_documents_only(tmp_path):
    recipe = Listening()
    cache = build(tmp_path, recipe=recipe)
    assert b"".join(recipe.seen[0]) == cache.tokenizer.decode_bytes(cache.train)


def test_a_single_document_gives_its_last_lines_to_validation(tmp_path):
    text = b"a line\n" * 100
    cache = build(tmp_path, {"one.txt": text}, fraction=0.1)
    train, validation = (cache.tokenizer.decode_bytes(ids) for ids in (cache.train, cache.validation))
    assert train + validation == text
    assert validation == b"a line\n" * 10


def test_a_cache_is_built_once_and_reopened(tmp_path, capsys):
    first = build(tmp_path, recipe=PAIRS)
    assert "tokens" in capsys.readouterr().err
    assert same(build(tmp_path, recipe=PAIRS), first)
    assert capsys.readouterr().err == ""
    assert len(caches(tmp_path)) == 1


def test_a_restored_tokenizer_finds_the_ids_that_its_training_made(tmp_path, capsys):
    first = build(tmp_path, recipe=PAIRS)
    capsys.readouterr()
    assert same(build(tmp_path, recipe=Restored(plain=first.tokenizer.to_dict())), first)
    assert capsys.readouterr().err == ""


def test_everything_a_cache_depends_on_makes_another(tmp_path):
    build(tmp_path)
    build(tmp_path, fraction=0.3)
    build(tmp_path, {**TEXTS, "0.txt": b"changed"})
    build(tmp_path, {f"x{name}": text for name, text in TEXTS.items()})
    build(tmp_path, dict(reversed(TEXTS.items())))
    build(tmp_path, {f"held out{name}": text for name, text in TEXTS.items()} | {"a": b"text"})
    build(tmp_path, TEXTS, TEXTS)
    build(tmp_path, recipe=PAIRS)
    build(tmp_path, recipe=BytePairs(vocab_size=301, train_bytes=10**6))
    build(tmp_path, recipe=BytePairs(vocab_size=300, train_bytes=2000))
    build(tmp_path, recipe=Bytes(specials=["mask"]))
    assert len(caches(tmp_path)) == 11


@pytest.mark.parametrize("file", ["train.bin", "validation.bin", "validation_sizes.bin", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "grow", "empty", "remove", "flip", "fill", "nest", "pipe"])
def test_a_damaged_cache_is_built_again(tmp_path, file, harm):
    wanted = build(tmp_path / "other")
    build(tmp_path)
    path = next(tmp_path.glob(f"*/{file}"))
    content = path.read_bytes()
    path.unlink()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    harms = {"cut": content[:-1], "grow": content + b"{", "empty": b"", "flip": flipped, "fill": b"\xff" * len(content)}
    if harm == "pipe":
        os.mkfifo(path)
    elif harm != "remove":
        path.write_bytes({**harms, "nest": b"[" * 100_000}[harm])
    assert same(build(tmp_path), wanted)
    assert path.read_bytes() == content


def rewrite(folder: Path, **changes: object) -> None:
    """Change a cache's manifest, and give it the checksum of what it then says."""
    from performer_lm.data import cache as room

    manifest = {**json.loads((folder / "manifest.json").read_bytes()), **changes}
    del manifest["sha256"]
    manifest["sha256"] = room._checksum(manifest, *room._map_all(folder, manifest))
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("harm", ["ids", "bounds", "negative", "type"])
def test_a_cache_made_to_harm_is_built_again(tmp_path, harm):
    wanted = build(tmp_path / "other", TEXTS, TEXTS)
    build(tmp_path, TEXTS, TEXTS)
    (folder,) = (path.parent for path in tmp_path.glob("*/train.bin"))
    last = len(wanted.train) - 1
    if harm == "ids":
        ids = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r+")
        ids[5] = 257  # one more than there are
        ids.flush()
    changes = {"bounds": {"train": [0, 10**9, last]}, "negative": {"train": [-5, 3, last]}, "type": {"dtype": "int16"}}
    rewrite(folder, **changes.get(harm, {}))
    assert same(build(tmp_path, TEXTS, TEXTS), wanted)


@pytest.mark.parametrize("content", [b"", b"{}", b"[", b"[" * 100_000, b'{"kind": "byte_pairs"}', None])
def test_a_damaged_tokenizer_is_trained_again(tmp_path, content):
    wanted = build(tmp_path, recipe=PAIRS)
    (path,) = tmp_path.glob("tokenizers/*.json")
    good = path.read_bytes()
    if content is None:  # another merge in a merge's place, which would do
        kept = json.loads(good)
        kept["tokenizer"]["merges"][-1] = [0, 1]
        content = json.dumps(kept).encode()
    path.write_bytes(content)
    assert same(build(tmp_path, recipe=PAIRS), wanted)
    assert path.read_bytes() == good


def test_several_at_once_build_it_once(tmp_path):
    recipe = Listening()
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: build(tmp_path, recipe=recipe), range(8)))
    assert len(recipe.seen) == 1
    assert all(same(cache, opened[0]) for cache in opened)


@pytest.mark.parametrize("late", [{"b": b"other"}, {}, {"b": b"second", "c": b"more"}])
def test_a_corpus_that_changes_meanwhile_is_refused(tmp_path, late):
    class Changing(Texts):
        readings = 0

        def documents(self) -> Iterator[Document]:
            self.readings += 1
            self.texts = {"a": b"first", "b": b"second"} if self.readings == 1 else {"a": b"first", **late}
            yield from super().documents()

    with pytest.raises(ValueError, match="the corpus changed while it was tokenized"):
        open_cache(
            Collection({"": Changing({})}, errors="strict"), BYTES, validation_fraction=0.2, cache_dir=str(tmp_path)
        )
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_text_that_a_tokenizer_cannot_take_is_named(tmp_path, tokenizer_file):
    texts = {"0.txt": b"fine", "bad.txt": b"not \xff fine", "2.txt": b"fine too"}
    with pytest.raises(ValueError, match=re.escape("bad.txt: text is not UTF-8: byte 0xff at 4")):
        build(tmp_path, texts, recipe=tokenizer_file, errors="bytes")
    assert not list(tmp_path.glob("*/manifest.json"))
    cache = build(tmp_path, texts, errors="bytes")
    assert sorted(documents(cache, cache.train) + documents(cache, cache.validation)) == sorted(texts.values())


def test_what_a_tokenizer_does_not_give_back_is_noticed(tmp_path, tokenizer_file):
    cache = build(tmp_path, recipe=tokenizer_file)
    assert not cache.is_exact
    assert cache.validation_sizes.sum() == sum(
        len(text) for text in TEXTS.values() if text not in train_texts(tmp_path)
    )


def train_texts(folder: Path) -> list[bytes]:
    cache = build(folder / "bytes")
    return documents(cache, cache.train)


@pytest.fixture
def tokenizer_file(tmp_path) -> TokenizerFile:
    """Return a recipe whose tokenizer lowers letters and drops spaces."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    library = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "times": 1, "is": 2}, unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    return TokenizerFile(path=str(tmp_path / "tokenizer.json"), specials=[])


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.cache_dir=.*file/cache cannot be written: Not a directory"):
        build(tmp_path / "file" / "cache")

    def fill_the_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(ValueError, match=r"data.cache_dir=.* cannot be written: No space left on device"):
        build(tmp_path)
    monkeypatch.undo()
    assert same(build(tmp_path), build(tmp_path / "other"))


STALLING_BUILD = """
import os, sys, time
from pathlib import Path
from performer_lm.data import build as room
from performer_lm.data.cache import open_cache
from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.collection import Collection
from performer_lm.data.tokenizer.recipes import BytePairs

folder, stall_in = sys.argv[1], sys.argv[2]

def stall():
    os.write(1, b"stalled\\n")
    time.sleep(60)

class Texts(Corpus):
    label = "texts"
    readings = 0
    def documents(self):
        self.readings += 1
        for index in range(20):
            if index == 10 and str(self.readings) == stall_in:
                stall()
            yield Document(f"{index}.txt", (f"{index} times {index} is {index * index}\\n" * (5 + index)).encode())

room.BATCH_BYTES = 300
if stall_in == "renaming":
    Path.rename = lambda *_: stall()
if stall_in == "replacing":
    Path.replace = lambda *_: stall()
if stall_in == "encoding":
    room._encoder = lambda *_: lambda batch: stall()
if stall_in == "sorting":
    room._HeldOut.write = lambda *_: stall()
recipe = BytePairs(vocab_size=300, train_bytes=10**6)
collection = Collection({"": Texts()}, errors="strict")
open_cache(collection, recipe, validation_fraction=0.2, cache_dir=folder, threads=2)
"""
MOMENTS = ["1", "2", "3", "replacing", "encoding", "sorting", "renaming"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_build_leaves_nothing_that_is_accepted(tmp_path, moment):
    killed = tmp_path / "killed"
    program = [sys.executable, "-c", STALLING_BUILD, str(killed), moment]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        said = child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert said == "stalled\n"
    left = caches(killed)
    assert [path.suffix for path in left] == [".partial"] * (moment in ("3", "encoding", "sorting", "renaming"))
    assert [path.suffix for path in killed.glob("tokenizers/*.json")] == [".json"] * bool(left)
    assert same(build(killed, recipe=PAIRS), build(tmp_path / "clean", recipe=PAIRS))
    assert [path.name for path in caches(killed)] == [path.name for path in caches(tmp_path / "clean")]


def test_without_a_fraction_every_document_is_held_out(tmp_path, capsys):
    cache = build(tmp_path, {**TEXTS, "copy.txt": TEXTS["5.txt"]}, fraction=None)
    assert sorted(documents(cache, cache.validation)) == sorted([*TEXTS.values(), TEXTS["5.txt"]])
    assert (len(cache.train), cache.train_bounds) == (1, [0, 0])
    assert f" {len(cache.validation):,} tokens\n" in capsys.readouterr().err
    given = {"a": b"left aside", "held out 1": b"measured", "held out 2": b"left aside"}
    cache = build(tmp_path, given, {"b": b"measured too"}, fraction=None)
    assert sorted(documents(cache, cache.validation)) == [b"left aside", b"measured", b"measured too"]
    cache = build(tmp_path, {"a": b"x"}, fraction=None)
    assert documents(cache, cache.validation) == [b"x"]
