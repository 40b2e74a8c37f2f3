"""A memory's folder: how it is written and read. Every file is checked on its way in."""

import copy
import importlib.metadata
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from knnmoe_hf.errors import MemoryFileError, MemoryMismatchError, in_one_line, shown
from knnmoe_hf.files import file_digest, told_of_full_disks
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory import next_tokens as following
from knnmoe_hf.memory import ownership, storage
from knnmoe_hf.memory.adjust import with_given
from knnmoe_hf.memory.card import text_is_inside, write_card
from knnmoe_hf.memory.card.base_name import stated
from knnmoe_hf.memory.card_data import CardData
from knnmoe_hf.memory.data import Memory, MemoryData
from knnmoe_hf.memory.download import resolve_folder
from knnmoe_hf.memory.fingerprint import tokenizer_fingerprint
from knnmoe_hf.memory.history import OPTIONS_CHANGED, changes
from knnmoe_hf.memory.layer_sizes import LayerSizes
from knnmoe_hf.memory.levels import at_level, tells_text
from knnmoe_hf.memory.manifest import CalibrationRecord, Manifest
from knnmoe_hf.memory.plain_files import read_json, unusable
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.shards import open_tensors
from knnmoe_hf.memory.tokenizer import read_tokenizer
from knnmoe_hf.memory.versions import check_version, optional_tensors, with_means

if TYPE_CHECKING:  # a class of transformers, as AutoTokenizer: both are imported only where a folder is read
    from knnmoe_hf.config import KNNMoEConfig

logger = logging.getLogger(__name__)

_AGAIN = "and save again"
_LIBRARIES = ("knnmoe_hf", "transformers", "torch", "safetensors")


def save_pretrained(
    memory: MemoryData,
    save_directory: str | PathLike,
    max_shard_size: int | str = "2GB",
    provenance: str | bool | None = None,
    overwrite: bool = False,
    next_tokens: bool | None = None,
    model_card_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes the memory's folder: `config.json`, safetensors, tokenizer, `README.md`; a killed save changes nothing.

    Args:
        save_directory: a new or empty folder, or one that holds a memory of the same base model, which is replaced.
        max_shard_size: of one safetensors file, as an `int` of bytes or a `str` such as `"2GB"`.
        provenance: what is saved of the references. `"text"`: each row's example, position and NLL, and the token ids
            of the examples, which are their text; a warning says so. `"ids"`: each row's example and position, and
            hashes of a quarter of the examples' runs of 8 tokens, by which a text that one has is recognised, but no
            token id, no NLL, and no digest of the whole set. `"none"`: none of these. True is `"text"` and False
            `"none"`. By default as much as the memory has, which is text after a build. Keys and values are saved in
            any case: keys are compressed hidden states of the references, from which whoever has the base model may
            recover text.
        overwrite: write over files that are not the memory's own: a `README.md` or tokenizer files that no earlier
            save left there, or that were edited since; another model, an adapter, a memory of another base model.
        next_tokens: whether the token that follows each row is kept where the text is left out, four bytes a row, for
            `recall="next_tokens"` and `"both"`. **In the order of the rows these tokens are the text of the
            references**; a warning says so. By default they are kept if the memory has them without the text and
            `provenance` says nothing else. The text holds them in any case.
        model_card_kwargs: what the card states, such as `{"license": "cc-by-4.0", "dataset": "my notes"}`, by the
            names of `knnmoe_hf.memory.card_data.CardData`.

    Raises:
        FileExistsError: naming the file that would be written over.
        ValueError: for text or next tokens of a memory that has none, for neither of them where the memory's own
            `recall` needs them, or the folder of the base model itself.
    """
    memory = stated(at_level(memory, provenance, next_tokens), model_card_kwargs)
    write_folder(memory, Path(save_directory), max_shard_size, overwrite)
    if tells_text(memory):
        logger.warning("%s", text_is_inside(memory, str(save_directory)))


def write_folder(
    memory: MemoryData, folder: Path, max_shard_size: int | str = "2GB", overwrite: bool = False, if_full: str = _AGAIN
) -> None:
    """As `save_pretrained`, with all the provenance, and no word about it; `if_full` is the way out of a full disk."""
    memory.check_config()
    memory = replace(memory)  # drops the verdict if the configuration was changed after it was measured
    kept, origin = memory.provenance, memory.origin
    tensors = kept.tensors() if kept is not None else {}
    if memory.stored_next_tokens is not None:
        tensors[following.TENSOR] = memory.stored_next_tokens
    for layer, rows in memory.layers.items():
        tensors |= {f"layers.{layer}.{name}": tensor for name, tensor in rows.tensors().items()}
    ownership.refuse_foreign_config(folder, overwrite, memory.config.base_model_name_or_path)
    folder.mkdir(parents=True, exist_ok=True)
    storage.finish_save(folder)
    full = told_of_full_disks(folder, lambda: if_full)
    with full, storage.staged(folder, ownership.own_files(folder)) as scratch:
        if memory.tokenizer is not None:
            memory.tokenizer.save_pretrained(scratch)
            origin = replace(origin, tokenizer_fingerprint=tokenizer_fingerprint(memory.tokenizer))
        tokenizer_files = storage.relative_files(scratch)
        write_card(memory, scratch)
        _refuse_foreign_files(memory, folder, scratch, overwrite)  # before gigabytes are written
        files = storage.write_tensors(scratch, tensors, max_shard_size)
        digests = _refuse_foreign_files(memory, folder, scratch, overwrite)  # there may be an index now
        config = copy.deepcopy(memory.config)
        config.memory = Manifest(
            origin=origin,
            layers=[_sizes(layer, rows) for layer, rows in memory.layers.items()],
            rows=len(memory),
            provenance=kept.sizes if kept is not None else None,
            next_tokens=memory.stored_next_tokens is not None,
            tokenizer_files=tokenizer_files,
            digests=digests,
            files=files,
            library_versions={name: _version(name) for name in _LIBRARIES},
            calibration=memory.calibration,
            verdict=memory.verdict,
            task_record=memory.task_record,
            card_data=memory.card_data,
        ).to_json()
        storage.write_json(scratch / storage.CONFIG_FILE, config.saved())


def _refuse_foreign_files(memory: MemoryData, folder: Path, scratch: Path, overwrite: bool) -> dict[str, str]:
    """The SHA-256 of each file beside the tensors, if none of them is written over one that is not the memory's."""
    files = {name: scratch / name for name in storage.relative_files(scratch) if not storage.is_shard(name)}
    base = memory.config.base_model_name_or_path
    save = ownership.Save(files, lambda: memory.origin.base_model_fingerprint, base, overwrite)
    ownership.refuse_foreign_files(folder, save)
    return {name: file_digest(path) for name, path in files.items()}


def _sizes(layer: int, rows: LayerRows) -> LayerSizes:
    sample = tuple(rows.distances.shape)
    return LayerSizes(layer, rows.hidden_size, rows.num_experts, sample, rows.scale, rows.stats)


def from_pretrained(
    cls: type[Memory],
    pretrained_model_name_or_path: str | PathLike,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    mmap: bool = True,
    **options,
) -> Memory:
    """
    Opens a memory from a folder or a repository of the Hub; nothing in it is executed, or believed unchecked.

    Args:
        pretrained_model_name_or_path: a folder, or a repository id such as `"me/my-memory"`, of which all files are
            downloaded at one commit.
        revision: branch, tag, commit or pull request (`"refs/pr/1"`) of the repository.
        subfolder: where in the folder or repository the memory lies, such as `"memory"` in a model's own repository.
        token, cache_dir, local_files_only, force_download: as in `transformers`.
        mmap: map the files of tensors. False reads them into memory: choose it where others may write to them, as
            truncating a mapped file ends the process that uses it (SIGBUS), and writing to it changes the memory.
        options: of `KNNMoEConfig`, in place of those that were saved (`num_neighbors=8`).

    Raises:
        MemoryFileError: naming the file that is missing, truncated, edited or of another format.
        MemoryMismatchError: if an option would read the rows as what they are not.
        FileNotFoundError, PermissionError, ConnectionError: as `knnmoe_hf.memory.download.resolve_folder`.
    """
    hub = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download)
    folder = resolve_folder(pretrained_model_name_or_path, revision, subfolder, **hub)
    saved, manifest = read_config(folder)
    config = with_given(saved, options)
    config.layers = saved.layers if config.layers is None else config.layers
    tensors = _read_tensors(folder, manifest, mmap)
    layers = _read_layers(tensors, manifest, config.layers)
    provenance = Provenance.of_tensors(tensors, folder) if manifest.provenance is not None else None
    tokenizer = _read_tokenizer(folder, manifest) if manifest.tokenizer_files else None
    changed = changes(saved, config)
    verdict = manifest.verdict if not changed or manifest.verdict and manifest.verdict.holds_for(config) else None
    card_data = manifest.card_data or CardData()
    memory = cls(
        config,
        layers,
        manifest.origin,
        provenance,
        tokenizer,
        calibration=_calibration(manifest, layers, config.recall),
        verdict=verdict,
        stored_next_tokens=tensors.get(following.TENSOR),
        task_record=manifest.task_record,
        card_data=card_data.noted(f"{OPTIONS_CHANGED}{', '.join(changed)}") if changed else card_data,
    )
    memory.check_config()
    given = [name for name, value in options.items() if name.startswith("next_token_") and value is not None]
    if given and config.recall == "routing":
        logger.warning("%s: no effect with recall='routing'; use recall='next_tokens' or 'both'", ", ".join(given))
    return memory


def _read_tensors(folder: Path, manifest: Manifest, mmap: bool) -> dict[str, Tensor]:
    expected = manifest.specification()
    optional = optional_tensors(manifest.format_version, expected)
    return with_means(open_tensors(folder, manifest.files, expected, manifest.bounds(), mmap, optional))


def _read_layers(tensors: dict[str, Tensor], manifest: Manifest, layers: list[int] | None) -> dict[int, LayerRows]:
    """The rows of these layers; of all if None."""
    stored = [entry.layer for entry in manifest.layers]
    if layers is not None and (unknown := sorted(set(layers) - set(stored))):
        raise ValueError(f"layers={shown(layers)}: {shown(unknown)} have no rows here, choose among {shown(stored)}.")
    content = " ".join(entry["sha256"] for entry in manifest.files)
    return {
        entry.layer: _layer_rows(tensors, entry, manifest.origin.options, f"{content} {entry.layer}")
        for entry in manifest.layers
        if layers is None or entry.layer in layers
    }


def _calibration(manifest: Manifest, layers: Mapping[int, LayerRows], recall: str) -> CalibrationRecord | None:
    """The record for a memory of these layers: how next tokens are recalled was fitted to the last of all."""
    record = manifest.calibration
    if record is None or not record.fits or (last := max(entry.layer for entry in manifest.layers)) in layers:
        return record
    if recall != "routing":
        logger.warning(
            "the recall of next tokens was fitted to layer %d, which layers=%s leaves out: its defaults are used "
            "instead; knnmoe_hf.calibrate (knnmoe calibrate) fits it anew",
            last,
            list(layers),
        )
    return replace(record, fits={})


def _layer_rows(tensors: dict[str, Tensor], entry: LayerSizes, options: Mapping[str, Any], source: str) -> LayerRows:
    prefix = f"layers.{entry.layer}."
    return LayerRows.of_tensors(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)},
        hidden_size=entry.hidden_size,
        num_experts=entry.num_experts,
        of_logits=options["key_codec"] == "logits",
        scale=entry.scale,
        stats=entry.stats,
        source=source,
    )


def read_config(folder: Path) -> "tuple[KNNMoEConfig, Manifest]":
    """
    A memory's configuration and manifest, checked, without opening a tensor.

    Raises:
        MemoryFileError: naming the file and what is wrong with it.
    """
    from knnmoe_hf.config import KNNMoEConfig

    path = folder / storage.CONFIG_FILE
    if not os.path.lexists(path):
        raise MemoryFileError(
            f"{folder} holds no memory: there is no config.json; name a folder that a memory was saved to."
        )
    content = read_json(path)
    if content.get("model_type") != storage.MODEL_TYPE:
        kind = shown(content.get("model_type"))
        raise MemoryFileError(
            f"{path} is of model_type {kind} where 'knn_moe' is needed: name the folder of a memory."
        )
    check_version(content.get("memory"), path)  # first: a later version may have more options
    try:
        saved = KNNMoEConfig.from_dict(content)  # as transformers will, for the tokenizer
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise unusable(path, in_one_line(error).rstrip(".")) from error
    manifest = Manifest.from_json(saved.memory, path)
    saved.memory, saved.name_or_path = None, str(folder)
    for name, built in manifest.origin.options.items():
        if getattr(saved, name) != built:
            raise MemoryMismatchError(
                f"{path} asks to read {name}={built!r} rows as {shown(getattr(saved, name))}: build the memory anew."
            )
    return saved, manifest


def _read_tokenizer(folder: Path, manifest: Manifest):
    digests = {name: manifest.digests.get(name) for name in manifest.tokenizer_files}
    return read_tokenizer(folder, manifest.origin.tokenizer_fingerprint, digests)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
