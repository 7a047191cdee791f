"""Softmax attention by PyTorch's fused kernels, with decay and padding riding inside them as extra key channels.

The kernels know causal and nothing else at full speed. But a term that depends on the key alone is a dot product: a
key channel that holds it against a query channel that holds a constant. So log_decay keeps its gradient and padding
its meaning without an i x j matrix. A number in a 16-bit channel is too coarse (8 or 11 bits); three parts are not.

Letters: `b` batch, `h` heads, `g` key heads, `r` query heads per key head, `i` queries, `j` keys, `d` head width, `e`
value width.
"""

from dataclasses import replace
from typing import Unpack

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from performer_lm.ops.checks import fold_heads, gather_terms
from performer_lm.ops.precision import sum_dtype
from performer_lm.ops.terms import ALL, Options, Terms

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
FLASH_CAPABILITY = (8, 0)  # of the CUDA devices that have the flash kernel
WIDTH_MULTIPLE = 8
DECAY_QUERY = 16.0  # powers of two, so that products are exact; large enough for what float16 must reach
HIDE_QUERY = 2.0**15  # against -HIDE_QUERY: below any score, yet within float16


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> Tensor:
    """Attend as `exact_attention` does, by the flash or memory-efficient kernel of `scaled_dot_product_attention`.

    Linear memory for causal (as many queries as keys, or one query), key_mask and log_decay; window, mask, bias,
    segments and a causal block of queries on older keys are given to the kernel as an i x j matrix.

    Args:
        q: `(..., h, i, d)`.
        k: `(..., g, j, d)`.
        v: `(..., g, j, e)`.
        options: those of `exact_attention`, but no dropout, and no gradient for `bias`.

    Returns:
        `(..., h, i, e)` in q's dtype.

    Raises:
        ValueError: for what the kernels cannot do: dropout, a bias with gradient, float64 on an accelerator.

    Examples:
        >>> import torch
        >>> from performer_lm.ops import sdpa_attention
        >>> q, k, v = torch.randn(3, 2, 8, 10, 16).unbind()
        >>> sdpa_attention(q, k, v, causal=True, log_decay=-torch.rand(2, 8, 10)).shape
        torch.Size([2, 8, 10, 16])
    """
    terms = gather_terms(q, k, v, **options)
    if isinstance(terms.bias, Tensor) and terms.bias.requires_grad:
        raise ValueError("the flash kernel has no gradient for bias; chunked_attention (attn=chunked) has")
    if terms.dropout > 0.0:
        raise ValueError("the flash kernel has no seeded dropout; chunked_attention (attn=chunked) has")
    if q.is_cuda and q.dtype == torch.float64:
        raise ValueError("the flash kernel has no float64; tiled_attention (attn=flash_tiled) has")
    queries, keys, values = fold_heads(q, k, v, dtype=q.dtype)
    matrix = _told_matrix(terms, queries)
    sees_none = _rows_without_keys(terms, matrix)
    is_one_row = terms.queries == 1 and matrix is None and _fits_one_row(terms, queries, keys, values)
    if is_one_row:
        matrix = _one_row(terms, queries)
    else:
        queries, keys = _add_channels(queries, keys, terms)
    if matrix is not None and sees_none is not None:  # a row of -inf has no softmax, one of zeros has
        matrix = matrix.masked_fill(sees_none[..., None], 0.0)
    if matrix is not None and is_one_row and _rounds_bias(queries):
        out = _attend_one_query(queries, keys, values, matrix, scale=terms.scale)
    else:
        is_causal = terms.causal and matrix is None and bool(terms.queries > 1)
        out = _run_kernel(queries, keys, values, matrix, causal=is_causal, scale=terms.scale)[..., : v.shape[-1]]
    if sees_none is not None:
        out = out.masked_fill(sees_none[..., None], 0.0)
    return out.reshape(*q.shape[:-1], v.shape[-1])


def _add_channels(q: Tensor, k: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Widen `q` and `k` by the channels whose products are the decay and the hiding of masked keys."""
    q_channels, k_channels = [q], [k]
    if terms.decay is not None:
        rest = (terms.decay / (terms.scale * DECAY_QUERY))[..., None].clamp(min=torch.finfo(k.dtype).min)
        for _ in range(3 if k.dtype.itemsize == 2 else 1):
            part = rest.to(k.dtype)
            rest = rest - part
            k_channels.append(part)
            q_channels.append(q.new_full((1,), DECAY_QUERY).expand(*q.shape[:-1], 1))
    if terms.key_mask is not None:
        hidden = ~terms.key_mask[:, None, :, None]
        k_channels[0] = k.masked_fill(hidden, 0.0)  # or a large one could still be seen
        hide = k.new_zeros(()).masked_fill(hidden, -HIDE_QUERY)
        k_channels.append(hide.expand(*k.shape[:-1], 1))
        q_channels.append(q.new_full((1,), HIDE_QUERY).expand(*q.shape[:-1], 1))
    if len(q_channels) == 1:
        return q, k
    return torch.cat(q_channels, dim=-1), torch.cat(k_channels, dim=-1)


def _run_kernel(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor | None, *, causal: bool, scale: float) -> Tensor:
    """Call the kernel with equal widths and the grouping it can take: `(b h i width)`."""
    width = -(-max(k.shape[-1], v.shape[-1]) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    parts = [q, k, v]
    for place, x in enumerate(parts):
        x = F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
        parts[place] = x if x.stride(-1) == 1 else x.contiguous()  # all that the kernels take
    q, k, v = parts
    heads, groups = q.shape[1], k.shape[1]
    rows_alike = not causal and (matrix is None or (matrix.shape[1] <= groups and matrix.shape[2] == 1))
    fold = heads != groups and rows_alike
    if fold:  # queries that see the same keys may stand in one head, whatever the kernel
        q = rearrange(q, "b (g r) i d -> b g (r i) d", g=groups)
    elif heads != groups and not _takes_groups(q, matrix):
        k, v = (repeat(x, "b g j d -> b (g r) j d", r=heads // groups) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(KERNELS):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=matrix, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return rearrange(out, "b g (r i) e -> b (g r) i e", r=heads // groups) if fold else out


def _takes_groups(q: Tensor, matrix: Tensor | None) -> bool:
    """Return True if the kernel that a call gets reads grouped keys: of CUDA's, the memory-efficient one does not."""
    if not q.is_cuda:
        return True
    has_flash = torch.cuda.get_device_capability(q.device) >= FLASH_CAPABILITY
    return has_flash and q.dtype != torch.float32 and matrix is None


def _told_matrix(terms: Terms, q: Tensor) -> Tensor | None:
    """Return what the kernel must be told beyond causal, `(b | 1, h | 1, i, j)` to be added; None if nothing."""
    is_block_on_older_keys = terms.causal and terms.queries not in (1, terms.keys)
    by_place = terms.window is not None or terms.segments is not None
    if not (is_block_on_older_keys or by_place or terms.mask is not None or terms.bias is not None):
        return None
    matrix = q.new_zeros(1, 1, terms.queries, terms.keys)
    if terms.bias is not None:
        matrix = matrix + terms.block(terms.bias, ALL, ALL).to(q.dtype)
    hidden = replace(terms, key_mask=None).hidden(ALL, ALL, q.device)
    return matrix if hidden is None else matrix.masked_fill(hidden, -torch.inf)


def _fits_one_row(terms: Terms, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True if decay and padding of a decoding step may be one row of bias, which spares widening the cache.

    The kernels give a bias no gradient, and `_attend_one_query` gives none at all.
    """
    known = [terms.decay] if not _rounds_bias(q) else [terms.decay, q, k, v]
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in known)
    return not needs_gradient and not (terms.decay is None and terms.key_mask is None)


def _rounds_bias(q: Tensor) -> bool:
    """Return True if the kernels want a bias as coarse as the queries, where a decay would lose its digits."""
    return q.is_cuda and q.dtype.itemsize == 2


def _attend_one_query(q: Tensor, k: Tensor, v: Tensor, row: Tensor, *, scale: float) -> Tensor:
    """Attend from one query per head under a row of float32 bias, reading keys and values where they lie: `(b h 1 e)`.

    Two products, whose sums stay float32, and a softmax between them; like the kernels, it rounds the weights.
    """
    groups = k.shape[1]
    queries = rearrange(q, "b (g r) 1 d -> (b g) r d", g=groups)
    scores = _multiply_halves(queries, rearrange(k, "b g j d -> (b g) d j")) * scale
    weights = (rearrange(scores, "(b g) r j -> b g r j", g=groups) + row).softmax(-1).to(v.dtype)
    out = _multiply_halves(rearrange(weights, "b g r j -> (b g) r j"), rearrange(v, "b g j e -> (b g) j e"))
    return rearrange(out, "(b g) r e -> b (g r) 1 e", g=groups).to(q.dtype)


def _multiply_halves(x: Tensor, y: Tensor) -> Tensor:
    """Multiply batches of matrices in half precision, with the sums in float32."""
    return torch.bmm(x, y, out_dtype=torch.float32)


def _one_row(terms: Terms, q: Tensor) -> Tensor:
    """Return decay and padding as the one query, which stands at the last key, feels them: `(b, g | 1, 1, j)`."""
    row = q.new_zeros(1, 1, 1, terms.keys, dtype=sum_dtype(q))
    if terms.decay is not None:
        row = terms.decay[:, :, None].to(row.dtype)
    return row if terms.key_mask is None else row.masked_fill(~terms.key_mask[:, None, None], -torch.inf)


def _rows_without_keys(terms: Terms, told: Tensor | None) -> Tensor | None:
    """Return True at queries that see no key, `(b | 1, h | 1, i)`; None where every query sees one."""
    if told is not None:
        hidden = told.isneginf()
        return (hidden if terms.key_mask is None else hidden | ~terms.key_mask[:, None, None]).all(-1)
    if terms.key_mask is None:
        return None
    if terms.causal and terms.queries > 1:
        return (terms.key_mask.cumsum(-1) == 0)[:, None]
    return ~terms.key_mask.any(-1)[:, None, None]
