"""No model of transformers slips by: each router is in the table of families or refused with a reason."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.families import FAMILIES
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.refused import REFUSED
from tests.support.families import FAMILIES as TESTED
from tests.support.families import family_model

MODELS = Path(transformers.__file__).parent / "models"
# a class that chooses experts, by its name
ROUTES = re.compile(r"(Router|TopKGate|TopKGating|M[oO]E\w*Gate|Moe\w*Gate)$")
CHOOSES = re.compile(r"\b(topk|argmax|multinomial|sort|argsort)\(")  # or by what it does, to what is called as here
AMONG = re.compile("expert|router", re.IGNORECASE)
MIXED = re.compile("MoE|Moe")
EXPERTS = re.compile(r"(Experts|MoE|Moe|MoeBlock|MoEBlock|MoELayer)$")  # a class that has experts
# transformers does not record these: their layers have no gate, and a memory leaves them as they are
NO_GATES = {
    "DeepseekV4HashRouter": "chooses experts by the token's id, not by logits; other layers of its model have gates",
    "Dots3NoteVisionTopKRouter": "it routes pieces of images, not tokens of text",
    "Ernie4_5_VLMoeMoeTopKRouter": "lies in a block that is refused as a whole",
}
NOT_OF_EXPERTS = {
    "granite_docling": "its density router chooses an image's resolution",
    "vitpose_backbone": "its experts are chosen by the data set, for images",
}
NOT_ROUTERS = {
    "DbrxFFN": "chooses by what DbrxRouter returns, which is refused",
    "SwitchTransformersForConditionalGeneration": "counts what its routers chose, which are refused",
}


def modeling_files() -> dict[str, str]:
    return {path.stem.removeprefix("modeling_"): path.read_text("utf-8") for path in MODELS.rglob("modeling_*.py")}


def routers_of(source: str) -> set[str]:
    """The classes of a file that choose experts, and those that it records as the source of `router_logits`."""
    if not (AMONG.search(source) or MIXED.search(source)):
        return set()
    tree, lines, found = ast.parse(source), source.splitlines(), set()
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, node in classes.items():
        chooses = CHOOSES.search("\n".join(lines[node.lineno : node.end_lineno]))
        if ROUTES.search(name) or (chooses and AMONG.search(ast.unparse(node))):  # without its comments
            found.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and key.value == "router_logits":
                    found |= {name.id for name in ast.walk(value) if isinstance(name, ast.Name)}
    if not found and any(EXPERTS.search(name) for name in classes):
        found.add("experts without a router")
    return found - {"OutputRecorder"} - set(NOT_ROUTERS)


def all_routers(files: dict[str, str]) -> set[str]:
    return set().union(*(routers_of(source) for name, source in files.items() if name not in NOT_OF_EXPERTS))


def test_every_router_of_transformers_is_supported_or_refused_with_a_reason():
    supported = {family.router_class for family in FAMILIES}
    assert len(supported) == len(FAMILIES) and not supported & set(REFUSED)
    routers = all_routers(modeling_files())
    assert len(routers) > 60
    unknown = sorted(routers - supported - set(REFUSED) - set(NO_GATES))
    assert not unknown, "add each to FAMILIES (with a tiny model in tests/support/family_options.py), or to REFUSED"
    gone = sorted((supported | set(REFUSED) | set(NO_GATES)) - routers)
    assert not gone, "these rows name no router of this transformers"


@pytest.mark.parametrize(
    "found, source",
    {
        "NovaTopKRouter": "class NovaTopKRouter(nn.Module): pass",
        "NovaMoeGate": "class NovaMoeGate(nn.Module): pass",
        "Chooser": "class NovaModel:\n  _can_record_outputs = {'router_logits': OutputRecorder(Chooser, index=0)}",
        "Picker": "class Picker:\n  def forward(self, x):\n    return torch.topk(self.score(x), self.experts)",
        "Best": "class Best:\n  def forward(self, x, experts):\n    return experts[x.argmax(-1)]",
        "experts without a router": "class NovaExperts(nn.Module): pass",
    }.items(),
)
def test_a_new_router_does_not_slip_by_whatever_its_name(found, source):
    assert all_routers({"nova": source}) == {found}


def test_every_row_is_tested():
    tested = {type(find_gates(family_model(name))[0].module).__name__ for name in TESTED}
    assert tested == {family.router_class for family in FAMILIES}


class Recording(transformers.PreTrainedModel):
    """A model that records a router class of transformers, without the rest of its family."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, router: type):
        super().__init__(transformers.PreTrainedConfig())
        self._can_record_outputs = {"router_logits": router}
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].gate = router()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_router_is_named_with_the_reason_and_the_way_out(name):
    model = Recording(type(name, (nn.Module,), {}))
    with pytest.raises(UnsupportedModelError) as error:
        find_gates(model)
    reason, way_out = REFUSED[name]
    assert str(error.value).startswith(f"the router {name} at layers.0.gate is not supported: {reason}, so {way_out}")
    assert all(family.name in str(error.value) for family in FAMILIES)


SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4)


def refused_models():
    with torch.device("meta"):
        yield transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(**SMALL, num_local_experts=4, intermediate_size_mlp=16, head_dim=8)
        )
        yield transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**SMALL, num_local_experts=4))
        yield transformers.JetMoeForCausalLM(
            transformers.JetMoeConfig(**SMALL | dict(num_key_value_heads=2), num_local_experts=4, kv_channels=8)
        )
        yield transformers.DogeForCausalLM(transformers.DogeConfig(**SMALL, is_moe=True, num_experts=16))
        yield transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(vocab_size=96, d_model=32, d_ff=16, num_layers=2, num_heads=4)
        )
        yield transformers.NllbMoeForConditionalGeneration(
            transformers.NllbMoeConfig(
                vocab_size=96, d_model=32, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layers=4, decoder_layers=4
            )
        )


def test_models_of_refused_families_are_refused():
    models = list(refused_models())
    assert len(models) == 6
    for model in models:
        with pytest.raises(UnsupportedModelError, match="is not supported: .*, so use a model of another family"):
            find_gates(model)
