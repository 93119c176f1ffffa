"""The embeddings of an index in Milvus (https://milvus.io), for collections that outgrow one machine.

A collection holds a row per image: its path (the primary key), its embedding, and the manifest's columns as dynamic
fields. The same client speaks to a cluster (`milvus://HOST:PORT/COLLECTION`, with the token in MILVUS_TOKEN where it
asks for one) and to the embedded milvus-lite (a file such as `photos.db` in the index folder). A collection that
exists is used with the index type that it has; a new one is exact in milvus-lite, and AUTOINDEX on a server.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError

_MOST = 16_384  # rows that Milvus returns at once
_PART = 1_000  # rows of a request


class MilvusStore:
    """`LocalStore`'s interface to a Milvus collection; `where` is a Milvus filter, much like SQL.

    Raises UserError where the server cannot be reached, the collection is missing or of another dimension, or pymilvus
    is not installed.
    """

    def __init__(self, store: str, folder: Path, dim: int, writing: bool = False):
        found = re.fullmatch(r"milvus://([^/]+:\d+)/(\w+)", store)
        if not found and not re.fullmatch(r"[\w.-]+\.db", store):
            raise UserError(f"store {store!r} is neither milvus://HOST:PORT/COLLECTION nor a file name, as photos.db")
        try:
            from pymilvus import MilvusClient, MilvusException
        except ImportError as error:
            raise UserError("Milvus needs another library: pip install 'clip_scratch[milvus]'") from error
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it raises, with a traceback
        self._name, self._error, self._where = store, MilvusException, ""
        self.collection = found[2] if found else "photos"
        address = f"http://{found[1]}" if found else str(folder / store)
        with self._errors():
            self._client = MilvusClient(address, token=os.environ.get("MILVUS_TOKEN", ""), timeout=10)
            if not self._client.has_collection(self.collection):
                if not writing:
                    raise UserError(f"{store} has no collection {self.collection!r}: index the images again")
                self._create(dim, "AUTOINDEX" if found else "FLAT")
            fields = self._client.describe_collection(self.collection)["fields"]
            dims = [int(field["params"]["dim"]) for field in fields if field["name"] == "embedding"]
        if dims != [dim]:
            raise UserError(f"the collection {self.collection!r} of {store} has no embeddings of {dim} dimensions")

    def __enter__(self) -> MilvusStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def __len__(self) -> int:
        with self._errors():
            return self._client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"]

    @property
    def columns(self) -> list[str]:
        with self._errors():
            rows = self._client.query(self.collection, filter="", limit=1, output_fields=["*"])
        return [name for name in (rows[0] if rows else {"path": ""}) if name != "embedding"]

    # ---- writing

    def known(self) -> dict[str, tuple[int, int]]:
        known = {}
        with self._errors():
            rows = self._client.query_iterator(
                self.collection, batch_size=_PART, filter="", output_fields=["path", "size", "mtime_ns"]
            )
            while part := rows.next():
                known |= {row["path"]: (row["size"], row["mtime_ns"]) for row in part}
            rows.close()
        return known

    def add_columns(self, types: dict[str, str]) -> None:
        """Nothing to do: rows may have any field."""

    def add(self, records: Sequence[dict], embeddings: np.ndarray) -> None:
        rows = []
        for record, embedding in zip(records, embeddings, strict=True):
            date = record.get("date") or ""
            dated = {"year": int(date[:4]), "month": int(date[5:7])} if date else {"year": None, "month": None}
            rows.append({**record, **dated, "embedding": embedding})
        with self._errors():
            for start in range(0, len(rows), _PART):
                self._client.upsert(self.collection, rows[start : start + _PART])

    def update(self, records: Iterable[dict]) -> None:
        with self._errors():
            for record in records:
                found = self._client.get(self.collection, ids=[record["path"]], output_fields=["*"])
                self._client.upsert(self.collection, [{**row, **record} for row in found])

    def remove(self, paths: Iterable[str]) -> None:
        paths = list(paths)
        with self._errors():
            for start in range(0, len(paths), _PART):
                self._client.delete(self.collection, ids=paths[start : start + _PART])

    def finish(self, ann: bool) -> None:
        """Nothing to do: Milvus indexes as it receives."""

    # ---- reading

    def search(self, queries: np.ndarray, k: int, where: str = "") -> list[list[dict]]:
        self._where = where
        with self._errors():
            hits = self._client.search(
                self.collection, data=[*np.asarray(queries, np.float32)], anns_field="embedding", filter=where,
                limit=min(k, _MOST), output_fields=["*"],
            )  # fmt: skip
        results = []
        for found in hits:
            rows = [{"path": hit["path"], "cosine": float(hit["distance"]), **hit["entity"]} for hit in found]
            results.append([{name: value for name, value in row.items() if name != "embedding"} for row in rows])
        return results

    def vector(self, path: str) -> np.ndarray | None:
        with self._errors():
            found = self._client.get(self.collection, ids=[path], output_fields=["embedding"])
        return np.asarray(found[0]["embedding"], np.float32) if found else None

    def record(self, path: str) -> dict | None:
        with self._errors():
            found = self._client.get(self.collection, ids=[path], output_fields=["*"])
        return {name: value for name, value in found[0].items() if name != "embedding"} if found else None

    def sample(self, n: int) -> tuple[list[str], np.ndarray]:
        fields = ["path", "embedding"]
        with self._errors():
            rows = self._client.query(self.collection, filter="", limit=min(n, _MOST), output_fields=fields)
        return [row["path"] for row in rows], np.asarray([row["embedding"] for row in rows], np.float32)

    def least_background(self) -> float:
        return -math.inf  # Milvus has no minimum: a cut-off by score looks at all images that it returns

    def _create(self, dim: int, index_type: str) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("path", DataType.VARCHAR, is_primary=True, max_length=4096)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
        index = self._client.prepare_index_params()
        index.add_index("embedding", index_type=index_type, metric_type="IP")
        self._client.create_collection(self.collection, schema=schema, index_params=index, consistency_level="Strong")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn Milvus's errors into UserErrors."""
        try:
            yield
        except self._error as error:
            reason = str(error.message).splitlines()[0] if getattr(error, "message", "") else str(error)
            if self._where:
                raise UserError(f"where {self._where!r} is not a Milvus filter: {reason}") from error
            raise UserError(f"Milvus ({self._name}): {reason}") from error
