import re
import resource
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tokenizers import models, pre_tokenizers
from torch import Tensor

from performer_lm.data.corpora.files import Files
from performer_lm.data.text import TextData
from performer_lm.data.tokenizer.recipes import BytePairs, Bytes, TokenizerFile
from performer_lm.data.windows import IGNORE, FiniteWindows
from performer_lm.objectives import shift

CONFIGS = Path(__file__).parents[2] / "configs"


def batch(data: TextData, step: int) -> Tensor:
    return data.training.rows(step * 8 + np.arange(8))


@pytest.mark.parametrize(
    "choice", [["data=stdlib"], ["data=files", "data.path=my text.txt"], ["data=hf", "data.name=x"], ["data=mixture"]]
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "characters", "wordpiece", "unigram"])
def test_the_configs_build_text_data(choice, tokenizer):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(overrides=["+" + choice[0], f"+tokenizer={tokenizer}", "+seed=3", *choice[1:]])
    data = instantiate(cfg.data)
    assert isinstance(data, TextData)
    assert data.context == cfg.data.context


def test_the_path_stands_where_the_command_line_puts_it():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(overrides=["+data=files", "+tokenizer=bytes", "+seed=3", "data.path=my text.txt"])
    with pytest.raises(ValueError, match=r"data.path=my text.txt does not exist"):
        instantiate(cfg.data).prepare()


@pytest.mark.parametrize(
    ("length", "context", "message"),
    [
        (812, 1024, r"data.path=.*short.txt has 733 tokens for training; one window needs 1025 \(data.context=1024\)"),
        (1, 4, r"data.path=.*short.txt has 3 tokens for training; one window needs 5 \(data.context=4\)"),
    ],
)
def test_a_corpus_shorter_than_a_window_is_refused_with_both_counts(text_data, tmp_path, length, context, message):
    (tmp_path / "short.txt").write_text("x" * length)
    corpus = Files(path=str(tmp_path / "short.txt"), include=[])
    data = text_data(corpora={"files": corpus}, context=context, validation_fraction=0.1)
    with pytest.raises(ValueError, match=message):
        data.prepare()


def test_a_corpus_with_nothing_to_validate_on_is_refused(text_data, tmp_path):
    (tmp_path / "a.txt").write_text("\N{GRINNING FACE}" * 10)
    corpus = Files(path=str(tmp_path / "a.txt"), include=[])
    with pytest.raises(ValueError, match=r"data.path=.*a.txt has no token for validation"):
        text_data(corpora={"files": corpus}, context=4, validation_fraction=0.01).prepare()


def test_a_corpus_of_a_mixture_with_nothing_to_validate_on_is_named(text_data, tmp_path, two):
    (tmp_path / "one.txt").write_text("a single document\n" * 20)
    alone = Files(path=str(tmp_path / "one.txt"), include=[])
    with pytest.raises(ValueError, match=r"data.path=.*one.txt has no token for validation"):
        text_data(corpora={**two, "one": alone}, validation_fraction=0.001).prepare()
    text_data(corpora={**two, "one": alone}, validation_bytes=3).prepare()  # a share of less than a token is one


@pytest.mark.parametrize("documents", ["stream", "packed", "cropped"])
@pytest.mark.parametrize("text", ["x", "a line\n" * 100])
def test_whole_text_is_held_out_however_short(text_data, tmp_path, documents, text):
    (tmp_path / "a.txt").write_text(text)
    corpus = Files(path=str(tmp_path / "a.txt"), include=[])
    data = text_data(corpora={"a": corpus}, context=4000, documents=documents)
    data.prepare_held_out(whole=True)
    rows = data.held_out.rows(np.arange(len(data.held_out)))
    assert data.tokenizer.decode_bytes(rows[rows != IGNORE].tolist()) == text.encode()


def test_whole_text_is_that_given_for_validation_where_some_is(text_data, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 100)
    corpus = Files(path=str(tmp_path / "a.txt"), include=[], validation_path=str(tmp_path / "b.txt"))
    data = text_data(corpora={"a": corpus})
    data.prepare_held_out(whole=True)
    assert counted_bytes(data.held_out) == 100
    assert data.tokenizer.decode_bytes(data.held_out_ids) == b"b" * 100


def test_validation_keeps_to_its_bytes_and_the_held_out_rest_stays_at_hand(text_data):
    data = text_data(validation_bytes=50)
    data.prepare()
    targets, all_targets = (
        shift(windows.rows(np.arange(len(windows))))[1] for windows in (data.validation, data.held_out)
    )
    assert torch.equal(all_targets[all_targets != IGNORE], torch.from_numpy(data.held_out_ids[1:].astype(np.int64)))
    counted = targets[targets != IGNORE]
    assert data.tokenizer.byte_lengths()[counted].sum() == 50
    assert counted.tolist() == data.held_out_ids[1 : 1 + len(counted)].tolist()
    assert len(data.held_out) > len(data.validation)


def test_cropped_documents_are_one_window_each_and_none_is_dropped(text_data):
    data = text_data(documents="cropped", validation_bytes=30)
    data.prepare()
    assert data.separator is None
    end, lengths = data.tokenizer.end_id, data.tokenizer.byte_lengths()
    for windows, ids in ((data.training, data.train_ids), (data.held_out, data.held_out_ids)):
        bounds = np.flatnonzero(ids == end)
        rows = windows.rows(np.arange(len(bounds) - 1))
        wanted = [ids[first : last + 1][:17].tolist() for first, last in pairwise(bounds)]
        assert sorted([token for token in row if token != IGNORE] for row in rows.tolist()) == sorted(wanted)
        assert all(row[0] == end for row in rows.tolist())
    targets = shift(data.validation.rows(np.arange(len(data.validation))))[1]
    assert 0 < lengths[targets[targets != IGNORE]].sum() <= 30
    assert len(data.validation) < len(data.held_out)


def test_packed_documents_are_the_stream_with_a_separator(text_data):
    stream, packed = text_data(), text_data(documents="packed")
    stream.prepare()
    packed.prepare()
    assert stream.separator is None
    assert packed.separator == packed.tokenizer.end_id
    assert torch.equal(batch(stream, 3), batch(packed, 3))


def test_cropped_documents_may_be_shorter_than_the_context(text_data):
    data = text_data(documents="cropped", context=4000)
    data.prepare()
    rows = data.training.rows(np.arange(4))
    assert rows.shape == (4, 4001)
    assert ((rows == IGNORE).sum(1) > 3000).all()


def test_the_fingerprint_is_plain_and_follows_what_decides_the_batches(text_data):
    one = text_data().fingerprint()
    assert one == text_data(num_workers=2, validation_bytes=70).fingerprint()
    assert all(isinstance(value, (str, int, float)) for value in one.values())
    for change in (
        {"seed": 6},
        {"context": 15},
        {"batch_size": 4},
        {"validation_fraction": 0.5},
        {"documents": "packed"},
    ):
        assert text_data(**change).fingerprint() != one


def corpora(folder: Path, **texts: dict[str, str]) -> dict[str, Files]:
    """Return corpora whose documents are these texts."""
    for corpus, documents in texts.items():
        (folder / corpus).mkdir()
        for name, text in documents.items():
            (folder / corpus / f"{name}.txt").write_text(text)
    return {corpus: Files(path=str(folder / corpus), include=["*.txt"]) for corpus in texts}


@pytest.fixture
def two(tmp_path) -> dict[str, Files]:
    """Return a corpus of `a` and a shorter one of `b`, in words of many lengths."""
    letters = {"a": 60, "b": 20}
    return corpora(tmp_path, **{x: {str(i): f"{i} {x * (20 + i)}" for i in range(n)} for x, n in letters.items()})


@pytest.mark.parametrize("documents", ["stream", "packed", "cropped"])
def test_a_mixture_gives_each_corpus_its_share_of_every_batch(text_data, two, documents):
    data = text_data(corpora=two, weights={"b": 3.0, "a": 1.0}, documents=documents)
    data.prepare()
    windows = data.training.rows(np.arange(2000))
    from_b = (windows == ord("b")).any(1)
    assert from_b.sum() == 1500
    assert ((windows == ord("a")).any(1) != from_b).all()
    assert torch.equal(batch(data, 7), windows[56:64])
    held_out = data.validation.rows(np.arange(len(data.validation)))
    assert (held_out == ord("a")).any()
    assert (held_out == ord("b")).any()


def test_without_weights_each_corpus_has_as_many_windows_as_it_has(text_data, two):
    data = text_data(corpora=two)
    data.prepare()
    from_b = (data.training.rows(np.arange(1000)) == ord("b")).any(1)
    assert 0.15 < from_b.float().mean() < 0.3
    assert "weights" not in data.fingerprint()


def test_a_mixture_s_fingerprint_follows_its_weights(text_data, two):
    one = text_data(corpora=two, weights={"a": 1.0, "b": 1.0}).fingerprint()
    assert one != text_data(corpora=two, weights={"a": 1.0, "b": 2.0}).fingerprint()


def test_validation_shares_its_bytes_out_among_the_corpora(text_data, two):
    data = text_data(corpora=two, weights={"a": 1.0, "b": 1.0}, validation_bytes=60)
    data.prepare()
    targets = shift(data.validation.rows(np.arange(len(data.validation))))[1]
    counted = data.tokenizer.decode_bytes(targets[targets != IGNORE].tolist())
    assert len(counted) == 60
    assert counted.count(b"a") > 20
    assert counted.count(b"b") > 20


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "data.weights (a) must name the corpora (a, b)"),
        ({"a": 1.0, "c": 1.0}, "data.weights (a, c) must name the corpora (a, b)"),
        ({"a": 1.0, "b": 0.0}, "data.weights (1.0, 0.0) must each be at least 1/2000 of all"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_read(text_data, two, weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        text_data(corpora=two, weights=weights)


def test_a_corpus_too_short_for_a_mixture_is_named(text_data, tmp_path, two):
    short = corpora(tmp_path, short={"a": "few", "b": "words"})
    with pytest.raises(ValueError, match=r"data.path=.*short has \d tokens for training; one window needs 17"):
        text_data(corpora={**two, **short}).prepare()


@pytest.mark.parametrize("documents", ["stream", "cropped"])
def test_resident_ids_give_the_same_batches_bit_for_bit(text_data, two, documents):
    plain, resident = (text_data(corpora=two, documents=documents, device_resident=on) for on in (False, True))
    for data in (plain, resident):
        data.prepare()
    assert torch.equal(batch(resident, 3), batch(plain, 3))
    for windows in ("training", "validation"):
        there = getattr(resident, windows).to(torch.device("cpu")).rows(np.arange(30))
        assert torch.equal(there, getattr(plain, windows).rows(np.arange(30)))


def test_resident_ids_need_no_workers(text_data):
    with pytest.raises(ValueError, match=r"data.num_workers \(2\) must be 0 with data.device_resident=true"):
        text_data(device_resident=True, num_workers=2)


def counted_bytes(windows: FiniteWindows) -> float:
    targets = shift(windows.rows(np.arange(len(windows))))[1].numpy()
    return float(windows.byte_lengths[targets[targets != IGNORE]].sum(dtype=np.float64))


@pytest.mark.parametrize("limit", [1, 90, 10**6])
def test_with_a_tokenizer_that_loses_text_bytes_are_those_of_the_text(text_data, tmp_path, two, capsys, limit):
    library = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "1": 1, "2": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    recipe = TokenizerFile(path=str(tmp_path / "tokenizer.json"), specials=["mask"])
    data = text_data(corpora=two, tokenizer=recipe, validation_bytes=limit, context=5)
    data.prepare()
    assert "does not give the text back byte for byte" in capsys.readouterr().err
    exact = text_data(corpora=two, validation_bytes=10**6)
    exact.prepare()
    held_out = exact.tokenizer.decode_bytes(exact.held_out_ids)
    assert counted_bytes(data.held_out) == pytest.approx(len(held_out))
    if limit == 10**6:
        assert counted_bytes(data.validation) == pytest.approx(len(held_out))
    else:  # whole documents, at least one of each corpus
        sizes = np.diff(np.flatnonzero(exact.held_out_ids == 256)) - 1
        assert round(counted_bytes(data.validation)) in {sum(pair) for pair in combinations(sizes.tolist(), 2)} | {
            sum(three) for three in combinations(sizes.tolist(), 3)
        }


def test_documents_shorter_than_the_context_are_packed_and_none_is_dropped(text_data, tmp_path):
    few = corpora(tmp_path, few={str(number): chr(ord("a") + number) * 3 for number in range(20)})
    data = text_data(corpora=few, context=30)
    data.prepare()
    seen = set(data.training.rows(np.arange(60)).flatten().tolist())
    assert seen == set(data.train_ids.tolist())


@pytest.mark.parametrize("missing", [1, 0])
def test_one_token_short_of_a_window_is_too_short(text_data, missing):
    data = text_data()
    data.prepare()
    context = len(data.train_ids) - 1 + missing
    again = text_data(context=context)
    if missing:
        with pytest.raises(ValueError, match=rf"has {context} tokens for training; one window needs {context + 1} "):
            again.prepare()
    else:
        again.prepare()
        assert torch.equal(batch(again, 0), torch.from_numpy(data.train_ids.astype(np.int64)).expand(8, -1))


def test_a_batch_may_be_larger_than_an_epoch(text_data):
    data = text_data(context=200)
    data.prepare()
    rows = data.training.rows(np.arange(500))
    assert rows.shape == (500, 201)
    assert len(torch.unique(rows, dim=0)) < 500


@pytest.mark.parametrize(
    "text",
    [b"\0" * 500, b"a\r\nb\r\n" * 90, b"\xef\xbb\xbfabc " * 90, b"\n" * 500, ("=" * 300 + " \u3000").encode() * 3],
)
@pytest.mark.parametrize("recipe", [Bytes(), BytePairs(vocab_size=300, train_bytes=10**6)], ids=["bytes", "bpe"])
def test_texts_that_are_hard_to_read_come_back_byte_for_byte(text_data, tmp_path, text, recipe):
    (tmp_path / "hard.txt").write_bytes(text)
    data = text_data(corpora={"hard": Files(path=str(tmp_path / "hard.txt"), include=[])}, tokenizer=recipe, context=4)
    data.prepare()
    both = (data.tokenizer.decode_bytes(ids) for ids in (data.train_ids, data.held_out_ids))
    assert b"".join(both) == text.removeprefix(b"\xef\xbb\xbf")


@pytest.mark.slow
def test_a_line_of_100_megabytes_is_read_whole_and_in_bounded_memory(text_data, tmp_path):
    words = np.random.default_rng(0).integers(0, 1000, 20_000_000)
    text = b" ".join(b"%04d" % word for word in words)
    (tmp_path / "long.txt").write_bytes(text)
    recipe = BytePairs(vocab_size=600, train_bytes=1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = text_data(corpora={"long": Files(path=str(tmp_path / "long.txt"), include=[])}, tokenizer=recipe)
    data.prepare()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    lengths = data.tokenizer.byte_lengths()
    assert int(lengths[data.train_ids].sum() + lengths[data.held_out_ids].sum()) == len(text)
    assert text.startswith(data.tokenizer.decode_bytes(data.train_ids[:1000]))
    assert grown < 2000  # MiB: the text, its characters and its ids, several times over; not its encodings
