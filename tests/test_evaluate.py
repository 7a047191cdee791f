"""The commands of evaluate.py, as a user types them."""

import re
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


@pytest.fixture
def text(invoke: Invoke) -> None:
    Path("text.txt").write_text("".join(f"line {index} says {index * 37 % 101}\n" for index in range(1500)))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=bits_per_bite"], "task=bits_per_bite: no such choice; did you mean task=bits_per_byte?"),
        (["ckpt=runs/nothing"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line(invoke: Invoke, text: None, arguments: list[str], message: str) -> None:
    code, out, err = invoke(*arguments, script="evaluate.py")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
