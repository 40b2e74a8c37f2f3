"""Random damage and malice done to a small memory's files: bytes, JSON, headers, numbers, names, whole files."""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.memory.fuzz.artefacts import Files, Special, sealed

VALUES = [
    *(None, True, False, 0, 1, -1, 2, 255, 256, 2**15, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.5, -1.0, 1e-320, 1e-45, 1e-30, 1e30, 3e38, 1e300, math.inf, -math.inf, math.nan),
    *(
        "",
        "x",
        "..",
        "../x",
        "/etc/passwd",
        "a\nb",
        "\x1b[2J",
        "\ud800",
        "\x00",
        "é" * 300,
        "logits",
        "float32",
        "int8",
    ),
    *([], {}, [[]], [{}], {"": None}, [0, 0], [2**62, 2**62], [-1, 2], "union", "calibrated", "both", "hnsw", "ivf"),
]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e4, 65504.0, 1e10, 1e30, -1e30, 3e38, -3e38, math.inf, math.nan]
BITS = [0, 1, 127, 128, 255]
FORMATS = {"F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B", "BF16": "<H"}


class Mutator:
    """
    Makes one mutated artefact after another out of sound ones; equal seeds make equal ones.

    Args:
        artefacts: sound files, by any name.
        seed: of all choices.
        outside: path of a file that no artefact may reach.
    """

    def __init__(self, artefacts: Mapping[str, Files], seed: int, outside: str):
        self.artefacts, self.random, self.outside = artefacts, random.Random(seed), outside
        self.kinds: list[Callable[[Files], Files]] = [
            *(self.bytes_of_a_file,) * 4,
            *(self.value_of_config,) * 10,
            *(self.header_of_a_shard,) * 4,
            *(self.numbers_of_a_tensor,) * 8,
            *(self.file_of_another,) * 2,
            *(self.name_of_a_file, self.kind_of_a_file, self.leftover_of_a_save),
        ]

    def __iter__(self) -> Iterator[tuple[str, Files]]:
        """Endlessly what was done to what, and the files."""
        while True:
            name = self.random.choice(list(self.artefacts))
            files, done = dict(self.artefacts[name]), [name]
            for _ in range(self.random.choice([1, 1, 1, 2, 3])):
                kind = self.random.choice(self.kinds)
                files, done = kind(files), [*done, kind.__name__]
            if self.random.random() < 0.85:  # else digests give it away
                try:
                    files = sealed(files)
                except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
                    done.append("no longer sealed")
            yield ", ".join(done), files

    def bytes_of_a_file(self, files: Files) -> Files:
        """Flips, deletes, repeats or appends bytes."""
        name, data = self._file(files)
        place = self.random.randrange(len(data) + 1)
        size = self.random.choice([1, 1, 2, 8, 100, len(data)])
        piece = data[place : place + size]
        noise = self.random.randbytes(len(piece))
        zeros = bytes(self.random.choice([1, 8, 4096]))
        new = self.random.choice([piece[:0], noise, piece * 2, piece[::-1], zeros])
        return files | {
            name: self.random.choice([data[:place] + new + data[place + size :], data[:place], data + new])
        }

    def value_of_config(self, files: Files) -> Files:
        """Another value, a key too few, too many or twice in the JSON of one of the files."""
        names = [name for name in files if name.endswith(".json") and isinstance(files[name], bytes)]
        name = "config.json" if self.random.random() < 0.8 or not names else self.random.choice(names)
        try:
            content = json.loads(files[name])
        except (KeyError, TypeError, ValueError, RecursionError):
            return files
        return files | {name: self._changed_json(content)}

    def header_of_a_shard(self, files: Files) -> Files:
        """Another shape, dtype, offset or name, or another length of the header."""
        name, data = self._shard(files)
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
        except (ValueError, RecursionError):
            return files
        text, rest = self._changed_json(header), data[8 + length :]
        said = self.random.choice([len(text)] * 12 + [len(text) + 1, 0, 2**31, 2**63, 2**64 - 1])
        return files | {name: said.to_bytes(8, "little") + text + rest}

    def numbers_of_a_tensor(self, files: Files) -> Files:
        """One number, or all of them, in one tensor."""
        name, data = self._shard(files)
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            entry = header[self.random.choice([name for name in header if name != "__metadata__"])]
            form, (start, end) = FORMATS[entry["dtype"]], entry["data_offsets"]
            value = self._packed(form)
            count = min((end - start) // len(value), len(data))
            first = 8 + length + start
            if self.random.random() < 0.3:
                return files | {name: data[:first] + value * count + data[8 + length + end :]}
            place = first + len(value) * self.random.randrange(count)
            return files | {name: data[:place] + value + data[place + len(value) :]}
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return files

    def file_of_another(self, files: Files) -> Files:
        """A file of another memory under this one's name for it, or in addition."""
        other = self.artefacts[self.random.choice(list(self.artefacts))]
        name, _ = self._file(files)
        same = [there for there in other if there.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        source = self.random.choice(same or list(other))
        return files | {self.random.choice([name, source]): other[source]}

    def name_of_a_file(self, files: Files) -> Files:
        """A file that is missing, is called otherwise, or is there twice."""
        name, data = self._file(files)
        new = self.random.choice([name.upper(), name + ".bak", "config.json", "memory-" + "0" * 16 + ".safetensors"])
        kept = {other: content for other, content in files.items() if other != name or self.random.random() < 0.3}
        return kept | self.random.choice([{}, {new: data}])

    def kind_of_a_file(self, files: Files) -> Files:
        """A link, a pipe, a folder or a socket in place of a file, or under a name that tokenizers look for."""
        extra = ["added_tokens.json", "vocab.json", "merges.txt", "additional_chat_templates/a.jinja", "spiece.model"]
        name = self.random.choice([*files, *files, *extra])
        kind = self.random.choice(["link", "link", "pipe", "folder", "socket"])
        target = self.random.choice([self.outside, "config.json", ".", "missing", "/dev/zero", "../../blobs/x"])
        return files | {name: Special(kind, target)}

    def leftover_of_a_save(self, files: Files) -> Files:
        """What a killed save leaves, which moves and deletes files when the memory is opened."""
        folder, other = ".knnmoe-committed/", self.artefacts[self.random.choice(list(self.artefacts))]
        gone = self.random.choice([[], ["README.md"], ["../../victim"], [self.outside], ["x/../../victim"], 3, [[]]])
        left = {folder + name: data for name, data in other.items() if self.random.random() < 0.8}
        left |= {folder + ".gone.json": json.dumps(gone).encode()} if self.random.random() < 0.8 else {}
        if self.random.random() < 0.2:
            left[folder + "link"] = Special("link", self.outside)
        return files | (left or {folder[:-1]: Special("link", "..")})

    def _file(self, files: Files) -> tuple[str, bytes]:
        names = [name for name, content in files.items() if isinstance(content, bytes)]
        return (name := self.random.choice(names or ["config.json"])), files.get(name, b"")

    def _shard(self, files: Files) -> tuple[str, bytes]:
        names = [name for name, content in files.items() if name.endswith("tensors") and isinstance(content, bytes)]
        name = self.random.choice(names) if names else "memory-" + "0" * 16 + ".safetensors"
        return name, files.get(name, bytes(8))

    def _packed(self, form: str) -> bytes:
        if form in ("<f", "<e"):
            value = self.random.choice(NUMBERS)
            try:
                return struct.pack(form, value)
            except OverflowError:
                return struct.pack(form, math.copysign(math.inf, value))
        return bytes(self.random.choice(BITS) for _ in range(struct.calcsize(form)))

    def _changed_json(self, content: Any) -> bytes:
        holders = [part for part in _holders(content) if part]
        if not holders:
            return json.dumps(self.random.choice(VALUES)).encode()
        holder = self.random.choice(holders)
        key = self.random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        change = self.random.choice(["value"] * 8 + ["number", "number", "other", "gone", "twice", "more", "deep"])
        if change == "number" and type(holder[key]) in (int, float):
            holder[key] = self.random.choice([holder[key] + 1, -holder[key], holder[key] * 2, float(holder[key])])
        elif change == "other":
            other = self.random.choice(holders)
            holder[key] = json.loads(json.dumps(other))
        elif change == "gone":
            del holder[key]
        elif change == "more":
            more = json.loads(json.dumps(holder[key]))
            holder.append(more) if isinstance(holder, list) else holder.update({self.random.choice("xyz"): more})
        elif change == "deep":
            holder[key] = json.loads("[" * 200 + "]" * 200)
        elif change == "value":
            holder[key] = self.random.choice(VALUES)
        text = json.dumps(content)
        if change == "twice" and isinstance(holder, dict):
            text = text.replace(
                json.dumps(key) + ":", f'"{key}": {json.dumps(self.random.choice(VALUES))}, "{key}":', 1
            )
        return text.encode()


def _holders(content: Any) -> Iterator[dict | list]:
    """Every object and list in a JSON value."""
    if isinstance(content, (dict, list)):
        yield content
        for part in content.values() if isinstance(content, dict) else content:
            yield from _holders(part)
