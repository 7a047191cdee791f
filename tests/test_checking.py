from performer_lm.checking import Checker

WHOLE = {"_target_": "performer_lm.sample.Whole", "dim": 4, "vocab_size": 3}


def problems(tree, **options):
    """Return the problems of plain data, one line each."""
    checker = Checker(**options)
    checker.visit(tree, "")
    return checker.lines()


def test_text_in_plain_data_is_no_interpolation(sample):
    assert problems({"model": {**WHOLE, "name": "${seed}"}, "free": "???"}, keys={"free": str}) == []
    assert problems({"model": {**WHOLE, "heads": "${seed}"}}) == ["model.heads: wanted int, got '${seed}' (str)"]


def test_a_key_has_one_problem_and_all_keys_are_told(sample):
    tree = {"model": {**WHOLE, "dmi": 3, "flag": 1, "part": {"_target_": "os.system"}}, "other": 2}
    assert problems(tree, keys={"seed": int}) == [
        "model.dmi: unknown key; did you mean model.dim?",
        "model.flag: wanted bool, got 1 (int)",
        f"model.part._target_: {refusal()}",
        "other: unknown key",
    ]


def test_what_stands_elsewhere_is_told_there_alone(sample):
    tree = {"size": "x", "model": {**WHOLE, "heads": "x"}}
    assert problems(tree, keys={"size": int}, references={"model.heads": "size"}) == ["size: wanted int, got 'x' (str)"]


def refusal():
    from performer_lm.building import ALLOWED

    return f"'os.system' may not be built from a config; allowed: {', '.join(ALLOWED)}"
