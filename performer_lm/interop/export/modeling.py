"""A causal language model of performer-lm as transformers knows models: config, model, decoding state.

Letters: `b` batch, `n` tokens.
"""

import importlib
from collections.abc import Callable
from dataclasses import fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from performer_lm.attention.base import select_rows
from performer_lm.building import build
from performer_lm.model import PerformerLM
from performer_lm.ops.checks import check_mask
from performer_lm.performer import PerformerState

PACKAGE = build.__module__.rpartition(".")[0]
# transformers 5.24 calls `cache` what was `past_key_values` before
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))


class PerformerConfig(PreTrainedConfig):
    """The config of a model: `performer` is the section that performer-lm builds, the rest is derived from it."""

    model_type = "performer_lm"

    performer: dict[str, Any] | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int | None = None
    num_attention_heads: int = 0
    max_position_embeddings: int | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False


class StateLayer(CacheLayerMixin):
    """The decoding state of one layer, of whatever its heads run, as a layer of transformers' cache."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.state: Any = None  # the tokens of each stream, and the states of the layer's branches
        self.tokens = 0

    def put(self, state: Any, *, more: int) -> None:
        """Take the state after `more` tokens."""
        self.state, self.tokens, self.is_initialized = state, self.tokens + more, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the model makes the first state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values: a state takes in tokens through the model alone."""
        raise NotImplementedError("the state of a Performer is changed by the model's forward alone")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens a mask tells of, and from which on."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens that were read, pads among them."""
        return self.tokens

    def get_max_length(self) -> int:
        """Return -1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.tokens, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the last tokens: their sum with the others is all that is held."""
        if tokens_to_remove:
            raise NotImplementedError("the state of a Performer cannot be cropped: read the text again")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the streams of other beams."""
        if self.state is not None:
            self.state = select_rows(self.state, beam_idx.to(self.state[0].device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these streams."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each stream so many times."""
        if self.state is not None:
            length = self.state[0]
            self.reorder_cache(torch.arange(len(length), device=length.device).repeat_interleave(repeats))

    def offload(self) -> None:
        """Stay on the device: a state is small."""

    def prefetch(self) -> None:
        """Stay on the device."""


class PerformerForCausalLM(PreTrainedModel, GenerationMixin):
    """A Performer that predicts the next token, and whose cache is a state of its own in each layer."""

    config_class = PerformerConfig
    base_model_prefix = "model"
    _is_stateful = True  # a state cannot go back, as assisted generation would have it
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ("mean_square",)

    model: PerformerLM

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        if config.performer is None:
            raise ValueError("the config has no section `performer`: export.py of performer-lm writes it")
        self.model = build({**config.performer, "vocab_size": config.vocab_size}, find=find_class)
        for module in self.modules():
            module._non_persistent_buffers_set.clear()  # all come from the file
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as their constructors made them."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Let `generate` ask a cache for its length before the first forward."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if model_kwargs.get(CACHE) is not None:
            self._layers_of(model_kwargs[CACHE])

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Set the embedding of tokens."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Set the output layer."""
        self.model.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict tokens: ids `(b, n)` to logits `(b, n, vocab)`.

        Args:
            input_ids: `(b, n)`, with a cache those that it has not seen.
            attention_mask: `(b, n)`, with a cache of what it has seen too: 0 at padding, which stands left where a
                cache is kept.
            position_ids: follow from the mask; not looked at.
            cache: of an earlier call; changed in place.
            past_key_values: the older name of cache.
            inputs_embeds: not taken.
            labels: `(b, n)` ids, -100 where there is nothing to predict; shifted here.
            use_cache: whether to make a cache where none is given; by default not.
            logits_to_keep: of the last so many tokens, 0 for all; or of the tokens of these indices.
            kwargs: of the loss.

        Raises:
            ValueError: for vectors in place of ids, a mask that fits neither, or a cache of another model.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a Performer reads input_ids, and no inputs_embeds")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        if cache is None:
            x = self.model.hidden(input_ids, mask=find_padding(attention_mask, input_ids))
        else:
            x = self._extend(input_ids, attention_mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _extend(self, tokens: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Read tokens `(b, n)` after those of a cache, and return the vectors `(b, n, dim)`."""
        layers = self._layers_of(cache)
        mask = find_padding(None if mask is None else mask[:, -tokens.shape[1] :], tokens)
        if layers[0].state is None:
            mask = self.model.check_prompt(tokens, mask)
            state = self.model.init_state(len(tokens))
        else:
            state = PerformerState(layers[0].state[0], tuple(chain(*(layer.state[1] for layer in layers))))
        performer = self.model.performer
        x, state = performer.extend(self.model.embedding(tokens), state, mask=mask)
        each = len(state.branches) // len(layers)
        for index, layer in enumerate(layers):
            branches = state.branches[index * each : (index + 1) * each]
            layer.put((state.length, branches), more=tokens.shape[1])
        return x

    def _layers_of(self, cache: Any) -> list[StateLayer]:
        """Return the layers of a cache, which become ours where they are empty."""
        if not all(isinstance(layer, StateLayer) for layer in cache.layers) or not cache.layers:
            if not isinstance(cache, DynamicCache):
                raise ValueError(
                    f"a Performer keeps its state in a DynamicCache, not in a {type(cache).__name__}: "
                    "leave cache_implementation out"
                )
            if any(getattr(layer, "keys", None) is not None for layer in cache.layers):
                raise ValueError("the cache holds keys of another model")
            cache.layers = [StateLayer() for _ in self.model.performer.layers]
        return cache.layers


def find_padding(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Return the mask of tokens `(b, n)` as bool, or None where nothing is padding; a compiler is not asked for values.

    Raises:
        ValueError: for a mask that is not of these tokens.
    """
    mask = check_mask(mask, tokens.shape, name="attention_mask")
    if mask is None or torch.compiler.is_compiling() or mask.is_meta:
        return mask
    return None if bool(mask.all()) else mask


def find_class(name: str) -> Callable[..., Any]:
    """Return the class of a layer or model by the name that performer-lm has for it.

    Raises:
        ValueError: for a name of anything else.
    """
    module, _, attribute = name.rpartition(".")
    module = PACKAGE + module.removeprefix("performer_lm")
    found = getattr(importlib.import_module(module), attribute, None) if module.startswith(PACKAGE + ".") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == module):
        raise ValueError(f"{name!r} is no layer or model of performer-lm")
    return found
