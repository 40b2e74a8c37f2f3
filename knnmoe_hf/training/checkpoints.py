"""
Checkpoints of a build: folders `checkpoint-N` with the rows of the batches that were solved in the first N steps.

A checkpoint has the segments of all its batches (see `knnmoe_hf.training.segments`); those that an earlier checkpoint
has too are hard links to the same files, where the file system has them. It is written to a temporary folder, which is
renamed when everything is on the disk: a checkpoint is there as a whole or not at all.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from knnmoe_hf.errors import MemoryFileError, shown
from knnmoe_hf.files import write_json
from knnmoe_hf.memory.plain_files import read_json
from knnmoe_hf.training.segments import KEY_DTYPES, WAY_OUT, Segment, SegmentSizes, broken
from knnmoe_hf.version import __version__

CHECKPOINT_FILE = "knnmoe_checkpoint.json"
"""What a checkpoint of a build has beside `trainer_state.json` and its segments."""
FORMAT = 1
_TEMPORARY = ".knnmoe-checkpoint-"
_FOLDER = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d{{1,12}})")
_SEGMENT = re.compile(r"batches-\d{1,12}-\d{1,12}\.safetensors")
_DTYPE_NAMES = {dtype: name for name, dtype in KEY_DTYPES.items()}
_LARGEST_JSON = 2**26
_MOST = 2**48  # of anything that is counted, so that no product of two counts is too large for the file system


@dataclass(frozen=True)
class SegmentEntry:
    """
    What a checkpoint says of a segment.

    Attributes:
        name: of its file.
        batches, rows, examples, tokens: as in `SegmentSizes`.
        key_dtype: `{layer: dtype of gate inputs}`, as safetensors spells it.
        sha256: of the file.
    """

    name: str
    batches: int
    rows: int
    examples: int
    tokens: int
    key_dtype: dict[str, str]
    sha256: str

    @classmethod
    def of(cls, name: str, sizes: SegmentSizes, sha256: str) -> "SegmentEntry":
        """The entry of a segment."""
        dtypes = {str(layer): _DTYPE_NAMES[dtype] for layer, (_, dtype) in sizes.keys.items()}
        return cls(name, sizes.batches, sizes.rows, sizes.examples, sizes.tokens, dtypes, sha256)


@dataclass(frozen=True)
class Checkpoint:
    """
    The content of a checkpoint's `knnmoe_checkpoint.json`.

    Attributes:
        step: number of steps that Trainer had made.
        batches: number of batches that were solved, from the first one on.
        data: digest of their examples (see `knnmoe_hf.training.dataloader`).
        model: digests of the model's gates and weights.
        options: what the rows depend on, by the names of the arguments.
        layers: `{layer: (width of gate inputs, number of experts)}`.
        segments: in the order of the batches.
        version: of the library that wrote it.
    """

    step: int
    batches: int
    data: str
    model: dict[str, str]
    options: dict[str, Any]
    layers: dict[str, tuple[int, int]]
    segments: list[SegmentEntry]
    version: str = __version__

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], path: Path) -> "Checkpoint":
        """
        Raises:
            MemoryFileError: for content that `to_json` would not have written, or of another format.
        """
        if content.get("format") != FORMAT:
            was = shown(content.get("format"))
            raise broken(path, f"it is of the format {was}, and this version of knnmoe_hf reads the format {FORMAT}")
        found = {name: content.get(name) for name in cls.__dataclass_fields__}
        good = [_is_count(found["step"]), _is_count(found["batches"]), _is_text(found["data"], found["version"])]
        good.append(isinstance(found["options"], dict) and _is_texts(found["model"]))
        good.append(_are_layers(found["layers"]) and isinstance(found["segments"], list))
        if not all(good) or set(content) != {"format", *found}:
            raise broken(path, "it does not describe a checkpoint of a build")
        found["segments"] = [_entry(entry, found["layers"], path) for entry in found["segments"]]
        if sum(entry.batches for entry in found["segments"]) != found["batches"]:
            raise broken(path, "its segments do not have as many batches as it says")
        found["layers"] = {layer: tuple(widths) for layer, widths in found["layers"].items()}
        return cls(**found)

    def sizes(self, entry: SegmentEntry) -> SegmentSizes:
        """The sizes of one of its segments."""
        keys = {int(layer): (width, KEY_DTYPES[entry.key_dtype[layer]]) for layer, (width, _) in self.layers.items()}
        values = {int(layer): experts for layer, (_, experts) in self.layers.items()}
        return SegmentSizes(entry.batches, entry.rows, entry.examples, entry.tokens, keys, values)

    def open(self, folder: Path) -> list[Segment]:
        """
        Opens the segments.

        Raises:
            MemoryFileError: for a file that is missing, or is not what was written.
        """
        segments = []
        for entry in self.segments:
            segments.append(Segment(folder / entry.name, self.sizes(entry), entry.sha256))
            if segments[-1].digest() != entry.sha256:
                raise broken(folder / entry.name, "its SHA-256 is not the one that its checkpoint says")
        return segments


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _MOST


def _is_text(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(*value.values())


def _are_layers(value: Any) -> bool:
    if not isinstance(value, dict) or not value or not all(re.fullmatch(r"\d{1,6}", layer) for layer in value):
        return False
    return all(isinstance(two, list) and len(two) == 2 and all(_is_count(n, 1) for n in two) for two in value.values())


def _entry(entry: Any, layers: Mapping[str, Any], path: Path) -> SegmentEntry:
    names = set(SegmentEntry.__dataclass_fields__)
    if not isinstance(entry, dict) or set(entry) != names or not _is_text(entry["name"], entry["sha256"]):
        raise broken(path, f"it has {shown(entry)} as a segment")
    if not _SEGMENT.fullmatch(entry["name"]):
        raise broken(path, f"it names {shown(entry['name'])} as a segment")
    if not all(_is_count(entry[name]) for name in ("batches", "rows", "examples", "tokens")):
        raise broken(path, f"it gives counts of {entry['name']} that are not counts")
    dtypes = entry["key_dtype"]
    if not _is_texts(dtypes) or set(dtypes) != set(layers) or not set(dtypes.values()) <= set(KEY_DTYPES):
        raise broken(path, f"it gives dtypes of {entry['name']} that are none")
    return SegmentEntry(**entry)


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The checkpoints of builds in a folder, by their numbers; those of other trainers are left out."""
    found = {}
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in Path(folder).iterdir():
            match = _FOLDER.fullmatch(path.name)
            if match and (path / CHECKPOINT_FILE).is_file():
                found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def read_checkpoint(folder: Path) -> Checkpoint:
    """
    Reads what a checkpoint says of itself; `Checkpoint.open` opens its segments.

    Raises:
        MemoryFileError: if `folder` holds no checkpoint of a build, or one that cannot be used.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise MemoryFileError(
            f"{shown(str(folder))} is not a checkpoint of a build, as it has no {CHECKPOINT_FILE}: name a folder "
            f"{PREFIX_CHECKPOINT_DIR}-N of the build's output_dir."
        )
    return Checkpoint.from_json(read_state(path), path)


def read_state(path: Path) -> dict[str, Any]:
    """
    The object in one of a checkpoint's JSON files, which grow with the number of checkpoints and of logs.

    Raises:
        MemoryFileError: if it is none.
    """
    return read_json(path, most_bytes=_LARGEST_JSON, way_out=WAY_OUT)


def write_checkpoint(
    folder: Path,
    checkpoint: Callable[[Path], Checkpoint],
    earlier: Sequence[Segment],
    write_state: Callable[[Path], None],
) -> Path:
    """
    Writes a checkpoint; killed at any moment, it leaves a checkpoint or a temporary folder that `clean` removes.

    Args:
        folder: of the build.
        checkpoint: writes the new segments into the folder that it is given, and returns what to say of all.
        earlier: segments to take over.
        write_state: writes `trainer_state.json` into the folder that it is given.

    Returns:
        The folder of the checkpoint.
    """
    scratch = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
    try:
        for segment in earlier:
            _take_over(segment, scratch / segment.path.name)
        content = checkpoint(scratch)
        write_state(scratch)
        write_json(scratch / CHECKPOINT_FILE, content.to_json())
        scratch.chmod(0o755)
        for path in (*scratch.iterdir(), scratch):
            _sync(path)
        target = folder / f"{PREFIX_CHECKPOINT_DIR}-{content.step}"
        if os.path.lexists(target):  # of an earlier build
            remove(target)
        os.rename(scratch, target)
        _sync(folder)
        for segment in earlier:
            segment.moved(target / segment.path.name)  # where it was may be removed now
        return target
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take_over(segment: Segment, path: Path) -> None:
    with suppress(OSError):  # a file system without hard links, or another one
        os.link(os.path.realpath(segment.path), path)  # that of a snapshot of the Hub is a link
        if segment.is_at(path):
            return
        path.unlink()  # somebody has put another file there
    with path.open("xb") as file:
        file.writelines(segment.content())


def _sync(path: Path) -> None:
    """Waits until a file or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a checkpoint; killed on the way, it leaves no half of one."""
    gone = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
    os.rename(path, gone / path.name)
    shutil.rmtree(gone, ignore_errors=True)


def rotate(folder: Path, limit: int | None) -> None:
    """Removes all but the last `limit` checkpoints of builds in a folder; none if it is None or 0, as in `Trainer`."""
    if limit is not None and limit > 0:
        for path in checkpoints_of(folder)[:-limit]:
            remove(path)


def clean(folder: Path) -> None:
    """Removes what killed builds have left unfinished."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def size_of(folder: str | Path) -> int:
    """Bytes of the last checkpoint in a folder, 0 if there is none."""
    last = checkpoints_of(folder)[-1:]
    return sum(path.stat().st_size for folder in last for path in folder.iterdir() if path.is_file())
