"""Tables of images: Parquet files and Arrow streams, as Hugging Face's `datasets` writes them; read by pyarrow."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4vit_fx.data.pictures import Content, Images, Numbered
from ptq4vit_fx.errors import failure, foreign, some_names, unknown_name
from ptq4vit_fx.inputs.sizes import check_memory

#: Names that columns of images and of class numbers have, where there are several.
IMAGES = ("image", "img", "jpg", "png", "picture", "photo")
LABELS = ("label", "labels", "cls", "class", "target", "fine_label")


@dataclass(frozen=True)
class Table:
    """A file of rows. schema: pyarrow's. row: what a column holds in a row. column: all of it."""

    path: Path
    rows: int
    schema: Any
    row: Callable[[str, int], Any]
    column: Callable[[str], list[Any]]


def open_table(path: Path, *, entry: str | None, labelled: bool) -> Images:
    """Return the images of a Parquet file, or of an Arrow file, of the column `entry` or of the only one."""
    return open_tables(path, [path], entry=entry, labelled=labelled)


def open_tables(data: Path, paths: Iterable[Path], *, entry: str | None = None, labelled: bool = False) -> Images:
    """Return the images of several files of one set, and the class numbers and names that `datasets` keeps with them.

    Raises PTQError without pyarrow, on damaged files, and where the columns do not say which of them is meant.
    """
    tables = []
    for path in paths:
        with foreign("read images", str(path), expected="a whole table", do="download or write it again"):
            tables.append(_parquet(path) if path.suffix.lower() == ".parquet" else _arrow(path))
    if not sum(table.rows for table in tables):
        raise failure("read images", str(data), expected="a row or more", got="none", do="check the data set")
    column = _image_column(data, tables[0].schema, entry)
    items = _rows(tables, column)
    label = _label_column(data, tables[0].schema) if labelled else None
    if label is None:
        return Images(items)
    numbers: list[Any] = []
    for table in tables:
        with foreign("read images", f"{table.path}: {label}", expected="class numbers", do="write it again"):
            numbers += table.column(label)
    return Images(items, [-1 if number is None else number for number in numbers], _names(tables[0].schema, label))


def _pyarrow(path: Path) -> Any:
    """Return pyarrow with its readers; raises PTQError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        do = "pip install ptq4vit-fx[data]"
        raise failure("read images", str(path), expected="pyarrow, which reads it", got="none", do=do) from error
    return pyarrow


def _parquet(path: Path) -> Table:
    """Open a Parquet file; a row group is held at a time."""
    file = _pyarrow(path).parquet.ParquetFile(path)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]

    @functools.lru_cache(maxsize=1)
    def values(group: int, column: str) -> Any:
        size = groups[group].total_byte_size
        check_memory("read images", str(path), size, what=f"row group {group}", do="write it in smaller row groups")
        return file.read_row_group(group, columns=[column]).column(0)

    def row(column: str, number: int) -> Any:
        for group, facts in enumerate(groups):
            if number < facts.num_rows:
                return values(group, column)[number].as_py()
            number -= facts.num_rows
        raise ValueError("the file ends before it")

    def whole(column: str) -> list[Any]:
        found: list[Any] = file.read(columns=[column]).column(0).to_pylist()
        return found

    return Table(path, file.metadata.num_rows, file.schema_arrow, row, whole)


def _arrow(path: Path) -> Table:
    """Open a stream or a file of Arrow, mapped into memory and not read."""
    arrow = _pyarrow(path)
    source = arrow.memory_map(str(path))
    is_file = bytes(source.read(6)) == b"ARROW1"
    source.seek(0)
    table = (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(source).read_all()
    whole = lambda column: table.column(column).to_pylist()  # noqa: E731
    return Table(path, table.num_rows, table.schema, lambda column, number: table.column(column)[number].as_py(), whole)


def _rows(tables: Sequence[Table], column: str) -> Numbered:
    """Return the rows of several tables as pictures, numbered through."""
    starts = [0, *itertools.accumulate(table.rows for table in tables)]

    def place(number: int) -> tuple[Table, int]:
        found = bisect.bisect_right(starts, number) - 1
        return tables[found], number - starts[found]

    def name(number: int) -> str:
        table, row = place(number)
        return f"{table.path}: row {row}"

    return Numbered(starts[-1], name, lambda number: _picture(*place(number), column))


def _picture(table: Table, number: int, column: str) -> Content:
    """Return what a row has of its picture: bytes, or the path of a file beside the table."""
    value = table.row(column, number)
    if isinstance(value, dict):
        if value.get("bytes") is None and isinstance(value.get("path"), str):
            return Path(table.path.parent, value["path"])
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError("no image in it")
    return value


def _image_column(data: Path, schema: Any, entry: str | None) -> str:
    """Return the name of the column of images: bytes, or structs of bytes and a path."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if entry is not None:
        if entry not in found:
            raise unknown_name("read images", str(data), entry, found)
        return entry
    named = [name for name in IMAGES if name in found][:1] or found
    if len(named) == 1:
        return named[0]
    if not named:
        got, do = some_names(schema.names) or "no column", "store encoded images, as `datasets` does"
        raise failure("read images", str(data), expected="a column of bytes", got=got, do=do)
    do = f"name it: {data}:{named[0]}"
    raise failure("read images", str(data), expected="one column of images", got=some_names(named), do=do)


def _holds_bytes(kind: Any) -> bool:
    fields = [kind.field(number) for number in range(kind.num_fields)] if str(kind).startswith("struct") else []
    return str(kind) in ("binary", "large_binary") or any(f.name == "bytes" and _holds_bytes(f.type) for f in fields)


def _label_column(data: Path, schema: Any) -> str | None:
    """Return the name of the column of class numbers; None if there is none."""
    found = [field.name for field in schema if str(field.type).lstrip("u").startswith("int")]
    named = [name for name in LABELS if name in found][:1] or found
    if len(named) > 1:
        do = f"call it {LABELS[0]}"
        raise failure("read images", str(data), expected="one column of class numbers", got=some_names(named), do=do)
    return named[0] if named else None


def _names(schema: Any, label: str) -> tuple[str, ...]:
    """Return the names of the classes that `datasets` writes into a schema; () if there are none."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names: Sequence[Any] = said["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
