"""Data sets of the Hugging Face hub, or of a local folder in the same form, through HF `datasets`."""

import difflib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, final

from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.columns import pick_outer, texts_of
from performer_lm.data.progress import say
from performer_lm.wording import did_you_mean, first_line

ROWS_AT_ONCE: Final = 1000
READERS: Final = ("arrow", "csv", "generator", "json", "parquet", "text")  # folders of the cache that are no data sets


@final
class Hub(Corpus):
    """The rows of a data set, each a document named by split and row.

    The set is downloaded once, by HF `datasets` and into its cache, and read from there in the order it has.

    Args:
        name: on the hub (`roneneldan/TinyStories`), or a local folder.
        config: which of its configurations, where it has several.
        split: rows to train on; a part is `train[:10%]`.
        validation_split: rows to validate on; None holds out some of the others.
        text_column: the column that holds the text, `meta.text` where it lies inside `meta`.
        revision: branch, tag or commit of the set; None for the newest.
    """

    def __init__(
        self,
        *,
        name: str | None,
        config: str | None,
        split: str,
        validation_split: str | None,
        text_column: str,
        revision: str | None = None,
    ) -> None:
        self._name = name
        self._config = config
        self.split: Final = split
        self._validation_split = validation_split
        self.splits: Final = [(split, None)] if validation_split is None else [(split, False), (validation_split, True)]
        self._text_column = text_column
        self._revision = revision

    @property
    def label(self) -> str:
        return f"data.name={self._name}"

    @property
    def validation_label(self) -> str | None:
        return self._validation_split and f"data.validation_split={self._validation_split} of {self.label}"

    def documents(self) -> Iterator[Document]:
        for split, held_out in self.splits:
            for row, text in enumerate(self.texts(self.open(split, streaming=False))):
                yield Document(f"{split}#{row}", text, held_out)

    def texts(self, data: Any) -> Iterator[bytes]:
        """Yield the text of every row of a split from `open`; ValueError for a set that breaks off."""
        try:
            for batch in data.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
                for text in texts_of(batch, self._text_column, where=self.label):
                    yield text or b""
        except ValueError as error:
            raise ValueError(f"{self.label}: {first_line(error).removeprefix(f'{self.label}: ')}") from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self.label} broke off: {first_line(error)}") from error

    def open(self, split: str, *, streaming: bool) -> Any:
        """Return a split of the set, with its text column alone, as HF `datasets` gives it.

        Raises:
            ValueError: in one line, with the nearest name, split, configuration or column where there is one.
        """
        if not self._name:
            raise ValueError("data.name is not given: data=hf needs data.name=NAME, e.g. roneneldan/TinyStories")
        datasets = import_datasets()
        if not Path(self._name).exists():
            say(f"looking up {self._name} on the hub")
        try:
            data = datasets.load_dataset(
                self._name, self._config, split=split, streaming=streaming, revision=self._revision
            )
        except Exception as error:  # a network, a server, an archive and a parser may fail, each in its own way
            raise ValueError(self._explain(error, split)) from error
        columns = data.column_names or list(next(iter(data), {}))
        return data.select_columns([pick_outer(self._text_column, columns, where=self.label)])

    def _explain(self, error: Exception, split: str) -> str:
        said = first_line(error)
        choices = re.findall(r"'([^']+)'", said.partition("[")[2])
        if said.startswith(("Unknown split", "Bad split")):
            return f"data.split={split}: {self._name} has none of that name{_mean('data.split', split, choices)}"
        if said.startswith("BuilderConfig") or said.startswith("Config name is missing"):
            wanted = self._config or ""
            return f"data.config={self._config}: {self._name} wants another{_mean('data.config', wanted, choices)}"
        near = difflib.get_close_matches(str(self._name), _at_hand(), n=1, cutoff=0.4)
        hint = f"; at hand on this machine: data.name={near[0]}" if near else "; data=files reads local files"
        if isinstance(error, ConnectionError):
            return f"{self.label} is not in the local cache, and the hub cannot be reached{hint}"
        return f"{self.label} cannot be opened: {said[:200]}{hint}"


def import_datasets() -> Any:
    """Return HF `datasets`, quiet, or raise ValueError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"hub data need the package '{error.name}': pip install datasets") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # every retry, where there is no network
    return datasets


def _mean(key: str, name: str, choices: list[str]) -> str:
    hint = did_you_mean(name, choices, prefix=f"{key}=", cutoff=0.4)
    return f"{hint} (choices: {', '.join(choices)})" if choices else hint


def _at_hand() -> list[str]:
    """Return the names that can be opened without a network: those in the cache, and folders here."""
    cache = Path(import_datasets().config.HF_DATASETS_CACHE)
    cached = [path.name.replace("___", "/") for path in cache.glob("*") if path.is_dir() and path.name not in READERS]
    return [*cached, *{path.parent.name for kind in ("jsonl", "parquet", "csv") for path in Path().glob(f"*/*.{kind}")}]
