"""Objectives that learn from a teacher, a trained model: how a softmax model becomes a Performer.

`Layerwise` teaches the attention of each layer, `Distillation` the whole model. The teacher runs beside the student,
without gradients; a checkpoint names its file and the digest of it, and holds none of its weights.
Letters: `b` batch, `n` tokens, `c` those of a chunk.
"""

import hashlib
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from performer_lm import checkpoint
from performer_lm.data.tokenizer import Tokenizer
from performer_lm.data.windows import IGNORE
from performer_lm.language_model import LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.nn.attention import MultiHeadAttention
from performer_lm.nn.branch import TokenInfo
from performer_lm.objectives import Losses, NextToken, Objective, Prediction, choose_chunk_size, kl_divergence
from performer_lm.ops.precision import sum_dtype
from performer_lm.ops.terms import slices
from performer_lm.ranges import Count, Fraction, Positive, ranged


class Taught(Objective):
    """Learn next tokens, and what a teacher knows of them; validation measures next tokens alone.

    Args:
        teacher: run folder or checkpoint file.
        chunk_size: of `Objective`.

    Raises:
        ValueError: without a teacher, or for a file that is none.
    """

    def __init__(self, *, teacher: str | None, chunk_size: Count | None) -> None:
        super().__init__(chunk_size=chunk_size)
        if teacher is None:
            raise ValueError(
                "teacher is not given: init=CKPT, which is then the teacher too, or objective.teacher=CKPT"
            )
        self._file = checkpoint.find(teacher, key="objective.teacher")
        self._next = NextToken(chunk_size=chunk_size)
        self._teacher: PerformerLM

    def check(self, model: LanguageModel, *, packed: bool, answers: bool) -> None:
        """Want a causal model without a context."""
        self._next.check(model, packed=packed, answers=answers)

    def sources(self) -> dict[str, str]:
        """Return the digest of the teacher's file."""
        with self._file.open("rb") as file:
            return {"teacher": hashlib.file_digest(file, "sha256").hexdigest()}

    def adopt(self, tokenizer: Tokenizer) -> None:
        """Open the teacher, which is to know the same ids.

        Raises:
            ValueError: for a teacher of another tokenizer, or of another objective.
        """
        opened = checkpoint.read(self._file)
        teacher, known = checkpoint.open_model(opened)
        if known.to_dict() != tokenizer.to_dict():
            raise ValueError(
                f"objective.teacher={self._file} knows other ids than the student: they need one tokenizer"
            )
        self._next.check(teacher, packed=False, answers=False)
        assert isinstance(teacher, PerformerLM)
        self._teacher = teacher.requires_grad_(False)

    def ask(self, model: PerformerLM, windows: Tensor, *, step: int | None, separator: int | None = None) -> Prediction:
        """Ask for every token but the windows' first."""
        return self._next.ask(model, windows, step=step, separator=separator)

    def _teacher_on(self, device: torch.device) -> PerformerLM:
        self._teacher = self._teacher.to(device)
        return self._teacher


@ranged
@final
class Distillation(Taught):
    """Learn the distribution of a teacher's next tokens (Hinton et al. 2015, arXiv 1503.02531), and the tokens.

    Args:
        teacher: run folder or checkpoint file.
        temperature: divides both models' logits; the divergence is weighed by its square.
        share: of the divergence in the loss; the rest is the next tokens'.
        chunk_size: of `Objective`.
    """

    def __init__(
        self, *, teacher: str | None, temperature: Positive, share: Fraction, chunk_size: Count | None
    ) -> None:
        super().__init__(teacher=teacher, chunk_size=chunk_size)
        self.temperature = temperature
        self.part = share

    def __call__(self, model: Any, windows: Tensor, *, step: int | None, separator: int | None = None) -> Losses:
        """Return the mixed losses of a training step; in validation, those of next tokens."""
        if step is None or windows.is_meta:
            return self._next(model, windows, step=step, separator=separator)
        hidden, targets = self.ask(model, windows, step=step, separator=separator)
        teacher = self._teacher_on(windows.device)
        with torch.no_grad():
            known, _ = self.ask(teacher, windows, step=step, separator=separator)
        hidden, known, wanted = hidden.flatten(0, 1), known.flatten(0, 1), targets.flatten()
        size = self.chunk_size or choose_chunk_size(2 * len(wanted), vocab_size=model.head.out_features)
        nats = [
            recomputed(
                self._losses, model.head, teacher.head, hidden[each], known[each], wanted[each], use_reentrant=False
            )
            for each in slices(len(wanted), size)
        ]
        return Losses(torch.cat(nats).reshape(targets.shape), targets)

    def _losses(self, head: nn.Linear, teacher: nn.Linear, hidden: Tensor, known: Tensor, targets: Tensor) -> Tensor:
        """Return the losses `(c,)` of the tokens whose vectors are `hidden` and, in the teacher, `known`."""
        logits, wanted = head(hidden), teacher(known)
        logits, wanted = logits.to(sum_dtype(logits)), wanted.to(sum_dtype(wanted))
        nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        divergence = self.temperature**2 * kl_divergence(wanted / self.temperature, logits / self.temperature)
        return torch.where(targets == IGNORE, 0.0, self.part * divergence + (1 - self.part) * nats)


@final
class Layerwise(Taught):
    """Let the attention of each layer learn what the teacher's gives for the same vectors; all else stays.

    Queries and keys of the layers whose attention is not the teacher's, and what their backends own, learn at once,
    each layer from the teacher's stream. The loss is the squared error over the teacher's mean square, mean over these
    layers. One layer's graph is in memory at a time: the backward computes it anew.
    """

    def join(self, model: LanguageModel) -> None:
        """Freeze all but what makes queries, keys and features in the layers that learn.

        Raises:
            ValueError: for a student of another shape than the teacher, or of the same attention in all layers.
        """
        checkpoint.check_fit(model, self._teacher.state_dict(), source=f"objective.teacher={self._file}")
        self._learning = checkpoint.other_attention(model, self._teacher)
        if not self._learning:
            raise ValueError(
                "objective=layerwise teaches another attention, and this is the teacher's: type attn=favor"
            )
        learning = [_attentions(model)[layer] for layer in self._learning]
        own = {id(parameter) for body in learning for parameter in body.backend.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in own:  # of its own a backend decides itself
                parameter.requires_grad_(False)
        for body in learning:
            heads, key_heads, _ = body.heads_each
            rows = body.project_in.out_features // sum(body.heads_each) * (heads + key_heads)
            for parameter in body.project_in.parameters():
                parameter.requires_grad_(True).register_hook(_Rows(rows))

    def __call__(self, model: Any, windows: Tensor, *, step: int | None, separator: int | None = None) -> Losses:
        """Return the layers' errors in a training step; in validation, the losses of next tokens."""
        if step is None or windows.is_meta:
            return self._next(model, windows, step=step, separator=separator)
        seen: list[Seen] = []
        teacher = self._teacher_on(windows.device)
        hooks = [_attentions(teacher)[layer].register_forward_hook(_watch(seen)) for layer in self._learning]
        try:
            with torch.no_grad():
                targets = self.ask(teacher, windows, step=step, separator=separator).targets
        finally:
            for hook in hooks:
                hook.remove()
        errors = [
            recomputed(layer_error, body, each, use_reentrant=False)
            for body, each in zip([_attentions(model)[layer] for layer in self._learning], seen, strict=True)
        ]
        return Losses(torch.where(targets == IGNORE, 0.0, torch.stack(errors).mean(0)), targets)


class Seen(NamedTuple):
    """A layer's attention at work in the teacher."""

    x: Tensor  # (b, n, dim)
    info: TokenInfo
    out: Tensor  # (b, n, dim)


def layer_error(body: MultiHeadAttention, seen: Seen) -> Tensor:
    """Return the squared error `(b, n)` of a student's attention over the mean square of the teacher's."""
    out = body(seen.x, seen.info)
    wanted = seen.out.to(sum_dtype(seen.out))
    return (out - wanted).square().mean(-1) / wanted.square().mean().clamp(min=torch.finfo(wanted.dtype).tiny)


class _Rows:
    """A hook of a parameter's gradient that keeps the first rows, of queries and keys, and clears those of values."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __call__(self, gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[self._rows :] = 0
        return kept


def _watch(seen: list[Seen]) -> Any:
    """Return a forward hook that notes what an attention was given, and what it gave."""

    def note(_: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        seen.append(Seen(given[0], given[1], out))

    return note


def _attentions(model: nn.Module) -> list[MultiHeadAttention]:
    return [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
