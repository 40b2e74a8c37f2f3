"""A copy of a memory's folder, byte for byte: of a snapshot of the Hub's cache, which is not to be edited, say."""

import shutil
from pathlib import Path

from knnmoe_hf.files import file_digest
from knnmoe_hf.memory import ownership, storage
from knnmoe_hf.memory.folder import read_config
from knnmoe_hf.memory.manifest import Manifest
from knnmoe_hf.memory.plain_files import open_plain, unusable


def copy_folder(source: Path, target: Path, overwrite: bool = False) -> None:
    """
    Copies the files of a memory, and nothing else that lies beside them; a killed copy changes nothing.

    Args:
        source: a folder whose memory was opened, and so checked. Of a snapshot in the cache of the Hub, whose
            files are links, what they lead to is copied.
        target, overwrite: as `save_directory` and `overwrite` of `RoutingMemory.save_pretrained`.

    Raises:
        FileExistsError: naming the file of `target` that would be written over.
        MemoryFileError: if a file is not the one that `config.json` describes, or is a link to anywhere else.
    """
    config, manifest = read_config(source)
    names = _names(source, manifest)
    beside = {name: source / name for name in names if not storage.is_shard(name) and name != storage.CONFIG_FILE}
    origin = manifest.origin
    save = ownership.Save(beside, lambda: origin.base_model_fingerprint, config.base_model_name_or_path, overwrite)
    ownership.refuse_foreign_config(target, overwrite, config.base_model_name_or_path)
    target.mkdir(parents=True, exist_ok=True)
    storage.finish_save(target)
    ownership.refuse_foreign_files(target, save)
    digests = {entry["name"]: entry["sha256"] for entry in manifest.files}
    with storage.staged(target, ownership.own_files(target)) as scratch:
        for name in names:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            with open_plain(source / name, source) as file, (scratch / name).open("xb") as copied:
                shutil.copyfileobj(file, copied)
            if name in digests and file_digest(scratch / name) != digests[name]:
                raise unusable(source / name, "its SHA-256 is not the one that config.json says")


def _names(folder: Path, manifest: Manifest) -> list[str]:
    """The memory's files, by their paths in its folder."""
    shards = [entry["name"] for entry in manifest.files]
    known = {storage.CONFIG_FILE, storage.INDEX_FILE, ownership.CARD, *shards}
    known |= {*manifest.digests, *manifest.tokenizer_files}
    return [name for name in storage.relative_files(folder) if name in known]
