"""What every softmax op promises beyond equality with the reference."""

import doctest
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor

from performer_lm import ops
from performer_lm.ops import chunked_attention, exact_attention, local_attention, sdpa_attention, tiled_attention

SEEDED = {
    "exact": exact_attention,
    "chunked": partial(chunked_attention, query_chunk_size=5, key_chunk_size=7),
    "chunked_whole": chunked_attention,
    "tiled": partial(tiled_attention, on_chip=1200),
}
ALL = SEEDED | {"sdpa": sdpa_attention}

every_op = pytest.mark.parametrize("attend", ALL.values(), ids=ALL)
every_seeded_op = pytest.mark.parametrize("attend", SEEDED.values(), ids=SEEDED)


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def kept_probabilities(
    attend, *, seed: int, batch: int = 2, heads: int = 2, queries: int = 20, keys: int = 30
) -> Tensor:
    """Read the dropout mask off the output: equal scores over an identity of values give the probabilities."""
    q, k = torch.zeros(batch, heads, queries, 1), torch.zeros(batch, heads, keys, 1)
    v = torch.eye(keys).expand(batch, heads, -1, -1)
    return attend(q, k, v, dropout=0.4, seed=seed) > 0


@every_seeded_op
def test_dropout_is_the_same_in_every_op(attend):
    assert torch.equal(kept_probabilities(attend, seed=3), kept_probabilities(exact_attention, seed=3))


@every_seeded_op
def test_dropout_differs_between_tiles_rows_heads_batch_and_seeds(attend):
    kept = kept_probabilities(attend, seed=3)
    assert not torch.equal(kept, kept_probabilities(attend, seed=4))
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert not torch.equal(kept[:, :, 0], kept[:, :, 1])
    assert not torch.equal(kept[:, :, :5, :7], kept[:, :, 5:10, 7:14])


@every_seeded_op
def test_dropout_keeps_the_mean_and_leaves_the_generator_alone(attend):
    before = torch.random.get_rng_state()
    kept = kept_probabilities(attend, seed=0, batch=8, heads=8, queries=40, keys=60).double()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert abs(kept.mean().item() - 0.6) < 3 * (0.24 / kept.numel()) ** 0.5
    out = attend(*draw((1, 1, 1, 4), (1, 1, 300, 4)), torch.ones(1, 1, 300, 1).double(), dropout=0.1, seed=0)
    assert out.item() == pytest.approx(1.0, abs=0.1)  # 300 weights of mean 1, a tenth of them dropped: spread 0.02


def test_sdpa_names_the_op_that_has_what_it_lacks():
    q, k, v = draw((1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2))
    with pytest.raises(ValueError, match="attn=chunked"):
        sdpa_attention(q, k, v, dropout=0.1, seed=0)
    with pytest.raises(ValueError, match="attn=chunked"):
        sdpa_attention(q, k, v, bias=torch.zeros(3, 3, requires_grad=True))


GRADED = {"local": partial(local_attention, window=4), **ALL}
INPUTS = ("q", "k", "v", "bias", "log_decay")


@pytest.mark.parametrize("name", GRADED)
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_whatever_asks_for_a_gradient_gets_the_one_it_has_beside_all_others(name, groups, masked):
    shapes = ((2, 4, 6, 3), (2, groups, 6, 3), (2, groups, 6, 5), (4, 6, 6), (2, groups, 6))
    lacks_bias = name in ("local", "sdpa")  # sdpa takes a bias, without gradient
    call = {key: x for key, x in zip(INPUTS, draw(*shapes), strict=True) if not (lacks_bias and key == "bias")}
    call["log_decay"] = -call["log_decay"].abs()
    fixed = {"causal": True, "key_mask": torch.rand(2, 6) < 0.7 if masked else None}

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        own = {key: x.detach().requires_grad_(key in wanted) for key, x in call.items()}
        out = GRADED[name](**own, **fixed)
        return dict(zip(wanted, torch.autograd.grad(out.cos().sum(), [own[key] for key in wanted]), strict=True))

    whole = gradients(tuple(call))
    for count in range(1, len(call)):
        for wanted in combinations(call, count):
            for key, grad in gradients(wanted).items():
                torch.testing.assert_close(grad, whole[key])
                assert grad.any()


@every_op
def test_mask_and_bias_as_functions_equal_the_whole(attend):
    q, k, v, bias = draw((2, 3, 12, 4), (2, 3, 17, 4), (2, 3, 17, 4), (3, 12, 17))
    mask = torch.rand(2, 1, 12, 17) < 0.7
    asked = attend(
        q, k, v, mask=lambda rows, cols: mask[..., rows, cols], bias=lambda rows, cols: bias[..., rows, cols]
    )
    torch.testing.assert_close(asked, exact_attention(q, k, v, mask=mask, bias=bias))


@every_op
def test_a_function_of_slices_is_never_asked_for_the_whole_by_chunks(attend):
    q, k, v = draw((1, 1, 40, 4), (1, 1, 40, 4), (1, 1, 40, 4))
    asked = []

    def bias(rows: slice, cols: slice) -> Tensor:
        i, j = range(*rows.indices(40)), range(*cols.indices(40))
        asked.append((len(i), len(j)))
        return torch.zeros(len(i), len(j), dtype=q.dtype)

    attend(q, k, v, bias=bias)
    assert sum(i * j for i, j in asked) == 40 * 40


@every_op
def test_any_leading_dimensions(attend):
    q, k, v, bias = draw((3, 2, 4, 6, 5), (3, 2, 2, 9, 5), (3, 2, 2, 9, 3), (2, 1, 6, 9))
    mask, key_mask = torch.rand(3, 1, 4, 6, 9) < 0.8, torch.rand(3, 2, 9) < 0.8
    segments = torch.zeros(3, 2, 9, dtype=torch.long)
    out = attend(q, k, v, bias=bias, mask=mask, key_mask=key_mask, segments=segments, causal=True)
    assert out.shape == (3, 2, 4, 6, 3)
    for one in range(3):
        for two in range(2):
            alone = attend(
                q[one, two],
                k[one, two],
                v[one, two],
                bias=bias[two],
                mask=mask[one, 0],
                key_mask=key_mask[one, two],
                causal=True,
            )
            torch.testing.assert_close(out[one, two], alone)


@every_op
@pytest.mark.parametrize("causal", [True, False])
def test_logits_of_ten_thousand_are_finite(attend, causal):
    q, k, v = (x.requires_grad_() for x in draw((1, 2, 20, 4), (1, 2, 20, 4), (1, 2, 20, 4), dtype=torch.float32))
    out = attend(q, k, v, causal=causal, scale=1e4)
    torch.testing.assert_close(
        out.double(),
        exact_attention(q.double(), k.double(), v.double(), causal=causal, scale=1e4),
        atol=1e-2,
        rtol=1e-2,
    )  # a float32 logit of 1e4 is off by 1e-3
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single(attend, dtype):
    half = [x.requires_grad_() for x in draw((2, 4, 50, 16), (2, 2, 50, 16), (2, 2, 50, 16), dtype=dtype)]
    single = [x.detach().float().requires_grad_() for x in half]
    log_decay = -torch.rand(2, 2, 50)
    out, wanted = (attend(*x, causal=True, log_decay=log_decay) for x in (half, single))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, atol=1e-2, rtol=1e-2)
    for grad, wanted_grad in zip(
        torch.autograd.grad(out.float().cos().sum(), half), torch.autograd.grad(wanted.cos().sum(), single), strict=True
    ):
        assert (grad.float() - wanted_grad).norm() < 1e-2 * wanted_grad.norm()


@every_op
def test_inputs_may_lie_in_memory_in_any_order(attend):
    q, k, v = (x.mT for x in draw((2, 2, 8, 9), (2, 2, 8, 9), (2, 2, 8, 9)))
    torch.testing.assert_close(attend(q, k, v), exact_attention(q.contiguous(), k.contiguous(), v.contiguous()))


@every_op
def test_one_query_and_one_key(attend):
    q, k, v = draw((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 3))
    for causal in (True, False):
        torch.testing.assert_close(attend(q, k, v, causal=causal), v)


@pytest.mark.parametrize(
    "function", [exact_attention, chunked_attention, tiled_attention, sdpa_attention, local_attention]
)
def test_the_documented_example_runs(function):
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(function, function.__name__, globs={})
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
    assert getattr(ops, function.__name__) is function
