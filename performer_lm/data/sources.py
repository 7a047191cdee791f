"""What `data=` chooses: functions from the options of a config to the data of a run."""

from collections.abc import Mapping
from typing import Unpack

from performer_lm.data.corpora.base import Corpus
from performer_lm.data.corpora.files import Files
from performer_lm.data.corpora.hub import Hub
from performer_lm.data.corpora.standard_library import StandardLibrary
from performer_lm.data.text import TextData, TextOptions


def standard_library(**options: Unpack[TextOptions]) -> TextData:
    """Return the source of Python's standard library.

    Args:
        options: of `TextData`.
    """
    return TextData(corpora={"stdlib": StandardLibrary()}, weights=None, **options)


def files(
    *,
    path: str | None,
    include: list[str],
    text_column: str | None,
    validation_path: str | None,
    **options: Unpack[TextOptions],
) -> TextData:
    """Return local files.

    Args:
        path, include, text_column, validation_path: of `Files`.
        options: of `TextData`.
    """
    corpus = Files(path=path, include=include, text_column=text_column, validation_path=validation_path)
    return TextData(corpora={"files": corpus}, weights=None, **options)


def hub(
    *,
    name: str | None,
    config: str | None,
    split: str,
    validation_split: str | None,
    text_column: str,
    revision: str | None,
    **options: Unpack[TextOptions],
) -> TextData:
    """Return a data set of the Hugging Face hub.

    Args:
        name, config, split, validation_split, text_column, revision: of `Hub`.
        options: of `TextData`.
    """
    corpus = Hub(
        name=name,
        config=config,
        split=split,
        validation_split=validation_split,
        text_column=text_column,
        revision=revision,
    )
    return TextData(corpora={"hub": corpus}, weights=None, **options)


def mixture(
    *, corpora: Mapping[str, Corpus], weights: Mapping[str, float] | None, **options: Unpack[TextOptions]
) -> TextData:
    """Return several corpora, mixed by weight.

    Args:
        corpora, weights: of `TextData`.
        options: of `TextData`.
    """
    return TextData(corpora=corpora, weights=weights, **options)
