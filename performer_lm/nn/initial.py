"""The initial weights of every layer."""

import torch
from torch import nn

from performer_lm.nn.branch import Branch
from performer_lm.nn.mixing import LogDecay, ShortConvolution
from performer_lm.nn.positions import AxialPositions, LearnedPositions


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Set the initial weights of the layers in a model; `normal(s)` has standard deviation s.

    | weight | initial values |
    |---|---|
    | linear layers that read the stream | normal(1 / sqrt(fan in)) |
    | linear layers that write to it | zeros: every branch starts by adding nothing |
    | the same, behind a ReZero gate | normal(1 / sqrt(fan in)): the gate is what is zero |
    | biases | zeros |
    | convolution | the token itself (1), and a little of those before (normal(0.1)) |
    | decay | weight zeros; bias evenly from `longest`, for local heads, to `shortest`; an only global head: `longest` |
    | learned and axial positions | normal(0.02) |
    | norms, ReZero gates, temperatures | their constructors': gain 1 (ScaleNorm sqrt(dim)), offset 0, gate 0, logit 0 |
    | projections of random features | their backend's own |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ShortConvolution):
            nn.init.normal_(module.weight, std=0.1)
            nn.init.ones_(module.weight[0])
        elif isinstance(module, LearnedPositions | AxialPositions):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, LogDecay):
            nn.init.zeros_(module.project.weight)
            bias = module.project.bias
            spread = torch.linspace(module.longest, module.shortest, len(bias), device=bias.device)
            bias.copy_(spread.roll(-module.local))
            if len(bias) - module.local == 1:
                bias[0] = module.longest
        elif isinstance(module, Branch) and module.gate is None:
            for name, parameter in module.named_parameters():
                if name.endswith("project_out.weight"):
                    nn.init.zeros_(parameter)
