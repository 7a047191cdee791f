from collections.abc import Iterator

from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.collection import Collection
from performer_lm.data.survey import place_of, read_through


class Documents(Corpus):
    label = "documents"

    def __init__(self, *documents: Document) -> None:
        self._documents = documents

    def documents(self) -> Iterator[Document]:
        yield from self._documents


def survey(*corpora: list[Document]):
    named = {str(number): Documents(*documents) for number, documents in enumerate(corpora)}
    return read_through(Collection(named, errors="strict"))


def test_a_survey_knows_every_document():
    found = survey(
        [Document("a", b"one"), Document("b", b"")], [Document("c", b"one", True), Document("d", b"four", False)]
    )
    assert found.corpora.tolist() == [0, 1, 1]
    assert found.sizes.tolist() == [3, 3, 4]
    assert found.given.tolist() == [-1, 1, 0]
    assert found.places.tolist() == [place_of("a"), place_of("c"), place_of("d")]
    assert found.digests[0] == found.digests[1] != found.digests[2]


def test_the_hash_follows_everything_that_was_read():
    a, b = Document("a", b"one"), Document("b", b"two")
    surveys = [
        survey([a, b]),
        survey([b, a]),
        survey([a], [b]),
        survey([a._replace(name="A"), b]),
        survey([a._replace(text=b"One"), b]),
        survey([a._replace(held_out=False), b]),
        survey([Document("ab", b"one"), Document("", b"two")]),
        survey([a, b, a]),
    ]
    assert len({each.content_hash for each in surveys}) == len(surveys)
    assert survey([a, b]).content_hash == surveys[0].content_hash
