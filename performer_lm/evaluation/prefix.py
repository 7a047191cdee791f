"""`evaluate.py task=prefix`: whether generation's logits, token by token, are those of a forward over the whole text.

Letters: `b` batch, `n` tokens.
"""

from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from performer_lm.evaluation.base import Evaluation, Subject, check_next_token, pick_windows
from performer_lm.generation.captured import Steps
from performer_lm.generation.decode import read
from performer_lm.language_model import LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.objectives import shift
from performer_lm.ranges import Count, NotNegative, ranged


class Difference(NamedTuple):
    """Where the logits of generation are farthest from those of a forward, and how far."""

    row: int
    position: int
    token: int
    forward: float
    generated: float
    agreeing: float  # share of the positions at which both think the same token likeliest

    @property
    def size(self) -> float:
        """Return the absolute difference."""
        return abs(self.forward - self.generated)


@ranged
@final
class ComparePrefix(Evaluation):
    """Print the largest difference between the logits of a forward and those of generation, and where it stands.

    Ends with exit code 1 where that is above `tolerance`: generation then goes on from another text than it was given.

    Args:
        windows: of held-out text to look at.
        tolerance: the largest difference that rounding may make.
    """

    def __init__(self, *, windows: Count, tolerance: NotNegative) -> None:
        self.windows, self.tolerance = windows, tolerance

    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Want a model that predicts each next token."""
        check_next_token(model, "task=prefix")

    def __call__(self, subject: Subject) -> float:
        """Return the largest difference.

        Raises:
            SystemExit: in one line, where it is above the tolerance, or no number.
        """
        model = check_next_token(subject.model, "task=prefix")
        tokens = shift(pick_windows(subject.data.held_out, self.windows))[0].to(subject.device)
        found = compare_prefix(model, tokens)
        rows, length = tokens.shape
        place = f"at token {found.position} of window {found.row}"
        print(f"{rows} windows of {length} tokens, read at once and one token at a time")
        print(f"the same token is likeliest at {found.agreeing:.2%} of the positions")
        print(
            f"largest difference of logits {found.size:.3g}, {place}: of id {found.token}, {found.forward:.6g} by the "
            f"forward and {found.generated:.6g} by generation"
        )
        if not found.size <= self.tolerance:
            raise SystemExit(
                f"error: generation differs from the forward by {found.size:.3g} {place}, above task.tolerance "
                f"({self.tolerance:g})"
            )
        return found.size


@torch.inference_mode()
def compare_prefix(model: PerformerLM, tokens: Tensor) -> Difference:
    """Return where logits of a forward over tokens `(b, n)` and those of decoding them one by one differ most.

    A difference that is no number counts as the largest.
    """
    forward = model(tokens)
    prefix = read(model, tokens[:, :1], max_new_tokens=0)
    logits, state, steps = prefix.logits, prefix.state, Steps(model)
    largest, found, same = -1.0, (0, 0, 0, 0.0, 0.0), 0
    for position in range(tokens.shape[1]):
        if position:
            logits, state = steps.extend(tokens[:, position], state)
        whole = forward[:, position]
        same += int((whole.argmax(-1) == logits.argmax(-1)).sum())
        gaps = (whole - logits).abs().nan_to_num(nan=torch.inf).flatten()
        place = int(gaps.argmax())
        if float(gaps[place]) > largest:
            largest = float(gaps[place])
            row, token = divmod(place, logits.shape[1])
            found = (row, position, token, float(whole[row, token]), float(logits[row, token]))
    return Difference(*found, agreeing=same / tokens.numel())
