"""Compiling a model's stacks of layers, in place: weight names, checkpoints and decoding stay as they are.

Lightning's part of a step, the output layer and the loss are not compiled. FAVOR's engine checks its numbers on a CPU,
which cuts its graphs there. Results differ from uncompiled ones by rounding.
"""

import logging

import torch

from performer_lm.language_model import LanguageModel
from performer_lm.performer import Performer


def compile_stacks(model: LanguageModel, *, device: torch.device) -> None:
    """Let every stack of layers be compiled when it first runs on `device`.

    Raises:
        ValueError: where nothing can be compiled for that device.
    """
    check_compiler(device)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it warns of every place where a graph is cut
    for module in model.modules():
        if isinstance(module, Performer):
            module.compile()


def check_compiler(device: torch.device) -> None:
    """Compile a function of one line.

    Raises:
        ValueError: saying why that fails.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler, its backend and the C compiler under it raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"compile=true needs a compiler for {device.type}, and torch has none: {reason}") from error
