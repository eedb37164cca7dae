"""How the readers of a run say what is wrong with a file, and which stage makes it again."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import ArrowException

from opnp.errors import InputError, UnavailableError

__all__ = ["Array", "read_columns", "read_table", "reading", "select", "stale"]

Array = NDArray[Any]


@contextmanager
def reading(path: Path, stage: str) -> Iterator[None]:
    """Tell whatever goes wrong while ``path`` is read in one sentence.

    Args:
        path: the file that is read within the block.
        stage: the stage that makes it.

    Raises:
        InputError: the file is missing or damaged; its ``about`` names the stage.
    """
    about = f"stage:{stage}"
    try:
        yield
    except UnavailableError:  # the storage, not the file
        raise
    except InputError as error:
        error.about = error.about or about
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing.", about) from None
    except (ArrowException, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({reason}).", about) from None


def stale(path: Path, what: str, stage: str) -> InputError:
    """The error for a file that was made with something else than the run has now."""
    return InputError(f"{path} was made with {what}.", f"stage:{stage}")


def select(values: Any, *levels: Iterable[str]) -> Any:
    """The part of nested mappings that has these keys at each level.

    Raises:
        KeyError: a key is absent.
    """
    if not levels:
        return values
    return {key: select(values[key], *levels[1:]) for key in levels[0]}


def read_columns(path: Path, stage: str, columns: Sequence[str]) -> dict[str, Array]:
    """Numeric columns of a CSV file."""
    with reading(path, stage), open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        select(dict.fromkeys(reader.fieldnames or ()), columns)  # even where there are no rows
        return {name: np.array([float(row[name]) for row in rows]) for name in columns}


def read_table(path: Path, stage: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file."""
    with reading(path, stage):
        table = pq.read_table(path, columns=list(columns))
        if missing := [name for name in columns if name not in table.column_names]:
            raise LookupError(f"no column {missing[0]}")
        return table
