"""Multi-head attention around any backend: projections, convolution, positions, decay, gate, decoding state.

This is the only room that turns `(b, n, dim)` into `(b, h, n, d)` and back.
Letters: `b` batch, `n` tokens, `j` tokens of the context, `h` heads, `g` key heads, `d` head width, `c` channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm.attention.base import AttentionFactory, parts_of
from performer_lm.nn.branch import Body, Context, TokenInfo, count_weights
from performer_lm.nn.mixing import LogDecay, ShortConvolution, WriteStrength
from performer_lm.nn.norm import QueryKeyNorm, RMSNorm
from performer_lm.nn.positions import NoPositions, Positions


class AttentionState(NamedTuple):
    """The decoding state of self-attention."""

    backend: Any
    tail: Tensor | None  # (b, k - 1, c): the convolution's last inputs


class MultiHeadAttention(Body):
    """Self-attention over `(b, n, dim)`, whose global heads run the backend that `attn` builds.

    Args:
        dim: width of the stream.
        heads: query heads h.
        dim_head: width d of each head's queries, keys and values.
        key_heads: key and value heads g; divides h.
        attn: factory of the backend.
        layer: index of this layer, from 0.
        causal: whether a token sees only itself and those before it.
        convolution: taps of the short causal convolution on q, k and v; 0 for none.
        decay: whether each key head fades by a data-dependent `log_decay`; causal only.
        gate: whether each head's output is RMS-normalised and passes a sigmoid gate.
        positions: factory of the position scheme.
        qk_norm: bound of the learned temperature of normalised queries and keys; None leaves them as they are.
        head_norm: factory of the norms of each head's queries and keys, called with dim_head; None for none.
        qkv_bias: whether the projections to q, k and v have biases.
        out_bias: whether the projection back to the stream has one.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        dim_head: int,
        key_heads: int,
        attn: AttentionFactory,
        layer: int,
        causal: bool,
        convolution: int,
        decay: bool,
        gate: bool,
        positions: Callable[..., Positions],
        qk_norm: float | None,
        head_norm: Callable[..., nn.Module] | None,
        qkv_bias: bool,
        out_bias: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.heads_each = (heads, key_heads, key_heads)
        channels = sum(self.heads_each) * dim_head
        self.project_in = nn.Linear(dim, channels, bias=qkv_bias)
        self.convolution = ShortConvolution(channels, taps=convolution) if convolution else None
        self.norm = None if qk_norm is None else QueryKeyNorm(key_heads=key_heads, dim_head=dim_head, bound=qk_norm)
        self.query_norm = None if head_norm is None else head_norm(dim_head)
        self.key_norm = None if head_norm is None else head_norm(dim_head)
        places = positions(dim_head=dim_head)
        self.positions = None if isinstance(places, NoPositions) else places
        backend = attn(heads=heads, key_heads=key_heads, dim_head=dim_head, dim_value=dim_head, layer=layer)
        self.decay = LogDecay(dim, key_heads=key_heads, local=sum(backend.keys_each[1:])) if decay else None
        self.backend = backend  # behind decay: optimizers know weights by their order
        self.backend.check(causal=causal, packed=False)
        if self.backend.takes_beta:  # a part of the backend: another one leaves it out
            self.backend.beta = WriteStrength(dim, key_heads=key_heads)
        self.output = HeadOutput(dim, heads=heads, dim_head=dim_head, gate=gate, bias=out_bias)

    def forward(self, x: Tensor, info: TokenInfo) -> Tensor:
        """Attend over whole sequences `(b, n, dim)`."""
        qkv, of_keys, _ = self._project(x, None, info)
        out = self.backend(*qkv, causal=self.causal, mask=info.mask, segments=info.segments, **of_keys)
        return self.output(out, x)

    def init_state(
        self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype, context: Context | None
    ) -> AttentionState:
        """Return the state of `batch` streams before any token."""
        tail = None if self.convolution is None else self.convolution.init_tail(batch, device=device, dtype=dtype)
        return AttentionState(self.backend.init_state(batch, max_len=max_len, device=device, dtype=dtype), tail)

    def extend(self, x: Tensor, state: AttentionState, info: TokenInfo) -> tuple[Tensor, AttentionState]:
        """Append n tokens `(b, n, dim)` causally; pads stand on the left."""
        qkv, of_keys, tail = self._project(x, state.tail, info)
        out, backend = self.backend.extend(*qkv, state.backend, mask=info.mask, **of_keys)
        return self.output(out, x), AttentionState(backend, tail)

    def count_flops(self, tokens: int, *, context: int) -> int:
        """Count projections and attention."""
        projections = super().count_flops(tokens, context=context)
        return projections + self.backend.count_flops(tokens, tokens, causal=self.causal)

    def _project(
        self, x: Tensor, tail: Tensor | None, info: TokenInfo
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor], Tensor | None]:
        """Return q `(b, h, n, d)`, k and v `(b, g, n, d)`; log_decay and beta `(b, g, n)`; the next convolution tail.

        Log_decay and beta stand under their names where there are any.
        """
        qkv = self.project_in(x)
        if self.convolution is not None:
            qkv, tail = self.convolution(qkv, tail, mask=info.mask, segments=info.segments)
        heads = rearrange(qkv, "b n (h d) -> b h n d", h=sum(self.heads_each))
        q, k, v = heads.split(self.heads_each, dim=1)
        if self.norm is not None:
            q, k = self.norm(q), self.norm(k)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.positions is not None:
            q, k = self.positions(q, k, info.places)
        of_keys = {} if self.decay is None else {"log_decay": self.decay(x)}
        if self.backend.takes_beta:
            of_keys["beta"] = self.backend.beta(x)
        return (q, k, v), of_keys, tail


class CrossAttention(Body):
    """Attention from a stream `(b, n, dim)` to another sequence, `info.context`, without an order between the two.

    While decoding, the state holds the context as the backend keeps it: the context itself is read once.
    Arguments are those of `MultiHeadAttention`.

    Raises:
        ValueError: for a backend that cannot attend across sequences.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        dim_head: int,
        key_heads: int,
        attn: AttentionFactory,
        layer: int,
        gate: bool,
        qk_norm: float | None,
        head_norm: Callable[..., nn.Module] | None,
        qkv_bias: bool,
        out_bias: bool,
    ) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.project_query = nn.Linear(dim, heads * dim_head, bias=qkv_bias)
        self.project_context = nn.Linear(dim, 2 * key_heads * dim_head, bias=qkv_bias)
        self.norm = None if qk_norm is None else QueryKeyNorm(key_heads=key_heads, dim_head=dim_head, bound=qk_norm)
        self.query_norm = None if head_norm is None else head_norm(dim_head)
        self.key_norm = None if head_norm is None else head_norm(dim_head)
        self.backend = attn(heads=heads, key_heads=key_heads, dim_head=dim_head, dim_value=dim_head, layer=layer)
        for part in parts_of(self.backend):
            if not part.attends_across:
                raise ValueError(
                    f"attn={part.choice} does not attend across sequences; favor, exact, chunked and flash do"
                )
        self.output = HeadOutput(dim, heads=heads, dim_head=dim_head, gate=gate, bias=out_bias)

    def forward(self, x: Tensor, info: TokenInfo) -> Tensor:
        """Attend from each token to all of the context."""
        k, v, mask = self._read(info.context)
        return self.output(self.backend(self._queries(x), k, v, causal=False, mask=mask), x)

    def init_state(
        self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype, context: Context | None
    ) -> Any:
        """Return the backend's state with the context in it."""
        k, v, mask = self._read(context)
        state = self.backend.init_state(batch, max_len=k.shape[2], device=device, dtype=dtype)
        return self.backend.absorb(k, v, state, mask=mask)

    def extend(self, x: Tensor, state: Any, info: TokenInfo) -> tuple[Tensor, Any]:
        """Attend from each of n tokens `(b, n, dim)` to the context in the state, which stays."""
        return self.output(self.backend.read(self._queries(x), state), x), state

    def count_flops(self, tokens: int, *, context: int) -> int:
        """Count projections and attention."""
        of_context = self.project_context.weight.numel()
        projections = 2 * ((count_weights(self) - of_context) * tokens + of_context * context)
        return projections + self.backend.count_flops(tokens, context, causal=False)

    def _queries(self, x: Tensor) -> Tensor:
        q = rearrange(self.project_query(x), "b n (h d) -> b h n d", h=self.heads)
        q = q if self.norm is None else self.norm(q)
        return q if self.query_norm is None else self.query_norm(q)

    def _read(self, context: Context | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys and values `(b, g, j, d)` and the mask of the context, which there must be."""
        if context is None:
            raise ValueError("cross-attention needs a context: pass context=, the sequence to look at")
        both = self.project_context(context.vectors)
        k, v = rearrange(both, "b j (two g d) -> two b g j d", two=2, g=self.key_heads)
        k = k if self.norm is None else self.norm(k)
        return (k if self.key_norm is None else self.key_norm(k)), v, context.mask


class HeadOutput(nn.Module):
    """Map the outputs of heads back to the stream, each perhaps RMS-normalised and gated by the token."""

    def __init__(self, dim: int, *, heads: int, dim_head: int, gate: bool, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(dim_head) if gate else None
        self.gate = nn.Linear(dim, heads * dim_head, bias=False) if gate else None
        self.project_out = nn.Linear(heads * dim_head, dim, bias=bias)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Map the heads' outputs `(b, h, n, d)`, which came of x `(b, n, dim)`, to `(b, n, dim)`."""
        if self.norm is not None and self.gate is not None:
            gate = rearrange(F.sigmoid(self.gate(x)), "b n (h d) -> b h n d", h=self.heads)
            out = self.norm(out) * gate
        return self.project_out(rearrange(out, "b h n d -> b n (h d)"))
