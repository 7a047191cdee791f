"""A small config tree, a small entry point, and a module of targets for the command line's tests."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest


class Base:
    """Something a config may ask for."""


class Part(Base):
    def __init__(self, *, size: int, scale: float = 1.0) -> None:
        self.size = size
        self.scale = scale


class Whole:
    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int = 2,
        name: str = "x",
        kind: Literal["fast", "slow"] = "fast",
        flag: bool = False,
        window: int | None = None,
        sizes: list[int] | None = None,
        rates: tuple[float, float] = (0.0, 1.0),
        part: Base | None = None,
        parts: dict[str, Base] | None = None,
        make_part: Callable[..., Base] | None = None,
        untyped=None,
    ) -> None:
        if dim % heads:
            raise ValueError(f"dim ({dim}) must be a multiple of heads ({heads})")
        self.dim = dim


def takes_anything(first: int, **options: Any) -> None:
    """Accept keys that the signature does not name."""


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put the targets above where a config may name them: `performer_lm.sample`."""
    import performer_lm

    module = ModuleType("performer_lm.sample")
    for target in (Base, Part, Whole, takes_anything):
        monkeypatch.setattr(target, "__module__", module.__name__)
        setattr(module, target.__name__, target)
    module.borrowed = textwrap.dedent  # an import of the module's own, defined elsewhere
    module.number = 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(performer_lm, "sample", module, raising=False)
    return module


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
