"""Loss over a large vocabulary: time and memory of the chunked output layer against holding all logits.

    python benchmarks/cross_entropy.py

Forward and backward of 4096 tokens, width 256, vocabulary 32768, float32. Both sides run in turns; medians; memory is
the high-water mark of a process of its own over weights, inputs and their gradients' places. Checked to be the same
function first. Writes results/cross_entropy.json.
"""

import torch
from measure import THREADS, Run, peak_memory, time_together, write_results
from torch import Tensor
from torch.nn import functional as F

from performer_lm.ops import linear_cross_entropy

TOKENS, DIM, VOCAB = 4096, 256, 32768
CHUNKS = (256, 1024)


def losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Return the losses, holding all logits for chunk_size 0."""
    if chunk_size:
        return linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
    return F.cross_entropy(hidden @ weight.mT, targets, reduction="none")


def make(tokens: int, chunk_size: int) -> Run:
    """Return a forward and backward over `tokens` tokens."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, DIM, requires_grad=True)
    weight = (torch.randn(VOCAB, DIM) / DIM**0.5).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,))

    def run() -> None:
        hidden.grad = weight.grad = None
        losses(hidden, weight, targets, chunk_size).mean().backward()

    return run


def largest_difference(chunk_size: int) -> float:
    """Return by how much the losses of the two forms differ at most."""
    torch.manual_seed(0)
    inputs = torch.randn(300, DIM), torch.randn(VOCAB, DIM) / DIM**0.5, torch.randint(VOCAB, (300,))
    return float((losses(*inputs, chunk_size) - losses(*inputs, 0)).abs().max())


def main() -> None:
    """Check, measure, print and write."""
    torch.set_num_threads(THREADS)
    names = {0: "all logits", **{chunk: f"chunks of {chunk}" for chunk in CHUNKS}}
    assert max(map(largest_difference, CHUNKS)) < 1e-5
    seconds = time_together({name: make(TOKENS, chunk) for chunk, name in names.items()}, repeats=7)
    mib = {name: peak_memory(make, TOKENS, chunk) / 2**20 for chunk, name in names.items()}
    for name in names.values():
        print(f"{name:16} {seconds[name]:6.2f} s  {mib[name]:7.0f} MiB")
    sizes = {"tokens": TOKENS, "dim": DIM, "vocabulary": VOCAB}
    write_results(
        "cross_entropy",
        {
            **sizes,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "MiB": {name: round(value, 1) for name, value in mib.items()},
        },
    )


if __name__ == "__main__":
    main()
