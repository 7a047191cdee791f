import torch

from performer_lm.nn.layout import find_places


def test_places_count_real_tokens_of_their_own_document() -> None:
    x = torch.zeros(1, 8, 2)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1]]).bool()
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    assert find_places(x, None, None).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert find_places(x, mask, None)[mask].tolist() == [0, 1, 2, 3, 4]
    assert find_places(x, None, segments).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert find_places(x, mask, segments)[mask].tolist() == [0, 1, 0, 0, 1]
