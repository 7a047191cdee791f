"""How far it is from the objective to the first product of attention: files and functions that a reader passes.

    python benchmarks/hops.py [--list] [attn=NAME] [override ...]

The model that train.py builds of the overrides (without `attn=`: of every choice in turn) is given one batch of random
ids, in training. Counted is every function of performer_lm that is entered from the call of the objective on, and the
files these stand in, until the first matrix product whose two factors both depend on the batch: q k^T, phi(q) phi(k)^T,
or a fused kernel that holds it. A product with weights or with a random projection has one such factor. A function
counts once, however often it is entered; methods, properties, lambdas and generators are functions, and so are
comprehensions before Python 3.12. What runs while the model is built is left out. `--list` prints the functions in the
order in which they are first entered.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import performer_lm
from performer_lm.building import build

CONFIGS: Final = Path(__file__).parents[1] / "configs"
PACKAGE: Final = Path(performer_lm.__file__).parent
PRODUCTS: Final = {"mm", "addmm", "bmm", "baddbmm", "matmul"}
FUSED: Final = "_scaled_dot_product"
VOCABULARY: Final = 2048


class Reached(BaseException):
    """The product is about to be made; no `except Exception` on the way stops it."""


class Watch(TorchDispatchMode):
    """Ends a forward at its first matrix product of two tensors that both depend on the given one.

    A product with a weight has one such factor only. Views and what is written in place go by their memory.
    """

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.dependent = {_memory(given)}
        self.kept: list[Tensor] = []  # so that no memory is given out twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, one of the package's own with a look inside."""
        name = func.overloadpacket.__name__.removesuffix("_")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        inputs = [value for value in tree_leaves(args) if isinstance(value, Tensor)]  # without `out`
        factors = inputs[:2] if name.startswith(FUSED) else inputs[-2:]
        if (name in PRODUCTS or name.startswith(FUSED)) and all(map(self._depends, factors)):
            raise Reached
        if custom := OPDEFS.get(func._schema.name):
            with self:
                return custom._init_fn(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        if any(map(self._depends, tensors)):
            written = [value for value, about in zip(args, func._schema.arguments, strict=False) if about.is_write]
            results = [value for value in tree_leaves((found, written)) if isinstance(value, Tensor)]
            self.kept += results
            self.dependent.update(map(_memory, results))
        return found

    def _depends(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self.dependent


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def trace(overrides: Sequence[str]) -> list[CodeType]:
    """Return the functions that are entered before the first product of attention, in order."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(
            compose("train", overrides=[*overrides, f"+model.vocab_size={VOCABULARY}"]), resolve=False
        )
    plain = OmegaConf.create({key: cfg[key] for key in ("seed", "attn", "model", "objective")})
    sections: Any = OmegaConf.to_container(plain, resolve=True)
    model, objective = build(sections["model"]), build(sections["objective"])
    windows = torch.randint(VOCABULARY, (cfg["data"]["batch_size"], cfg["data"]["context"] + 1))
    entered: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and PACKAGE in Path(code.co_filename).parents:
            entered.setdefault(code)

    sys.setprofile(note)
    try:
        with Watch(windows):
            objective(model.train(), windows, step=0)
    except Reached:
        return list(entered)
    finally:
        sys.setprofile(None)
    raise ValueError(f"{' '.join(overrides)}: no product of attention was met")


def count(path: Sequence[CodeType]) -> tuple[int, int]:
    """Return the number of files and of functions."""
    return len({code.co_filename for code in path}), len(path)


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="of train.py, such as attn=flash")
    parser.add_argument("--list", action="store_true", help="print the functions in order")
    options = parser.parse_args()
    is_given = any(override.startswith("attn=") for override in options.overrides)
    choices = [] if is_given else [f"attn={path.stem}" for path in sorted(CONFIGS.glob("attn/[!_]*.yaml"))]
    for choice in choices or [""]:
        overrides = [*filter(None, [choice]), *options.overrides]
        path = trace(overrides)
        files, functions = count(path)
        print(f"{' '.join(overrides):24} {files:3} files  {functions:3} functions")
        for code in path if options.list else []:
            print(f"    {Path(code.co_filename).relative_to(PACKAGE.parent)}:{code.co_firstlineno} {code.co_qualname}")


if __name__ == "__main__":
    main()
