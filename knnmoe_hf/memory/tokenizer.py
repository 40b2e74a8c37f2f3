"""The tokenizer that lies beside a memory."""

import tempfile
from pathlib import Path

from knnmoe_hf.errors import MemoryFileError, in_one_line, shown
from knnmoe_hf.memory import storage
from knnmoe_hf.memory.fingerprint import tokenizer_fingerprint


def read_tokenizer(folder: Path, fingerprint: str | None):
    """
    The tokenizer in a memory's folder.

    Raises:
        MemoryFileError: if it cannot be read, or is not the one of this fingerprint.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken file may make a tokenizer class raise anything
        raise MemoryFileError(
            f"{folder} is not usable: its tokenizer cannot be read ({in_one_line(error)}); save or download the "
            "memory again."
        ) from error
    for trace in ("is_local", "local_files_only"):  # set by the loading: saved again, they would change the file
        tokenizer.init_kwargs.pop(trace, None)
    if fingerprint is not None and tokenizer_fingerprint(tokenizer) != fingerprint:
        raise MemoryFileError(
            f"{folder / 'tokenizer.json'} is not usable: it is not the tokenizer that the memory was built with; save "
            "or download the memory again."
        )
    return tokenizer


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
        tokenizer.save_pretrained(folder)
        fingerprint, names = tokenizer_fingerprint(tokenizer), storage.relative_files(folder)
        with tempfile.TemporaryDirectory() as place:
            for name in names:
                (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(place) / name).write_bytes((folder / name).read_bytes())
            storage.write_json(Path(place) / storage.CONFIG_FILE, {"model_type": "knn_moe"})
            read_tokenizer(Path(place), fingerprint)
    except Exception as error:  # of whatever class is given as a tokenizer
        raise ValueError(
            f"the tokenizer {shown(kind)} cannot be saved with a memory ({in_one_line(error)}): pass a tokenizer of "
            "transformers."
        ) from error
    return names
