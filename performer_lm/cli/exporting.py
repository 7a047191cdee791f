"""Export as a config says: a folder for transformers, and the same on the hub where that is asked for."""

import re
from pathlib import Path

from omegaconf import DictConfig

from performer_lm import checkpoint
from performer_lm.checkpoint import Checkpoint
from performer_lm.cli.errors import usage_errors
from performer_lm.cli.run_data import read_data_section
from performer_lm.interop.export.card import Training
from performer_lm.interop.export.folder import check_place
from performer_lm.interop.export.folder import export as write_folder


def export(cfg: DictConfig) -> None:
    """Write the folder that a config asks for, and print its name.

    Raises:
        UsageError: for the first mistake, before anything is written.
    """
    with usage_errors():
        if cfg.push != (cfg.repo is not None):
            raise ValueError("push=true and repo=NAME/MODEL go together: give both or none")
        out = Path(cfg.out)
        check_place(out)
        opened = checkpoint.read(checkpoint.find(cfg.ckpt or "latest"))
        model, tokenizer = checkpoint.open_model(opened)
        config = write_folder(model, tokenizer, opened.section["model"], out, training=_training_of(opened))
    code = ", trust_remote_code=True" if "auto_map" in config else ""
    print(f'{out}: AutoModelForCausalLM.from_pretrained("{out}"{code}) opens a {config["architectures"][0]}')
    if cfg.push:
        with usage_errors():
            print(push(out, repo=cfg.repo, private=cfg.private))


def push(folder: Path, *, repo: str, private: bool) -> str:
    """Send a folder to the hub by its own client, and return the address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repo, private=private, exist_ok=True)
    return str(hub.upload_folder(folder_path=folder, repo_id=repo))


def _training_of(opened: Checkpoint) -> Training:
    """Return what the checkpoint and its run's folder tell of the training."""
    path = opened.path.resolve()
    config = checkpoint.holder(path) / "config.yaml"
    scored = re.search(r"-val_bpb=(\d+\.\d+)\.ckpt$", path.name)
    return Training(
        steps=int(opened.content.get("global_step", 0)),
        data=read_data_section(config) if config.is_file() else None,
        bits_per_byte=float(scored[1]) if scored else None,
    )
