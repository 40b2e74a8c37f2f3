"""Files of every kind with the same rows, and how they are compressed."""

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
from pyarrow import parquet

ROWS = [{"text": "first, quoted", "label": "1"}, {"text": 'second "one"', "label": "2"}, {"text": "drôle; 三\tx"}]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(rows: list[dict], delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[dict], make=pyarrow.ipc.new_file) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


TABLES: dict[str, Callable[[list[dict]], bytes]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: separated(rows, ","),
    ".tsv": lambda rows: separated(rows, "\t"),
    ".parquet": as_parquet,
    ".arrow": arrow,
    ".feather": lambda rows: arrow(rows, pyarrow.ipc.new_stream),
}
TEXTS = (".txt", ".text", ".md", ".rst", ".log")


def by_arrow(name: str) -> Callable[[bytes], bytes]:
    def compress(content: bytes) -> bytes:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, name) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": functools.partial(gzip.compress, mtime=0),  # parameters of tests must be the same in every process
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": by_arrow("zstd"),
    ".lz4": by_arrow("lz4"),
}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
