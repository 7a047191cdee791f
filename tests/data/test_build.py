import threading
import time

import pytest

from performer_lm.data import build as room
from performer_lm.data.build import Piece, in_order
from performer_lm.data.corpora.base import Document
from performer_lm.data.corpora.collection import Part


def test_results_come_in_order_and_few_items_are_taken_ahead():
    taken = []

    def items():
        for item in range(50):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    for item, result in in_order(work, items(), threads=3):
        assert result == item * item
        assert len(taken) <= item + 2 * 3 + 2
    assert taken == list(range(50))


def test_an_error_in_a_thread_ends_the_work_and_the_threads():
    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    before = threading.active_count()
    with pytest.raises(ValueError, match="five"):
        list(in_order(work, iter(range(1000)), threads=2))
    assert threading.active_count() == before


def test_texts_are_batched_whole_and_in_order(monkeypatch):
    monkeypatch.setattr(room, "BATCH_BYTES", 10)
    texts = [b"12345", b"67890", b"x" * 30, b"", b"end"]
    pieces = [Piece(Part(0, Document("", text)), 0.0, text, held_out=False) for text in texts]
    batches = [[piece.text for piece in batch] for batch in room._batches(pieces)]
    assert batches == [[b"12345", b"67890"], [b"x" * 30], [b"", b"end"]]
