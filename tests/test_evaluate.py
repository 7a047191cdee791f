"""The commands of evaluate.py, as a user types them."""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from performer_lm import checkpoint

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
    assert ("python evaluate.py ckpt=runs/a\n" in trained) == (name == "masked token")
    for attn in ([], ["attn=exact"]):
        code, out, err = invoke("ckpt=runs/a", *attn, script="evaluate.py")
        assert code == 0, err
        bits = re.search(r"([\d.]+) bits per byte\n", out)
        assert f" {name}s, " in out
        assert bits
        if not attn:  # a short text's held-out part is what the run validated on
            assert f"best val bpb  {bits[1]}" in trained


def measured(out: str) -> tuple[int, float]:
    """Return the bytes of text and the bits per byte that were told."""
    found = re.search(r" ([\d,]+) bytes of text\n.* ([\d.]+) bits per byte\n", out)
    assert found
    return int(found[1].replace(",", "")), float(found[2])


def run_of(invoke: Invoke, *options: str) -> Path:
    code, _, err = invoke(*SHORT, *options, "run_dir=runs/a")
    assert code == 0, err
    return Path("runs/a/config.yaml")


def test_all_of_the_text_that_is_given_is_measured_however_short(invoke: Invoke, text: None) -> None:
    run_of(invoke)
    lines = "".join(f"line {number}\n" for number in range(40))
    for content, context in (("x", 512), (lines, 8)):
        Path("tiny.txt").write_text(content)
        code, out, err = invoke(
            "ckpt=runs/a", "data=files", "data.path=tiny.txt", f"data.context={context}", script="evaluate.py"
        )
        assert code == 0, err
        assert measured(out)[0] == len(content)
    _, out, _ = invoke("ckpt=runs/a", *DATA, "data.validation_path=tiny.txt", script="evaluate.py")
    assert measured(out)[0] == len(lines)
    Path("tiny.txt").write_text("")
    code, _, err = invoke("ckpt=runs/a", "data=files", "data.path=tiny.txt", script="evaluate.py")
    assert (code, err) == (2, "error: data.path=tiny.txt has no text: 1 document, all empty or left out\n")


def test_without_data_it_is_what_the_run_held_out(invoke: Invoke, text: None) -> None:
    run_of(invoke, "data.validation_fraction=0.3", "callbacks.samples.prompt=line", "data.validation_bytes=500")
    code, own, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert (code, err) == (0, "")
    part = measured(invoke("ckpt=runs/a", *DATA, "data.validation_fraction=0.3", script="evaluate.py")[1])
    assert measured(own) == part
    assert part[0] == pytest.approx(0.3 * Path("text.txt").stat().st_size, rel=0.01)
    code, out, err = invoke("ckpt=runs/a", "data.context=100000", "data.batch_size=1", script="evaluate.py")
    assert (code, err) == (0, "")  # though there is no such window to train on
    assert measured(out)[0] == part[0]
    assert measured(out) != part


def test_a_path_is_taken_from_the_run_as_it_was_typed(invoke: Invoke, text: None) -> None:
    config = run_of(invoke)
    name = "a ${oc.env:HOME} 'b' \\${x}.txt"
    Path("text.txt").rename(name)
    config.write_text(config.read_text().replace("path: text.txt", f"path: {json.dumps(name)}"))
    code, _, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert code == 2  # the name is part of what was trained on
    assert "is no longer what the run was trained on" in err
    code, out, err = invoke("ckpt=runs/a", "data=files", f"data.path={name}", script="evaluate.py")
    assert code == 0, err
    assert measured(out)[0] == Path(name).stat().st_size


ANOTHER = "; data=files data.path=FILE measures another text\n"


def test_a_run_s_text_that_is_not_at_hand_is_one_line(invoke: Invoke, text: None, lines: str) -> None:
    config = run_of(invoke)
    folder = config.parent.resolve()

    def refused(*options: str) -> str:
        code, out, err = invoke("ckpt=runs/a", *options, script="evaluate.py")
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        return err

    Path("text.txt").rename("moved.txt")
    assert (
        refused() == f"error: the text of {folder}: data.path=text.txt does not exist; did you mean moved.txt?{ANOTHER}"
    )
    assert refused("task=approximation").startswith(f"error: the text of {folder}: data.path=text.txt")
    Path("text.txt").write_text(lines + "more")
    changed = f"error: the text of {folder} is no longer what the run was trained on{ANOTHER}"
    code, _, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert (code, err.splitlines(keepends=True)[-1]) == (2, changed)
    Path("moved.txt").rename("text.txt")
    assert invoke("ckpt=runs/a", script="evaluate.py")[0] == 0
    config.rename("config.yaml.away")
    alone = Path("runs/a/checkpoints/best.ckpt")
    assert f"{alone} lies in no run folder, whose config.yaml names its text{ANOTHER}" in refused()
    assert invoke("ckpt=runs/a", *DATA, script="evaluate.py")[0] == 0
    assert "data.cache_dir: unknown key" in refused("data.cache_dir=elsewhere")


def test_a_run_s_config_is_read_as_a_stranger_s(invoke: Invoke, text: None) -> None:
    config = run_of(invoke)
    config.write_text(config.read_text().replace("performer_lm.data.sources.files", "os.system"))
    code, out, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert (code, out, err) == (2, "", f"error: {config.resolve()} does not say what text the run had\n")


def test_a_model_that_gives_no_number_is_told_by_its_exit_code(invoke: Invoke, text: None) -> None:
    run_of(invoke)
    for path in Path("runs/a/checkpoints").glob("step=*.ckpt"):
        content = torch.load(path, weights_only=True)
        content["state_dict"]["model.head.weight"][0] = float("nan")
        checkpoint.save(content, path)
    code, _, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert code in (2, 3)  # opened or not, a number that is none is not printed
    assert "not finite" in err


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


def table_of(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def refused(invoke: Invoke, *arguments: str) -> str:
    """Return the one line that a command is refused with."""
    code, out, err = invoke(*arguments, script="evaluate.py")
    assert (code, out.startswith("note: ") or not out, len(err.splitlines())) == (2, True, 1), (out, err)
    return err


def test_copying_has_a_column_for_each_checkpoint_of_one_tokenizer(invoke: Invoke, text: None) -> None:
    for name, options in (("a", ["attn=favor"]), ("b", ["attn=flash"]), ("c", ["tokenizer=characters"])):
        assert invoke(*SHORT, *options, f"run_dir=runs/{name}")[0] == 0
    code, out, err = invoke(
        "ckpt=runs/a", "task=copying", "task.against=[runs/b]", "task.windows=9", script="evaluate.py"
    )
    assert (code, err) == (0, "")
    lines = table_of("runs/a/copying.csv")
    assert [*lines[0]] == ["group", "bucket", "tokens", "share", "a", "b"]
    assert "not yet" in out
    for group in ("position", "bigram"):
        own = [line for line in lines if line["group"] == group]
        assert sum(int(line["tokens"]) for line in own) == int(lines[0]["tokens"])
        for name in "ab":
            mean = sum(float(line["share"]) * float(line[name]) for line in own)
            assert mean == pytest.approx(float(lines[0][name]), rel=1e-4)
    assert Path("runs/a/copying.png").read_bytes().startswith(b"\x89PNG")
    loss = re.search(r"loss ([\d.]+) nats", invoke("ckpt=runs/b", script="evaluate.py")[1])
    assert loss
    assert invoke("ckpt=runs/b", "task=copying", script="evaluate.py")[0] == 0
    assert float(table_of("runs/b/copying.csv")[0]["b"]) == pytest.approx(float(loss[1]), abs=1e-4)
    written = Path("runs/a/copying.csv").read_text()
    assert "task.against=runs/c has another tokenizer" in refused(
        invoke, "ckpt=runs/a", "task=copying", "task.against=[runs/c]"
    )
    assert "task.against=runs/d does not exist" in refused(
        invoke, "ckpt=runs/a", "task=copying", "task.against=[runs/b,runs/d]"
    )
    assert "windows must be at least 1" in refused(invoke, "ckpt=runs/a", "task=copying", "task.windows=0")
    assert Path("runs/a/copying.csv").read_text() == written
