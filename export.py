"""Write a trained model as a folder of Hugging Face: `python export.py ckpt=runs/latest out=DIR`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import main, usage_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from performer_lm.checkpoint import Checkpoint
    from performer_lm.interop.export.card import Training


def run(cfg: "DictConfig") -> None:
    """Write the folder, and send it to the hub where that is asked for."""
    from performer_lm import checkpoint
    from performer_lm.interop.export.folder import check_place, export

    with usage_errors():
        if cfg.push != (cfg.repo is not None):
            raise ValueError("push=true and repo=NAME/MODEL go together: give both or none")
        out = Path(cfg.out)
        check_place(out)
        opened = checkpoint.read(checkpoint.find(cfg.ckpt or "latest"))
        model, tokenizer = checkpoint.open_model(opened)
        config = export(model, tokenizer, opened.section["model"], out, training=training_of(opened))
    code = ", trust_remote_code=True" if "auto_map" in config else ""
    print(f'{out}: AutoModelForCausalLM.from_pretrained("{out}"{code}) opens a {config["architectures"][0]}')
    if cfg.push:
        with usage_errors():
            print(push(out, repo=cfg.repo, private=cfg.private))


def training_of(opened: "Checkpoint") -> "Training":
    """Return what a checkpoint and its run's folder tell of its training."""
    from performer_lm import checkpoint
    from performer_lm.data.run_config import read_data_section
    from performer_lm.interop.export.card import Training

    path = opened.path.resolve()
    config = checkpoint.holder(path) / "config.yaml"
    scored = re.search(r"-val_bpb=(\d+\.\d+)\.ckpt$", path.name)
    return Training(
        steps=int(opened.content.get("global_step", 0)),
        data=read_data_section(config) if config.is_file() else None,
        bits_per_byte=float(scored[1]) if scored else None,
    )


def push(folder: Path, *, repo: str, private: bool) -> str:
    """Send a folder to the hub by its own client, and return the address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repo, private=private, exist_ok=True)
    return str(hub.upload_folder(folder_path=folder, repo_id=repo))


if __name__ == "__main__":
    main(
        run,
        config_name="export",
        config_path=Path(__file__).parent / "configs",
        keys={"ckpt": str, "out": str, "push": bool, "repo": str | None, "private": bool},
    )
