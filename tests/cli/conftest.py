"""A small config tree for the command line's tests."""

import textwrap
from pathlib import Path

import pytest

TREE = {
    "train.yaml": """
        defaults: [_self_, model: small, attn: favor, optimizer: adamw, optional debug: null,
                   override hydra/job_logging: disabled, override hydra/hydra_logging: disabled]
        seed: 0
        ckpt: null
        prompt: ""
        data: {_target_: torch.optim.SGD, _partial_: true, lr: 1.0}
        hydra:
          run: {dir: out/run}
          sweep: {dir: out/sweep}
        """,
    "model/small.yaml": """
        _target_: torch.optim.Adam
        _partial_: true
        lr: 0.1
        eps: ${optimizer.lr}
        """,
    "attn/favor.yaml": "{_target_: torch.optim.SGD, _partial_: true, momentum: 0.1}",
    "attn/flash.yaml": "{_target_: torch.optim.SGD, _partial_: true, nesterov: true}",
    "attn/exact.yaml": "{_target_: torch.optim.SGD, _partial_: true}",
    "optimizer/adamw.yaml": "{_target_: torch.optim.AdamW, _partial_: true, lr: 1e-3, betas: [0.9, 0.95]}",
    "debug/fast.yaml": "# @package _global_\nseed: 7\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Write the config tree and return its folder."""
    for name, text in TREE.items():
        file = tmp_path / "configs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return tmp_path / "configs"
