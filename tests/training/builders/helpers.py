"""What a builder recorded, and the NLL of the stored logits measured again."""

import torch
from torch.nn import functional as F

from knnmoe_hf.models.gates import find_gates
from tests.support.training import examples


def replay(model, memory, row: dict, example: int) -> torch.Tensor:
    """NLL of an example's targets when hooks of this test make every gate route by the stored logits."""
    mine = memory.provenance.example_ids == example
    positions = memory.provenance.positions[mine].long()
    handles = []
    for gate in find_gates(model):

        def force(_, args, output, gate=gate):
            logits = output[0].clone()
            logits[positions] = memory.layers[gate.layer].decoded_values[mine]
            return (logits, *gate.rule(logits, gate.top_k))

        handles.append(gate.module.register_forward_hook(force))
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    for handle in handles:
        handle.remove()
    return F.cross_entropy(logits[positions], ids[0, positions + 1], reduction="none")


def changes(memory) -> torch.Tensor:
    """(5,) recorded change of each example's NLL."""
    source = memory.provenance
    return torch.zeros(5).index_add(0, source.example_ids, source.nll_after - source.nll_before)


def check_recorded(model, memory) -> None:
    for index, row in enumerate(examples()):
        recorded = memory.provenance.nll_after[memory.provenance.example_ids == index]
        torch.testing.assert_close(replay(model, memory, row, index), recorded, atol=1e-4, rtol=1e-4)
