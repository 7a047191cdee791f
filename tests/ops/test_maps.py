"""Maps write what they are, and pull gradients as autograd does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from performer_lm.ops.maps import BlockMap, Exponential, Generalized, Taylor
from performer_lm.ops.precision import LOG2_E


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


MAPS: dict[str, Callable[[], BlockMap]] = {
    "exponential": lambda: Exponential((draw(2, 4, 3),), scale=0.7),
    "with norm": lambda: Exponential((draw(2, 4, 3),), scale=0.7, norm=0.3),
    "with bias": lambda: Exponential((draw(2, 4, 3), draw(2, 4)), scale=0.7, norm=0.3),
    "generalized": lambda: Generalized((draw(2, 4, 3),), activation="softplus", epsilon=0.1),
    "relu": lambda: Generalized((draw(2, 4, 3),), activation="relu", epsilon=0.1),
    "taylor": lambda: Taylor((), scale=0.8),
    "taylor of a projection": lambda: Taylor((draw(2, 2, 3),)),
}
every_map = pytest.mark.parametrize("name", MAPS)


def features(a_map: BlockMap, x: Tensor) -> Tensor:
    """Return features, or log features."""
    values, logs = a_map(x)
    gain = a_map.gain(x)
    if not a_map.logarithmic:
        assert (logs, gain) == (None, None)
        assert values is not None
        return values
    assert logs is not None
    return logs if gain is None else logs + gain[..., None]


@every_map
@pytest.mark.parametrize("wanted", [True, False])
def test_pulling_equals_autograd(name: str, wanted: bool) -> None:
    a_map, x = MAPS[name](), draw(2, 5, 3).requires_grad_()
    tensors = tuple(t.requires_grad_() for t in a_map.tensors)
    out = features(a_map, x)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (x, *tensors), grad)
    found, found_tensors = a_map.with_tensors(tuple(t.detach() for t in tensors)).pull(x.detach(), grad, wanted=wanted)
    assert torch.allclose(found, expected[0])
    for one, other in zip(found_tensors, expected[1:], strict=True):
        assert one is None if not wanted else torch.allclose(one, other)


@every_map
@pytest.mark.parametrize("add", [True, False])
def test_writing_equals_mapping(name: str, add: bool) -> None:
    a_map, x = MAPS[name](), draw(2, 5, 3)
    values, logs = a_map(x)
    expected = LOG2_E * logs if a_map.logarithmic and logs is not None else values
    assert expected is not None
    held = torch.randn_like(expected) if add else torch.full_like(expected, torch.nan)
    out = held.clone()
    a_map.write(x, out, add=add)
    assert torch.allclose(out, held + expected if add else expected)


@every_map
def test_a_code_says_all_but_the_tensors(name: str) -> None:
    a_map, x = MAPS[name](), draw(2, 5, 3)
    again = BlockMap.decode(a_map.code, a_map.tensors)
    assert type(again) is type(a_map)
    assert torch.equal(features(again, x), features(a_map, x))


def test_gains_of_long_vectors_are_precise() -> None:
    x = 100.0 * torch.randn(1, 4, 64)
    gain = Exponential((torch.zeros(1, 1, 64),), norm=0.5).gain(x)
    assert gain is not None
    assert torch.allclose(gain, -0.5 * x.double().square().sum(dim=-1), rtol=1e-14)


def test_maps_that_differ_in_gain_alone_write_alike() -> None:
    weight, bias = draw(2, 4, 3), draw(2, 4)
    one = Exponential((weight, bias), scale=0.5, norm=0.5)
    assert one.writes_like(Exponential((weight, bias), scale=0.5))
    for other in (
        Exponential((weight, bias), scale=0.6),
        Exponential((weight,), scale=0.5),
        Exponential((weight.clone(), bias), scale=0.5),
        Generalized((weight, bias)),
    ):
        assert not one.writes_like(other)
