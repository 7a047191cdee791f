"""Models of performer-pytorch give the same logits here, where its own faults do not stand in the way."""

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from performer_lm.interop.performer_pytorch import describe_language_model, find_differences, import_language_model
from performer_lm.model import PerformerLM

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"num_tokens": 30, "max_seq_len": 64, "dim": 16, "depth": 2, "heads": 4, "dim_head": 8}
SMALL = {**SIZES, "nb_features": 12, "causal": True}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return performer-pytorch, with nothing added to features or denominators: with it, it would not be softmax."""
    pytest.importorskip("local_attention", reason="needs the extra `bench`")
    module = pytest.importorskip("performer_pytorch.performer_pytorch", reason="needs the extra `bench`")
    monkeypatch.setattr(module, "softmax_kernel", partial(module.softmax_kernel, eps=0.0))
    causal = module.causal_linear_attention_noncuda
    monkeypatch.setattr(module, "causal_linear_attention_noncuda", partial(causal, eps=0.0))
    return module


def build(theirs: Any, **arguments: Any) -> nn.Module:
    """Build one of its models in float64, every weight of it random."""
    torch.manual_seed(0)
    model: nn.Module = theirs.PerformerLM(**arguments)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def logits_of(model: nn.Module, arguments: dict[str, Any], ids: Tensor) -> Tensor:
    """Return the logits of the model taken over."""
    ours = import_language_model(model.state_dict(), **arguments).model
    assert isinstance(ours, PerformerLM)
    return ours.double()(ids)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"reversible": True},
        {"use_scalenorm": True, "ff_glu": True, "ff_chunks": 3},
        {"use_rezero": True, "shift_tokens": True},
        {"use_rezero": True, "use_scalenorm": True},
        {"causal": False, "shift_tokens": True, "reversible": True, "use_rezero": True},
        {"tie_embed": True, "qkv_bias": True, "attn_out_bias": True},
        {"rotary_position_emb": False},
        {"rotary_position_emb": False, "axial_position_emb": True, "axial_position_shape": (8, 8)},
        {"generalized_attention": True, "causal": False},
        {"generalized_attention": True},
        {"generalized_attention": True, "kernel_fn": nn.Softplus(), "causal": False},
        {"no_projection": True},
        {"local_attn_heads": 2, "local_window_size": 32},
        {"local_attn_heads": (0, 4), "local_window_size": 32},
        {"nb_features": None, "ff_mult": 2, "dim_head": 6},
    ],
)
def test_logits_are_its_own(theirs: Any, options: dict[str, Any]) -> None:
    arguments, ids = SMALL | options, torch.randint(0, 30, (2, 23))
    model = build(theirs, **arguments)
    torch.testing.assert_close(logits_of(model, arguments, ids), model(ids), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_wrapped_model_is_taken_over_as_well(theirs: Any) -> None:
    model, ids = build(theirs, **SMALL), torch.randint(0, 30, (1, 9))
    wrapped = {f"net.{name}": value for name, value in model.state_dict().items()}
    ours = import_language_model(wrapped, **SMALL).model.double()
    torch.testing.assert_close(ours(ids), model(ids), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_what_it_adds_to_features_is_what_separates_us(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "softmax_kernel", partial(theirs.softmax_kernel, eps=1e-4))  # its own default
    model, ids = build(theirs, **SMALL), torch.randint(0, 30, (2, 23))
    for name, parameter in model.named_parameters():
        if "to_q" in name or "to_k" in name:
            parameter.mul_(40)
    assert not torch.allclose(logits_of(model, SMALL, ids), model(ids), atol=1e-3)
    monkeypatch.setattr(theirs, "softmax_kernel", partial(theirs.softmax_kernel, eps=0.0))
    torch.testing.assert_close(logits_of(model, SMALL, ids), model(ids), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_it_decodes_with_a_state_here(theirs: Any) -> None:
    model, ids = build(theirs, **SMALL), torch.randint(0, 30, (1, 12))
    ours = import_language_model(model.state_dict(), **SMALL).model.double()
    first, state = ours.start(ids[:, :7])
    second, _ = ours.extend(ids[:, 7:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), model(ids)[:, 6:], atol=1e-6, rtol=1e-6)


def test_redraws_go_on_from_the_projections_taken_over(theirs: Any) -> None:
    model = build(theirs, **SMALL, feature_redraw_interval=10)
    ours = import_language_model(model.state_dict(), **SMALL, feature_redraw_interval=10).model
    name = "performer.layers.0.attention.body.backend.features.projection"
    theirs_own = model.state_dict()["performer.net.layers.0.0.fn.fast_attention.projection_matrix"].float()
    for step, same in ((0, True), (9, True), (10, False)):
        ours.redraw(step)
        assert all(torch.equal(head, theirs_own) == same for head in ours.state_dict()[name])


def test_differences_are_named() -> None:
    usual = "\n".join(find_differences(**SMALL))
    assert "adds 1e-4" in usual
    assert "the future shows" in usual
    assert "one to two windows" in "\n".join(find_differences(**SMALL, local_attn_heads=1))
    assert "over tokens, for each feature" in "\n".join(find_differences(**SIZES, no_projection=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SMALL | {"tie_embeds": True}, "tie_embeds is no argument .*; did you mean tie_embed"),
        ({"dim": 8}, "needs num_tokens, max_seq_len, depth, heads"),
        (SMALL | {"cross_attend": True}, "cross_attend"),
        (SMALL | {"generalized_attention": True, "kernel_fn": "tan"}, "kernel_fn must be one of ReLU, .* got tan"),
    ],
)
def test_what_cannot_be_taken_over_is_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_language_model(**arguments)


def test_weights_that_do_not_fit_are_named(theirs: Any) -> None:
    weights = build(theirs, **SMALL).state_dict()
    with pytest.raises(ValueError, match=r"has no performer.net.layers.2.0.norm.weight"):
        import_language_model(weights, **SMALL | {"depth": 3})
    with pytest.raises(ValueError, match=r"holds performer.net.layers.1.0"):
        import_language_model(weights, **SMALL | {"depth": 1})
    with pytest.raises(ValueError, match=r"size mismatch for embedding.weight"):
        import_language_model(weights, **SMALL | {"num_tokens": 31})


def test_the_guide_names_every_argument(theirs: Any) -> None:
    from local_attention import LocalAttention
    from performer_pytorch import AutoregressiveWrapper, PerformerEncDec

    table = (ROOT / "docs/migrating.md").read_text().partition("\n## Names\n")[2]
    taken = [
        getattr(theirs, name) for name in ("PerformerLM", "Performer", "Attention", "FastAttention", "FeedForward")
    ]
    taken += [theirs.ProjectionUpdater, AutoregressiveWrapper, AutoregressiveWrapper.generate, PerformerEncDec]
    names = {name for part in (*taken, LocalAttention) for name in inspect.signature(part).parameters}
    names -= {"self", "kwargs", "fn"}
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", table)) == []
