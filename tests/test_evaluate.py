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
    invoke: Invoke, trained: Invoke, options: list[str], name: str
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


def run_of(trained: Invoke, *options: str) -> Path:
    code, _, err = trained(*SHORT, *options, "run_dir=runs/a")
    assert code == 0, err
    return Path("runs/a/config.yaml")


def test_all_of_the_text_that_is_given_is_measured_however_short(invoke: Invoke, trained: Invoke) -> None:
    run_of(trained)
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


def test_without_data_it_is_what_the_run_held_out(invoke: Invoke, trained: Invoke) -> None:
    run_of(trained, "data.validation_fraction=0.3", "callbacks.samples.prompt=line", "data.validation_bytes=500")
    code, own, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert (code, err) == (0, "")
    part = measured(invoke("ckpt=runs/a", *DATA, "data.validation_fraction=0.3", script="evaluate.py")[1])
    assert measured(own) == part
    assert part[0] == pytest.approx(0.3 * Path("text.txt").stat().st_size, rel=0.01)
    code, out, err = invoke("ckpt=runs/a", "data.context=100000", "data.batch_size=1", script="evaluate.py")
    assert (code, err) == (0, "")  # though there is no such window to train on
    assert measured(out)[0] == part[0]
    assert measured(out) != part


def test_a_path_is_taken_from_the_run_as_it_was_typed(invoke: Invoke, trained: Invoke) -> None:
    config = run_of(trained)
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


def test_a_run_s_text_that_is_not_at_hand_is_one_line(invoke: Invoke, trained: Invoke, lines: str) -> None:
    config = run_of(trained, "attn=favor")
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


def test_a_run_s_config_is_read_as_a_stranger_s(invoke: Invoke, trained: Invoke) -> None:
    config = run_of(trained)
    config.write_text(config.read_text().replace("performer_lm.data.sources.files", "os.system"))
    code, out, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert (code, out, err) == (2, "", f"error: {config.resolve()} does not say what text the run had\n")


def test_a_model_that_gives_no_number_is_told_by_its_exit_code(invoke: Invoke, trained: Invoke) -> None:
    run_of(trained)
    for path in Path("runs/a/checkpoints").glob("step=*.ckpt"):
        content = torch.load(path, weights_only=True)
        content["state_dict"]["model.head.weight"][0] = float("nan")
        checkpoint.save(content, path)
    code, _, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert code in (2, 3)  # opened or not, a number that is none is not printed
    assert "not finite" in err


SMALL = ["task=approximation", "task.num_features=[4,8]", "task.redraws=2", "task.queries=8", "task.tokens=12"]
APPROXIMATED = {
    "local heads": (["attn=favor", "model.local_heads=1", "model.local.window=16"], {"layer0": 1, "layer1": 1}),
    "hybrid": (["attn=hybrid", "attn.pattern=[flash,favor]"], {"layer1": 2}),
    "qk norm": (["attn=favor", "model.qk_norm=4", "data.documents=packed"], {"layer0": 2, "layer1": 2}),
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


def test_what_cannot_be_compared_is_one_line(invoke: Invoke, trained: Invoke) -> None:
    for attn in ("favor", "flash"):
        code, _, err = trained(*SHORT, f"attn={attn}", f"run_dir=runs/{attn}")
        assert code == 0, err
    for run, arguments, message in (
        ("flash", [], "this model runs none (attn=flash); attn=favor opens the same weights"),
        ("favor", ["attn=exact"], "this model runs none (attn=exact)"),
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


def test_bits_per_byte_is_perplexity_by_its_earlier_name(invoke: Invoke, trained: Invoke) -> None:
    run_of(trained)
    found = [invoke("ckpt=runs/a", task, script="evaluate.py") for task in ("task=perplexity", "task=bits_per_byte")]
    assert found[0] == found[1]
    assert re.search(r"accuracy [\d.]+, perplexity [\d.]+\n", found[0][1])
    size, bits = measured(found[0][1])
    for option in ("task.stride=16", "task.carry=true"):
        code, out, err = invoke("ckpt=runs/a", "task=bits_per_byte", option, script="evaluate.py")
        assert (code, err, measured(out)[0]) == (0, "", size)
        assert measured(out)[1] == pytest.approx(bits, rel=0.05)
        assert ("256-512" in out) == (option == "task.carry=true")  # positions past the 64 of training
    both = refused(invoke, "ckpt=runs/a", "task.stride=16", "task.carry=true")
    assert "stride moves windows that overlap and carry reads documents whole: give one of them" in both
    assert "task.stride (65) must be at most data.context (64)" in refused(invoke, "ckpt=runs/a", "task.stride=65")
    cropped = ["ckpt=runs/a", *DATA, "data.documents=cropped", "data.validation_path=notes", "task.carry=true"]
    Path("notes").mkdir()
    for index in range(9):
        Path(f"notes/{index}.txt").write_text("some words " * 20)
    invoke(*cropped[:-1], script="evaluate.py")  # which tokenizes them
    assert "these windows do not go on from one another" in refused(invoke, *cropped)


def test_generation_is_held_against_the_forward(invoke: Invoke, trained: Invoke) -> None:
    run_of(trained)
    code, out, err = invoke("ckpt=runs/a", "task=prefix", script="evaluate.py")
    assert (code, err) == (0, "")
    assert re.search(r"largest difference of logits [\d.e-]+, at token \d+ of window [01]: of id \d+", out)
    code, out, err = invoke("ckpt=runs/a", "task=prefix", "task.tolerance=0", script="evaluate.py")
    assert code == 1
    assert re.fullmatch(r"error: generation differs from the forward by .* above task.tolerance \(0\)\n", err)


def test_each_backend_is_measured_or_says_why_not(invoke: Invoke, trained: Invoke) -> None:
    run_of(trained, "attn=favor", "seed=3")
    narrow = ["task=backends", "task.windows=2", "task.backends.favor.num_features=0"]
    assert "task.backends.favor.num_features must be at least 1, got 0" in refused(invoke, "ckpt=runs/a", *narrow)
    wrong = ["task.backends.hybrid.pattern=[favor,nope]", "~task.backends.chunked"]
    code, out, err = invoke("ckpt=runs/a", *narrow[:2], *wrong, script="evaluate.py")
    assert (code, err) == (0, "")
    lines = {line["backend"]: line for line in table_of("runs/a/backends.csv")}
    named = {path.stem for path in Path(__file__).parents[1].glob("configs/attn/*.yaml")}
    assert lines.keys() == {"as trained", *named} - {"chunked"}
    assert "attn.pattern: no backend 'nope'" in lines["hybrid"]["note"]
    assert not lines.pop("hybrid")["bits_per_byte"]
    assert all(float(line["tokens_per_second"]) > 0 for line in lines.values())
    assert lines["favor"]["bits_per_byte"] == lines["as trained"]["bits_per_byte"]
    assert float(lines["flash"]["bits_per_byte"]) == pytest.approx(float(lines["exact"]["bits_per_byte"]), rel=1e-4)
    assert "drawn anew" in lines["delta"]["note"]
    assert "no backend 'nope'" in out


def test_a_task_is_asked_for_more_than_it_was_trained_on(invoke: Invoke) -> None:
    task = ["data=synthetic", "data/task=recall", "data.task.vocab_size=20", "data.context=24", "data.batch_size=4"]
    run = [
        "debug=fast",
        *task,
        "data.task.pairs=2",
        "data.validation_bytes=64",
        "trainer.max_steps=2",
        "run_dir=runs/a",
    ]
    code, _, err = invoke(*run, "trainer.precision=32-true", "callbacks.samples.max_new_tokens=4")
    assert code == 0, err
    for attn in ([], ["attn=exact"]):
        code, out, err = invoke("ckpt=runs/a", "task=recall", "task.rows=3", *attn, script="evaluate.py")
        assert (code, err) == (0, "")
        cells = table_of("runs/a/recall.csv")
        assert {cell["length"] for cell in cells} == {"24", "48", "96", "192"}
        assert {cell["row"] for cell in cells if cell["grid"] == "size"} == {"2", "4", "8"}  # 16 pairs need more ids
        for length in ("24", "192"):
            depths = [cell for cell in cells if (cell["grid"], cell["length"]) == ("depth", length)]
            assert sum(int(cell["answers"]) for cell in depths) == 3 * 2
        assert Path("runs/a/recall.png").read_bytes().startswith(b"\x89PNG")
        assert "Recall, trained on 24 tokens, size 2" in out
    written = Path("runs/a/recall.csv").read_text()
    for option, message in (
        ("task.sizes=[2,10]", "task.sizes: data.task.vocab_size (20) must be at least 22 for 10 pairs"),
        ("task.lengths=[2,3]", "task.lengths: 2, 3 tokens are too few for a row of the task"),
        ("task.depths=0", "task.depths must be at least 1, got 0"),
    ):
        assert message in refused(invoke, "ckpt=runs/a", "task=recall", option)
    assert Path("runs/a/recall.csv").read_text() == written


def test_a_model_is_told_which_measures_are_not_for_it(invoke: Invoke, trained: Invoke) -> None:
    code, _, err = invoke(*SHORT, *KINDS["mlm"][0], "run_dir=runs/mlm")
    assert code == 0, err
    for task in ("copying", "prefix", "recall"):
        expected = (
            f"error: task={task} is for models that predict each next token (objective=clm), which this one does not\n"
        )
        assert refused(invoke, "ckpt=runs/mlm", f"task={task}") == expected
    assert "task=perplexity with task.carry is for models" in refused(invoke, "ckpt=runs/mlm", "task.carry=true")
    code, _, err = invoke("ckpt=runs/mlm", "task=backends", "task.windows=1", script="evaluate.py")
    assert (code, err) == (0, "")
    lines = table_of("runs/mlm/backends.csv")
    assert {line["state_bytes"] for line in lines} == {""}
    assert lines[0]["bits_per_byte"]
    run_of(trained)
    assert "task=recall asks a model that was trained on data=synthetic" in refused(
        invoke, "ckpt=runs/a", "task=recall"
    )
