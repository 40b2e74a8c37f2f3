"""The tokenizer that lies beside a memory."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from knnmoe_hf.errors import NoSpaceError, in_one_line, shown
from knnmoe_hf.files import told_of_full_disks
from knnmoe_hf.memory import storage
from knnmoe_hf.memory.fingerprint import tokenizer_fingerprint
from knnmoe_hf.memory.plain_files import open_plain, read_json, unusable

LARGEST_FILE = 2**27
"""Bytes of the largest file of a tokenizer that is read; those of 262,144 tokens have a quarter of it."""
_CONFIG, _TEMPLATES = "tokenizer_config.json", "additional_chat_templates"
_PATHS = (
    "added_tokens_file",
    "chat_template_file",
    "gguf_file",
    "merges_file",
    "special_tokens_map_file",
    "spm_file",
    "tokenizer_config_file",
    "tokenizer_file",
    "vocab_file",
)
"""Entries of old configurations in which a path of another machine may have been left; they are not read."""
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".codes", ".bpe", ".vocab", ".dict", ".tokenizer")
"""Of the files that classes of tokenizers read."""
_LARGEST_LENGTH = 10**40  # `model_max_length` is 10**30 where there is none
_NO_PATHS = ("added_tokens_decoder", "chat_template", "extra_special_tokens", "model_specific_special_tokens")


def read_tokenizer(folder: Path, fingerprint: str | None, files: Mapping[str, str | None] | None = None):
    """
    The tokenizer in a memory's folder. Code that comes with it is never run, and no file outside of the folder read.

    Args:
        folder: the memory's.
        fingerprint: that the tokenizer must have; None if it is not known.
        files: `{name: SHA-256}` of the files that it must have; None where the digest is not known.

    Raises:
        MemoryFileError: if it cannot be read, is not the one of this fingerprint, or was changed since it was saved.
    """
    from transformers import AutoTokenizer

    _check_files(folder, files or {})
    paths = _check_config(folder / _CONFIG)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **dict.fromkeys(paths))
        found = tokenizer_fingerprint(tokenizer)
    except BaseException as error:  # a broken file may make a tokenizer class raise anything, and Rust panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):  # which transformers says to set
            reason = "its tokenizer is of a class that has code of its own, which is never run"
            raise unusable(folder, reason, "ask for the memory with a tokenizer of transformers") from error
        raise unusable(folder, f"its tokenizer cannot be read ({in_one_line(error)})") from error
    traces = ["is_local", "local_files_only", *(name for name in paths if tokenizer.init_kwargs.get(name) is None)]
    for trace in traces:  # set by the loading: saved again, they would change the file
        tokenizer.init_kwargs.pop(trace, None)
    if fingerprint is not None and found != fingerprint:
        reason = "it is not the tokenizer that the memory was built with"
        raise unusable(folder / "tokenizer.json", reason)
    return tokenizer


def _check_files(folder: Path, files: Mapping[str, str | None]) -> None:
    """Of all files that a class of tokenizers may read: which these are is known to the class alone."""
    names = set(files)
    for place in (folder, folder / _TEMPLATES):
        if place.is_dir():
            names |= {path.relative_to(folder).as_posix() for path in place.iterdir() if not _is_folder(path)}
    for name in sorted(names):
        if storage.is_shard(name):
            continue
        with open_plain(folder / name, folder) as file:
            read = name in files or PurePosixPath(name).suffix in _SUFFIXES
            if read and os.fstat(file.fileno()).st_size > LARGEST_FILE:
                raise unusable(folder / name, f"it has more than {LARGEST_FILE} bytes")
            known = files.get(name)
            if known is not None and hashlib.file_digest(file, "sha256").hexdigest() != known:
                raise unusable(folder / name, "it is not the file that was saved with the memory")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _check_config(path: Path) -> list[str]:
    """
    The entries of a tokenizer's configuration that name files. Its classes open these wherever they are.

    Raises:
        MemoryFileError: for a path that leads out of the folder in any other entry.
    """
    if not os.path.lexists(path):
        return []
    content = read_json(path, _LARGEST_LENGTH)
    versions = content.get("fast_tokenizer_files", [])
    if not isinstance(versions, list) or not all(isinstance(name, str) and "/" not in name for name in versions):
        raise unusable(path, f"its fast_tokenizer_files are {shown(versions)} where names of files are needed")
    for name, value in content.items():
        if name not in (*_PATHS, *_NO_PATHS, "name_or_path") and not name.endswith(("_token", "_tokens")):
            for text in _texts(value):
                if os.path.isabs(text) or ".." in PurePosixPath(text).parts:
                    raise unusable(path, f"its {shown(name)} is the path {shown(text)}, which leads out of the folder")
    return [name for name in _PATHS if name in content]


def _texts(value: Any) -> list[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]


def saved_tokenizer(tokenizer, folder: str | Path) -> list[str]:
    """
    Writes a tokenizer to an empty folder and reads it back, as a memory that it is saved with will be.

    Returns:
        The names of its files.

    Raises:
        ValueError: if it cannot be saved, or comes back as another one.
    """
    folder, kind = Path(folder), type(tokenizer).__name__
    try:
        with told_of_full_disks(folder, lambda: "as a tokenizer is saved there for a moment"):
            tokenizer.save_pretrained(folder)
        fingerprint, names = tokenizer_fingerprint(tokenizer), storage.relative_files(folder)
        with tempfile.TemporaryDirectory() as place:
            for name in names:
                (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(place) / name).write_bytes((folder / name).read_bytes())
            storage.write_json(Path(place) / storage.CONFIG_FILE, {"model_type": storage.MODEL_TYPE})
            read_tokenizer(Path(place), fingerprint)
    except NoSpaceError:
        raise
    except Exception as error:  # of whatever class is given as a tokenizer
        raise ValueError(
            f"the tokenizer {shown(kind)} cannot be saved with a memory ({in_one_line(error)}): pass a tokenizer of "
            "transformers."
        ) from error
    return names
