"""`RoutingMemory`: how a memory is made, and what can be done with it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.lookup.blocks import Allocate, Table, in_memory
from knnmoe_hf.memory import adjust, edit, encode, folder, hub
from knnmoe_hf.memory.base_model import BaseModel
from knnmoe_hf.memory.card_data import CardData
from knnmoe_hf.memory.data import MemoryData
from knnmoe_hf.memory.fingerprint import tokenizer_fingerprint
from knnmoe_hf.memory.next_tokens import check_next_tokens
from knnmoe_hf.memory.provenance import Provenance

if TYPE_CHECKING:  # a class of transformers, which takes seconds to import
    from knnmoe_hf.config import KNNMoEConfig


class RoutingMemory(MemoryData):
    """
    A routing memory: for each MoE layer, N keys (gate inputs) and N values (routing that suited the true next token).

    Made by `KNNMoETrainer`, by `from_rows` or by `from_pretrained`; in use once it is attached to its model
    (`attach_memory`). It is never changed: the methods that edit it return another memory. Its attributes are those of
    `MemoryData`.
    """

    @classmethod
    def from_rows(
        cls,
        config: "KNNMoEConfig",
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        base_model: nn.Module,
        example_ids: Iterable[int] | Tensor | None = None,
        next_tokens: Iterable[int] | Tensor | None = None,
    ) -> "RoutingMemory":
        """
        A memory from tensors.

        Args:
            config: retrieval and mixing; `config.value_space` says what the values are.
            keys: `{layer: (N, d)}`, gate inputs, any float dtype; stored as the config's key codec and dtype say.
            values: `{layer: (N, E)}`, float, in the value space's own form; stored as `config.value_dtype`.
            base_model: the model that the rows belong to; its gates' fingerprint is kept.
            example_ids: (N,) the example of each row; without them, a row is its own example.
            next_tokens: (N,) the id of the token that follows each row, for `recall="next_tokens"` and `"both"`.

        Raises:
            ValueError: for layers, shapes or values that do not fit the model or each other.
        """
        rows = encode.check_rows(config.value_space, keys, values, BaseModel(base_model).gates)
        provenance = Provenance.of_rows(encode.check_ids(example_ids, rows))
        next_tokens = check_next_tokens(next_tokens, rows)
        return replace(cls.build(config, keys, values, base_model, provenance), stored_next_tokens=next_tokens)

    @classmethod
    def build(
        cls,
        config: "KNNMoEConfig",
        keys: Mapping[int, Table],
        values: Mapping[int, Table],
        base_model: nn.Module,
        provenance: Provenance,
        tokenizer=None,
        reference_set_hash: str | None = None,
        processes: Processes = ALONE,
        allocate: Allocate = in_memory,
    ) -> "RoutingMemory":
        """
        A memory from the rows of a build, which are known to fit the model.

        Args:
            config, keys, values, base_model: as in `from_rows`; tables of rows may lie on disk.
            provenance: of the N rows.
            tokenizer: saved beside the memory.
            reference_set_hash: SHA-256 of the examples' tokens and labels.
            processes: that call this alike, each with the keys and values of other layers; all get the whole memory.
            allocate: makes the tensors of N rows.

        Raises:
            ValueError: if rows are not finite in the dtypes that the configuration asks for.
        """
        base, options = BaseModel(base_model), config.retrieval_options()
        layers = encode.encode_layers(options, keys, values, base, provenance.example_ids, processes, allocate)
        known = tokenizer_fingerprint(tokenizer) if tokenizer is not None else None
        parts = encode.bound_to(base, config, tokenizer_fingerprint=known, reference_set_hash=reference_set_hash)
        config, origin = parts
        card_data = CardData(finetuned_from=base.repository_of_folder())
        return cls(config, layers, origin, provenance, tokenizer, card_data=card_data)

    # the methods below are functions of these modules, documented there, whose first argument is the memory
    remove_examples = edit.remove_examples
    select_rows = edit.select_rows
    take = edit.take
    merge = edit.merge
    recoded = edit.recoded
    select_layers = adjust.select_layers
    with_options = adjust.with_options
    with_threshold = adjust.with_threshold
    save_pretrained = folder.save_pretrained
    from_pretrained = classmethod(folder.from_pretrained)
    push_to_hub = hub.push_to_hub
