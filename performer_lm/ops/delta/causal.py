"""The delta rule as its callers see it.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `d` head width, `e` value width, `m` features.
"""

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.ops.checks import check_batch, check_log_decay, check_per_key
from performer_lm.ops.delta.blocks import Writes, maps_of_rows, write_unit
from performer_lm.ops.delta.operator import run
from performer_lm.ops.linear.state import choose_geometry
from performer_lm.ops.maps import BlockMap, Maps
from performer_lm.ops.precision import no_autocast


def empty_memory(
    batch: int, key_heads: int, num_features: int, dim_value: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the memory of no tokens, `(b, g, m, e)`, in float32 unless `dtype` is wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    return torch.zeros(batch, key_heads, num_features, dim_value, device=device, dtype=dtype)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    memory: Tensor,
    *,
    query_map: BlockMap,
    key_map: BlockMap,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    log_decay: Tensor | None = None,
    consume: bool = False,
) -> tuple[Tensor, Tensor]:
    """Correct the memory by n tokens, each of which reads it after its own correction: the output and the memory.

    Any split of a sequence over calls gives the same outputs and the same memory. Earlier outputs do not depend on
    later tokens.

    Args:
        q: `(b, h, n, d)`.
        k: `(b, g, n, d)`, g dividing h.
        v: `(b, g, n, e)`.
        beta: `(b, g, n)`, from 0 to 1 (2 keeps it stable): the share of its error that a token corrects.
        memory: `(b, g, m, e)`, what came before; it is not changed, unless `consume`.
        query_map: the queries' features, with tensors `(g, ...)`; they are scaled to length one.
        key_map: the keys' features; they are scaled to length one.
        chunk_size: tokens per block, which trades speed and memory, never the result; None for what the device holds.
        mask: `(b, n)` bool or integer; a False key is as if absent.
        segments: `(b, n)` non-decreasing document ids; each document starts with an empty memory, and `memory` belongs
            to the first token's.
        log_decay: `(b, g, n)`, at most 0: what the memory keeps until token t is written is exp(log_decay_t).
        consume: the memory may be overwritten, which spares a copy when decoding without gradients.

    Returns:
        `(b, h, n, e)` in q's dtype, and the memory after the last token.

    Raises:
        ValueError: for beta, a mask, segments or log_decay of another shape or dtype, or a memory of another batch.
    """
    check_batch(k, memory)
    mask = check_per_key(k, mask=mask, segments=segments, log_decay=log_decay)
    check_log_decay(beta, k.shape[:3], name="beta")
    if mask is not None and log_decay is not None:
        log_decay = log_decay.masked_fill(~mask[:, None], 0.0)
    maps = Maps(query=query_map.to(memory.dtype), key=key_map.to(memory.dtype), groups=k.shape[1])
    documents = None if segments is None else torch.cat([segments[:, :1], segments], dim=-1)
    tokens = Writes(q, k, v, beta, log_decay, mask, documents)
    if q.shape[2] == 1 and segments is None:
        leaves = (*tokens, memory, *maps.tensors)
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)):
            with no_autocast(k.device):
                out, memory = _write_token(maps, tokens, memory if consume else memory.clone())
            return out.to(q.dtype), memory
    before = rearrange(memory, "b g m e -> (g b) m e")
    out, after = run(maps, choose_geometry(memory, block=chunk_size), tokens, before)
    return out.to(q.dtype), rearrange(after, "(g b) m e -> b g m e", b=memory.shape[0])


def _write_token(maps: Maps, tokens: Writes, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Take one token in, in place: the step of decoding."""
    b, g, m, e = memory.shape
    rows = torch.cat([tokens.queries.reshape(b, g, -1, tokens.queries.shape[-1]), tokens.keys], dim=2).transpose(0, 1)
    features = memory.new_empty(*rows.shape[:3], m)
    for a_map, part in maps_of_rows(maps, rows.shape[2] - 1):  # one product reads the projection once
        write_unit(a_map, maps, rows[:, :, part].to(memory.dtype), features[:, :, part])
    features = features.transpose(0, 1)
    queries, keys = features[:, :, :-1], features[:, :, -1:]  # (b, g, r or 1, m)
    if tokens.log_decay is not None:
        memory.mul_(tokens.log_decay[..., None].to(memory.dtype).exp())
    beta = tokens.beta if tokens.mask is None else tokens.beta.masked_fill(~tokens.mask[:, None], 0.0)
    written = (tokens.values - keys @ memory).mul_(beta[..., None])
    memory.addcmul_(keys.mT, written)
    return (queries @ memory).view(b, -1, 1, e), memory
