"""Measure how far random features carry in each layer of SmolLM2-135M, a softmax model, before anything is learned.

    python benchmarks/converting_kernel.py source=FILE.gguf

Writes results/converting.json.
"""

from typing import Any

import torch
from einops import einsum, rearrange
from teacher import composed, make_teacher, open_text, read_options, save
from torch import Tensor

from performer_lm.attention.flash import FlashAttention
from performer_lm.building import build
from performer_lm.evaluation.approximation.layer import measure_approximation
from performer_lm.evaluation.hybrid import read
from performer_lm.model import PerformerLM
from performer_lm.ops.sdpa import sdpa_attention


@torch.inference_mode()
def measure_kernel() -> list[dict[str, Any]]:
    """Return how far favor is from softmax in each layer, on the teacher's own q, k, v.

    Errors are |favor - softmax| / |softmax| of the outputs, mean over heads. What shortens vectors is measured on two
    windows and held against softmax on two others.
    """
    text, rows = open_text(4), []
    sections = {m: composed("attn", "attn=favor", f"attn.num_features={m}") for m in (64, 128, 266)}
    centred = composed("attn", "attn=favor", "attn.num_features=128", "attn.features.centred=true")
    known, asked = (see_vectors(text.teacher, each) for each in (text.windows[::2], text.windows[1::2]))
    for (module, given), (q, k, v) in zip(known.items(), asked.values(), strict=True):
        row: dict[str, Any] = {
            "layer": module.layer,
            "z2": _lengths(q, k),
            "equal weights": _error_of_averages(q, k, v),
        }
        for m, section in sections.items():
            found = measure_approximation(build(section)(**module.sizes), q, k, v, queries=64)
            row[f"m = {m}"] = float(found.relative_error.mean())
            if m == 128:
                row["effective m of 128"] = float(found.effective_features.mean())
        of_key_heads = [_by_key_head(x, module.key_heads) for x in given[:2]]
        for name, is_centred, shorten in SHORTENED:
            attention = build(centred if is_centred else sections[128])(**module.sizes)
            a, b = (is_centred * x.mean(dim=(0, 2)) for x in of_key_heads)
            turn = shorten(*of_key_heads, a, b)
            back = torch.linalg.inv(turn).mT
            a, b = _turn(a[:, None], turn), _turn(b[:, None], back)
            if is_centred:
                attention.features.centres.copy_(torch.stack([a, b])[:, :, 0])
            group = module.heads // module.key_heads
            turned = _turn(q, turn.repeat_interleave(group, dim=0)), _turn(k, back)
            row[name] = float(measure_approximation(attention, *turned, v, queries=64).relative_error.mean())
            row[f"{name}: z2"] = _lengths(turned[0] - a.repeat_interleave(group, dim=0), turned[1] - b)[1]
        rows.append(row)
        print(row, flush=True)
    return rows


def see_vectors(model: PerformerLM, windows: list[Tensor]) -> dict[FlashAttention, tuple[Tensor, ...]]:
    """Return q, k and v of each softmax layer of a model as it reads windows, joined along the batch."""
    seen: dict[FlashAttention, list[tuple[Tensor, ...]]] = {}
    modules = [module for module in model.modules() if isinstance(module, FlashAttention)]
    hooks = [
        module.register_forward_pre_hook(lambda own, qkv: seen.setdefault(own, []).append(qkv)) for module in modules
    ]
    read(model, windows, separator=None)
    for hook in hooks:
        hook.remove()
    return {module: tuple(map(torch.cat, zip(*seen[module], strict=True))) for module in modules}


def _turn(x: Tensor, matrices: Tensor) -> Tensor:
    """Return vectors `(..., h, n, d)`, each multiplied by the matrix of its head `(h, d, d)`."""
    return x @ matrices.mT


def _by_key_head(q: Tensor, g: int) -> Tensor:
    """Return the vectors `(b, h, n, d)` as those of key heads, `(b, g, r n, d)`."""
    return rearrange(q, "b (g r) n d -> b g (r n) d", g=g)


def _balance(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return diagonal matrices `(g, d, d)` that make queries and keys alike long in each pair that positions rotate."""
    found = []
    for x, centre in ((k, b), (q, a)):
        squares = (x - centre[:, None]).square().mean(dim=(0, 2))
        found.append(rearrange(squares, "g (two p) -> g two p", two=2).sum(dim=1))
    return torch.diag_embed((found[0] / found[1]).sqrt().sqrt().repeat(1, 2))


def _whiten(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the matrices `(g, d, d)` that make E |T q|^2 + E |T^-t k|^2 least: both get the same second moments."""
    of_q, of_k = (
        einsum((x - centre[:, None]).double(), (x - centre[:, None]).double(), "b g n i, b g n j -> g i j")
        / (x.shape[0] * x.shape[2])
        for x, centre in ((q, a), (k, b))
    )
    root = _power(of_q, 0.5)
    inverse = torch.linalg.inv(root)
    return _power(inverse @ _power(root @ of_k @ root, 0.5) @ inverse, 0.5).to(q.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = 1e-7 * values.amax(dim=-1, keepdim=True)
    return vectors @ torch.diag_embed(values.clamp(min=floor).pow(exponent)) @ vectors.mT


def _unturned(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.eye(q.shape[-1]).repeat(k.shape[1], 1, 1)


SHORTENED = (  # with m = 128: the name, whether means are subtracted, and the matrices that q and k are multiplied by
    ("centred", True, _unturned),
    ("balanced", False, _balance),
    ("whitened", False, _whiten),
    ("centred, balanced", True, _balance),
    ("centred, whitened", True, _whiten),
)


def _error_of_averages(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return the error of weights that know nothing of q and k."""
    wanted = sdpa_attention(q, k, v, causal=True)
    counts = torch.arange(1, v.shape[2] + 1)[:, None]
    averages = (v.cumsum(dim=2) / counts).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    squares = [x.square().sum(dim=(0, 2, 3)) for x in (averages - wanted, wanted)]
    return float((squares[0] / squares[1]).sqrt().mean())


def _lengths(q: Tensor, k: Tensor) -> list[float]:
    """Return quantiles of |z|^2 = |q + k|^2 d^-1/2 over pairs of a query and a key that it sees."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    rows = torch.arange(7, q.shape[2], 8)
    sums = q[:, :, rows].square().sum(-1)[..., None] + keys.square().sum(-1)[..., None, :]
    squares = (sums + 2 * q[:, :, rows] @ keys.mT) * q.shape[-1] ** -0.5
    seen = squares[..., torch.arange(q.shape[2]) <= rows[:, None]].flatten()
    return [round(float(seen.sort().values[int(share * len(seen))]), 1) for share in (0.1, 0.5, 0.9)]


def tabulate(rows: list[dict[str, Any]]) -> str:
    """Return how far random features are from softmax in each layer."""
    names = [name for name in rows[0] if name not in ("layer", "z2") and not name.endswith("z2")]
    lines = [f"| layer | \\|z\\|^2, 10 / 50 / 90% | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in rows:
        cells = (
            f"{row[name]:.2f}" + (f" ({row[each]:.0f})" if (each := f"{name}: z2") in row else "") for name in names
        )
        lines.append(f"| {row['layer']} | {' / '.join(f'{value:.0f}' for value in row['z2'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the layers, and print the table."""
    make_teacher(read_options())
    rows = measure_kernel()
    save(kernel=rows)
    print(tabulate(rows))


if __name__ == "__main__":
    main()
