"""Make every test run offline, quiet and repeatable; build small models of every kind, and name small targets."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
if not os.path.exists("/dev/nvidiactl"):  # read when kernels are defined, and torch may import triton
    os.environ["TRITON_INTERPRET"] = "1"

import importlib.util
import runpy
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, settings
from omegaconf import OmegaConf
from torch import nn

from performer_lm import checkpoint
from performer_lm.model import PerformerLM

settings.register_profile(
    "laws", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("laws")

ROOT = Path(__file__).parents[1]
CONFIGS = str(ROOT / "configs")
spec = importlib.util.spec_from_file_location("composing", ROOT / "tests" / "composing.py")
assert spec is not None
assert spec.loader is not None
composing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(composing)
composing.compose_once(CONFIGS)

TINY = ["model.dim=32", "model.depth=2", "model.heads=4", "model.dim_head=8", "model.local.window=5"]


class Base:
    """Something a config may ask for."""


class Part(Base):
    def __init__(self, *, size: int, scale: float = 1.0) -> None:
        if size < 0:
            raise ValueError(f"size must be at least 0, got {size}")
        if size > 8:
            raise ValueError("size is too large")
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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def lines() -> str:
    """Return 1500 lines that are easy to learn and none the same."""
    return "".join(f"line {index} says {index * 37 % 101}\n" for index in range(1500))


@pytest.fixture
def text(invoke: Callable[..., tuple[int, str, str]], lines: str) -> None:
    """Put `text.txt` into the folder that scripts run in."""
    Path("text.txt").write_text(lines)


@pytest.fixture
def pictures() -> None:
    """Have the runs of `invoke` draw `metrics.png`, which takes longer than they train."""


@pytest.fixture
def invoke(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Return a function that runs a script of the project in this process, in an empty folder.

    It takes the command line's words and returns exit code, output and errors. A process of its own would take seconds
    to import what is here already. Runs draw nothing but for tests that take `pictures`.
    """
    monkeypatch.chdir(tmp_path)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("performer_lm.training.loggers.record.draw_metrics", lambda *arguments, **options: None)

    def run(*arguments: str, script: str = "train.py") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        out, err = capfd.readouterr()
        return int(exit_.value.code or 0), out, err

    yield run
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def kept_runs() -> dict[tuple[str, ...], tuple[Path, tuple[int, str, str]]]:
    """Return the folders that `trained` copies, and what was told, by command line."""
    return {}


@pytest.fixture
def trained(
    invoke: Callable[..., tuple[int, str, str]],
    text: None,
    tmp_path_factory: pytest.TempPathFactory,
    kept_runs: dict[tuple[str, ...], tuple[Path, tuple[int, str, str]]],
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that leaves and returns what `train.py` would on `text.txt`, and trains each run only once."""

    def run(*words: str) -> tuple[int, str, str]:
        here = Path.cwd()
        if words not in kept_runs:
            folder = tmp_path_factory.mktemp("trained")
            shutil.copy("text.txt", folder)
            os.chdir(folder)
            try:
                kept_runs[words] = folder, invoke(*words)
            finally:
                os.chdir(here)
        folder, told = kept_runs[words]
        Path("runs/latest").unlink(missing_ok=True)
        shutil.copytree(folder, here, symlinks=True, dirs_exist_ok=True)
        return told

    return run


@pytest.fixture(scope="session")
def model_section() -> Callable[..., dict[str, Any]]:
    """Return a function from config overrides to the plain section of a tiny model."""

    def compose_section(*overrides: str, vocab_size: int = 40, tiny: list[str] = TINY) -> dict[str, Any]:
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            cfg = compose("train", overrides=[*tiny, "data.context=64", *overrides])
        section: Any = OmegaConf.to_container(cfg.model, resolve=True)
        return {**section, "vocab_size": vocab_size}

    return compose_section


@pytest.fixture(scope="session")
def lively_model(model_section: Callable[..., dict[str, Any]]) -> Callable[..., PerformerLM]:
    """Return a function from config overrides to a tiny float64 model in which every weight does something."""

    def build(*overrides: str, vocab_size: int = 40) -> PerformerLM:
        model: PerformerLM = checkpoint.build(model_section(*overrides, vocab_size=vocab_size))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.3, generator=generator)
        return model.double().eval()

    return build
