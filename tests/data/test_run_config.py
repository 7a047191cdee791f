"""The section `data` of a run's config, as a stranger may have written it."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from performer_lm.data.run_config import read_data_section

CONFIGS = str(Path(__file__).parents[2] / "configs")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Return a function from overrides to the config that a run with them leaves."""

    def write(*overrides: str) -> Path:
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            cfg = compose("train", overrides=["run_dir=runs/a", *overrides])
        OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
        return tmp_path / "config.yaml"

    return write


@pytest.mark.parametrize("data", ["stdlib", "files", "hf", "mixture", "synthetic"])
def test_every_run_s_section_is_read_back(config: Callable[..., Path], data: str) -> None:
    path = config(f"data={data}", "data.context=64", "seed=3")
    section = read_data_section(path)
    plain = OmegaConf.to_container(OmegaConf.load(path).data)
    assert isinstance(plain, dict)
    assert section == {**plain, **({"tokenizer": None} if data != "synthetic" else {})}
    assert (section["context"], section["seed"]) == (64, 3)


def test_texts_are_taken_as_they_are(config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush")
    texts = ["${oc.env:SECRET}", "${seed}", "${", "???", r"\\${x}", "2026-01-01", "1e3", "null", "a: b # c"]
    path = config("data=files")
    quoted = "".join(f"  - {json.dumps(text)}\n" for text in texts)
    path.write_text(path.read_text().replace("  include:\n", f"  include:\n{quoted}"))
    assert read_data_section(path)["include"][: len(texts)] == texts


FILES = "_target_: performer_lm.data.sources.files"
PATH = "\n  path: null"
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (None, "", "does not say what text the run had"),
        (None, "data: 5", "does not say what text the run had"),
        (None, "- data", "does not say what text the run had"),
        (None, "data: {path: text.txt}", "does not say what text the run had"),
        (None, "[" * 100_000, "is not the config of a run: it is nested too deeply"),
        (None, "[\n" * 50_000, "is not the config of a run: it is nested too deeply"),
        (None, "- " * 50_000, "is not the config of a run: it is nested too deeply"),
        (None, "data: \0", "is not the config of a run"),
        (None, "data: \udcff", "is not the config of a run"),
        (FILES, "_target_: performer_lm.data.progress.say", "does not say what text the run had"),
        (FILES, "_target_: os.system", "does not say what text the run had"),
        (FILES, "_target_: performer_lm.data.sources.os.system", "'performer_lm.data.sources.os.system': no module"),
        (FILES, f"{FILES}\n  _partial_: true", "does not say what text the run had"),
        (PATH, "\n  path: {_target_: shutil.copy, src: a, dst: b}", "does not say what text the run had"),
        (PATH, "\n  path: [{_target_: shutil.copy, src: a, dst: b}]", "does not say what text the run had"),
        (PATH, "\n  path: !!python/object/apply:os.system [touch marker]", "is not the config of a run"),
        (PATH, "\n  path: !!binary YQ==", "is not the config of a run: it holds a tag (tag:yaml.org,2002:binary)"),
        (PATH, "\n  ? !!null x\n  : 1", "is not the config of a run: it holds a tag"),
        (PATH, "\n  null: 1", "data.None: unknown key"),
        (PATH, "\n  a._args_: [1]", "does not say what text the run had"),
        (PATH, "\n  path: [a.txt]", "data.path: wanted str or null"),
        (PATH, "\n  paht: a.txt", "data.paht: unknown key; did you mean data.path?"),
        ("seed", f"{BOMB}seed", "is not the config of a run: it holds an alias"),
        ("seed", "# long\n" * 50_000 + "seed", "is not the config of a run: it is longer than 131,072 bytes"),
    ],
)
def test_what_no_run_writes_is_one_line(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = config("data=files")
    content = new if old is None else path.read_text().replace(old, new)
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_data_section(path)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())
    assert sorted(os.listdir(tmp_path)) == ["config.yaml"]


def test_a_config_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml is a named pipe; only regular files are read"):
        read_data_section(tmp_path / "config.yaml")
