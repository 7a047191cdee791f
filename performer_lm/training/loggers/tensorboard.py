"""TensorBoard beside the run's own record."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from performer_lm.training.loggers.base import RunLogger
from performer_lm.training.report import spared


class TensorBoard(TensorBoardLogger, RunLogger):
    """Write event files below `<save_dir>/tensorboard`: `tensorboard --logdir runs`.

    Raises:
        ValueError: where TensorBoard is not installed.
    """

    def __init__(self, *, save_dir: str) -> None:
        try:
            super().__init__(save_dir, name="tensorboard", version="", default_hp_metric=False)
        except ModuleNotFoundError as error:
            raise ValueError("logger=tensorboard needs TensorBoard: pip install -e '.[tensorboard]'") from error

    @rank_zero_only
    def begin(self, folder: Path, *, step: int) -> None:
        """Let TensorBoard hide logs of an earlier process after `step`."""
        if step:
            self._kwargs["purge_step"] = step + 1

    @rank_zero_only
    def log_sample(self, prompt: str, continuation: str, *, step: int) -> None:
        lines = f"{prompt}{continuation}".splitlines()
        self.experiment.add_text("samples", "\n".join(f"    {line}" for line in lines), step)  # markdown for verbatim

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with spared("the end of TensorBoard's files"):
            super().finalize(status)
