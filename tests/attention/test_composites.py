"""Backends made of backends hand on what belongs to the parts: refusals, redraws, fixed projections."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from performer_lm.attention.base import Attention
from performer_lm.attention.favor import FavorAttention, Redrawable
from performer_lm.attention.feature_maps import SoftmaxFeatures
from performer_lm.attention.hybrid import HybridAttention
from performer_lm.attention.kernel_maps import TrigonometricFeatures
from performer_lm.attention.local import LocalAttention
from performer_lm.attention.split import SplitAttention
from performer_lm.model import PerformerLM

Wrap = Callable[..., Attention[Any]]
SIZES = {"heads": 4, "key_heads": 4, "dim_head": 8, "dim_value": 8, "layer": 0}
favor = partial(FavorAttention, num_features=8, seed=0, redraw_until=None, chunk_size=None)
softmax = partial(SoftmaxFeatures, antithetic=False, learned=False, centred=False, momentum=None)
positive = partial(favor, features=partial(softmax, coupling="orthogonal", regularized=False), redraw_interval=1)
signed = partial(
    favor, features=partial(TrigonometricFeatures, coupling="orthogonal", regularized=False), redraw_interval=None
)


def hybrid(attn: Any) -> Attention[Any]:
    return HybridAttention(**SIZES, pattern=["one"], backends={"one": attn})


def split(attn: Any) -> Attention[Any]:
    return SplitAttention(**SIZES, attn=attn, local=partial(LocalAttention, window=3), local_heads=2)


composites = pytest.mark.parametrize("wrap", [hybrid, split])


@composites
@pytest.mark.parametrize(("causal", "packed"), [(True, False), (False, True)])
def test_what_a_part_cannot_keep_is_refused(wrap: Wrap, causal: bool, packed: bool) -> None:
    with pytest.raises(ValueError, match="signed features"):
        wrap(signed).check(causal=causal, packed=packed)
    wrap(signed).check(causal=False, packed=False)
    wrap(positive).check(causal=causal, packed=packed)


@composites
def test_projections_are_redrawn_and_kept(wrap: Wrap) -> None:
    model = Redrawable()
    model.attention = wrap(positive)
    name = next(name for name, _ in model.named_buffers() if name.endswith("projection"))
    first = model.get_buffer(name).clone()
    model.redraw(1)
    second = model.get_buffer(name).clone()
    assert not torch.equal(second, first)
    model.fix_projections()
    model.redraw(2)
    assert torch.equal(model.get_buffer(name), second)


def test_each_backend_is_settled_and_redrawn_once_whatever_it_is_part_of(
    monkeypatch: pytest.MonkeyPatch, lively_model: Callable[..., PerformerLM]
) -> None:
    seen: list[str] = []

    def count(owner: Any, name: str) -> None:
        kept = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **more: (seen.append(name), kept(*given, **more))[1])

    for owner, name in ((FavorAttention, "redraw"), (SoftmaxFeatures, "redraw"), (SoftmaxFeatures, "settle")):
        count(owner, name)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda pending: seen.append("all_reduce"))
    options = ["attn=hybrid", "attn.pattern=[favor]", "attn/features@attn.backends.favor.features=optimal"]
    model = lively_model(*options, "attn.backends.favor.redraw_interval=1", "model.local_heads=2", "model.depth=2")
    assert sum(isinstance(module, FavorAttention) for module in model.modules()) == 2
    model.settle()
    assert seen == ["settle", "all_reduce"] * 2
    seen.clear()
    model.redraw(1)
    assert seen == ["redraw", "redraw"] * 2  # of the backend, and of its features
