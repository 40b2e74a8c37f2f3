"""A memory's folder: how it is written, read, downloaded and uploaded. Every file is checked on its way in."""

import copy
import importlib.metadata
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor

from knnmoe_hf.errors import MemoryFileError, MemoryMismatchError, in_one_line, shown
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory import storage
from knnmoe_hf.memory.card import model_card
from knnmoe_hf.memory.data import Memory, MemoryData
from knnmoe_hf.memory.fingerprint import tokenizer_fingerprint
from knnmoe_hf.memory.manifest import LayerSizes, Manifest
from knnmoe_hf.memory.provenance import Provenance

if TYPE_CHECKING:  # a class of transformers, as AutoTokenizer: both are imported only where a folder is read
    from knnmoe_hf.config import KNNMoEConfig

_LIBRARIES = ("knnmoe_hf", "transformers", "torch", "safetensors")
_SHARDS = [f"memory-{'?' * 16}.safetensors", f"memory-{'?' * 16}-?????-of-?????.safetensors", storage.INDEX_FILE]
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]


def save_pretrained(
    memory: MemoryData, save_directory: str | PathLike, max_shard_size: int | str = "2GB", provenance: bool = True
) -> None:
    """
    Writes the memory's folder: `config.json`, safetensors, tokenizer, `README.md`; a killed save changes nothing.

    Args:
        save_directory: a new or empty folder, or one that holds a memory, which is replaced.
        max_shard_size: of one safetensors file, as an `int` of bytes or a `str` such as `"2GB"`.
        provenance: False leaves out which examples the rows came from, and their tokens.

    Raises:
        FileExistsError: if the folder holds another model's `config.json`.
    """
    memory.check_config()
    # both drop the verdict if the configuration was changed after it was measured
    memory = replace(memory) if provenance else _without_provenance(memory)
    folder, kept = Path(save_directory), memory.provenance
    tensors = kept.tensors() if kept is not None else {}
    for layer, rows in memory.layers.items():
        tensors |= {f"layers.{layer}.{name}": tensor for name, tensor in rows.tensors().items()}
    with storage.staged(folder, _tokenizer_files(folder)) as scratch:
        origin = memory.origin
        if memory.tokenizer is not None:
            memory.tokenizer.save_pretrained(scratch)
            origin = replace(origin, tokenizer_fingerprint=tokenizer_fingerprint(memory.tokenizer))
        tokenizer_files = storage.relative_files(scratch)
        config = copy.deepcopy(memory.config)
        config.memory = Manifest(
            origin=origin,
            layers=[_sizes(layer, rows) for layer, rows in memory.layers.items()],
            rows=len(memory),
            provenance=(len(kept.examples), len(kept.token_ids)) if kept is not None else None,
            tokenizer_files=tokenizer_files,
            files=storage.write_tensors(scratch, tensors, max_shard_size),
            library_versions={name: _version(name) for name in _LIBRARIES},
            calibration=memory.calibration,
            verdict=memory.verdict,
        ).to_json()
        (scratch / "README.md").write_text(model_card(memory), encoding="utf-8")
        storage.write_json(scratch / storage.CONFIG_FILE, config.saved())


def _without_provenance(memory: Memory) -> Memory:
    """As a whole: no example's id, position or tokens, and no digest by which a guessed text could be confirmed."""
    return replace(memory, provenance=None, origin=replace(memory.origin, reference_set_hash=None))


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
    **options,
) -> Memory:
    """
    Opens a memory, memory-mapped, from a folder or a repository of the Hub.

    Args:
        pretrained_model_name_or_path: a folder, or a repository id such as `"me/my-memory"`.
        revision: branch, tag or commit of the repository.
        subfolder: where in the folder or repository the memory lies.
        token, cache_dir, local_files_only, force_download: as in `transformers`.
        options: of `KNNMoEConfig`, in place of those that were saved (`num_neighbors=8`).

    Raises:
        MemoryFileError: naming the file that is missing, truncated, edited or of another format.
        MemoryMismatchError: if an option would read the rows as what they are not.
    """
    hub = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download)
    folder = resolve_folder(pretrained_model_name_or_path, revision, subfolder, **hub)
    config, manifest = read_config(folder, options)
    tensors = _read_tensors(folder, manifest)
    layers = _read_layers(tensors, manifest, config.layers)
    provenance = None
    if manifest.provenance is not None:
        names = Provenance.specification(0, 0, 0)
        provenance = Provenance(**{name.removeprefix("provenance."): tensors[name] for name in names})
        _check_provenance(provenance, folder)
    tokenizer = _read_tokenizer(folder, manifest) if manifest.tokenizer_files else None
    memory = cls(config, layers, manifest.origin, provenance, tokenizer, manifest.calibration, manifest.verdict)
    memory.check_config()
    return memory


def _read_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    experts = {f"layers.{entry.layer}.values.experts": entry.num_experts for entry in manifest.layers}
    return storage.open_tensors(folder, manifest.files, manifest.specification(), experts)


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


def read_config(folder: Path, options: dict | None = None) -> "tuple[KNNMoEConfig, Manifest]":
    """
    A memory's configuration and manifest, checked, without opening a tensor.

    Raises:
        MemoryFileError: naming the file and what is wrong with it.
        ValueError: for an option that is not allowed.
    """
    from knnmoe_hf.config import KNNMoEConfig

    path = folder / storage.CONFIG_FILE
    if not path.is_file():
        raise MemoryFileError(
            f"{folder} holds no memory: there is no config.json; name a folder that a memory was saved to."
        )
    content = storage.read_json(path)
    if content.get("model_type") != "knn_moe":
        kind = shown(content.get("model_type"))
        raise MemoryFileError(
            f"{path} is of model_type {kind} where 'knn_moe' is needed: name the folder of a memory."
        )
    try:
        saved = KNNMoEConfig.from_dict(content)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise MemoryFileError(f"{path} is not usable: {in_one_line(error)}") from error
    manifest = Manifest.from_json(saved.memory, path)
    saved.memory = None
    config = KNNMoEConfig.from_dict({**saved.saved(), **(options or {})})
    config.name_or_path = str(folder)
    for name, built in manifest.origin.options.items():
        if getattr(saved, name) != built:
            raise MemoryMismatchError(
                f"{path} asks to read {name}={built!r} rows as {shown(getattr(saved, name))}: build the memory anew."
            )
    return config, manifest


def resolve_folder(name_or_path: str | PathLike, revision: str | None = None, subfolder: str = "", **hub) -> Path:
    """The local folder of a memory, downloaded at one commit if it is a repository's."""
    folder = Path(name_or_path)
    if folder.is_dir():
        storage.finish_save(folder / subfolder)
        return folder / subfolder
    if folder.is_absolute() or str(name_or_path).startswith(".") or str(name_or_path).count("/") > 1:
        raise FileNotFoundError(f"{shown(str(name_or_path))} is no folder: name one that a memory was saved to.")
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    hub["allow_patterns"] = [prefix + pattern for pattern in _FILES]
    hub["ignore_patterns"] = [f"{prefix}*/*.safetensors"]  # of other memories in the repository
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, **hub)) / subfolder
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{shown(str(name_or_path))} is neither a folder nor a repository that can be read: check its name, the "
            f"revision, your access and the network ({in_one_line(error)})."
        ) from error


def push_to_hub(
    memory: MemoryData,
    repo_id: str,
    *,
    path_in_repo: str = "",
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload routing memory",
    create_pr: bool = False,
    max_shard_size: int | str = "2GB",
    provenance: bool = True,
):
    """
    Saves the memory and uploads its folder; the base model's weights are never part of it.

    Args:
        repo_id: `"name"` or `"owner/name"`; made if it does not exist.
        path_in_repo: folder in the repository, for several memories in one.
        revision, private, token, commit_message, create_pr: as in `huggingface_hub`.
        max_shard_size, provenance: as in `save_pretrained`.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(memory, folder, max_shard_size, provenance)
        repo = api.create_repo(repo_id, exist_ok=True, private=private, token=token)
        if revision is not None and not create_pr:
            api.create_branch(repo.repo_id, branch=revision, token=token, exist_ok=True)
        return api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            delete_patterns=_SHARDS,  # shards are named by their content: those of an earlier memory would stay
        )


def _check_provenance(provenance: Provenance, folder: Path) -> None:
    offsets = provenance.offsets
    if offsets[0] != 0 or offsets[-1] != len(provenance.token_ids) or bool((offsets.diff() < 0).any()):
        raise MemoryFileError(
            f"{folder} is not usable: its provenance.offsets do not divide its token_ids; save it again."
        )


def _tokenizer_files(folder: Path) -> list[str]:
    """The files of the tokenizer that the memory in `folder`, if there is one, was saved with."""
    try:
        return read_config(folder)[1].tokenizer_files
    except ValueError:  # none, or one that cannot be read and is replaced
        return []


def _read_tokenizer(folder: Path, manifest: Manifest):
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
    recorded = manifest.origin.tokenizer_fingerprint
    if recorded is not None and tokenizer_fingerprint(tokenizer) != recorded:
        raise MemoryFileError(
            f"{folder / 'tokenizer.json'} is not usable: it is not the tokenizer that the memory was built with; save "
            "or download the memory again."
        )
    return tokenizer


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
