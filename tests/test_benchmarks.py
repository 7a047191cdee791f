"""Scripts of benchmarks/ take from the package only what is there, and count what is to be counted."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from performer_lm.ops.linear.chunks import REACH
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.maps import Exponential, Maps

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_imports_what_the_package_has(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("performer_lm"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                there = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                assert there, f"{node.module} has no {name.name}"


def test_chunks_done_pair_by_pair_are_counted_where_keys_are_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS[0].parent)
    script = importlib.import_module("exact_form")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 128, 8)
    k[1, 1, 64:] *= 60.0  # one of eight chunks
    weight = torch.randn(2, 16, 8)
    maps = Maps(query=Exponential((weight,)), key=Exponential((weight,)), groups=2)
    tokens = Tokens(q, k, v, None, None, None, None)
    shares = [script.share(*one, script.ALONE) for one in script.alone(maps, tokens)]
    assert shares == [0.0, 0.0, 0.0, 0.5]
    assert [max(script.spans(one, own.keys)) > REACH for one, own in script.alone(maps, tokens)] == [False] * 3 + [True]
