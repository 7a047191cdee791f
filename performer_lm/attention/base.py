"""The contract of attention backends, and the one law that tests hold every backend to.

Letters: `b` batch, `h` heads, `g` key heads (g divides h), `i` queries, `j` keys, `n` tokens, `d` head width,
`e` value width.

The law of decoding: `extend` over any split of a sequence equals `forward(causal=True)` over the whole sequence.
Prefill and step are therefore the same method, and a backend has one mathematics for training and decoding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, NotRequired, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from performer_lm.ranges import Count, Share, Whole, ranged
from performer_lm.wording import snake_case

State = TypeVar("State")
Tree = TypeVar("Tree")


class Sizes(TypedDict):
    """The arguments that every backend takes: the sizes that a model gives to a factory, and the dropout.

    A backend with other options too takes these as `**sizes: Unpack[Sizes]` and hands the sizes to `Attention`.
    """

    heads: Count
    key_heads: Count
    dim_head: Count
    dim_value: Count
    layer: Whole
    dropout: NotRequired[Share]


@ranged
class Attention(nn.Module, ABC, Generic[State]):
    """A backend, which the heads of one layer run: `heads` queries over `key_heads` keys and values.

    A backend stands in the config as a factory (`_partial_`) that the model calls with the first five arguments below;
    the others come from the backend's yaml.

    Args:
        heads: query heads.
        key_heads: key heads; `heads / key_heads` queries share each.
        dim_head: `d`.
        dim_value: `e`.
        layer: the layer's number, from 0, so that layers can differ.
        dropout: share of the attention probabilities dropped in training; 0 for a backend that has none to drop.

    Raises:
        ValueError: for heads that key_heads does not divide, or a dropout that the backend cannot do.
    """

    attends_across: bool = True
    """Whether queries may belong to another sequence than the keys, as in cross-attention."""

    drops_weights: bool = False
    """Whether this backend has probabilities that can be dropped in training."""

    takes_beta: bool = False
    """Whether this backend writes by the delta rule, and wants to know how much of its error each token corrects."""

    beta: nn.Module
    """The module that computes beta from the stream, which the layer builds where `takes_beta`."""

    def __init__(
        self, *, heads: Count, key_heads: Count, dim_head: Count, dim_value: Count, layer: Whole, dropout: Share = 0.0
    ) -> None:
        super().__init__()
        if heads % key_heads:
            raise ValueError(f"heads ({heads}) must be a multiple of key_heads ({key_heads})")
        if dropout and not self.drops_weights:
            raise ValueError(
                f"dropout ({dropout}) is for backends with attention probabilities: attn=exact, chunked and flash_tiled"
            )
        self.dropout = dropout
        self.heads = heads
        self.key_heads = key_heads
        self.keys_each = [key_heads]  # of each group of heads that runs one backend: global heads, then local ones
        self.dim_head = dim_head
        self.dim_value = dim_value
        self.layer = layer

    @property
    def choice(self) -> str:
        """Return the name of the backend in `attn=`."""
        return snake_case(type(self).__name__.removesuffix("Attention"))

    @property
    def sizes(self) -> Sizes:
        """Return the sizes with which a factory builds another backend in the place of this one."""
        return {
            "heads": self.heads,
            "key_heads": self.key_heads,
            "dim_head": self.dim_head,
            "dim_value": self.dim_value,
            "layer": self.layer,
        }

    def check(self, *, causal: bool, packed: bool) -> None:
        """Refuse an order or packed documents that this backend cannot handle. Most handle both.

        Raises:
            ValueError: naming a backend or features that can.
        """

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Attend over a whole sequence.

        Args:
            q: `(b, h, i, d)`.
            k: `(b, g, j, d)`.
            v: `(b, g, j, e)`.
            causal: end-aligned: the last query stands at the last key.
            mask: `(b, j)` bool, True keeps; or integer, 1 keeps. A masked key is as if absent; a row with no key left
                gives zeros.
            segments: `(b, n)` int, contiguous and non-decreasing document ids; a token sees its own document only.
            log_decay: `(b, g, n)`, at most 0: key j weighs exp(sum of log_decay over j+1..i) at query i. Causal only.
            beta: `(b, g, n)`, from 0 to 1: the share of its error that token n corrects. Where `takes_beta` alone.

        Returns:
            `(b, h, i, e)` in the inputs' dtype.

        Raises:
            ValueError: for what this backend cannot do, naming one that can; for a mask, segments or log_decay of
                another shape or dtype.
        """

    @abstractmethod
    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> State:
        """Return the decoding state of `batch` streams before any token; `max_len` sizes caches and is no limit."""

    @abstractmethod
    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State,
        *,
        mask: Tensor | None = None,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Append n tokens causally: `(b, h, n, d), (b, g, n, d), (b, g, n, e)` -> `(b, h, n, e)` and the next state.

        `mask` is `(b, n)`, `log_decay` and `beta` `(b, g, n)`, all of the new tokens alone; n may be 0. May consume
        `state`: `fork` it first to continue one prefix in two ways.

        Raises:
            ValueError: for a mask or decay that is not of the new tokens, or a state of another batch.
        """

    @abstractmethod
    def absorb(self, k: Tensor, v: Tensor, state: State, *, mask: Tensor | None = None) -> State:
        """Append keys and values without queries, for `read`. May consume `state`."""

    @abstractmethod
    def read(self, q: Tensor, state: State) -> Tensor:
        """Attend from `q` `(b, h, i, d)` to all keys of the state, adding none: `(b, h, i, e)`.

        After `absorb` from an empty state this equals `forward(causal=False)`, where the backend `attends_across`.
        """

    @abstractmethod
    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Return the arithmetic of one sequence's forward: two operations for each multiply-add of a matrix product."""


def parts_of(module: nn.Module) -> Iterator[Attention[Any]]:
    """Yield the backends in a module, a backend among them, that are not made of others."""
    for each in module.modules():
        if isinstance(each, Attention) and not any(isinstance(child, Attention) for child in each.children()):
            yield each


def attend_at_end(attend: Callable[[Tensor], Tensor], q: Tensor, keys: int) -> Tensor:
    """Attend causally from queries `(b, h, i, d)` of another number than the keys: the last stands at the last key.

    Args:
        attend: for as many queries as keys; those that are missing in front are zeros.
        q: whose first ones, where there are more queries than keys, see nothing and give zeros.
        keys: their number.
    """
    queries = q.shape[-2]
    missing, early = max(0, keys - queries), max(0, queries - keys)
    out = attend(pad(q, (0, 0, missing, 0))[:, :, early:])
    return pad(out[:, :, missing:], (0, 0, early, 0))


AttentionFactory = Callable[..., Attention[Any]]

NO_BETA: Final = "beta is for backends that correct what they hold: take attn=delta"


def fork(state: Tree) -> Tree:
    """Copy a decoding state, so that one prefix can be continued in several ways.

    Takes any nesting of tensors, numbers, None, tuples, NamedTuples and lists.
    """
    return _map_tensors(torch.clone, state)


def select_rows(state: Tree, rows: Tensor) -> Tree:
    """Copy rows `(r,)` of a decoding state, in any order and number, into a state of r streams."""
    return _map_tensors(lambda tensor: tensor.index_select(0, rows), state)


def _map_tensors(change: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Return a nesting with each tensor changed."""
    copied: Any = tree
    if isinstance(tree, Tensor):
        copied = change(tree)
    elif isinstance(tree, tuple):
        items = [_map_tensors(change, item) for item in tree]
        copied = type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    elif isinstance(tree, list):
        copied = [_map_tensors(change, item) for item in tree]
    return copied
