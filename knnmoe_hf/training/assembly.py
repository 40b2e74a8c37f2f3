"""From the rows of all processes to one memory, which each of them has in the end."""

from collections.abc import Mapping, Sequence

from torch import nn

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.distributed import Processes
from knnmoe_hf.lookup.blocks import Allocate
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.encode import assemble, encode_layers
from knnmoe_hf.models.fingerprint import tokenizer_fingerprint
from knnmoe_hf.training.row_files import on_disk
from knnmoe_hf.training.rows import ReferenceRows


def build_together(
    config: KNNMoEConfig, rows: ReferenceRows, model: nn.Module, tokenizer, processes: Processes
) -> RoutingMemory:
    """
    The memory of what all processes have solved, which take turns at encoding its layers.

    Encoded rows are mapped from files without a name on the disk of `rows.folder`.

    Raises:
        ValueError: if there is no row, if two examples have one id, or if a row is not finite as it is stored.
    """
    layers, collected, allocate = [gate.layer for gate in rows.gates], rows.collect(processes), on_disk(rows.folder)
    config.retrieval_options()
    own, failure = {}, None
    try:
        own = encode_layers(
            config, collected.keys, collected.values, model, collected.provenance.example_ids, allocate
        )
    except ValueError as error:
        failure = str(error)
    if said := [text for text in processes.gather(failure) if text is not None]:  # all fail, as none would go on alone
        raise ValueError(said[0])
    return assemble(
        config,
        _shared(own, layers, processes, allocate),
        model,
        collected.provenance,
        tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
        reference_set_hash=collected.digest,
    )


def _shared(
    own: Mapping[int, LayerRows], layers: Sequence[int], processes: Processes, allocate: Allocate
) -> dict[int, LayerRows]:
    """The layers of all processes in each."""
    parts, shared = processes.gather({layer: _described(rows) for layer, rows in own.items()}), {}
    for place, layer in enumerate(layers):
        owner = processes.owner(place)
        shapes, about = parts[owner][layer]
        tensors = own[layer].tensors() if layer in own else {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name].contiguous() if layer in own else allocate(shape, dtype)
            processes.broadcast(tensor, owner)
            tensors[name] = tensor
        shared[layer] = own[layer] if layer in own else LayerRows.of_tensors(tensors, **about)
    return shared


def _described(rows: LayerRows) -> tuple[dict[str, tuple], dict]:
    """Shape and dtype of each tensor, and what else `LayerRows.of_tensors` asks for."""
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in rows.tensors().items()}
    about = dict(hidden_size=rows.hidden_size, num_experts=rows.num_experts, scale=rows.scale)
    return shapes, about | {"of_logits": rows.encoder.of_logits}
