from performer_lm.data.tokenizer import WordPieceTokenizer, train_word_pieces
from performer_lm.data.tokenizer.byte_level import spell
from performer_lm.data.tokenizer.word_pieces import INSIDE


def test_the_longest_piece_is_taken_from_the_start_of_a_word_on():
    pieces = ["un", INSIDE + "able", INSIDE + "ab", spell(b" un"), INSIDE + "tie"]
    tokenizer = WordPieceTokenizer(pieces=pieces, split="words")
    ids = tokenizer.encode("unable untieable able")
    assert [tokenizer.token_bytes(token) for token in ids] == [
        b"un",
        b"able",
        b" un",
        b"tie",
        b"able",
        b" ",
        b"able",
    ]
    assert ids[0] == 512
    assert tokenizer.encode("##a").tolist()[0] == ord("#")  # no text is taken for a mark


def test_training_learns_pieces_for_both_places():
    tokenizer = train_word_pieces([b"tested testing tester retest " * 20], vocab_size=560)
    pieces = tokenizer.to_dict()["pieces"]
    assert any(not name.startswith(INSIDE) for name in pieces)
    assert any(name.startswith(INSIDE) for name in pieces)
    assert len(set(pieces)) == len(pieces)
