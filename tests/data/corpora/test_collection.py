import re
from collections.abc import Iterator

import pytest

from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.collection import Collection

BROKEN = b"caf\xe9 \xff."


class Texts(Corpus):
    def __init__(self, *texts: bytes) -> None:
        self.texts = texts

    @property
    def label(self) -> str:
        return "texts"

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate(self.texts):
            yield Document(f"{number}.txt", text)

    def place(self, name: str) -> str:
        return f"folder/{name}"


def texts(errors, *corpora: Corpus) -> list[tuple[int, str, bytes]]:
    collection = Collection({str(number): corpus for number, corpus in enumerate(corpora)}, errors=errors)
    return [(part.corpus, part.document.name, part.document.text) for part in collection.documents()]


def test_documents_come_corpus_by_corpus_and_none_is_empty():
    found = texts("strict", Texts(b"a", b"", b"b"), Texts(b"c"))
    assert found == [(0, "0.txt", b"a"), (0, "2.txt", b"b"), (1, "0.txt", b"c")]


def test_a_byte_order_mark_is_no_text():
    assert texts("strict", Texts(b"\xef\xbb\xbfabc\xef\xbb\xbf", b"\xef\xbb\xbf", b"x")) == [
        (0, "0.txt", b"abc\xef\xbb\xbf"),
        (0, "2.txt", b"x"),
    ]


@pytest.mark.parametrize(
    ("errors", "kept"),
    [("replace", ["caf\ufffd \ufffd.".encode(), b"fine"]), ("skip", [b"fine"]), ("bytes", [BROKEN, b"fine"])],
)
def test_what_is_not_utf8_follows_the_policy(errors, kept):
    assert [text for _, _, text in texts(errors, Texts(BROKEN, b"fine"))] == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BROKEN, "folder/0.txt is not UTF-8 text: byte 0xe9 at 3; data.errors=replace, skip or bytes"),
        (b"\xef\xbb\xbfab\xffc", "folder/0.txt is not UTF-8 text: byte 0xff at 5"),
        (b"ab\xed\xa0\x80", "folder/0.txt is not UTF-8 text: byte 0xed at 2"),
        ("wide".encode("utf-16"), "folder/0.txt is UTF-16 text; convert it to UTF-8"),
    ],
)
def test_strictly_it_is_refused_with_its_place_and_byte(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        texts("strict", Texts(text, b"fine"))


def test_a_corpus_without_text_is_refused_with_its_count():
    with pytest.raises(ValueError, match="texts has no text: 1 document, all empty or left out"):
        texts("strict", Texts(b"fine"), Texts(b""))
    with pytest.raises(ValueError, match="texts has no text: 2 documents, all empty or left out"):
        texts("skip", Texts(BROKEN, b""))
    with pytest.raises(ValueError, match=r"data\.corpora must name at least one corpus"):
        Collection({}, errors="strict")


@pytest.mark.parametrize("errors", ["strict", "skip"])
@pytest.mark.parametrize("empty", [[], [b""], [b"", b""], [b"\xef\xbb\xbf"]])
def test_text_for_validation_that_is_empty_is_refused(empty, errors):
    class Given(Texts):
        validation_label = "given"

        def documents(self) -> Iterator[Document]:
            yield Document("a", b"text to train on")
            yield from (document._replace(held_out=True) for document in super().documents())

    count = f"{len(empty)} document{'s' * (len(empty) != 1)}"
    with pytest.raises(ValueError, match=f"^given has no text: {count}, all empty or left out$"):
        texts(errors, Given(*empty))
    assert len(texts(errors, Given(*empty, b"x"))) == 2
    if errors == "skip":
        with pytest.raises(ValueError, match=r"^given has no text: 1 document,"):
            texts(errors, Given(BROKEN))


def test_text_to_train_on_that_is_empty_is_refused_though_there_is_some_to_validate_on():
    class Given(Texts):
        validation_label = "given"

        def documents(self) -> Iterator[Document]:
            yield Document("a", b"")
            yield Document("b", b"held out", held_out=True)

    with pytest.raises(ValueError, match=r"^texts has no text: 1 document, all empty or left out$"):
        texts("strict", Given())


@pytest.mark.parametrize("binary", [b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xd8\xff\xe0\0\x10JFIF", b"\x1f\x9d\x90\x01\x02"])
def test_binary_files_are_told_from_broken_text(binary):
    with pytest.raises(ValueError, match=re.escape("folder/0.txt is no text: byte 0x")) as caught:
        texts("strict", Texts(binary))
    assert "data.errors" not in str(caught.value)
    assert texts("bytes", Texts(binary)) == [(0, "0.txt", binary)]
