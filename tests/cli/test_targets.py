import subprocess
import sys

import pytest

from performer_lm.cli.targets import refused_in_hydra, resolve

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
    "performer_lm.cli.targets.importlib.import_module",
    "performer_lm.cli.targets.importlib",
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
    "performer_lm.cli.targets._within",
]


@pytest.mark.parametrize("path", DANGEROUS)
def test_what_could_run_code_or_touch_files_is_refused(path):
    with pytest.raises(ValueError, match=r"may not be built|no module|no such name"):
        resolve(path)


def test_nothing_outside_the_list_is_imported_on_the_way():
    code = (
        "import sys; from performer_lm.cli.targets import resolve\n"
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


def test_hydra_s_own_section_is_held_to_its_own_list():
    good = {
        "launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"},
        "job_logging": {"handlers": {"console": {"class": "logging.StreamHandler"}}},
    }
    assert list(refused_in_hydra(good)) == []
    bad = {
        "callbacks": {"a": {"_target_": "os.system"}, "b": {"_target_": "hydra.utils.get_method", "path": "os.system"}},
        "job_logging": {"handlers": [{"class": "evil.Handler"}, {"()": "logging.config.fileConfig"}]},
    }
    assert [line.partition(":")[0] for line in refused_in_hydra(bad)] == [
        "hydra.callbacks.a._target_",
        "hydra.callbacks.b._target_",
        "hydra.job_logging.handlers[0].class",
        "hydra.job_logging.handlers[1].()",
    ]
