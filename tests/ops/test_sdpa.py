from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from performer_lm.attention.flash import FlashAttention
from performer_lm.ops import sdpa
from performer_lm.ops.sdpa import sdpa_attention
from performer_lm.ops.softmax import exact_attention

OPTIONS = ("causal", "window", "mask", "key_mask", "segments", "log_decay", "scale")


@given(data=st.data())
def test_sdpa_equals_exact_for_every_option_it_has(calls, agree, data):
    agree(sdpa_attention, exact_attention, data.draw(calls(OPTIONS)))


class CountBytes(TorchDispatchMode):
    """Counts the bytes of new tensors; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in held]
        self.bytes += sum(x.nbytes for x in new)
        return out


@pytest.fixture
def half_on_cuda(monkeypatch):
    """Let half precision be treated as on CUDA, whose product with float32 sums the CPU has not."""

    def multiply(x, y):
        if x.is_meta:
            return torch.bmm(x, y, out_dtype=torch.float32)
        return torch.bmm(x.float(), y.float())

    monkeypatch.setattr(sdpa, "_rounds_bias", lambda q: q.dtype.itemsize == 2)
    monkeypatch.setattr(sdpa, "_multiply_halves", multiply)


@pytest.mark.parametrize("masked", [False, True])
def test_a_decoding_step_in_half_precision_copies_no_keys_or_values(half_on_cuda, masked):
    def step(length, width):
        attention = FlashAttention(heads=4, key_heads=2, dim_head=width, dim_value=width, layer=0)
        state = attention.init_state(3, max_len=length + 1, device=torch.device("meta"), dtype=torch.bfloat16)
        q, k, v = (torch.empty(3, heads, length, width, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
        decay = None if masked else torch.empty(3, 2, length, device="meta")
        mask = torch.empty(3, length, device="meta", dtype=torch.bool) if masked else None
        state = state.append(k, v, mask=mask, log_decay=decay)
        last = [x[..., :1] for x in (mask, decay) if x is not None]
        options = {"mask": last[0]} if masked else {"log_decay": last[0]}
        with CountBytes() as counted, torch.no_grad():
            attention.extend(q[:, :, :1], k[:, :, :1], v[:, :, :1], state, **options)
        return counted.bytes

    wide, narrow = (step(2000, width) - step(1000, width) for width in (256, 8))
    assert wide == narrow  # a few numbers per key and head, whatever the width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_decoding_step_in_half_precision_equals_exact(half_on_cuda, dtype, key_heads):
    q, k, v = (torch.randn(2, heads, n, 16).to(dtype) for heads, n in ((4, 1), (key_heads, 300), (key_heads, 300)))
    options = {
        "log_decay": -torch.rand(2, key_heads, 300),
        "key_mask": (torch.arange(300) >= torch.tensor([[0], [300]])),  # a row without keys gives zeros
    }
    found = sdpa_attention(q, k, v, causal=True, **options)
    assert found.dtype == dtype
    wanted = exact_attention(q, k, v, causal=True, **options)
    torch.testing.assert_close(
        found, wanted, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=0
    )  # of 8 and 11 bits


@pytest.mark.parametrize(
    ("dtype", "capability", "has_matrix", "takes"),
    [
        (torch.float16, (7, 5), False, False),  # no flash kernel there
        (torch.float16, (8, 0), False, True),
        (torch.bfloat16, (9, 0), False, True),
        (torch.float16, (9, 0), True, False),
        (torch.float32, (9, 0), False, False),
    ],
)
def test_keys_are_repeated_where_the_kernel_that_is_left_knows_no_groups(
    monkeypatch, dtype, capability, has_matrix, takes
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"))
    assert sdpa._takes_groups(q, torch.zeros(1) if has_matrix else None) is takes


def test_every_fused_kernel_may_be_chosen():
    assert {kernel.name for kernel in sdpa.KERNELS} == {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"}
