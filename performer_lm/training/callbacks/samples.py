"""Samples of the model while it learns."""

import logging
import re
from pathlib import Path
from typing import cast

from lightning.pytorch import LightningModule, Trainer

from performer_lm.generation.sampling import Sampler
from performer_lm.generation.session import stream_text
from performer_lm.ranges import Count, NotNegative, ranged
from performer_lm.training.callbacks.base import RunCallback, TrainingTask
from performer_lm.training.loggers.base import RunLogger
from performer_lm.training.report import spared
from performer_lm.writing import append_text, replace_text

log = logging.getLogger("performer_lm")
_TITLE = re.compile(r"^=== sample at step (\d{1,18}) ===$", re.MULTILINE)


@ranged
class Samples(RunCallback):
    """Print a sample at every validation; keep all in `samples.txt` and in the loggers that take text.

    Samples have a generator of their own and change nothing in the run. A prompt that the tokenizer cannot write is
    left out.
    """

    def __init__(
        self, *, prompt: str, max_new_tokens: Count, temperature: NotNegative, top_k: Count | None, seed: int
    ) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.sampler = Sampler(temperature=temperature, top_k=top_k)
        self.seed = seed

    @property
    def file(self) -> Path:
        return self.run.folder / "samples.txt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop samples of later steps than the restored one, and check that the prompt can be encoded."""
        if trainer.is_global_zero and self.file.exists():
            with self.file.open(encoding="utf-8", errors="replace", newline="") as file:
                written = file.read()
            replace_text(self.file, cut(written, step=trainer.global_step))
        try:
            self.run.tokenizer.encode(self.prompt)
        except ValueError as error:
            log.info("samples begin with nothing, for their prompt %r cannot be written: %s", self.prompt, error)
            self.prompt = ""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompt with the model that validation runs, if the model decodes; on the first rank only."""
        model = cast(TrainingTask, pl_module).measured
        if not (trainer.is_global_zero and model.decodes):
            return
        left = model.room_after(max(1, len(self.run.tokenizer.encode(self.prompt))))  # where learned positions end
        length = self.max_new_tokens if left is None else min(self.max_new_tokens, left)
        if length < 1:
            return
        pieces = stream_text(
            model, self.run.tokenizer, self.prompt, max_new_tokens=length, sampler=self.sampler, seed=self.seed
        )
        continuation = "".join(pieces)
        title = f"sample at step {trainer.global_step}"
        log.info("--- %s ---\n%s%s\n%s", title, self.prompt, continuation, "-" * (len(title) + 8))
        with spared("samples.txt"):
            append_text(self.file, f"=== {title} ===\n{self.prompt}{continuation}\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_sample(self.prompt, continuation, step=trainer.global_step)


def cut(written: str, *, step: int) -> str:
    """Return the samples of a `samples.txt` up to `step`."""
    later = (found for found in _TITLE.finditer(written) if int(found[1]) > step)
    return written[: next((found.start() for found in later), len(written))]
