"""Rows on disk: fixed-width shards of arrays and texts that any number of processes write, extend, check and read by global row number.

::

    <root>/<first 20 digits of the key's hash>/
        manifest.json                 schema, key, fields, rows per shard
        000000.activation.npy         one file per field and shard, memory-mapped when read
        000000.document.json
        000000.shard.json             rows and SHA-256 of the shard's files; written last, so its presence says that they are complete

The *key* is everything that decides the values (model and revision, corpus, settings); what merely decides how many rows there are stays
out of it, so that a store can be extended and a subset of it used. Another key is another folder. Global row ``i`` is row ``i % n`` of
shard ``i // n`` whatever the number of processes that wrote them; only a store's last shard may hold fewer than ``n`` rows.

Shards are independent: each rank writes its own, nothing is shared but the folder. A shard whose files are missing, truncated or changed
is found by its hashes and reported as missing. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theodolite.provenance import content_hash, file_hash, write_bytes_atomic, write_json_atomic

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BFLOAT16 = "bfloat16"
"""NumPy has no such type: these bits are kept as ``int16`` and given back as a torch tensor."""
DTYPES = ("float64", "float32", "float16", BFLOAT16, "int64", "int32", "int16", "uint8", "bool")


class DamagedShardError(RuntimeError):
    """A shard's files are not those that its record vouches for."""


@dataclass(frozen=True, slots=True)
class Field:
    """One column of a store.

    Attributes:
        dtype: One of :data:`DTYPES`, or ``json`` for one piece of plain data per row (texts).
        shape: Of one row; empty for scalars and for ``json``.
    """

    dtype: str
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be stored."""
        if self.dtype not in (*DTYPES, "json") or (self.dtype == "json" and self.shape):
            raise ValueError(f"A field of dtype {self.dtype!r} and shape {self.shape} cannot be stored; use one of {(*DTYPES, 'json')}.")

    @property
    def suffix(self) -> str:
        """Of the field's files."""
        return "json" if self.dtype == "json" else "npy"


class RowShards:
    """A store of rows.

    Args:
        root: Folder of stores; made when the first shard is written.
        key: Plain data that decides the values.
        fields: Columns by name.
        rows_per_shard: Of a new store; one that exists keeps its own.

    Raises:
        ValueError: If the folder holds a store of another key or other fields (the message names the first that differs).
    """

    def __init__(self, root: str | Path, key: Mapping[str, Any], fields: Mapping[str, Field], rows_per_shard: int = 1024) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}.")
        self.key: dict[str, Any] = json.loads(json.dumps(dict(key), allow_nan=False))
        self.fields = dict(fields)
        self.folder = Path(root) / content_hash(self.key)[:20]
        self.rows_per_shard = rows_per_shard
        self._verified: dict[Path, tuple[int, int]] = {}
        self._open: dict[tuple[int, str], Any] = {}
        if (self.folder / MANIFEST).is_file():
            self._adopt(json.loads((self.folder / MANIFEST).read_text()))

    @classmethod
    def existing(cls, folder: str | Path) -> RowShards:
        """The store in ``folder`` as its manifest describes it.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The manifest does not belong to the folder.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST}: give the folder of a store of rows.")
        manifest = json.loads(path.read_text())
        fields = {name: Field(field["dtype"], tuple(field["shape"])) for name, field in manifest["fields"].items()}
        store = cls(Path(folder).parent, manifest["key"], fields, manifest["rows_per_shard"])
        if store.folder != Path(folder):
            raise ValueError(f"The key in {path} belongs into a folder called {store.folder.name}: the store was renamed or edited.")
        return store

    def __len__(self) -> int:
        """Rows in the complete shards from the first on; a gap ends the count. Verifies every shard once."""
        rows, shard = 0, 0
        while (found := self.rows_in(shard)) > 0:
            rows, shard = rows + found, shard + 1
            if found < self.rows_per_shard:
                break
        return rows

    def rows_in(self, shard: int) -> int:
        """Rows of a shard that is complete and whose hashes fit; 0 for one that has to be written (again)."""
        try:
            return self._verify(shard)
        except DamagedShardError:
            return 0

    def missing(self, rows: int) -> list[int]:
        """Numbers of the shards that have to be written before the first ``rows`` rows can be read."""
        n = self.rows_per_shard
        return [shard for shard in range(-(-rows // n)) if self.rows_in(shard) < min(n, rows - shard * n)]

    def write(self, shard: int, columns: Mapping[str, np.ndarray | Tensor | Sequence[Any]]) -> None:
        """Write one shard, atomically; one that exists is replaced.

        Args:
            shard: Its number.
            columns: Per field an array or tensor (rows, *shape), or for ``json`` one item per row.

        Raises:
            ValueError: If columns are missing, unknown, or differ from their field in length, shape or dtype.
        """
        rows = self._check(shard, columns)
        if not (self.folder / MANIFEST).is_file():
            described = {name: {"dtype": field.dtype, "shape": list(field.shape)} for name, field in self.fields.items()}
            facts = {"schema_version": SCHEMA_VERSION, "key": self.key, "fields": described, "rows_per_shard": self.rows_per_shard}
            write_json_atomic(self.folder / MANIFEST, facts)
        hashes: dict[str, str] = {}
        for name, field in self.fields.items():
            content = _encode(columns[name], field)
            write_bytes_atomic(self._path(shard, name), content)
            hashes[name] = hashlib.sha256(content).hexdigest()
            self._open.pop((shard, name), None)
        self._verified.pop(self._record(shard), None)
        write_json_atomic(self._record(shard), {"rows": rows, "sha256": hashes})

    def column(self, name: str, shard: int) -> Any:
        """One field of one shard: a memory-mapped array (rows, *shape), or a list for ``json``.

        Raises:
            DamagedShardError: If the shard is missing or not what was written.
        """
        if (shard, name) in self._open:
            return self._open[shard, name]
        self._verify(shard)
        path = self._path(shard, name)
        is_json = self.fields[name].dtype == "json"
        # training asks for a few rows of many shards at every step: parsing a column each time would cost more than the step
        self._open[shard, name] = json.loads(path.read_text()) if is_json else np.load(path, mmap_mode="r", allow_pickle=False)
        return self._open[shard, name]

    def tensor(self, name: str, rows: Sequence[int] | range | slice | Tensor) -> Tensor:
        """Rows of a numeric field as a new tensor (R, *shape), in the order asked for.

        Raises:
            IndexError: If a row lies beyond the rows written.
            DamagedShardError: If a shard is missing or not what was written.
        """
        numbers = self._numbers(rows)
        field = self.fields[name]
        found = np.empty((len(numbers), *field.shape), dtype=_numpy_dtype(field))
        for shard in np.unique(numbers // self.rows_per_shard).tolist():
            here = np.flatnonzero(numbers // self.rows_per_shard == shard)
            column = self.column(name, shard)
            self._offset(int(numbers[here].max()), len(column))
            found[here] = column[numbers[here] - shard * self.rows_per_shard]
        tensor = torch.from_numpy(found)
        return tensor.view(torch.bfloat16) if field.dtype == BFLOAT16 else tensor

    def items(self, name: str, rows: Sequence[int] | range | slice | Tensor) -> list[Any]:
        """Rows of a ``json`` field, in the order asked for; raises as :meth:`tensor` does."""
        numbers = self._numbers(rows)
        found: dict[int, Any] = {}
        for shard in np.unique(numbers // self.rows_per_shard).tolist():
            column = self.column(name, shard)
            for number in numbers[numbers // self.rows_per_shard == shard].tolist():
                found[number] = column[self._offset(number, len(column))]
        return [found[number] for number in numbers.tolist()]

    def _numbers(self, rows: Sequence[int] | range | slice | Tensor) -> np.ndarray:
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        numbers = np.asarray(rows, dtype=np.int64)
        if numbers.size and numbers.min() < 0:
            raise IndexError(f"Row {numbers.min()} of {self.folder} was asked for; rows count from 0.")
        return numbers

    def _offset(self, number: int, rows: int) -> int:
        """A row's place in its shard of ``rows`` rows."""
        shard, offset = divmod(number, self.rows_per_shard)
        if offset >= rows:
            raise IndexError(f"{self.folder} holds no row {number}: shard {shard} has {rows} rows.")
        return offset

    def _verify(self, shard: int) -> int:
        """Rows of a complete shard. The files are hashed once per process, and again when size or time of one of them changes."""
        record = self._record(shard)
        if not record.is_file():
            raise DamagedShardError(f"{self.folder} has no complete shard {shard}: run the stage that writes it.")
        facts = json.loads(record.read_text())
        for name in self.fields:
            path = self._path(shard, name)
            if not path.is_file():
                raise DamagedShardError(f"{path} is missing: run the stage that writes it.")
            status = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._verified.get(path) == status and record in self._verified:
                continue
            if file_hash(path) != facts["sha256"].get(name):
                raise DamagedShardError(f"{path} is not what was written there (its hash differs): run the stage that writes it.")
            self._verified[path] = status
        self._verified[record] = (0, 0)
        return int(facts["rows"])

    def _check(self, shard: int, columns: Mapping[str, np.ndarray | Tensor | Sequence[Any]]) -> int:
        if columns.keys() != self.fields.keys():
            raise ValueError(f"Shard {shard} of {self.folder} needs the columns {sorted(self.fields)}, got {sorted(columns)}.")
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1 or not 1 <= max(lengths) <= self.rows_per_shard:
            raise ValueError(f"The columns of shard {shard} have {sorted(lengths)} rows; need one length from 1 to {self.rows_per_shard}.")
        for name, field in self.fields.items():
            column = columns[name]
            if field.dtype == "json":
                continue
            got = (_dtype_name(column), tuple(column.shape[1:])) if isinstance(column, np.ndarray | Tensor) else type(column).__name__
            if got != (field.dtype, field.shape):
                raise ValueError(f"Column {name!r} of {self.folder} is {(field.dtype, field.shape)} per row, got {got}.")
        return lengths.pop()

    def _adopt(self, manifest: Mapping[str, Any]) -> None:
        """Take the layout of the store that exists, after checking that it is this one."""
        path = self.folder / MANIFEST
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {manifest.get('schema_version')}, this library reads {SCHEMA_VERSION}.")
        described = {name: {"dtype": field.dtype, "shape": list(field.shape)} for name, field in self.fields.items()}
        for what, ours, theirs in (("key", self.key, manifest["key"]), ("fields", described, manifest["fields"])):
            for name in sorted({*ours, *theirs}):
                if ours.get(name) != theirs.get(name):
                    raise ValueError(
                        f"{path} was written with {what}.{name} = {theirs.get(name)!r}, this run has {ours.get(name)!r}: "
                        "use another cache folder or the same settings."
                    )
        self.rows_per_shard = int(manifest["rows_per_shard"])

    def _path(self, shard: int, name: str) -> Path:
        return self.folder / f"{shard:06d}.{name}.{self.fields[name].suffix}"

    def _record(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.shard.json"


def _numpy_dtype(field: Field) -> np.dtype:
    return np.dtype("int16" if field.dtype == BFLOAT16 else field.dtype)


def _dtype_name(column: np.ndarray | Tensor) -> str:
    return str(column.dtype).removeprefix("torch.")


def _encode(column: np.ndarray | Tensor | Sequence[Any], field: Field) -> bytes:
    if field.dtype == "json":
        return json.dumps(list(column), ensure_ascii=False, allow_nan=False).encode()
    if isinstance(column, Tensor):
        column = column.detach().cpu().contiguous()
        column = (column.view(torch.int16) if field.dtype == BFLOAT16 else column).numpy()
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(column), allow_pickle=False)
    return buffer.getvalue()
