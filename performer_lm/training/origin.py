"""What a run begins with: nothing, the weights that `init=` gives, or the checkpoint that it goes on from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, open_dict
from torch.optim import Optimizer

from performer_lm import checkpoint
from performer_lm.building import TARGET
from performer_lm.checkpoint import Checkpoint
from performer_lm.checkpoint.backend import typed_paths
from performer_lm.language_model import LanguageModel
from performer_lm.training.carrying import carry_over
from performer_lm.training.choosing import AUTO, open_last, open_named, open_newest
from performer_lm.training.folder import RunFolder
from performer_lm.training.given import load_given, open_given, take_model
from performer_lm.training.restoring import check_state
from performer_lm.training.resume import check_resumed, forget_best, keep_former_defaults, share_out_anew
from performer_lm.training.run import plain
from performer_lm.training.task import LanguageModelTask


class Origin:
    """The beginning of a run, which is asked for each part of it in turn, cheapest first.

    Args:
        cfg: of the run; its model becomes the one that the run goes on with.
        overrides: that were typed.
        wanted: the run's folder, as the config names it.

    Raises:
        ValueError: for a checkpoint that does not open.
    """

    resumed: Checkpoint | None = None
    given: Checkpoint | None = None
    """Whose model and tokenizer the run has: with `init=`, of the checkpoint that it goes on from, if there is one."""

    def __init__(self, cfg: DictConfig, *, overrides: Sequence[str], wanted: Path) -> None:
        self.cfg, self.wanted = cfg, wanted
        self.notes: list[str] = []
        self.is_named = any(override.startswith("run_dir=") for override in overrides)
        self._typed = typed_paths(overrides, "model", "attn")
        if cfg.ckpt == AUTO and self.is_named:
            self.resumed, self.notes = open_last(wanted)
        elif cfg.ckpt not in (None, AUTO):
            self.resumed = open_named(cfg.ckpt)
        if cfg.init is not None:
            self.given = self.resumed or open_given(cfg.init)
            take_model(cfg, self.given, overrides=overrides)
        self._keep_former_defaults()

    def settle(self, section: dict[str, Any], *, max_steps: int) -> None:
        """Find the run that `ckpt=auto` goes on with, and hold a run's section of its checkpoints against the resumed.

        Raises:
            ValueError: for another run than the one that the checkpoint is of.
        """
        if self.cfg.ckpt == AUTO and not self.is_named:
            self.resumed, self.notes = open_newest(section, self.cfg, typed=self._typed)
            self._keep_former_defaults()
        if self.resumed:
            section["model"] = {**plain(self.cfg.model), "vocab_size": section["model"]["vocab_size"]}
            section["init"] = self.resumed.section.get("init")
            self.notes += check_resumed(self.resumed, section, max_steps=max_steps, allow=self.cfg.resume.allow)

    def load(self, model: LanguageModel, optimizer: Callable[..., Optimizer], section: dict[str, Any]) -> None:
        """Load given weights into the model, or fit the checkpoint to a run whose model or optimizer changes.

        Raises:
            ValueError: for a weight that does not fit.
        """
        if self.resumed:
            self.notes += carry_over(self.resumed, model, optimizer, section, is_allowed=bool(self.cfg.resume.allow))
        elif self.given:
            self.notes += load_given(model, self.given)

    def restore(self, trainer: Trainer, task: LanguageModelTask) -> None:
        """Check the checkpoint's training state, and make it one of this run.

        Raises:
            ValueError: for a state that is not of the kind of the run's own.
        """
        if self.resumed:
            check_state(self.resumed, trainer, task, optimizer=not self.cfg.resume.allow)
            self.notes += forget_best(self.resumed, task.section)
            share_out_anew(self.resumed.content, accumulation=trainer.accumulate_grad_batches)

    def take_folder(self, *, writes: bool) -> RunFolder:
        """Return the folder to resume in, or a new one; `ckpt=auto` always takes the one that is named."""
        if self.resumed:
            return RunFolder(checkpoint.holder(self.resumed.path), writes=writes)
        if self.cfg.ckpt == AUTO and self.is_named:
            return RunFolder.take(self.wanted, writes=writes)
        return RunFolder.create(self.wanted, writes=writes)

    def _keep_former_defaults(self) -> None:
        """Set the config's options to those of the version that the resumed run began with, where that had others."""
        if self.resumed is None:
            return
        saved = self.resumed.section["model"]
        sections = {name: plain(self.cfg[name]) for name in ("model", "attn")}
        now = sections["attn"].get(TARGET)
        keep_former_defaults(sections, {"model": saved, "attn": _attn_of(saved)}, typed=self._typed)
        if sections["attn"].get(TARGET) != now:
            self.notes.append("goes on with attn=favor, the default of earlier versions; type attn= for another run")
        with open_dict(self.cfg):
            for name, section in sections.items():
                if section != plain(self.cfg[name]):
                    self.cfg[name] = section


def _attn_of(model: dict[str, Any]) -> dict[str, Any]:
    """Return the backend's section of a model, or of the first of its stacks."""
    found = (each.get("attn") for each in (model, *model.values()) if isinstance(each, dict))
    return next((attn for attn in found if isinstance(attn, dict)), {})
