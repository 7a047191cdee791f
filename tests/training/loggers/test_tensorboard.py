from collections.abc import Callable
from pathlib import Path

import pytest

from performer_lm.training.loggers import tensorboard
from performer_lm.training.loggers.tensorboard import TensorBoard
from performer_lm.training.run import Run


def events(folder: str) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(folder, purge_orphaned_data=True)
    found.Reload()
    names = [*found.Tags()["scalars"], *found.Tags()["tensors"]]
    return {
        name: [event.step for event in (found.Scalars if "/" in name and "text" not in name else found.Tensors)(name)]
        for name in names
    }


@pytest.mark.filterwarnings("ignore")  # tensorboard's own use of numpy and protobuf
def test_it_shows_metrics_and_samples_once_after_a_resume(start: Callable[..., Run]) -> None:
    pytest.importorskip("tensorboard")
    common = ["logger=[csv,tensorboard]", "trainer.val_every=2"]
    start(*common, "run_dir=runs/a").fit()
    found = events("runs/a/tensorboard")
    assert found["train/loss"] == [1, 2, 3, 4]
    assert found["val/bpb"] == [2, 4]
    assert found["samples/text_summary"] == [2, 4]
    start(*common, "ckpt=runs/a", "trainer.max_steps=6").fit()
    found = events("runs/a/tensorboard")
    assert found["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert Path("runs/a/metrics.jsonl").exists()


def test_where_it_is_missing_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr(tensorboard.TensorBoardLogger, "__init__", refuse)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tensorboard\]'"):
        TensorBoard(save_dir=str(tmp_path))
