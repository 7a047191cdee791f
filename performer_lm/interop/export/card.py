"""README.md of an exported model: what it is, what it was trained on, and how to use it."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class Training(NamedTuple):
    """Facts of a model's training, for its card; None where they were not recorded."""

    steps: int
    data: Mapping[str, Any] | None = None  # the section of the run's config
    bits_per_byte: float | None = None

    @property
    def context(self) -> int | None:
        """Return the tokens of a window."""
        return None if self.data is None else self.data.get("context")

    @property
    def tokens(self) -> int | None:
        """Return the number of tokens that were trained on."""
        return None if self.data is None else self.steps * self.data["context"] * self.data["batch_size"]


CARD = """\
---
license: unknown  # fill in: the licence under which you give these weights away
library_name: transformers
pipeline_tag: text-generation
tags: [performer-lm{tag}]
---

# {name}

A causal language model of {parameters:,} parameters, trained with performer-lm.

| | |
|---|---|
| layers | {layers} |
| vocabulary | {vocabulary:,} tokens |
| steps | {steps:,} |
| tokens trained on | {tokens} |
| bits per byte on held-out text | {bits_per_byte} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of the repository
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
{code}
## Data

```json
{data}
```

## Model

```json
{model}
```
"""
CODE = """
`modeling_performer.py` holds performer-lm's own sources and needs torch and transformers alone. Text is continued from
a state of each layer, which does not grow where `layer_types` says `linear_attention`. It can be kept and reordered,
but not cropped: beam search works, assisted generation does not. Shorter prompts of a batch are padded on the left.
"""


def write_card(
    name: str,
    *,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    parameters: int,
    training: Training,
) -> str:
    """Return the text of README.md.

    Args:
        name: of the model.
        config: as in config.json.
        model: the section that it was built from.
        parameters: their number.
        training: what is known of it.
    """
    own = "auto_map" in config
    kinds = {kind: config["layer_types"].count(kind) for kind in dict.fromkeys(config["layer_types"])}
    unknown = "not recorded"
    data = None if training.data is None else {k: v for k, v in training.data.items() if k != "cache_dir"}
    return CARD.format(
        name=name,
        tag=", performer, linear-attention" if "linear_attention" in kinds else "",
        parameters=parameters,
        layers=", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        vocabulary=config["vocab_size"],
        steps=training.steps,
        tokens=unknown if training.tokens is None else f"{training.tokens:,}",
        bits_per_byte=unknown if training.bits_per_byte is None else f"{training.bits_per_byte:.3f}",
        trust=", trust_remote_code=True" if own else "",
        code=CODE if own else "",
        data=json.dumps(data, indent=2) if data else unknown,
        model=json.dumps(model, indent=2),
    )
