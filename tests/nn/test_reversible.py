"""Residual streams: reversible and recomputed layers are plain ones, gradients, dropout and all."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from performer_lm.attention.base import AttentionFactory
from performer_lm.attention.exact import ExactAttention
from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.kernel_maps import IdentityFeatures
from performer_lm.nn.branch import Branch, TokenInfo
from performer_lm.nn.feed_forward import FeedForward
from performer_lm.nn.norm import RMSNorm
from performer_lm.nn.positions import NoPositions
from performer_lm.nn.reversible import Reversible
from performer_lm.performer import Performer

linear = partial(
    FavorAttention,
    features=IdentityFeatures,
    num_features=None,
    seed=0,
    redraw_interval=None,
    redraw_until=None,
    chunk_size=5,
)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def build(
    *, dim: int = 8, depth: int = 3, dropout: float = 0.0, attn: AttentionFactory | None = None, **options: Any
) -> Performer:
    """Build a stack with the same weights every time."""
    torch.manual_seed(0)
    stack = Performer(
        dim=dim,
        depth=depth,
        heads=2,
        attn=attn or partial(ExactAttention, dropout=dropout),
        positions=NoPositions,
        feed_forward=partial(FeedForward, mult=2, activation="gelu", dropout=dropout),
        norm=RMSNorm,
        dropout=dropout,
        convolution=3,
        decay=True,
        **options,
    )
    for parameter in stack.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.3)
    return stack


class Kept(Reversible):
    """Two streams under plain autograd, a branch at a time, as decoding goes."""

    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        streams = self.open(x)
        for branch in branches:
            streams = self.add(streams, branch(streams[-1], info))
        return self.close(streams)


def kept(stack: Performer) -> Performer:
    """Return the stack with plain autograd in the place of the reversible backward."""
    other = copy.copy(stack)
    other.residual = Kept()
    return other


def gradients(stack: Performer, loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*inputs, *stack.parameters()]))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("crosses", [False, True])
def test_reversible_gradients_are_autograds(dropout: float, training: bool, crosses: bool) -> None:
    stack = build(dropout=dropout, reversible=True, cross_attend=crosses).double().train(training)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    context = {"context": torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)} if crosses else {}
    found = []
    for run in (stack, kept(stack)):
        torch.manual_seed(1)
        out = run(x, **context)
        found.append([out, torch.rand(3), *gradients(stack, out.square().sum(), x, *context.values())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("options", [{"reversible": True}, {"recompute": True}])
def test_several_forwards_may_come_before_one_backward(options: dict[str, Any]) -> None:
    stack = build(dropout=0.3, **options).double()
    x, y = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    first = stack(x).square().sum()
    alone = gradients(stack, first)
    torch.manual_seed(1)
    first = stack(x).square().sum()
    second = stack(y).square().sum()
    torch.rand(5)  # what is drawn in between does not matter
    both = gradients(stack, first + 0 * second)
    for one, other in zip(alone, both, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_backward_leaves_the_random_generator_where_it_was() -> None:
    stack = build(dropout=0.3, reversible=True)
    out = stack(torch.randn(1, 5, 8))
    state = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attn", [ExactAttention, linear])
def test_autocast_is_that_of_the_forward(attn: AttentionFactory) -> None:
    stack = build(reversible=True, depth=8, attn=attn)
    x = torch.randn(2, 6, 8, requires_grad=True)
    found = []
    for run in (stack, kept(stack)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(x)
        grads = gradients(stack, out.float().square().sum(), x)  # outside of autocast
        found.append(torch.cat([grad.flatten() for grad in grads]))
    # both round to 8 bits at the same places, but ours rounds inputs that were recovered to float32's precision
    assert (found[0] - found[1]).norm() <= 2e-3 * found[1].norm()


def test_frozen_layers_get_no_gradient() -> None:
    stack = build(reversible=True)
    frozen = list(stack.layers[1].parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    stack(torch.randn(1, 4, 8)).sum().backward()
    assert all(parameter.grad is None for parameter in frozen)
    assert all(p.grad is not None for layer in (stack.layers[0], stack.layers[2]) for p in layer.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_are_plain_ones(dropout: float) -> None:
    x, found = torch.randn(2, 7, 8, requires_grad=True), []
    for recompute in (False, True):
        stack = build(dropout=dropout, recompute=recompute)
        torch.manual_seed(1)
        out = stack(x)
        found.append([out, *gradients(stack, out.square().sum(), x)])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Return the bytes of all tensors that a forward keeps for its backward."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    del out
    return sum(sizes.values())


def test_what_reversible_layers_keep_does_not_grow_with_depth() -> None:
    x = torch.randn(1, 64, 32)
    held = {}
    for depth in (2, 8):
        for name, options in {
            "plain": {},
            "recomputed": {"recompute": True},
            "reversible": {"reversible": True},
        }.items():
            stack = build(dim=32, depth=depth, **options)
            held[name, depth] = saved_bytes(partial(stack, x))
    assert held["plain", 8] > 3 * held["plain", 2]
    assert held["reversible", 8] == held["reversible", 2] < 5 * x.nbytes
    assert held["recomputed", 8] - held["recomputed", 2] == 6 * 2 * x.nbytes  # an input for each branch


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks there
def test_a_compiled_model_takes_reversible_layers_as_they_are() -> None:
    stack, x = build(reversible=True), torch.randn(1, 6, 8)
    expected = gradients(stack, stack(x).square().sum())
    compiled = torch.compile(stack, backend="aot_eager")
    for ours, theirs in zip(gradients(stack, compiled(x).square().sum()), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _train_in_parallel(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    stack = build(reversible=True, cross_attend=True).double()
    parallel = DistributedDataParallel(stack)
    x, context = torch.randn(2, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mine = slice(rank, rank + 1)
    parallel(x[mine], context=context[mine]).square().sum().backward()
    found = [parameter.grad for parameter in stack.parameters()]
    torch.distributed.destroy_process_group()
    alone = build(reversible=True, cross_attend=True).double()
    (alone(x, context=context).square().sum() / 2).backward()
    for ours, theirs in zip(found, alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, **EXACT)


@pytest.mark.slow
def test_reversible_layers_train_in_parallel_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path / "store"),), nprocs=2)
