from performer_lm.data.tokenizer import BytePairTokenizer


def test_merges_that_make_the_same_bytes_share_an_id():
    a, b, c = b"abc"
    tokenizer = BytePairTokenizer(merges=[[a, b], [b, c], [256, c], [a, 257]], split="words")
    assert tokenizer.vocab_size == 256 + 3 + 1
    assert tokenizer.token_bytes(258) == b"abc"
