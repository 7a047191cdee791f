"""Take over a model of transformers or llama.cpp: `python convert.py source=FOLDER_OR_GGUF [out=runs/NAME]`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import main, usage_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> None:
    """Write the model and the tokenizer of the source into a run folder, and print what to do with it."""
    from performer_lm import checkpoint
    from performer_lm.interop.convert import convert, open_source
    from performer_lm.training.folder import RunFolder
    from performer_lm.training.report import point_latest

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


if __name__ == "__main__":
    main(
        run,
        config_name="convert",
        config_path=Path(__file__).parent / "configs",
        keys={"source": str | None, "out": str},
    )
