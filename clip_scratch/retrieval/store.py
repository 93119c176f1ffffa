"""The local store of an index: an SQLite manifest of the images, and their embeddings in one memory-mapped fp16 array.

A row of the manifest names a row of the array. Embeddings are appended and synced before the transaction that names
them, so that a writer killed at any moment leaves what it had committed. Readers see a whole snapshot and never wait
for the writer (SQLite's write-ahead log). Rows of removed images stay in the array until a fifth of it is dead; then a
new generation of the array is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..errors import UserError
from ..files import write_atomically
from .exact import ExactSearch

OWN_COLUMNS = ("row", "path", "size", "mtime_ns", "width", "height", "date", "year", "month", "background")
ANN_FROM = 1_000_000  # images from which an approximate index is built and used
_DEAD = 0.2  # share of dead rows at which the array is rewritten
_WHERE_SECONDS = 20.0
_MOST_VARIABLES = 30_000  # of an SQLite statement
_SCHEMA = """
create table if not exists meta (key text primary key, value);
create table if not exists photos (
  row integer primary key, path text unique not null, size integer, mtime_ns integer,
  width integer, height integer, date text, background real,
  year integer generated always as (cast(substr(date, 1, 4) as integer)) virtual,
  month integer generated always as (cast(substr(date, 6, 2) as integer)) virtual
);
"""


class LocalStore:
    """Images and embeddings of one folder on disk, `dim` numbers each; a context manager.

    A store that is opened for reading follows what a writer commits meanwhile. Raises UserError for a damaged one.
    """

    def __init__(self, folder: Path, dim: int, writing: bool = False):
        self.folder, self.dim = folder, dim
        self._lock = threading.RLock()
        with self._errors():
            self._sql = _connect(folder / "manifest.sqlite", writing)
            if writing:
                self._sql.executescript(_SCHEMA)
            self._version = None
            self._refresh()

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._sql.close()

    def __len__(self) -> int:
        with self._errors():
            return self._sql.execute("select count(*) from photos").fetchone()[0]

    @property
    def columns(self) -> list[str]:
        """The names that a `where` may use."""
        with self._errors():
            return [name for _, name, *_ in self._sql.execute("pragma table_xinfo(photos)") if name != "row"]

    # ---- writing

    def known(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every image by its path."""
        with self._errors():
            return {p: (s, t) for p, s, t in self._sql.execute("select path, size, mtime_ns from photos")}

    def add_columns(self, types: dict[str, str]) -> None:
        """Make sure of columns of a captions table, by their SQLite types."""
        with self._errors(), self._sql:
            for name in types.keys() - set(self.columns):
                self._sql.execute(f"alter table photos add column {_quoted(name)} {types[name]}")

    def add(self, records: Sequence[dict], embeddings: np.ndarray) -> None:
        """Add images, or replace those of the same paths: records by column, embeddings (N, dim)."""
        if not len(records):
            return
        first = self._rows
        with self._errors():
            with open(self._array_path, "r+b" if self._array_path.exists() else "wb") as file:
                file.seek(first * self.dim * 2)
                file.write(np.ascontiguousarray(embeddings, np.float16).tobytes())
                file.flush()
                os.fsync(file.fileno())
            names = ["row", *records[0]]
            columns, marks = ", ".join(map(_quoted, names)), ", ".join("?" * len(names))
            changes = ", ".join(f"{name} = excluded.{name}" for name in map(_quoted, names))
            statement = f"insert into photos ({columns}) values ({marks}) on conflict (path) do update set {changes}"
            with self._sql:
                self._sql.executemany(statement, [(first + i, *r.values()) for i, r in enumerate(records)])
                self._set_meta("rows", first + len(records))
        self._rows = first + len(records)

    def update(self, records: Iterable[dict]) -> None:
        """Set columns of known images, by their paths."""
        with self._errors(), self._sql:
            for record in records:
                names = [name for name in record if name != "path"]
                values = ", ".join(f"{_quoted(name)} = ?" for name in names)
                values_of = [record[name] for name in names]
                self._sql.execute(f"update photos set {values} where path = ?", (*values_of, record["path"]))

    def remove(self, paths: Iterable[str]) -> None:
        """Forget images."""
        with self._errors(), self._sql:
            self._sql.executemany("delete from photos where path = ?", [(path,) for path in paths])

    def finish(self, ann: bool) -> float | None:
        """After the last `add`: drop dead rows where they are many, and build the approximate index that is due.

        Returns the approximate index's recall against exact search (10 neighbours of up to 200 images), or None
        without one. `ann` builds it for a small store too.
        """
        with self._errors():
            self._refresh()
            if self._rows - len(self) > _DEAD * self._rows:
                self._compact()
                self._refresh()
        if not len(self) or not (ann or len(self) >= ANN_FROM):
            with contextlib.suppress(OSError):
                self._ann_path.unlink(missing_ok=True)
            return None
        return self._build_ann()

    def _compact(self) -> None:
        """Write the live rows as the next generation of the array, and renumber the images."""
        rows, old = self._live_rows(), self._array_path
        generation = self._generation + 1
        parts = (self.embeddings[part].tobytes() for part in np.array_split(rows, max(1, len(rows) // 100_000)))
        target = self.folder / f"embeddings-{generation}.f16"

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                file.writelines(parts)

        write_atomically(target, write)
        with self._sql:  # in ascending order, a new number is never one still in use
            self._sql.executemany("update photos set row = ? where row = ?", enumerate(rows.tolist()))
            self._set_meta("rows", len(rows))
            self._set_meta("generation", generation)
        with contextlib.suppress(OSError):  # Windows keeps a file that a reader maps; the next compaction removes it
            old.unlink()

    def _build_ann(self) -> float:
        from tqdm import tqdm

        usearch = _usearch()
        rows = self._live_rows()
        graph = usearch.Index(ndim=self.dim, metric="ip", dtype="f16")
        for part in tqdm(np.array_split(rows, -(-len(rows) // 10_000)), desc="approximate index", unit="10k"):
            # Insertion in parallel leaves some nodes of a small graph out of reach
            graph.add(part, self.embeddings[part], threads=1 if len(rows) <= len(part) else 0)
        write_atomically(self._ann_path, lambda temporary: graph.save(str(temporary)))
        self._graph = graph
        sample = np.random.default_rng(0).choice(rows, min(200, len(rows)), replace=False)
        queries = np.asarray(self.embeddings[np.sort(sample)], np.float32)
        exact = self._exact_search(rows).search(queries, 10)[1]
        found = [set(keys) for keys, _ in self._ann_search(queries, 10)]
        return float(np.mean([len(f & set(rows[e])) / len(e) for f, e in zip(found, exact, strict=True)]))

    # ---- reading

    def search(self, queries: np.ndarray, k: int, where: str = "") -> list[list[dict]]:
        """For each query (Q, dim) the k nearest images, best first, of those that fit `where`.

        A dict of the manifest's columns and `cosine` for each. Exact, but for a store with an approximate index and no
        `where`.
        """
        with self._lock, self._errors():
            self._refresh()
            if where:
                live = self._rows_where(where)
                search = self._exact_search(live) if len(live) else None
            elif self._graph is None and self._exact is None:
                self._live = live = self._live_rows()
                self._exact = search = self._exact_search(live) if len(live) else None
            else:
                live, search = self._live, self._exact
            if not where and self._graph is not None:
                found = self._ann_search(queries, k)
            elif search is None:
                return [[] for _ in queries]
            else:
                cosines, numbers = search.search(queries, k)
                found = [(live[n], c) for n, c in zip(numbers, cosines, strict=True)]
            results = []
            for rows, cosines in found:
                records = self._records(rows.tolist())
                nearest = zip(rows.tolist(), cosines.tolist(), strict=True)
                results.append([{**records[row], "cosine": cosine} for row, cosine in nearest if row in records])
            return results

    def vector(self, path: str) -> np.ndarray | None:
        """The embedding of an image by its path, (dim,); None where it is not indexed."""
        with self._lock, self._errors():
            self._refresh()
            found = self._sql.execute("select row from photos where path = ?", (path,)).fetchone()
            return found and np.asarray(self.embeddings[found[0]], np.float32)

    def record(self, path: str) -> dict | None:
        """The manifest's columns of an image by its path; None where it is not indexed."""
        with self._lock, self._errors():
            found = self._sql.execute("select row from photos where path = ?", (path,)).fetchone()
            return self._records([found[0]])[found[0]] if found else None

    def sample(self, n: int) -> tuple[list[str], np.ndarray]:
        """The paths and embeddings (n, dim) of up to `n` images drawn at random, the same ones at each call."""
        with self._lock, self._errors():
            self._refresh()
            rows = np.random.default_rng(0).permutation(self._rows)[:n]
            records = self._records(np.sort(rows).tolist())
            return [r["path"] for r in records.values()], np.asarray(self.embeddings[list(records)], np.float32)

    def least_background(self) -> float:
        """The least `background` of all images."""
        with self._lock, self._errors():
            return self._sql.execute("select min(background) from photos").fetchone()[0] or 0.0

    @property
    def _array_path(self) -> Path:
        return self.folder / f"embeddings-{self._generation}.f16"

    @property
    def _ann_path(self) -> Path:
        return self.folder / "neighbours.usearch"

    def _records(self, rows: list[int]) -> dict[int, dict]:
        """The manifest's columns of images by their rows, without those that are gone."""
        records = {}
        for start in range(0, len(rows), _MOST_VARIABLES):
            part = rows[start : start + _MOST_VARIABLES]
            cursor = self._sql.execute(f"select * from photos where row in ({', '.join('?' * len(part))})", part)
            names = [name for name, *_ in cursor.description]
            for values in cursor:
                record = dict(zip(names, values, strict=True))
                records[record.pop("row")] = record
        return records

    def _live_rows(self) -> np.ndarray:
        return np.fromiter((row for (row,) in self._sql.execute("select row from photos order by row")), np.int64)

    def _exact_search(self, rows: np.ndarray) -> ExactSearch:
        # For one search, such as a command's, torch would take longer to import than its bf16 copy saves
        half = None if "torch" in sys.modules else False
        return ExactSearch(self.embeddings if len(rows) == self._rows else self.embeddings[rows], half)

    def _ann_search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        found = [self._graph.search(query, k) for query in np.asarray(queries, np.float32)]
        return [(matches.keys.astype(np.int64), 1 - matches.distances) for matches in found]

    def _rows_where(self, where: str) -> np.ndarray:
        """The rows of the images that fit an SQL expression, which may read the manifest's images and nothing else."""
        readable = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION}
        deadline = time.monotonic() + _WHERE_SECONDS

        def authorize(action: int, table: str | None, *_: object) -> int:
            allowed = action in readable or (action == sqlite3.SQLITE_READ and table == "photos")
            return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

        self._sql.set_authorizer(authorize)
        self._sql.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
        try:
            found = self._sql.execute(f"select row from photos where ({where}\n) order by row")
            return np.fromiter((row for (row,) in found), np.int64)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            reason = "it took too long" if str(error) == "interrupted" else error
            known = ", ".join(name for name in self._column_names if name != "background")
            message = f"where {where!r} is not a condition on the images: {reason}. Their columns: {known}"
            raise UserError(message) from error
        finally:
            self._sql.set_authorizer(None)
            self._sql.set_progress_handler(None, 0)

    def _refresh(self) -> None:
        """Map the array as the manifest has it now, if that has changed."""
        version = self._sql.execute("pragma data_version").fetchone()[0], self._sql.total_changes
        if version == self._version:
            return
        meta = dict(self._sql.execute("select key, value from meta"))
        self._rows, self._generation = meta.get("rows", 0), meta.get("generation", 0)
        size = self._array_path.stat().st_size if self._array_path.exists() else 0
        if size < self._rows * self.dim * 2:
            raise UserError(f"{self._array_path} is damaged: delete {self.folder} and index the folder again")
        shape = (self._rows, self.dim)
        self.embeddings = np.memmap(self._array_path, np.float16, "r", shape=shape) if self._rows else np.empty(shape)
        self._live = self._exact = self._graph = None
        self._column_names = self.columns
        if self._ann_path.exists():
            graph = _usearch().Index.restore(str(self._ann_path), view=True)
            if len(graph) == len(self):  # else a writer was killed before it rebuilt the graph
                self._graph = graph
        self._version = version

    def _set_meta(self, key: str, value: int) -> None:
        self._sql.execute("insert or replace into meta values (?, ?)", (key, value))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what a damaged manifest or a full disk raises into a UserError."""
        try:
            yield
        except sqlite3.Error as error:
            if "full" in str(error):
                raise UserError(f"the disk of {self.folder} is full: what was indexed so far is kept") from error
            message = f"the index {self.folder} is damaged ({error}): delete it and index the folder again"
            raise UserError(message) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(f"the disk of {self.folder} is full: what was indexed so far is kept") from error
            raise UserError(f"the index {self.folder} cannot be used: {error}") from error


def _connect(path: Path, writing: bool) -> sqlite3.Connection:
    if writing:
        connection = sqlite3.connect(path, check_same_thread=False)
        connection.execute("pragma journal_mode = wal")
        return connection
    location = f"file:{quote(str(path.absolute()))}"
    try:
        connection = sqlite3.connect(f"{location}?mode=ro", uri=True, check_same_thread=False)
        connection.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.OperationalError:  # on a disk that cannot be written, where the log cannot be opened
        connection = sqlite3.connect(f"{location}?immutable=1", uri=True, check_same_thread=False)
    return connection


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _usearch():
    try:
        import usearch.index
    except ImportError as error:
        message = "an approximate index needs another library: pip install 'clip_scratch[ann]'"
        raise UserError(message) from error
    return usearch.index
