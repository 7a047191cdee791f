"""`evaluate.py task=hybrid`: the layers of a student whose attention is best left the teacher's.

Letters: `n` tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm import checkpoint
from performer_lm.attention.base import AttentionFactory
from performer_lm.attention.delta import DeltaAttention
from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.feature_maps import AttentionFeatures
from performer_lm.data.windows import IGNORE, FiniteWindows
from performer_lm.evaluation.base import Evaluation, Subject, spread_places
from performer_lm.evaluation.patterns import BACKENDS, Section, backend_of_layer, section_of, spell_pattern
from performer_lm.language_model import LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.objectives import NextToken, choose_chunk_size, kl_divergence
from performer_lm.ops.precision import sum_dtype
from performer_lm.ops.terms import slices
from performer_lm.ranges import Count, Fraction, ranged

NEXT: Final = NextToken(chunk_size=None)


class Apart(NamedTuple):
    """How far a model is from the teacher on a text."""

    divergence: float  # nats a token
    bits_per_byte: float


@ranged
@final
class PlanHybrid(Evaluation):
    """Restore one layer's attention at a time to the teacher's, and rank the layers by the divergence that saves.

    Prints the table, the teacher's bits per byte, the student's as it is and with its linear attention cut off, and the
    pattern that keeps a share of the layers, as it is typed, with its own score. Of a checkpoint opened with another
    backend (`ckpt=TEACHER attn=favor`) that is the error of the swap alone, no token spent.

    Args:
        teacher: run folder or checkpoint file; None for the checkpoint itself, with the backend it was trained with.
        keep: share of the layers that stay the teacher's.
        sequences: windows of text to look at.
        attn: the backend that the student was opened with; None for its own.
        hybrid: `attn=hybrid`, whose backends a pattern may name.
        features: the choices of `attn/features`, by name.
    """

    def __init__(
        self,
        *,
        teacher: str | None,
        keep: Fraction,
        sequences: Count,
        attn: AttentionFactory | None,
        hybrid: AttentionFactory,
        features: dict[str, Callable[..., AttentionFeatures]],
    ) -> None:
        self.teacher, self.keep, self.sequences = teacher, keep, sequences
        self.attn, self.features = section_of(attn), section_of(features)
        self.backends = section_of(hybrid)[BACKENDS]

    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Want a causal model, and a teacher of its shape with other backends."""
        self._open(model, folder)

    def __call__(self, subject: Subject) -> float:
        """Return the divergence of the student as it is, in nats a token."""
        student = subject.model
        assert isinstance(student, PerformerLM)
        teacher, of_teacher = self._open(student, subject.folder)
        of_student, depth = self.attn or subject.checkpoint.section["model"]["attn"], len(student.performer.layers)
        device, separator = subject.device, subject.data.separator
        windows = [x.to(device) for x in _windows(subject.data.held_out, self.sequences, subject.data.batch_size)]
        lengths = torch.from_numpy(subject.data.held_out.byte_lengths)
        teacher = teacher.to(device)

        def pattern(kept: list[int]) -> str:
            layers = [backend_of_layer(of_teacher if n in kept else of_student, n) for n in range(depth)]
            return spell_pattern(layers, backends=self.backends, features=self.features)

        count = round(self.keep * depth)
        if count:
            pattern([*range(count)])  # what has no name is refused before anything is measured
        known = read(teacher, windows, separator=separator)

        def measure(*restored: int) -> Apart:
            with with_layers(student, teacher, restored):
                return measure_apart(student, teacher, windows, known, lengths, separator=separator)

        own = measure_apart(teacher, teacher, windows, known, lengths, separator=separator)
        swapped = measure()
        with without_linear(student):
            cut = measure()
        each = [measure(layer) for layer in range(depth)]
        order = sorted(range(depth), key=lambda layer: each[layer].divergence)
        print(f"teacher                 {own.bits_per_byte:.4f} bits per byte")
        print(f"student                 {_tell(swapped)}")
        print(f"  linear part cut off   {_tell(cut)}")
        for layer in order:
            saved = swapped.divergence - each[layer].divergence
            print(f"  layer {layer:<3} restored    {_tell(each[layer])}, {saved:+.4f} saved")
        if count:
            print(f"{count:>3} of {depth} layers kept    {_tell(measure(*order[:count]))}")
            print(pattern(order[:count]))
        return swapped.divergence

    def _open(self, student: LanguageModel, folder: Path) -> tuple[PerformerLM, Section]:
        """Return the teacher, and what its checkpoint says of its attention."""
        path = checkpoint.find(str(folder) if self.teacher is None else self.teacher, key="task.teacher")
        opened = checkpoint.read(path)
        teacher, _ = checkpoint.open_model(opened)
        if not isinstance(teacher, PerformerLM) or not teacher.decodes or not isinstance(student, PerformerLM):
            raise ValueError("task=hybrid compares causal models of one stack")
        checkpoint.check_fit(student, teacher.state_dict(), source=f"task.teacher={path}")
        if not checkpoint.other_attention(student, teacher):
            raise ValueError(
                f"the model attends in all layers as task.teacher={path} does: attn=favor opens it with another "
                f"backend, task.teacher=CKPT names another teacher"
            )
        return teacher, opened.section["model"]["attn"]


@contextmanager
def with_layers(student: PerformerLM, teacher: PerformerLM, restored: tuple[int, ...]) -> Iterator[None]:
    """Give some layers of a student the teacher's attention for a while."""
    pairs = [(_layer(student, layer), _layer(teacher, layer)) for layer in restored]
    own = [mine["attention"] for mine, _ in pairs]
    try:
        for mine, theirs in pairs:
            mine["attention"] = theirs["attention"]
        yield
    finally:
        for (mine, _), attention in zip(pairs, own, strict=True):
            mine["attention"] = attention


@contextmanager
def without_linear(model: nn.Module) -> Iterator[None]:
    """Let the linear backends of a model give zeros for a while; local heads and layers of softmax go on.

    A student that loses little by it does not use them: it lives on its windows.
    """

    def silence(backend: nn.Module, given: Any, out: Tensor) -> Tensor:
        return torch.zeros_like(out)

    linear = [module for module in model.modules() if isinstance(module, FavorAttention | DeltaAttention)]
    hooks = [module.register_forward_hook(silence) for module in linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def measure_apart(
    student: PerformerLM,
    teacher: PerformerLM,
    windows: list[Tensor],
    known: list[Tensor],
    lengths: Tensor,
    *,
    separator: int | None,
) -> Apart:
    """Measure a student's divergence from the teacher, and its bits per byte.

    Args:
        student: in evaluation mode.
        teacher: of the same ids.
        windows: batches of ids, `(b, n + 1)`.
        known: of `read`, by the teacher.
        lengths: bytes of text that each id stands for.
        separator: the id that begins a document where tokens see their own document only.
    """
    divergence = nats = text = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for batch, of_teacher in zip(windows, known, strict=True):
        hidden, targets = NEXT.ask(student, batch, step=None, separator=separator)
        asked = targets != IGNORE
        hidden, told, wanted = hidden[asked], of_teacher[asked], targets[asked]
        for each in slices(len(wanted), choose_chunk_size(2 * len(wanted), vocab_size=student.head.out_features)):
            logits, theirs = student.head(hidden[each]), teacher.head(told[each])
            logits, theirs = logits.to(sum_dtype(logits)), theirs.to(sum_dtype(theirs))
            divergence = divergence + kl_divergence(theirs, logits).sum().cpu().double()
            nats = nats + F.cross_entropy(logits, wanted[each], reduction="sum").cpu().double()
        tokens, text = tokens + len(wanted), text + lengths[wanted.cpu()].sum().double()
    if not text:
        raise ValueError("the text is too short: not one token of it stands for text")
    return Apart(float(divergence) / tokens, float(nats / text) / math.log(2))


@torch.inference_mode()
def read(teacher: PerformerLM, windows: list[Tensor], *, separator: int | None) -> list[Tensor]:
    """Return the vectors `(b, n, dim)` that the teacher's output layer reads, of each batch of windows."""
    return [NEXT.ask(teacher, batch, step=None, separator=separator).hidden for batch in windows]


def _windows(windows: FiniteWindows, count: int, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of as many windows, evenly spread over the text."""
    places = spread_places(windows, count)
    for each in slices(len(places), batch_size):
        yield windows.rows(places[each])


def _layer(model: PerformerLM, layer: int) -> nn.ModuleDict:
    found = model.performer.layers[layer]
    assert isinstance(found, nn.ModuleDict)
    return found


def _tell(found: Apart) -> str:
    return f"{found.bits_per_byte:.4f} bits per byte, {found.divergence:.4f} nats a token from the teacher"
