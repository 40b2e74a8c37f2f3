"""`RoutingMemory`: keys and values of every layer, where they came from, and how they are searched and mixed."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import MemoryMismatchError, shown
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory import edit
from knnmoe_hf.memory.checks import check_ids, check_rows
from knnmoe_hf.memory.encode import build_memory
from knnmoe_hf.memory.folder import load_memory, push_memory, resolve_folder, save_memory
from knnmoe_hf.memory.manifest import Origin
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.models.fingerprint import fingerprint, same_gates
from knnmoe_hf.models.gates import find_gates


class RoutingMemory:
    """
    A routing memory: for each MoE layer, N keys (gate inputs) and N values (routing that suited the true next token).

    Made by `KNNMoETrainer`, by `from_rows` or by `from_pretrained`; consulted once it is attached to its model
    (`attach_memory`).

    Attributes:
        config: how it is searched and mixed. Options that describe the stored rows
            (`knnmoe_hf.lookup.options.FIXED_AT_BUILD`) must not change; the others may, before attaching.
        layers: `{decoder layer: LayerRows}`.
        provenance: where each row came from, or None.
        origin: what it was built from.
        tokenizer: saved beside it, so that `pipeline` needs nothing else; or None.
    """

    def __init__(
        self,
        config: KNNMoEConfig,
        layers: Mapping[int, LayerRows],
        origin: Origin,
        provenance: Provenance | None = None,
        tokenizer=None,
    ):
        self.config = config
        self.layers = dict(sorted(layers.items()))
        self.origin = origin
        self.provenance = provenance
        self.tokenizer = tokenizer

    @classmethod
    def from_rows(
        cls,
        config: KNNMoEConfig,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        base_model: nn.Module,
        example_ids: Iterable[int] | Tensor | None = None,
    ) -> "RoutingMemory":
        """
        A memory from tensors.

        Args:
            config: retrieval and mixing; `config.value_space` says what the values are.
            keys: `{layer: (N, d)}`, gate inputs, any float dtype; stored as the config's key codec and dtype say.
            values: `{layer: (N, E)}`, float, in the value space's own form; stored as `config.value_dtype`.
            base_model: the model that the rows belong to; its gates' fingerprint is kept.
            example_ids: (N,) the example of each row; without them, a row is its own example.

        Raises:
            ValueError: for layers, shapes or values that do not fit the model or each other.
        """
        rows = check_rows(config, keys, values, {gate.layer: gate for gate in find_gates(base_model)})
        provenance = Provenance.of_rows(check_ids(example_ids, rows))
        return build_memory(config, keys, values, base_model, provenance)

    def __len__(self) -> int:
        """Rows, that is reference tokens; each has a key and a value in every layer."""
        return next((len(rows.key_codes) for rows in self.layers.values()), 0)

    def __repr__(self) -> str:
        space = self.origin.options["value_space"]
        return f"RoutingMemory({len(self)} rows, layers {list(self.layers)}, {space}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes_per_layer(self) -> dict[int, int]:
        """Bytes of keys and values, codecs included, `{layer: bytes}`."""
        return {layer: rows.nbytes for layer, rows in self.layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, without provenance."""
        return sum(self.nbytes_per_layer.values())

    def check_config(self) -> None:
        """
        Checks that the configuration still reads the rows as what they are.

        Raises:
            MemoryMismatchError: if an option that says how rows are stored was changed after the build.
            ValueError: for any other bad option.
        """
        self.config.retrieval_options()
        for name, built in self.origin.options.items():
            asked = getattr(self.config, name)
            if built != asked:
                raise MemoryMismatchError(
                    f"this memory was built with {name}={built!r} and cannot be read as {shown(asked)}: build it "
                    "anew, or store its rows otherwise with `recoded`."
                )

    def check_model(self, model: nn.Module) -> None:
        """
        Checks that the memory belongs to `model`.

        Raises:
            MemoryMismatchError: naming what differs.
        """
        gates = {gate.layer: gate for gate in find_gates(model)}
        for layer, rows in self.layers.items():
            built = (rows.hidden_size, rows.num_experts)
            found = (gates[layer].hidden_size, gates[layer].num_experts) if layer in gates else None
            if found != built:
                actual = f"{found[0]} and {found[1]} there" if found else "no gate there"
                raise MemoryMismatchError(
                    f"this memory has hidden size {built[0]} and {built[1]} experts in layer {layer}, the model has "
                    f"{actual}: attach it to {shown(self.config.base_model_name_or_path)}, for which it was built."
                )
        stored = self.origin.base_model_fingerprint
        if stored is not None and not same_gates(dict(stored), fingerprint(list(gates.values()))):
            raise MemoryMismatchError(
                f"the gates of this {type(model).__name__} are not those that this memory was built for: attach it to "
                f"{shown(self.config.base_model_name_or_path)} at revision {shown(self.config.base_model_revision)}, "
                "or build it anew for this model."
            )

    def remove_examples(self, example_ids: Iterable[int]) -> "RoutingMemory":
        """
        A memory without the rows of these examples, its scales fitted anew.

        Raises:
            ValueError: if provenance was left out, or an id has no row.
        """
        return edit.remove_examples(self, example_ids)

    def recoded(self, base_model: nn.Module, **options) -> "RoutingMemory":
        """
        The same rows, stored with other options of `KNNMoEConfig` (`key_codec`, `key_dtype`, `value_dtype`, ...).

        What the present storage has lost stays lost: begin with a memory of `key_codec="raw"`, `key_dtype="float32"`,
        `value_dtype="float32"`. Other keys have other similarities, so a calibration is left behind:
        `knnmoe_hf.calibrate` makes another.

        Args:
            base_model: the model that the memory was built for.
            options: in place of the memory's own.

        Raises:
            MemoryMismatchError: for another model.
            ValueError: for a value space other than the memory's, or keys of logits that are to become others.
        """
        return edit.recoded(self, base_model, options)

    def with_inputs(self, base_model: nn.Module, inputs: Mapping[int, Tensor]) -> "RoutingMemory":
        """
        The same values under other keys, of gate inputs `{layer: (N, d)}`; codecs and distances are fitted anew.

        A calibration is left behind.
        """
        return edit.with_inputs(self, base_model, inputs)

    def take(self, keep: Tensor) -> "RoutingMemory":
        """The rows where `keep` (N,) bool is true; unlike the other edits, distances and scales stay those of all."""
        return edit.take(self, keep)

    def select_rows(self, max_rows: int | None = None, min_gain: float | None = None) -> "RoutingMemory":
        """
        A memory of the rows that optimisation gained most on, its scales fitted anew.

        Args:
            max_rows: keep at most so many, those of the largest gains.
            min_gain: keep rows whose target's NLL fell by at least so many nats.

        Raises:
            ValueError: if the rows' gains are not recorded.
        """
        return edit.select_rows(self, max_rows, min_gain)

    def merge_duplicates(self, base_model: nn.Module, distance: float) -> "RoutingMemory":
        """
        A memory in which rows that say the same are one, with the mean of their values; its scales are fitted anew.

        Args:
            base_model: the model that the memory was built for.
            distance: rows are the same if their keys lie closer than `distance` times the layer's scale in every layer
                and their values choose the same experts there.
        """
        return edit.merge_duplicates(self, base_model, distance)

    def merge(self, other: "RoutingMemory") -> "RoutingMemory":
        """
        A memory with the rows of both, its scales fitted anew; without provenance they are the mean of the two.

        Rows of the other memory are stored by this one's codecs, which were not fitted to them.
        An example that both hold under one id with the same tokens is taken once; another example under a taken id
        gets the next free one.

        Raises:
            MemoryMismatchError: if value spaces, ways of storage, layers, base models or provenance differ in kind.
        """
        return edit.merge(self, other)

    def save_pretrained(
        self, save_directory: str | PathLike, max_shard_size: int | str = "2GB", provenance: bool = True
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
        save_memory(self, Path(save_directory), max_shard_size, provenance)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **options,
    ) -> "RoutingMemory":
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
        return load_memory(cls, folder, options)

    def push_to_hub(
        self,
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
        return push_memory(
            self,
            repo_id,
            save=dict(max_shard_size=max_shard_size, provenance=provenance),
            create=dict(private=private, token=token),
            upload=dict(
                path_in_repo=path_in_repo,
                revision=revision,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
            ),
        )
