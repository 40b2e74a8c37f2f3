"""Memories with a card that tells everything."""

from dataclasses import replace

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory.card_data import CardData
from knnmoe_hf.memory.measurements import ConfidenceBin, EvaluatedText, LayerConfidence, Measurements
from knnmoe_hf.memory.verdict import NllChange, Verdict
from tests.memory.helpers import full_memory, tiny_tokenizer
from tests.support.models import tiny_model

MEASURED = Measurements(
    base_nll=3.0,
    elsewhere_nll={"python": 2.0},
    layers=[LayerConfidence(0, 0.61, 0.11), LayerConfidence(1, 0.72, None)],
    references=[ConfidenceBin(0.2, -0.01, 60), ConfidenceBin(0.7, -0.2, 61)],
    background=[ConfidenceBin(0.1, 0.002, 50)],
    evaluations=[EvaluatedText("new text", 900, 3.5, NllChange(-0.25, -0.3, -0.2, 12), 3, 0.02)],
)
SAID = CardData(
    model_name="A memory of notes",
    license="cc-by-4.0",
    language=["en"],
    tags=["notes"],
    dataset_tags=["me/notes"],
    dataset=["notes.jsonl"],
    build={"builder": "candidates", "builder_steps": 10, "learning_rate": 0.3},
    measured=MEASURED,
)


def verdict(**given) -> Verdict:
    """Of a memory that helps, and costs a little on one kind of text."""
    elsewhere = {"python": NllChange(0.002, -0.001, 0.005, 16, "this machine")}
    gain = NllChange(-0.12, -0.15, -0.09, 16)
    known = dict(examples=128, tokens=32640, repeated=0, gain=gain, open_gain=NllChange(-0.15, -0.2, -0.1, 16))
    return Verdict(**(known | dict(elsewhere=elsewhere, confidence="rbf") | given))


def memory(level: bool = True, **card) -> RoutingMemory:
    """A memory that tells everything; `card`: other parts of its `card_data`."""
    bare = full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer() if level else None)
    return replace(bare, verdict=verdict(), card_data=replace(SAID, **card))
