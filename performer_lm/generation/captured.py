"""Steps of decoding captured as a CUDA graph: one launch for each token, where the host launches hundreds of kernels.

A graph repeats kernels with the numbers and the places in memory of its capture. So a step is captured only where a
state keeps its shapes, and all in it that is no tensor, from token to token. That is seen, not known by name: linear
attention's sums, the delta rule's memory, local windows and tails keep theirs, caches that grow do not.

Letters: `b` batch.
"""

import warnings
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from performer_lm.attention.base import fork
from performer_lm.language_model import LanguageModel
from performer_lm.performer import PerformerState
from performer_lm.wording import first_line

DEVICE: Final = "cuda"
PATIENCE: Final = 8
"""Steps of equal layout before a capture, so that few tokens never pay for one; what one costs was not timed yet."""
WARM_UPS: Final = 3  # on the capture's own stream, where libraries get ready; as many as torch's documentation takes

_refused: Final = WeakSet[LanguageModel]()  # models that go on without, and said so


class Steps:
    """Reads a token of every row at a time with a model; on CUDA by a captured step, where that can be and is right.

    Args:
        model: whose weights stay where they are in memory; they may change in place.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._captured: CapturedStep | None = None
        self._layout: Any = None  # after the last step
        self._alike = 0  # steps that left the layout as it was

    def extend(self, ids: Tensor, state: PerformerState) -> tuple[Tensor, PerformerState]:
        """Append ids `(b,)` to the streams: logits `(b, vocab)` of the next tokens, and the next state.

        May consume `state`, and the state that the last call returned even if another one is given.
        """
        may_capture = self._may_capture(ids)
        if may_capture and self._captured is not None and self._captured.takes(ids, state):
            return self._captured.extend(ids, state)
        self._captured = None
        logits, state = self._model.extend(ids[:, None], state)
        if may_capture:
            layout = _layout(ids, state)
            self._alike = self._alike + 1 if layout == self._layout else 0
            self._layout = layout
            if self._alike >= PATIENCE:
                self._captured = capture(self._model, ids, state)
        return logits[:, -1], state

    @property
    def is_captured(self) -> bool:
        """Return True if a step of the same layout as the last would be a captured one."""
        return self._captured is not None

    def _may_capture(self, ids: Tensor) -> bool:
        """Return True on CUDA, but where gradients or dropout may be wanted, or autocast holds copies of weights."""
        if ids.device.type != DEVICE or torch.is_grad_enabled() or torch.is_autocast_enabled(DEVICE):
            return False
        return not (self._model.training or self._model in _refused)


class CapturedStep:
    """A step of a model as a graph, over ids and a state of its own that have the layout of those given.

    Raises:
        RuntimeError: where the step cannot be captured.
    """

    def __init__(self, model: LanguageModel, ids: Tensor, state: PerformerState) -> None:
        self._own_layout = _layout(ids, state)
        with torch.inference_mode(False), torch.no_grad():  # what a first capture makes inside serves none outside
            self._ids, self._state = tree_map(_copy, (ids, state))
            self._replay, self._logits = record(lambda: advance(model, self._ids, self._state), ids.device)

    def takes(self, ids: Tensor, state: PerformerState) -> bool:
        """Return True if ids and a state have the layout of the capture."""
        is_own = state is self._state and ids.shape == self._ids.shape
        return is_own or _layout(ids, state) == self._own_layout

    def extend(self, ids: Tensor, state: PerformerState) -> tuple[Tensor, PerformerState]:
        """Append ids `(b,)`: logits `(b, vocab)`, and the state of the step itself; another one that is given stays."""
        self._ids.copy_(ids)
        if state is not self._state:
            for own, given in zip(_tensors(self._state), _tensors(state), strict=True):
                own.copy_(given)
        self._replay()
        return self._logits.clone(), self._state


def capture(model: LanguageModel, ids: Tensor, state: PerformerState) -> CapturedStep | None:
    """Return the step captured, if it agrees with the model's own; else say so, once for each model. `state` stays."""
    try:
        captured = CapturedStep(model, ids, state)
        apart = _measure(captured, model, ids, state)
    except RuntimeError as error:
        reason = f"failed ({type(error).__name__}: {first_line(error)})"
    else:
        if apart <= torch.finfo(model.head.weight.dtype).eps ** 0.5:  # half of the digits
            return captured
        reason = f"differs from the model's own by {apart:.2g} of the largest number"
    _refused.add(model)
    warnings.warn(f"decoding goes on without a captured step, which {reason}", stacklevel=2)
    return None


def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture a call as a graph, after calls that warm up: return the call that replays it, and where its result lies.

    Raises:
        RuntimeError: where it does what no graph can repeat, such as to wait for the device.
    """
    graph, caller, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(caller)
    try:
        with torch.cuda.stream(side):  # back to the caller's stream even after a capture that failed, as torch is not
            for _ in range(WARM_UPS):
                step()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # others may use the device
                result = step()
    finally:
        caller.wait_stream(side)
    return graph.replay, result


def advance(model: LanguageModel, ids: Tensor, state: PerformerState) -> Tensor:
    """Append ids `(b,)` to the streams, write the next state over `state`, and return logits `(b, vocab)`."""
    logits, after = model.extend(ids[:, None], state)
    places = {own.untyped_storage().data_ptr() for own in _tensors(state)}
    moved = [pair for pair in zip(_tensors(state), _tensors(after), strict=True) if not _is_in_place(*pair)]
    news = [new.clone() if new.untyped_storage().data_ptr() in places else new for _, new in moved]
    for (own, _), new in zip(moved, news, strict=True):
        own.copy_(new)
    return logits[:, -1]


def _measure(captured: CapturedStep, model: LanguageModel, ids: Tensor, state: PerformerState) -> float:
    """Return the largest difference that two steps make in logits and state, as a share of each one's largest number.

    The second step reads what the first has written. The difference is NaN where any number is.
    """
    wanted_state, found_state = fork(state), state
    apart = []
    for _ in range(2):
        wanted, wanted_state = model.extend(ids[:, None], wanted_state)
        found, found_state = captured.extend(ids, found_state)
        pairs = zip(_tensors((found, found_state)), _tensors((wanted[:, -1], wanted_state)), strict=True)
        both = [(x.double(), y.double()) for x, y in pairs if x.numel()]
        apart += [(x - y).abs().max() / y.abs().max().clamp_min(1e-30) for x, y in both]
    return float(torch.stack(apart).max())


def _layout(ids: Tensor, state: PerformerState) -> Any:
    """Return what a graph takes as given of ids and a state: shapes and dtypes, and all that is no tensor."""
    leaves, structure = tree_flatten((ids, state))
    return structure, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copy(leaf: Any) -> Any:
    return leaf.clone(memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf


def _is_in_place(own: Tensor, new: Tensor) -> bool:
    return own.data_ptr() == new.data_ptr() and own.stride() == new.stride()
