from collections.abc import Callable
from typing import Any

import pytest
import torch

from performer_lm.model import PerformerLM
from performer_lm.training.optim import adamw, decay_groups

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "fused": False}


def names(model: PerformerLM, group: dict[str, Any]) -> set[str]:
    wanted = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_matrices_decay_and_the_rest_does_not(lively_model: Callable[..., PerformerLM]) -> None:
    model = lively_model()
    decayed, kept = (names(model, group) for group in decay_groups(model))
    assert decayed | kept == {name for name, _ in model.named_parameters()}
    assert not decayed & kept
    for word in ("norm.gain", "convolution.weight", "project.bias", "embedding.weight"):
        assert {name for name in decayed if name.endswith(word)} == set()
    assert {"head.weight", "layers.0.attention.project_in.weight"} <= decayed


def test_a_tied_embedding_does_not_decay(lively_model: Callable[..., PerformerLM]) -> None:
    model = lively_model("model.tie_embeddings=true")
    decayed, kept = (names(model, group) for group in decay_groups(model))
    assert "embedding.weight" in kept
    assert "head.weight" not in decayed


def test_frozen_parameters_are_left_out(lively_model: Callable[..., PerformerLM]) -> None:
    model = lively_model()
    model.head.weight.requires_grad_(False)
    assert all("head.weight" not in names(model, group) for group in decay_groups(model))


def test_adamw_decays_one_group_alone() -> None:
    groups = [{"params": [torch.ones(1)], "decays": True}, {"params": [torch.ones(1)], "decays": False}]
    assert [group["weight_decay"] for group in adamw(groups, **SETTINGS).param_groups] == [0.1, 0.0]


def test_bad_betas_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.betas must be two numbers"):
        adamw([], **{**SETTINGS, "betas": [0.9]})
