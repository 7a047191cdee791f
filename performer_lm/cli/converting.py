"""Convert a model of another system as a config says."""

import shlex
from pathlib import Path

from omegaconf import DictConfig

from performer_lm import checkpoint
from performer_lm.cli.errors import usage_errors
from performer_lm.interop.convert import convert, open_source
from performer_lm.training.folder import RunFolder
from performer_lm.training.report import point_latest


def write_converted(cfg: DictConfig) -> None:
    """Write the checkpoint of a converted model into a folder of its own, and print what to do with it.

    Raises:
        UsageError: for the first mistake; then nothing is written.
    """
    with usage_errors():
        if cfg.source is None:
            raise ValueError("source is not given: source=FOLDER of transformers, or source=FILE.gguf")
        content = convert(open_source(Path(cfg.source)))
        folder = RunFolder.create(Path(cfg.out), writes=True)
        try:
            path = folder.checkpoints / checkpoint.name_of(0)
            checkpoint.save(content, path)
            for name in ("best", "last"):
                checkpoint.point(folder.checkpoints / f"{name}.ckpt", path)
        finally:
            folder.release()
    point_latest(folder.path)
    weights = {id(value): value.numel() for value in content["state_dict"].values()}  # tied ones count once
    model = content["performer_lm"]["model"]
    print(f"{cfg.source}: {sum(weights.values()):,} parameters, {model['depth']} layers, {model['vocab_size']:,} ids")
    name = shlex.quote(f"ckpt={folder.path}")
    print(f'sample        python generate.py {name} prompt="The capital of France is"')
    print(f"measure       python evaluate.py {name} data=files data.path=FILE")
    print(f"train         python train.py {shlex.quote(f'init={folder.path}')} data=files data.path=FILE")
