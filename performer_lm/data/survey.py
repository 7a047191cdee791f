"""One reading of corpora: their identity, and the facts of each document that the split needs.

Letters: `d` documents.
"""

from array import array
from hashlib import blake2b, sha256
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from performer_lm.data.corpora.collection import Collection

DIGEST: Final = np.dtype([("high", "<u8"), ("low", "<u8")])


class Survey(NamedTuple):
    """Facts of every document, in the order of reading, and a hash of every name and byte."""

    corpora: NDArray[np.int64]
    """`(d,)` the number of each document's corpus."""
    sizes: NDArray[np.int64]
    """`(d,)` bytes of text."""
    places: NDArray[np.float64]
    """`(d,)` where in [0, 1) each name falls."""
    digests: NDArray[np.void]
    """`(d,)` hashes of the texts, `digest_of`."""
    given: NDArray[np.int64]
    """`(d,)` 1 where a document is given for validation, 0 where for training, -1 where the split decides."""
    content_hash: str


def read_through(collection: Collection) -> Survey:
    """Read all documents once."""
    corpora, sizes, places, given = array("q"), array("q"), array("d"), array("q")
    digests, content = bytearray(), sha256()
    for corpus, document in collection.documents():
        corpora.append(corpus)
        sizes.append(len(document.text))
        places.append(place_of(document.name))
        given.append(-1 if document.held_out is None else int(document.held_out))
        digest = digest_of(document.text)
        digests += digest
        name = document.name.encode("utf-8", errors="surrogateescape")
        content.update(f"{corpus} {given[-1]} {len(name)} {len(document.text)} ".encode() + name + digest)
    return Survey(
        np.frombuffer(corpora, dtype=np.int64),
        np.frombuffer(sizes, dtype=np.int64),
        np.frombuffer(places, dtype=np.float64),
        np.frombuffer(bytes(digests), dtype=DIGEST),
        np.frombuffer(given, dtype=np.int64),
        content.hexdigest(),
    )


def place_of(name: str) -> float:
    """Return where in [0, 1) a name falls."""
    return int.from_bytes(sha256(name.encode("utf-8", errors="surrogateescape")).digest()[:6], "big") / 2**48


def digest_of(text: bytes) -> bytes:
    """Return 16 bytes that no other text has."""
    return blake2b(text, digest_size=16).digest()
