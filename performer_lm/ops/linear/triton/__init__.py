"""Linear attention by Triton's kernels on a GPU: the same numbers as `sequence.py` to rounding, in a dozen launches.

They take what FAVOR+ is made of: fixed exponential features, the same for queries and keys. `auto` takes them for
bfloat16, whose products are what a GPU is fast at, and only where a first use shows that they agree with PyTorch's.

| file | holds |
|---|---|
| `launch.py` | a forward and a backward as launches |
| `states.py` | the kernels that go along the sequence, forward and back |
| `outputs.py`, `gradients.py` | the kernels of a chunk: its outputs; the gradients at its tokens |
| `blocks.py` | what they share |
"""

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from performer_lm.ops.linear.state import EMPTY, Geometry, LinearState
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.maps import Exponential, FeatureMap, Maps

Kernel = Literal["auto", "torch", "triton"]

WIDEST = 128
"""The widest heads and values that registers and shared memory hold."""
AGREEMENT = 0.05
"""How far kernels and PyTorch may be apart, as a share of the largest number: sums over 150 tokens of products of eight
bits differ by up to 0.028 where all is right (H200, the gradient at decay), and by 0.6 and more where it was wrong."""


def takes_triton(kernel: Kernel, maps: Maps, tokens: Tokens) -> bool:
    """Return True if Triton's kernels are to attend to a sequence.

    Raises:
        ValueError: if `kernel` is `triton` and they cannot.
    """
    if kernel == "torch":
        return False
    q, k, v = tokens[:3]
    if kernel == "auto" and not (q.is_cuda and all(x.dtype == torch.bfloat16 for x in (q, k, v))):
        return False
    refusal = refuse_features(maps.query, maps.key, max(q.shape[3], v.shape[3])) or _refuse_tokens(q, k, v)
    if kernel == "triton":
        if refusal:
            raise ValueError(f"kernel=triton {refusal}: take kernel=auto")
        return True
    if refusal:
        return False
    weight, *bias = maps.key.tensors
    given = tuple(x is not None for x in tokens)
    return _agrees(str(q.device), q.shape[1] // k.shape[1], *weight.shape[1:], v.shape[3], bool(bias), given)


def refuse_features(queries: FeatureMap, keys: FeatureMap, width: int) -> str | None:
    """Return why the kernels cannot work with maps and a width of heads."""
    if not isinstance(queries, Exponential) or not isinstance(keys, Exponential):
        return "needs exponential features"
    if queries.norm or not queries.writes_like(keys):
        return "needs the same features for queries and keys"
    if any(x.requires_grad for x in keys.tensors):
        return "needs features that are not trained"
    if width > WIDEST:
        return f"needs heads of width {WIDEST} at most, got {width}"
    return None


def _refuse_tokens(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the kernels cannot take tokens."""
    if q.shape[2] != k.shape[2] or not q.shape[2]:
        return f"needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}"
    if any(x.dtype == torch.float64 for x in (q, k, v)):
        return "needs float32 at most, got float64"
    return None if runs_on(q.device.type) else refuse_device(q.device.type)


def refuse_device(kind: str) -> str:
    """Return that a kind of device does not run the kernels."""
    return f"needs a CUDA device, got {kind}, and the package triton (pip install 'performer-lm[gpu]')"


@torch.compiler.assume_constant_result
@cache
def runs_on(device: str) -> bool:
    """Return True if kernels run on a kind of device: on CUDA, or wherever Triton's interpreter does."""
    if find_spec("triton") is None:
        return False
    from performer_lm.ops.linear.triton.blocks import WIDEN

    return device == "cuda" or bool(WIDEN.value)


@torch.compiler.assume_constant_result
@cache
def _agrees(
    device: str, group: int, num_features: int, width: int, value_width: int, biased: bool, given: tuple[bool, ...]
) -> bool:
    """Return True if the kernels' output and gradients on drawn numbers are those of PyTorch; else say so, once."""
    try:
        apart = _measure(torch.device(device), group, num_features, width, value_width, biased, given)
    except Exception as error:  # compilers, assemblers and drivers have no error in common; a run goes on without them
        reason = f"failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    else:
        if apart <= AGREEMENT:
            return True
        reason = f"differ from PyTorch by {apart:.2g} of the largest number"
    warnings.warn(f"linear attention goes on without Triton's kernels, which {reason}", stacklevel=2)
    return False


@torch.no_grad()
def _measure(
    device: torch.device,
    group: int,
    num_features: int,
    width: int,
    value_width: int,
    biased: bool,
    given: tuple[bool, ...],
) -> float:
    """Return the largest difference of outputs and gradients on drawn numbers, as a share of the largest number.

    It is NaN where any of them is.
    """
    from performer_lm.ops.linear import sequence
    from performer_lm.ops.linear.triton import launch

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    n = 150
    weight, bias = draw(1, num_features, width), (draw(1, num_features),) if biased else ()
    scale = width**-0.25
    one = Exponential((weight, *bias), scale=scale)
    maps = Maps(query=one, key=Exponential(one.tensors, scale=scale, norm=0.5 * scale * scale), groups=1)
    places = torch.arange(n, device=device)
    drawn = (
        *(x.bfloat16() for x in (draw(1, group, n, width), draw(1, 1, n, width), draw(1, 1, n, value_width))),
        draw(1, 1, n),
        -draw(1, 1, n).abs(),
        (places % 5 > 0)[None],
        (torch.arange(n + 1, device=device) // 100)[None],
    )
    tokens = Tokens(*(x if there else None for x, there in zip(drawn, given, strict=True)))  # type: ignore[arg-type]  # what every call has is there
    sums = torch.zeros(1, num_features, value_width + 1, device=device)
    state = LinearState(sums, torch.full_like(sums[..., 0], EMPTY, dtype=torch.float64))
    geometry, grads = Geometry(64, 128, False), [draw(1, group, n, value_width), None, None]
    trace = sequence.attend(maps, geometry, tokens, state, keep=True)
    wanted = [trace.out, *sequence.pull(maps, geometry, tokens, trace, grads, wanted=False)[0]]
    trace = launch.attend(maps, tokens, state, keep=True)
    found = [trace.out, *launch.pull(maps, tokens, trace, grads)[0]]
    pairs = [(x.float(), y.float()) for x, y in zip(found, wanted, strict=True) if x is not None and y is not None]
    return float(torch.stack([(x - y).abs().max() / y.abs().max() for x, y in pairs]).max())
