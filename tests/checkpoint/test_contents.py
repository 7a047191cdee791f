"""A checkpoint has all its sections, each of its own kind, or is refused in one line."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from performer_lm import checkpoint

Content = dict[str, Any]
Refused = Callable[..., None]
OWN = "performer_lm"
NOTHING = object()


def changed(content: Content, key: str, value: Any) -> Content:
    """Set the value at a place such as `performer_lm.model.dim`; `NOTHING` takes it out."""
    *outer, last = key.split("/")
    inside = content
    for name in outer:
        inside = inside.setdefault(name, {})
    if value is NOTHING:
        del inside[last]
    else:
        inside[last] = value
    return content


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (OWN, NOTHING, "it has no `performer_lm` section"),
        (OWN, [], "it has no `performer_lm` section"),
        ("state_dict", NOTHING, "it has no `performer_lm` section"),
        ("state_dict", [torch.zeros(1)], "it has no `performer_lm` section"),
        *((f"{OWN}/{name}", NOTHING, f"it has no `{name}`") for name in ("model", "tokenizer", "fingerprint", "seed")),
        *((f"{OWN}/{name}", [1], rf"its {name} is \[1\], and not ") for name in ("model", "tokenizer", "fingerprint")),
        *((f"{OWN}/{name}", "x", f"its {name} is 'x', and not a section") for name in ("model", "training")),
        *((f"{OWN}/seed", value, "its seed is ") for value in ("x", 1.5, None, True, [0], torch.zeros(1))),
        (f"{OWN}/seed", 1 << 63, "it holds a whole number of 64 bits"),
        *(("global_step", value, "its global_step is ") for value in ("x", 1.5, None, True, -1, 1 << 62, [3])),
        *((f"{OWN}/format", value, "has checkpoint format ") for value in (2, True, "1", 1.0, None, [1], NOTHING)),
        *((name, 3, f"its {name} is 3, and not a section") for name in ("loops", "callbacks", "averages")),
        *(
            (name, {}, f"its {name} is {{}}, and not a list")
            for name in ("optimizer_states", "lr_schedulers", "random")
        ),
        ("state_dict/model.more", [1], "it has 'model.more' in its `state_dict`, which is no tensor with a name"),
        ("averages/more", 1.0, "it has 'more' in its `averages`, which is no tensor with a name"),
        ("state_dict", {7: torch.zeros(1)}, "it has 7 in its `state_dict`, which is no tensor with a name"),
        ("callbacks/Checkpoints", {"best_model_score": "best"}, "its best_model_score is 'best', and not a number"),
        ("callbacks/Checkpoints", {"best_model_score": torch.zeros(9)}, "its best_model_score is "),
        (f"{OWN}/model/norm", {1: 2}, "it has 1 in its config, which is no name"),
        (f"{OWN}/fingerprint/corpus", torch.zeros(2), "it holds a tensor in its config"),
        (f"{OWN}/training", {"optimizer": ["${oc.env:HOME}"]}, "its config holds an interpolation"),
        (f"{OWN}/${{now:}}", 1, "its config holds an interpolation"),
    ],
)
def test_sections_that_are_missing_or_of_another_kind(
    key: str, value: Any, message: str, content: Content, refused: Refused
) -> None:
    refused(changed(content, key, value), message)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["state_dict", "averages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_named(
    bad: float, where: str, dtype: torch.dtype, content: Content, tmp_path: Any
) -> None:
    weights = {name.removeprefix("model."): value.clone() for name, value in content["state_dict"].items()}
    prefix = "model." if where == "state_dict" else ""
    content[where] = {prefix + name: value for name, value in weights.items()}
    spoilt = content[where][f"{prefix}head.weight"] = weights["head.weight"].to(dtype)
    spoilt[3, 2] = bad
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"a\.ckpt is not opened: its weights are not finite \({prefix}head.weight\)"):
        checkpoint.read(tmp_path / "a.ckpt")
    checkpoint.peek(tmp_path / "a.ckpt")
