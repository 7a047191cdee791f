"""The column of a table that holds the text, by its name; `meta.text` is the field `text` of the column `meta`."""

from collections.abc import Sequence
from typing import Any, Final

from performer_lm.wording import did_you_mean

TEXT_TYPES: Final = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def pick_column(name: str, columns: Sequence[str], *, where: str) -> str:
    """Return `name` if it is one of the columns, or raise ValueError with the nearest, and all where there are few."""
    if name in columns:
        return name
    hint = did_you_mean(name, columns, prefix="data.text_column=", cutoff=0.4)
    listed = f" (columns: {', '.join(columns)})" if 0 < len(columns) <= 16 else ""
    raise ValueError(f"{where} has no column '{name}'{hint}{listed}")


def pick_outer(name: str, columns: Sequence[str], *, where: str) -> str:
    """Return the column that `name` is, or that it is a field of, or raise ValueError with the nearest."""
    return name if name in columns else pick_column(name.partition(".")[0], columns, where=where)


def texts_of(batch: Any, name: str, *, where: str) -> list[bytes | None]:
    """Return the texts in a column of an arrow table, UTF-8 or not, or raise ValueError for another type."""
    from pyarrow import compute, large_binary, types  # comes with datasets

    outer = pick_outer(name, batch.schema.names, where=where)
    found = batch.column(batch.schema.names.index(outer))
    for field in name.removeprefix(outer).split(".")[1:]:
        fields = [f"{outer}.{each.name}" for each in found.type] if types.is_struct(found.type) else []
        outer = pick_column(f"{outer}.{field}", fields, where=where)
        found = compute.struct_field(found, [field])
    kind = found.type.value_type if types.is_dictionary(found.type) else found.type
    if str(kind) not in TEXT_TYPES:
        raise ValueError(f"{where}: column '{name}' holds {found.type}, not text")
    texts: list[bytes | None] = found.cast(large_binary()).to_pylist()
    return texts
