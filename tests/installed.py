"""Build the default model, find the server's page, and refuse unless the package is the one below the folder given.

`.ci/run` runs this as a script where there is no repository: python installed.py FOLDER
"""

import sys
from importlib.resources import files
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import performer_lm
from performer_lm.building import build

folder = Path(sys.argv[1]).resolve()
assert Path(performer_lm.__file__).resolve().is_relative_to(folder), performer_lm.__file__
for page in ("index.html", "page.js"):
    assert (files("performer_lm") / "serving/page" / page).is_file(), page
with initialize_config_dir(str(files("performer_lm") / "configs"), version_base="1.3"):
    cfg = compose("train", overrides=["attn=hybrid"])
section = OmegaConf.to_container(cfg.model, resolve=True)
with torch.inference_mode():
    logits = build(section, more={"vocab_size": 300}).eval()(torch.zeros(1, 8, dtype=torch.int64))
assert logits.shape == (1, 8, 300)
print(f"{Path(performer_lm.__file__).parent} builds the model of its own configs")
