"""The commands of evaluate.py, as a user types them."""

import csv
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

Invoke = Callable[..., tuple[int, str, str]]
DATA = ["data=files", "data.path=text.txt", "data.context=64"]
SHORT = ["debug=fast", *DATA, "tokenizer=bytes", "trainer.max_steps=2", "callbacks.samples.max_new_tokens=4"]
SHORT += ["trainer.precision=32-true"]  # what evaluate.py runs in
SEQ2SEQ = ["debug=[]", "model.dim=32", "data.batch_size=4", "trainer.val_every=2"]
SEQ2SEQ += [f"model.{stack}.{size}" for stack in ("encoder", "decoder") for size in ("depth=1", "heads=2")]
KINDS = {
    "clm": (["objective=clm"], "token"),
    "mlm": (["objective=mlm", "model=performer_encoder"], "masked token"),
    "seq2seq": (["objective=seq2seq", "model=performer_seq2seq", *SEQ2SEQ], "target token"),
}


@pytest.mark.parametrize(("options", "name"), KINDS.values(), ids=KINDS)
def test_a_model_is_measured_by_what_it_was_trained_to_predict(
    invoke: Invoke, text: None, options: list[str], name: str
) -> None:
    code, trained, err = invoke(*SHORT, *options, "run_dir=runs/a")
    assert code == 0, err
    assert ("generate.py" in trained) == (name != "masked token")
    assert ("python evaluate.py ckpt=runs/a data=files data.path=text.txt" in trained) == (name == "masked token")
    for attn in ([], ["attn=exact"]):
        code, out, err = invoke("ckpt=runs/a", *DATA, *attn, script="evaluate.py")
        assert code == 0, err
        bits = re.search(r"([\d.]+) bits per byte\n", out)
        assert f" {name}s, " in out
        assert bits
        if not attn:  # a short text's held-out part is what the run validated on
            assert f"best val bpb  {bits[1]}" in trained


SMALL = ["task=approximation", "task.num_features=[4,8]", "task.redraws=2", "task.queries=8", "task.tokens=12"]
APPROXIMATED = {
    "local heads": (["model.local_heads=1", "model.local.window=16"], {"layer0": 1, "layer1": 1}),
    "hybrid": (["attn=hybrid", "attn.pattern=[flash,favor]"], {"layer1": 2}),
    "qk norm": (["model.qk_norm=4", "data.documents=packed"], {"layer0": 2, "layer1": 2}),
    "mlm": (KINDS["mlm"][0], {"layer0": 2, "layer1": 2}),
    "seq2seq": (KINDS["seq2seq"][0], {"encoder/layer0": 2, "decoder/layer0": 2, "decoder/layer0/cross": 2}),
    "linear": (["attn=linear"], {"layer0": 2, "layer1": 2}),
}


@pytest.mark.parametrize(("options", "heads"), APPROXIMATED.values(), ids=APPROXIMATED)
def test_random_features_are_compared_with_softmax(
    invoke: Invoke, text: None, options: list[str], heads: dict[str, int]
) -> None:
    code, _, err = invoke(*SHORT, *options, "run_dir=runs/a")
    assert code == 0, err
    code, out, err = invoke("ckpt=runs/a", *DATA, *SMALL, f"task.layer={list(heads)[-1]}", script="evaluate.py")
    assert code == 0, err
    with Path("runs/a/approximation.csv").open() as file:
        rows = list(csv.DictReader(file))
    draws = 1 if options == ["attn=linear"] else 1 + 2 * 2
    assert ("nothing to sweep" in out) == (draws == 1)
    assert Counter(row["layer"] for row in rows) == {layer: count * draws for layer, count in heads.items()}
    assert all(math.isfinite(float(row["total_variation"])) for row in rows)
    for name in ("approximation.png", "attention.png"):
        assert Path(f"runs/a/{name}").read_bytes().startswith(b"\x89PNG")
    assert "heads come closer to softmax than equal weights do" in out


def test_what_cannot_be_compared_is_one_line(invoke: Invoke, text: None) -> None:
    for attn in ("favor", "flash"):
        code, _, err = invoke(*SHORT, f"attn={attn}", f"run_dir=runs/{attn}")
        assert code == 0, err
    for run, arguments, message in (
        ("flash", [], "this model runs none (FlashAttention); attn=favor opens the same weights"),
        ("favor", ["attn=exact"], "this model runs none (ExactAttention)"),
        ("favor", ["task.layer=2"], "task.layer=2: no such FAVOR layer; did you mean layer"),
        ("favor", ["task.layer=later0"], "did you mean layer0? (known: layer0, layer1)"),
        ("favor", ["task.heads=[0,2]"], "task.heads must be within 0..1, the layer's FAVOR heads; got 2"),
        ("favor", ["task.heads=[]"], "the layer's FAVOR heads; got none"),
        ("favor", ["task.redraws=0"], "redraws must be at least 1, got 0"),
        ("favor", ["task.num_features=[16,0]"], "task.num_features[1] must be at least 1, got 0"),
        ("favor", ["task.num_features=16"], "task.num_features"),
        ("favor", ["layer=1"], "layer: unknown key; did you mean task.layer?"),
    ):
        code, out, err = invoke(f"ckpt=runs/{run}", *DATA, *SMALL, *arguments, script="evaluate.py")
        assert (code, out.startswith("note: ") or not out) == (2, True), arguments
        assert message in err
        assert len(err.splitlines()) == 1
    assert not list(Path("runs").glob("*/approximation*"))
    code, out, err = invoke("ckpt=runs/flash", *DATA, *SMALL, "attn=favor", script="evaluate.py")
    assert code == 0, err  # what random features would make of a softmax model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=bits_per_bite"], "task=bits_per_bite: no such choice; did you mean task=bits_per_byte?"),
        (["ckpt=runs/nothing"], "does not exist"),
        (["-m", "task=bits_per_byte,approximation"], "--multirun: evaluate.py runs once; give each key one value"),
    ],
)
def test_a_mistake_is_one_line(invoke: Invoke, text: None, arguments: list[str], message: str) -> None:
    code, out, err = invoke(*arguments, script="evaluate.py")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
