"""Tables in Parquet files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from opnp.runtime.files import atomic

__all__ = ["write_table"]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet, atomically."""
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
