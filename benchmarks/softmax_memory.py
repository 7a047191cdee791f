"""Attention over the positions of an image, three ways: the same numbers, very different memory.

    python benchmarks/softmax_memory.py

A layer that lets every pixel attend to every other is often written with einsum, and runs out of memory as the image
grows. Swapping in a fused kernel helps only if it still attends over positions: given (batch, heads, channels,
positions) it attends over channels, fits in memory, and computes something else. Here all three ways are checked to
agree before they are measured. About two minutes on two cores; needs 9 GiB of memory. Writes
results/softmax_memory.json and results/softmax_memory.png.
"""

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange
from measure import RESULTS, THREADS, Run, peak_memory, write_results
from torch import Tensor, nn

from performer_lm.ops import chunked_attention, sdpa_attention

CHANNELS = 64
WIDTHS = {1024: 32, 2048: 64, 4096: 64, 8192: 128, 16384: 128, 32768: 256}  # positions: width of the image
LONGEST_TRAINED_EINSUM = 16384  # at twice that, forward and backward take 16 GiB


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over positions `(b h n d)` with the n x n matrix written out."""
    scores = einsum(q * q.shape[-1] ** -0.5, k, "b h i d, b h j d -> b h i j")
    return einsum(scores.softmax(-1), v, "b h i j, b h j d -> b h i d")


WAYS: dict[str, Callable[..., Tensor]] = {
    "einsum": einsum_attention,
    "chunked": chunked_attention,
    "SDPA": sdpa_attention,
}


class ImageAttention(nn.Module):
    """One head over all positions of an image `(b, channels, y, x)`, by `attend`."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.to_qkv = nn.Conv2d(CHANNELS, 3 * CHANNELS, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(image), "b (three c) y x -> three b 1 (y x) c", three=3).unbind()
        return rearrange(self.attend(q, k, v), "b 1 (y x) c -> b c y x", x=image.shape[-1])


def build(way: str) -> ImageAttention:
    """Return the layer that attends in one of the `WAYS`, with the same weights for each."""
    torch.manual_seed(0)
    return ImageAttention(WAYS[way])


def draw_image(positions: int, *, grad: bool) -> Tensor:
    """Draw an image `(1, channels, y, x)`, the same every time."""
    width = WIDTHS.get(positions, 16)
    random = torch.Generator().manual_seed(0)
    return torch.randn(1, CHANNELS, positions // width, width, generator=random).requires_grad_(grad)


def forward(positions: int, way: str) -> Run:
    """Return a run of the forward pass."""
    layer, image = build(way).requires_grad_(False), draw_image(positions, grad=False)

    def run() -> None:
        layer(image)

    return run


def train(positions: int, way: str) -> Run:
    """Return a run of the forward and the backward pass."""
    layer, image = build(way), draw_image(positions, grad=True)

    def run() -> None:
        layer(image).sum().backward()

    return run


def check_agreement() -> float:
    """Assert that all ways compute one thing, and return how far attention over channels is from it."""
    image = draw_image(1024, grad=False)
    with torch.no_grad():
        wanted = build("einsum")(image)
        for way in WAYS:
            torch.testing.assert_close(build(way)(image), wanted, atol=1e-5, rtol=1e-5)
        layer = build("einsum")
        layer.attend = lambda *qkv: sdpa_attention(*(x.mT for x in qkv)).mT
        return (layer(image) - wanted).abs().max().item()


def measure() -> list[dict[str, object]]:
    """Measure the peak memory of every way at every size."""
    rows: list[dict[str, object]] = []
    for positions in WIDTHS:
        for way in WAYS:
            trained = way != "einsum" or positions <= LONGEST_TRAINED_EINSUM
            row = {"positions": positions, "way": way, "forward_MiB": peak_memory(forward, positions, way) / 2**20}
            row["train_MiB"] = peak_memory(train, positions, way) / 2**20 if trained else None
            rows.append(row)
            backward = f"{row['train_MiB']:9.1f}" if trained else "        -"
            print(
                f"n={positions:6} {way:8} forward {row['forward_MiB']:9.1f} MiB, with backward {backward} MiB",
                flush=True,
            )
    return rows


def plot(rows: list[dict[str, object]]) -> None:
    """Draw memory over positions into results/softmax_memory.png."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axes, field, title in zip(panels, ("forward_MiB", "train_MiB"), ("forward", "forward + backward"), strict=True):
        for way in WAYS:
            points = [(row["positions"], row[field]) for row in rows if row["way"] == way and row[field] is not None]
            axes.loglog(*zip(*points, strict=True), marker="o", label=way, base=2)
        axes.set(xlabel="image positions", title=title)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="peak MiB over the inputs")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "softmax_memory.png", dpi=150)


def main() -> None:
    """Check, measure, write it down, draw it."""
    torch.set_num_threads(THREADS)
    difference = check_agreement()
    print(f"einsum, chunked and SDPA agree; attention over channels differs from them by {difference:.2f}")
    rows = measure()
    write_results("softmax_memory", {"over_channels_differs_by": difference, "rows": rows})
    plot(rows)


if __name__ == "__main__":
    main()
