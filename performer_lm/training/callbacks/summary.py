"""The cost of a model, printed before it trains."""

import logging
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from performer_lm.building import build_model
from performer_lm.cost import Cost, measure_cost
from performer_lm.training.callbacks.base import RunCallback
from performer_lm.training.report import spared

log = logging.getLogger("performer_lm")


class ModelSummary(RunCallback):
    """Print the cost of the model, on the first rank, before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count on a sketch of the model, which computes nothing."""
        if not trainer.is_global_zero:
            return
        with spared("what the model costs"):
            task, data = cast(Any, pl_module), cast(Any, trainer).datamodule
            with torch.device("meta"):
                sketch = build_model(task.section["model"])
            task.objective.join(sketch)
            cost = measure_cost(sketch, task.objective, context=data.context)
            sequences, precision = data.share(trainer).micro_batch, str(trainer.precision)
            log.info("%s", describe_cost(cost, context=data.context, sequences=sequences, precision=precision))


def describe_cost(cost: Cost, *, context: int, sequences: int, precision: str) -> str:
    """Return a few lines on size, arithmetic and memory, and a note where softmax would do less arithmetic.

    Args:
        cost: at `context` tokens of a window.
        context: of the data.
        sequences: windows of a micro-batch.
        precision: of Lightning.
    """
    size = cost.size
    frozen = size.parameters - size.trainable
    products = torch.get_float32_matmul_precision()
    precision += "" if products == "highest" else f", products of float32 in {products} precision"
    lines = [
        f"parameters    {size.parameters:,}: {size.embedding:,} in embeddings"
        f"{f', {frozen:,} frozen' if frozen else ''}; {size.buffers:,} numbers in buffers",
        f"arithmetic    {_count(cost.flops)}FLOP a token forward at context {context:,}, in {precision}",
        f"activations   about {_bytes(cost.activation_bytes * sequences)} a step of {sequences} x {context:,} tokens",
    ]
    compared = [(f"{layers} x {backend.name}", backend) for backend, layers in cost.backends.items()]
    compared += [("attn=flash", cost.softmax)] if cost.softmax else []
    lines += [
        f"  {name:<11} {_count(backend.flops)}FLOP a token and layer, decoding state {_bytes(backend.state_bytes)}"
        for name, backend in compared
    ]
    if cost.pays_from is not None and context < cost.pays_from:
        lines.append(
            f"note: below {cost.pays_from:,} tokens softmax does less arithmetic: at data.context={context} attn=flash "
            "may be faster"
        )
    return "\n".join(lines)


def _count(number: float) -> str:
    for unit, power in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number / 1e3:.3g} k"


def _bytes(number: float) -> str:
    for unit, power in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number / 2**10:.3g} KiB"
