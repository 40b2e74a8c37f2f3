"""A memory's folder: what is in it, and the one way in, through which every file is checked."""

import copy
import importlib.metadata
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor
from transformers import AutoTokenizer

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import MemoryFileError, MemoryMismatchError, in_one_line, shown
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory import storage
from knnmoe_hf.memory.card import model_card
from knnmoe_hf.memory.manifest import LayerSizes, Manifest
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.models.fingerprint import tokenizer_fingerprint

if TYPE_CHECKING:
    from knnmoe_hf.memory.memory import RoutingMemory

_LIBRARIES = ("knnmoe_hf", "transformers", "torch", "safetensors")
_SHARDS = [f"memory-{'?' * 16}.safetensors", f"memory-{'?' * 16}-?????-of-?????.safetensors", storage.INDEX_FILE]
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]


def save_memory(memory: "RoutingMemory", folder: Path, max_shard_size: int | str, provenance: bool) -> None:
    """See `RoutingMemory.save_pretrained`."""
    memory.check_config()
    if not provenance:
        memory = _without_provenance(memory)
    kept = memory.provenance
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
            layers=[
                LayerSizes(
                    layer, rows.hidden_size, rows.num_experts, tuple(rows.distances.shape), rows.scale, rows.stats
                )
                for layer, rows in memory.layers.items()
            ],
            rows=len(memory),
            provenance=(len(kept.examples), len(kept.token_ids)) if kept is not None else None,
            tokenizer_files=tokenizer_files,
            files=storage.write_tensors(scratch, tensors, max_shard_size),
            library_versions={name: _version(name) for name in _LIBRARIES},
        ).to_json()
        (scratch / "README.md").write_text(model_card(memory), encoding="utf-8")
        storage.write_json(scratch / storage.CONFIG_FILE, config.saved())


def _without_provenance(memory: "RoutingMemory") -> "RoutingMemory":
    """As a whole: no example's id, position or tokens, and no digest by which a guessed text could be confirmed."""
    stripped = copy.copy(memory)
    stripped.provenance, stripped.origin = None, replace(memory.origin, reference_set_hash=None)
    return stripped


def load_memory(cls: "type[RoutingMemory]", folder: Path, options: dict) -> "RoutingMemory":
    """See `RoutingMemory.from_pretrained`; `options` replace those that were saved."""
    config, manifest = read_config(folder, options)
    experts = {f"layers.{entry.layer}.values.experts": entry.num_experts for entry in manifest.layers}
    tensors = storage.open_tensors(folder, manifest.files, manifest.specification(), experts)
    content = " ".join(entry["sha256"] for entry in manifest.files)
    layers = {
        entry.layer: _layer_rows(tensors, entry, manifest.origin.options, f"{content} {entry.layer}")
        for entry in manifest.layers
        if config.layers is None or entry.layer in config.layers
    }
    if config.layers is not None and (unknown := sorted(set(config.layers) - set(layers))):
        stored = [entry.layer for entry in manifest.layers]
        raise ValueError(
            f"layers={shown(config.layers)}: {shown(unknown)} have no rows here, choose among {shown(stored)}."
        )
    provenance = None
    if manifest.provenance is not None:
        names = Provenance.specification(0, 0, 0)
        provenance = Provenance(**{name.removeprefix("provenance."): tensors[name] for name in names})
        _check_provenance(provenance, folder)
    tokenizer = _tokenizer(folder) if manifest.tokenizer_files else None
    recorded = manifest.origin.tokenizer_fingerprint
    if tokenizer is not None and recorded is not None and tokenizer_fingerprint(tokenizer) != recorded:
        raise MemoryFileError(
            f"{folder / 'tokenizer.json'} is not usable: it is not the tokenizer that the memory was built with; save "
            "or download the memory again."
        )
    memory = cls(config, layers, manifest.origin, provenance, tokenizer)
    memory.check_config()
    return memory


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


def read_config(folder: Path, options: dict | None = None) -> tuple[KNNMoEConfig, Manifest]:
    """
    A memory's configuration and manifest, checked, without opening a tensor.

    Raises:
        MemoryFileError: naming the file and what is wrong with it.
        ValueError: for an option that is not allowed.
    """
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


def cached_commit(repo_id: str | None) -> str | None:
    """
    The commit at which a repository's `main` lies in the local cache; None for a folder or an unknown repository.

    A loaded model does not say which commit it came from; one of another revision than `main` needs
    `KNNMoEConfig(base_model_revision=...)`.
    """
    if not repo_id or Path(repo_id).is_dir():
        return None
    try:
        path = try_to_load_from_cache(repo_id, storage.CONFIG_FILE)
    except HFValidationError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def push_memory(memory: "RoutingMemory", repo_id: str, save: dict, create: dict, upload: dict):
    """See `RoutingMemory.push_to_hub`."""
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        memory.save_pretrained(folder, **save)
        repo = api.create_repo(repo_id, exist_ok=True, **create)
        if upload["revision"] is not None and not upload["create_pr"]:
            api.create_branch(repo.repo_id, branch=upload["revision"], token=upload["token"], exist_ok=True)
        # shards are named by their content: those of an earlier memory would stay
        return api.upload_folder(repo_id=repo.repo_id, folder_path=folder, delete_patterns=_SHARDS, **upload)


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


def _tokenizer(folder: Path):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer class makes of a broken file
        raise MemoryFileError(
            f"{folder} is not usable: its tokenizer cannot be read ({in_one_line(error)}); save or download the "
            "memory again."
        ) from error
    for trace in ("is_local", "local_files_only"):  # of the loading: saved again, it would be another file
        tokenizer.init_kwargs.pop(trace, None)
    return tokenizer


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
