"""What `data=` chooses: functions from the options of a config to the data of a run."""

from collections.abc import Mapping
from typing import Unpack

from performer_lm.data.corpora.base import Corpus
from performer_lm.data.corpora.files import Files
from performer_lm.data.corpora.hub import Hub
from performer_lm.data.corpora.standard_library import StandardLibrary
from performer_lm.data.module import WindowData
from performer_lm.data.streaming.data import StreamData
from performer_lm.data.text import TextData, TextOptions
from performer_lm.ranges import Count, NotNegative, ranged


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
    """Return local files; all arguments but `options` are those of `Files`.

    Args:
        options: of `TextData`.
    """
    corpus = Files(path=path, include=include, text_column=text_column, validation_path=validation_path)
    return TextData(corpora={"files": corpus}, weights=None, **options)


@ranged
def hub(
    *,
    name: str | None,
    config: str | None,
    split: str,
    validation_split: str | None,
    text_column: str,
    revision: str | None,
    streaming: bool,
    shuffle_buffer: Count,
    head_bytes: Count,
    **options: Unpack[TextOptions],
) -> WindowData:
    """Return a data set of the Hugging Face hub; arguments not listed here are those of `Hub`.

    Args:
        streaming: whether to read it while the run goes on; then nothing of it is stored.
        shuffle_buffer: of `StreamData`; without streaming, all windows are shuffled.
        head_bytes: of `StreamData`.
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
    if not streaming:
        return TextData(corpora={"hub": corpus}, weights=None, **options)
    if options["device_resident"] or options["documents"] == "cropped":
        raise ValueError("data.streaming=true takes neither data.device_resident=true nor data.documents=cropped")
    return StreamData(
        hub=corpus,
        tokenizer=options["tokenizer"],
        head_bytes=head_bytes,
        shuffle_buffer=shuffle_buffer,
        packed=options["documents"] == "packed",
        errors=options["errors"],
        validation_fraction=options["validation_fraction"],
        validation_bytes=options["validation_bytes"],
        context=options["context"],
        batch_size=options["batch_size"],
        seed=options["seed"],
        num_workers=options["num_workers"],
        start_method=options["start_method"],
    )


def mixture(
    *, corpora: Mapping[str, Corpus], weights: Mapping[str, NotNegative] | None, **options: Unpack[TextOptions]
) -> TextData:
    """Return several corpora, mixed by weight.

    Args:
        corpora: of `TextData`.
        weights: of `TextData`.
        options: of `TextData`.
    """
    return TextData(corpora=corpora, weights=weights, **options)
