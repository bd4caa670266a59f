"""Writes the rows of all samples as Parquet, for `launch evaluate NAME rows=PATH`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.engine.rows import Column, entries
from launcher.errors import ConfigError, StorageError

_GROUP = 65_536  # rows of a row group, which bounds the memory for the conversion


def check_target(path: Path) -> None:
    """Raise ConfigError if the file cannot be created."""
    if path.suffix != ".parquet":
        raise ConfigError(f"rows={path} must be a path that ends in .parquet.", key="rows")
    if not path.parent.is_dir():
        raise ConfigError(f"rows={path}: the folder {path.parent} does not exist. Create it first.", key="rows")


def write_rows(path: Path, sets: Sequence[tuple[str, Column | Mapping[str, Column]]]) -> None:
    """Write the rows of several data sets to one file; it appears when it is complete.

    The columns are `set` (`val`, `test`, or `val/<name>`), `index` (the number of the sample in its set), and those of
    the model; rows that are not a mapping are the column `row`.

    Raises:
        StorageError: the file cannot be written, or the entries of a column have no common type.
    """
    import pyarrow as pa
    from pyarrow import parquet

    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer: Any = None
    try:
        for name, rows in sets:
            columns = dict(rows) if isinstance(rows, Mapping) else {"row": rows}
            length = len(next(iter(columns.values())))
            for start in range(0, length, _GROUP):
                stop = min(start + _GROUP, length)
                arrays = {"set": pa.array([name] * (stop - start)), "index": pa.array(range(start, stop), pa.int64())}
                arrays.update({key: _array(column[start:stop]) for key, column in columns.items()})
                table = pa.table(arrays)
                writer = writer or parquet.ParquetWriter(partial, table.schema)
                writer.write_table(table)
        if writer is not None:
            writer.close()
            os.replace(partial, path)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise StorageError(
            f"The rows cannot be written to {path}: {error}. Choose another path, or return entries of one type."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _array(column: Column) -> Any:
    import pyarrow as pa

    if isinstance(column, Tensor) and column.ndim == 1 and not column.is_complex():
        narrow = column.is_floating_point() and column.dtype.itemsize < 4  # NumPy has no bfloat16
        return pa.array((column.float() if narrow else column).numpy())
    return pa.array(list(entries(column)))
