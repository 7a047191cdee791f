"""Which names a config may build, and nothing else.

`_target_` names any importable object, so a config could run any installed code. A name is taken only if it is one
attribute of a module below `ALLOWED`, and the object itself was defined there: a path that walks through a module's
own imports (`performer_lm.checkpoint.shutil.copy`) leads nowhere. Names outside are refused before anything of theirs
is imported.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from performer_lm.cli.errors import did_you_mean

ALLOWED = (
    "performer_lm",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.trainer",
)
# Of this package too, what reads, writes and deletes files is not for configs to call.
REFUSED = ("performer_lm.checkpoint", "performer_lm.cli", "performer_lm.interop", "performer_lm.training.folder")
TRAINERS = ("lightning.Trainer", "lightning.pytorch.Trainer")

# Hydra builds its launcher, sweeper, callbacks and log handlers itself, from its own part of the config.
HYDRA_ALLOWED = (
    "hydra._internal.core_plugins",
    "hydra.experimental.callbacks",
    "hydra_plugins",
    "optuna.samplers",  # of hydra/sweeper=optuna
    "performer_lm",
)
LOG_MODULES = ("logging", "logging.handlers", "colorlog")


def resolve(path: str, *, allowed: tuple[str, ...] = ALLOWED) -> Callable[..., Any]:
    """Return the class or function that `path` names.

    Raises:
        ValueError: if the path is not allowed, or there is no such name.
    """
    module_name, _, name = path.rpartition(".")
    is_allowed = _within(module_name, allowed) and not _within(module_name, REFUSED)
    if not (is_allowed or path in TRAINERS) or name.startswith("_"):
        raise ValueError(f"'{path}' may not be built from a config; allowed: {', '.join(allowed)}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and _within(module_name, (error.name,)):
            raise ValueError(f"'{path}': no module '{error.name}'") from error
        raise ValueError(f"'{path}' needs the package '{error.name}', which is not installed") from error
    target = getattr(module, name, None)
    if target is None:
        public = [other for other in vars(module) if not other.startswith("_")]
        raise ValueError(f"'{path}': no such name{did_you_mean(name, public, prefix=module_name + '.')}")
    if not (inspect.isclass(target) or inspect.isfunction(target)) or not _within(target.__module__, allowed):
        raise ValueError(f"'{path}' may not be built from a config: it is not a class or function defined there")
    return target


def refused_in_hydra(section: Any, key: str = "hydra") -> Iterator[str]:
    """Yield a problem for each name in Hydra's own section that Hydra would import and should not."""
    if isinstance(section, list):
        for index, value in enumerate(section):
            yield from refused_in_hydra(value, f"{key}[{index}]")
    elif isinstance(section, dict):
        for name, value in section.items():
            inner = f"{key}.{name}"
            yield from refused_in_hydra(value, inner)
            if name == "_target_":
                try:
                    resolve(str(value), allowed=HYDRA_ALLOWED)
                except ValueError as refusal:
                    yield f"{inner}: {refusal}"
            elif name in ("class", "()") and str(value).rpartition(".")[0] not in LOG_MODULES:
                yield f"{inner}: '{value}' may not be built from a config; allowed: {', '.join(LOG_MODULES)}"


def _within(module: str, roots: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)
