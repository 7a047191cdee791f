import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from performer_lm.building import build, escape, resolve

DANGEROUS = [
    "os.system",
    "subprocess.run",
    "torch.load",
    "pandas.read_pickle",
    "numpy.load",
    "builtins.open",
    "pathlib.Path.write_text",
    "shutil.copy",
    "performer_lm.checkpoint.shutil.copy",
    "performer_lm.building.importlib.import_module",
    "performer_lm.building.importlib",
    "torch.optim.lr_scheduler.partial",
    "torch.optim.optimizer.torch.load",
    "hydra.utils.get_method",
    "lightning.pytorch.core.saving.load_hparams_from_yaml",
    "performer_lmx.thing",
    "eval",
    "",
    ".",
    "performer_lm.",
    "performer_lm..cli",
    "performer_lm.building._within",
    "performer_lm.writing.replace_text",
    "performer_lm.data.run_config.read_data_section",
    "performer_lm.evaluation.measured_text.open_data",
    "performer_lm.generation.interactive.interact",
    "performer_lm.generation.states.save_state",
    "performer_lm.serving.server.open_socket",
]


@pytest.mark.parametrize("path", DANGEROUS)
def test_what_could_run_code_or_touch_files_is_refused(path):
    with pytest.raises(ValueError, match=r"may not be built|no module|no such name"):
        resolve(path)


def test_nothing_outside_the_list_is_imported_on_the_way():
    code = (
        "import sys; from performer_lm.building import resolve\n"
        "for path in ['pandas.read_pickle', 'numpy.load', 'torch.load', 'shelve.open', 'ftplib.FTP']:\n"
        "    try: resolve(path)\n"
        "    except ValueError: pass\n"
        "    else: raise SystemExit(path)\n"
        "raise SystemExit(bool({'pandas', 'numpy', 'torch', 'shelve', 'ftplib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_what_a_config_builds_is_found(sample):
    import torch

    assert resolve("torch.optim.AdamW") is torch.optim.AdamW
    assert resolve("torch.optim.lr_scheduler.CosineAnnealingLR") is torch.optim.lr_scheduler.CosineAnnealingLR
    assert resolve("performer_lm.sample.Whole") is sample.Whole
    assert resolve("performer_lm.sample.takes_anything") is sample.takes_anything


@pytest.mark.parametrize("name", ["borrowed", "number"])
def test_a_name_defined_elsewhere_or_no_callable_is_refused(sample, name):
    with pytest.raises(ValueError, match="not a class or function defined there"):
        resolve(f"performer_lm.sample.{name}")


def test_a_misspelled_name_gets_the_nearest(sample):
    with pytest.raises(ValueError, match=r"did you mean performer_lm\.sample\.Whole\?"):
        resolve("performer_lm.sample.Whol")


@pytest.mark.slow
def test_lightning_s_trainer_callbacks_and_loggers_are_found():
    import lightning.pytorch as pl

    for path in ("lightning.Trainer", "lightning.pytorch.Trainer", "lightning.pytorch.trainer.Trainer"):
        assert resolve(path) is pl.Trainer
    for path in (
        "callbacks.ModelCheckpoint",
        "loggers.CSVLogger",
        "strategies.DDPStrategy",
        "profilers.SimpleProfiler",
    ):
        resolve(f"lightning.pytorch.{path}")


PART = {"_target_": "performer_lm.sample.Part", "size": 1}
WHOLE = {"_target_": "performer_lm.sample.Whole", "dim": 4, "vocab_size": 3}


def test_a_section_becomes_its_object_with_those_inside(sample):
    built = build({"a": [PART, 3], "b": None, "c": {**WHOLE, "part": PART, "make_part": {**PART, "_partial_": True}}})
    assert isinstance(built["a"][0], sample.Part)
    assert (built["a"][1], built["b"], built["c"].dim) == (3, None, 4)


def test_a_partial_section_is_a_factory_that_takes_the_rest(sample):
    factory = build({"_target_": "performer_lm.sample.Part", "_partial_": True, "scale": 2.0})
    assert (factory(size=3).size, factory(size=3, scale=4.0).scale) == (3, 4.0)


@pytest.mark.parametrize(
    ("attempt", "problem"),
    [
        (lambda: build({**WHOLE, "dim": 5}, key="model"), "model: dim (5) must be a multiple of heads (2)"),
        (lambda: build({**PART, "size": 9}, key="a"), "a: size is too large"),
        (lambda: build({**PART, "size": -1}, key="a"), "a.size must be at least 0, got -1"),
        (lambda: build({"a": [{**WHOLE, "dim": 5}]}, key="b"), "b.a[0]: dim (5) must be a multiple of heads (2)"),
        (lambda: build({"_target_": WHOLE["_target_"], "dim": 4}, key="model"), "model.vocab_size: missing"),
        (lambda: build({**PART, "_partial_": True}, key="p")(sise=1), "p: got an unexpected keyword argument 'sise'"),
        (lambda: build({"_target_": "os.system"}), "'os.system' may not be built from a config; allowed: "),
    ],
)
def test_what_cannot_be_built_is_told_with_its_place(sample, attempt, problem):
    with pytest.raises(ValueError, match=re.escape(problem)) as raised:
        attempt()
    assert str(raised.value).startswith(problem)


@pytest.mark.parametrize("text", ["${seed}", r"a\${seed}\\${x}", "???", "$", "", "{}"])
def test_escaped_text_is_read_as_it_was(text):
    assert OmegaConf.create({"seed": 1, "a": escape(text)}).a == text
