"""The data of a run, as Lightning asks for it: windows in, loaders of micro-batches out.

A run is one Lightning epoch of `max_steps` optimizer steps, so that its position is one number.
"""

from abc import abstractmethod
from typing import Annotated, Any, Final, Literal, TypedDict, TypeVar

import lightning
import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.utils.data import DataLoader

from performer_lm.data.loader import BatchShare, RemainingIndices, TrainBatches, TrainLoader, ValidationBatches
from performer_lm.data.tokenizer import Tokenizer
from performer_lm.data.windows import FiniteWindows, Windows
from performer_lm.ranges import Count, Whole, ranged

PROMPT: Final = "def main("

AnyWindows = TypeVar("AnyWindows", bound=Windows)
StartMethod = Literal["fork", "spawn", "forkserver"]
Workers = Annotated[int, Ge(0), Le(1024)]


class WindowOptions(TypedDict):
    """The options of all data, which `WindowData` explains."""

    context: Count
    batch_size: Count
    seed: Whole
    num_workers: Workers
    start_method: StartMethod | None


@ranged
class WindowData(lightning.LightningDataModule):
    """Windows as batches `(b, context + 1)` of ids, `b` the sequences of one micro-batch; `windows.shift` cuts them.

    Args:
        context: tokens that a model sees at once.
        batch_size: sequences per optimizer step, over all ranks and accumulated micro-batches.
        seed: of the order of the windows.
        num_workers: processes that gather windows; 0 gathers in the main one.
        start_method: how those processes start; None for the platform's way.

    After `prepare()`:
        tokenizer: the Tokenizer.
        training: training's windows, without end.
        validation, held_out: windows that a run validates on, and all that were held out.
    """

    tokenizer: Tokenizer
    training: Windows
    validation: FiniteWindows
    held_out: FiniteWindows

    def __init__(
        self, *, context: Count, batch_size: Count, seed: Whole, num_workers: Workers, start_method: StartMethod | None
    ) -> None:
        super().__init__()
        self.context = context
        self.batch_size = batch_size
        self._seed = seed
        self._num_workers = num_workers
        self._start_method = start_method

    @abstractmethod
    def prepare(self) -> None:
        """Make tokenizer and windows; a second call changes nothing.

        Raises:
            ValueError: in one line, for data that are missing, broken or too few.
        """

    def prepare_held_out(self, *, whole: bool) -> None:
        """Make tokenizer and `held_out`, to measure and not to train: there may be no text to train on.

        Args:
            whole: whether all text is held out, of corpora that give some for validation all of that; else what is
                held out of a training run.

        Raises:
            ValueError: in one line, for data that are missing or broken, or that are never held out whole.
        """
        self.prepare()

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return plain data that two runs share exactly when they see the same batches."""

    @property
    def is_packed(self) -> bool:
        """Whether windows hold several documents, of which a token sees only its own."""
        return False

    @property
    def separator(self) -> int | None:
        """The id at which tokens begin to see another document (`segments_of`); None where they see all."""
        return self.tokenizer.end_id if self.is_packed else None

    @property
    def has_answers(self) -> bool:
        """Whether the targets of a window are answers, right or wrong, so that accuracy means something."""
        return self.counted < 1

    @property
    def counted(self) -> float:
        """The share of a window's tokens that count."""
        return 1.0

    @property
    def prompt(self) -> str:
        """The first prompt for a trained model; empty where the tokenizer cannot write it."""
        try:
            self.tokenizer.encode(PROMPT)
        except ValueError:
            return ""
        return PROMPT

    def setup(self, stage: str) -> None:
        """Prepare data for a trainer that was given data nobody prepared."""
        self.prepare()

    def share(self, trainer: lightning.Trainer) -> BatchShare:
        """Return the part of every batch that this process of a trainer takes; no data need be prepared for it.

        Raises:
            ValueError: if the trainer has no `max_steps`, or the batch does not divide over ranks and accumulation.
        """
        if trainer.max_steps < 0:
            raise ValueError(f"trainer.max_steps ({trainer.max_steps}) must be at least 0: it is the length of a run")
        share = BatchShare(
            batch_size=self.batch_size,
            accumulation=trainer.accumulate_grad_batches,
            ranks=trainer.world_size,
            rank=trainer.global_rank,
        )
        share.check()
        return share

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the micro-batches of a whole run on this rank."""
        trainer = self.fitting_trainer()
        share = self.share(trainer)
        windows = self.where_gathered(self.training)
        return TrainLoader(
            TrainBatches(windows, share, steps=trainer.max_steps),
            accumulation=share.accumulation,
            done=lambda: trainer.fit_loop.epoch_loop.batch_progress.current.state_dict()["processed"],
            num_workers=self._num_workers,
            start_method=self._start_method,
            pin_memory=self.pins_memory and windows is self.training,  # only what lies on the host can be pinned
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the validation windows of this rank, in micro-batches of the size of training's."""
        windows = self.where_gathered(self.validation)
        batches = ValidationBatches(windows, self.share(self.fitting_trainer()))
        return DataLoader(
            batches,
            batch_size=None,
            sampler=RemainingIndices(batches),
            generator=torch.Generator(),
            pin_memory=self.pins_memory and windows is self.validation,
        )

    def fitting_trainer(self) -> lightning.Trainer:
        """Return the trainer that batches are cut for."""
        assert self.trainer, "batches are cut for a trainer: pass this module to one"
        return self.trainer

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        device: torch.device = self.fitting_trainer().strategy.root_device
        return device

    @property
    def pins_memory(self) -> bool:
        """Whether batches that are gathered on the host lie where an accelerator can fetch them from by itself."""
        return self.device.type == "cuda"

    def where_gathered(self, windows: AnyWindows) -> AnyWindows:
        """Return the windows where this module wants them gathered."""
        return windows
