import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from performer_lm.data import cache as room
from performer_lm.data.cache import TokenCache, open_cache
from performer_lm.data.corpus import Corpus, Document
from performer_lm.data.tokenizer import ByteTokenizer, TokenizerRecipe
from performer_lm.data.tokenizer.recipes import BytePairs, Bytes

TEXTS = {f"{index}.txt": (f"{index} times {index} is {index * index}\n" * (5 + index)).encode() for index in range(20)}

BYTES = Bytes()
PAIRS = BytePairs(vocab_size=300, train_bytes=10**6)


class Listening(TokenizerRecipe):
    """Remembers the texts it was given."""

    def __init__(self) -> None:
        self.seen: list[list[bytes]] = []

    def build(self, texts, *, num_bytes):
        self.seen.append(list(texts))
        assert sum(map(len, self.seen[-1])) == num_bytes
        return ByteTokenizer()

    def key(self):
        return {}


class Texts(Corpus):
    def __init__(self, texts: dict[str, bytes]) -> None:
        self.texts = texts

    def documents(self) -> Iterator[Document]:
        for name, text in self.texts.items():
            yield Document(name, text)


def build(
    folder: Path, texts: dict[str, bytes] = TEXTS, recipe: TokenizerRecipe = BYTES, fraction: float = 0.2
) -> TokenCache:
    return open_cache(Texts(texts), recipe, validation_fraction=fraction, cache_dir=str(folder))


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir())


def same(left: TokenCache, right: TokenCache) -> bool:
    arrays = np.array_equal(left.train, right.train) and np.array_equal(left.validation, right.validation)
    hashes = left.corpus_hash == right.corpus_hash and left.tokenizer_hash == right.tokenizer_hash
    return bool(arrays and hashes and left.tokenizer.to_dict() == right.tokenizer.to_dict())


@pytest.mark.parametrize("recipe", [BYTES, PAIRS])
def test_both_sides_together_hold_every_document_once_between_end_tokens(tmp_path, recipe):
    cache = build(tmp_path, recipe=recipe)
    end, found = cache.tokenizer.end_id, []
    for ids in (cache.train, cache.validation):
        assert ids[0] == ids[-1] == end
        spans = pairwise(np.flatnonzero(ids == end))
        found += [cache.tokenizer.decode_bytes(ids[first + 1 : last]) for first, last in spans]
    assert sorted(found) == sorted(TEXTS.values())
    assert len(cache.validation) > 2
    assert cache.train.dtype == np.uint16


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
    first = build(tmp_path)
    assert "tokens" in capsys.readouterr().err
    assert same(build(tmp_path), first)
    assert capsys.readouterr().err == ""
    assert len(caches(tmp_path)) == 1


def test_everything_a_cache_depends_on_makes_another(tmp_path):
    build(tmp_path)
    build(tmp_path, fraction=0.3)
    build(tmp_path, {**TEXTS, "0.txt": b"changed"})
    build(tmp_path, {f"x{name}": text for name, text in TEXTS.items()})
    build(tmp_path, dict(reversed(TEXTS.items())))
    build(tmp_path, recipe=PAIRS)
    build(tmp_path, recipe=BytePairs(vocab_size=301, train_bytes=10**6))
    assert len(caches(tmp_path)) == 7


@pytest.mark.parametrize("file", ["train.bin", "validation.bin", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "grow", "empty", "remove"])
def test_a_damaged_cache_is_built_again(tmp_path, file, harm):
    wanted = build(tmp_path / "other")
    build(tmp_path)
    path = next(tmp_path.glob(f"*/{file}"))
    content = path.read_bytes()
    path.unlink()
    if harm != "remove":
        path.write_bytes({"cut": content[:-1], "grow": content + b"{", "empty": b""}[harm])
    assert same(build(tmp_path), wanted)
    assert path.read_bytes() == content


def test_several_at_once_build_it_once(tmp_path):
    recipe = Listening()
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: build(tmp_path, recipe=recipe), range(8)))
    assert len(recipe.seen) == 1
    assert all(same(cache, opened[0]) for cache in opened)


def test_a_corpus_that_changes_meanwhile_is_refused(tmp_path):
    class Changing(Corpus):
        readings = 0

        def documents(self) -> Iterator[Document]:
            self.readings += 1
            yield Document("a", b"first")
            yield Document("b", b"second" if self.readings < 4 else b"other")

    with pytest.raises(ValueError, match="the corpus changed while it was tokenized"):
        open_cache(Changing(), BYTES, validation_fraction=0.2, cache_dir=str(tmp_path))
    assert not list(tmp_path.glob("*/manifest.json"))


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


def test_texts_are_batched_whole_and_in_order(monkeypatch):
    monkeypatch.setattr(room, "BATCH_BYTES", 10)
    texts = [b"12345", b"67890", b"x" * 30, b"", b"end"]
    assert list(room._batches(texts)) == [[b"12345", b"67890"], [b"x" * 30], [b"", b"end"]]


STALLING_BUILD = """
import sys, time
from pathlib import Path
from performer_lm.data.cache import open_cache
from performer_lm.data.corpus import Corpus, Document
from performer_lm.data.tokenizer.recipes import Bytes

folder, stall_in = sys.argv[1], int(sys.argv[2])

def stall():
    print("stalled", flush=True)
    time.sleep(60)

class Texts(Corpus):
    readings = 0
    def documents(self):
        self.readings += 1
        for index in range(20):
            if index == 10 and self.readings == stall_in:
                stall()
            yield Document(f"{index}.txt", (f"{index} times {index} is {index * index}\\n" * (5 + index)).encode())

class Learning(Bytes.__mro__[1]):
    def build(self, texts, *, num_bytes):
        list(texts)
        return Bytes().build([], num_bytes=0)

    def key(self):
        return Bytes().key()

if stall_in == 0:
    Path.rename = lambda *_: stall()
open_cache(Texts(), Learning(), validation_fraction=0.2, cache_dir=folder)
"""
MOMENTS = {"reading": 1, "training": 3, "train ids": 4, "validation ids": 5, "checking": 6, "renaming": 0}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_build_leaves_nothing_that_is_accepted(tmp_path, moment, monkeypatch):
    monkeypatch.setattr(room, "BATCH_BYTES", 100)
    program = [sys.executable, "-c", STALLING_BUILD, str(tmp_path / "killed"), str(MOMENTS[moment])]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "stalled\n"
        child.send_signal(signal.SIGKILL)
    left = caches(tmp_path / "killed")
    assert [path.suffix for path in left] == [".partial"] * (moment != "reading")
    assert same(build(tmp_path / "killed"), build(tmp_path / "clean"))
    assert [path.name for path in caches(tmp_path / "killed")] == [path.name for path in caches(tmp_path / "clean")]
