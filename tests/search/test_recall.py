"""The default engine finds the neighbours that are there among what a memory really holds: encoded router inputs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows
from knnmoe_hf.lookup.codecs import fit_keys
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.search import StoredKeys
from tests.search.helpers import BACKENDS, K, engine, found_share

ROWS, QUERIES = 8192, 512
OTHERS = [pytest.param(backend, marks=pytest.mark.slow) for backend in BACKENDS]


def encoded(x: torch.Tensor, asked: torch.Tensor) -> tuple[StoredKeys, torch.Tensor]:
    """Inputs (N, d) as a memory of the default configuration stores them, and others (T, d) as it looks them up."""
    config, unused = KNNMoEConfig(), torch.zeros(len(x), 1)
    encoder = fit_keys(x, unused, config.key_codec, config.key_dim, config.key_whitening, torch.int8)
    return StoredKeys(encoder.encode(x, unused, torch.int8), encoder.step), encoder.query(asked, unused)


def router_inputs(model, tokenizer, split: str, length: int) -> dict[int, torch.Tensor]:
    """(length, d) inputs of the first and the last gate of a lab model, while it reads English."""
    gates = find_gates(model)
    seen = {gate.layer: [] for gate in (gates[0], gates[-1])}
    hooks = [
        gate.module.register_forward_hook(lambda _, args, out, i=gate.layer: seen[i].append(args[0].flatten(0, -2)))
        for gate in gates
        if gate.layer in seen
    ]
    texts = torch.tensor(windows(documents("topics", split), tokenizer, 256, length // 256))
    with torch.no_grad():
        for part in texts.split(16):
            model(input_ids=part)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in seen.items()}


@pytest.fixture(scope="module")
def lab():
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS["olmoe"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS["olmoe"])
    stored = router_inputs(model, tokenizer, "reference", ROWS)
    asked = router_inputs(model, tokenizer, "test", 2048)
    return [encoded(stored[layer], asked[layer][:: 2048 // QUERIES]) for layer in stored]


def clustered_inputs(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs around 200 centres, off the origin, whose main axes hold most of their variance."""
    generator = torch.Generator().manual_seed(hidden)
    spectrum = torch.arange(1, hidden + 1).float() ** -0.5
    centres = 1 + torch.randn(200, hidden, generator=generator) * spectrum
    ids = torch.randint(200, (ROWS + QUERIES,), generator=generator)
    x = centres[ids] + 0.6 * spectrum * torch.randn(len(ids), hidden, generator=generator)
    return x[QUERIES:], x[:QUERIES]


def assert_recall(backend: str, keys: StoredKeys, queries: torch.Tensor, least: float, k: int = K) -> None:
    found = engine(keys, backend, num_neighbors=k).search(queries, k)
    assert bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
    share = found_share(found, engine(keys).search(queries, k))
    assert share >= least, f"{backend} finds {share:.4f}"


@pytest.mark.parametrize("backend", ["auto", *OTHERS])
def test_router_inputs_of_the_lab(backend, lab):
    for keys, queries in lab:
        assert_recall(backend, keys, queries, 0.98)
    assert_recall(backend, *lab[-1], least=0.97, k=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("hidden", [2048, 2880])
def test_clustered_inputs_of_real_width(backend, hidden):
    assert_recall(backend, *encoded(*clustered_inputs(hidden)), least=0.97)


def test_a_row_with_its_index_takes_no_more_than_130_bytes(lab):
    keys, _ = lab[0]
    assert engine(keys, "auto").nbytes <= (130 - 86) * len(keys)
