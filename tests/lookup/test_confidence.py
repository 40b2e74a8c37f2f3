"""How far neighbours are trusted, against loops over tokens, on real models with real memories."""

import logging
import math
from dataclasses import replace
from statistics import mean

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, detach_memory, disable_memory
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.lookup.options import CONFIDENCES
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.attach import watch_lookups
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from tests.support.attaching import attached
from tests.support.caches import CACHES, LENGTHS, WIDE, fed, packed_calls, padded, uncached
from tests.support.models import PLAIN, random_memory, tiny_model
from tests.support.stats import stats_of, with_stats

DEFAULT = {name: KNNMoEConfig().options()[name] for name in PLAIN}
LEVELS = {
    0: dict(
        reference_mean=0.65,
        background_mean=0.35,
        weight=1.0,
        threshold=0.45,
        width=0.3,
        reference_drift=0.1,
        background_drift=-0.1,
    ),
    1: dict(
        reference_mean=0.6,
        background_mean=0.2,
        weight=3.0,
        threshold=0.55,
        width=0.2,
        reference_drift=-0.1,
        min_warmup=0.8,
        open_shift=0.3,
        background_open_shift=0.1,
    ),
}


def calibrated_memory(model, stats=LEVELS, **options) -> RoutingMemory:
    return with_stats(random_memory(model, **(DEFAULT | options)), stats)


def observed(model, ids, mask=None, **options):
    """Logits; by layer, neighbours' distances (B, S, K) and confidences (B, S)."""
    distances, confidences = {}, {}

    def note(event):
        distances[event.layer] = event.neighbors.distances.reshape(*ids.shape, -1)
        confidences[event.layer] = event.confidence.reshape(ids.shape)

    with watch_lookups(model, note), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **options).logits
    return logits, distances, confidences


def similarity(distances: list[float], scale: float, gamma: float) -> float:
    return mean(math.exp(-gamma * d / scale) for d in distances)


def by_loop(distances, real, memory, stats) -> dict[int, torch.Tensor]:
    """Confidences of tokens one after the other: a running mean for each layer, averaged over the layers passed."""
    config, found = memory.config, {layer: torch.zeros(real.shape) for layer in distances}
    keep = 0.5 ** (1 / config.half_life)
    for row in range(real.shape[0]):
        totals, tokens, seen = dict.fromkeys(distances, 0.0), 0.0, 0
        for t in range(real.shape[1]):
            if not real[row, t]:
                continue
            tokens, seen, evidence, weights, opening = tokens * keep + 1, seen + 1, 0.0, 0.0, 0.0
            for layer in sorted(distances):
                own = stats[layer]
                warmup = max(keep**seen, own.min_warmup)
                similar = similarity(distances[layer][row, t].tolist(), memory.layers[layer].scale, config.gamma)
                likeness = min(max(evidence / weights, 0.0), 1.0) if weights else 0.0
                fallen = (1 - likeness) * own.background_open_shift + likeness * own.open_shift
                totals[layer] = totals[layer] * keep + similar + fallen * opening
                ordinary, high = (
                    own.background_mean + own.background_drift * warmup,
                    own.reference_mean + own.reference_drift * warmup,
                )
                between = (totals[layer] / tokens - ordinary) / (high - ordinary)
                evidence, weights = evidence + own.weight * between, weights + own.weight
                opening = 1 / (1 + math.exp(-(evidence / weights - own.threshold) / own.width))
                lam = similar * opening
                found[layer][row, t] = lam if lam >= 1e-3 else 0.0
    return found


def levels_in_force(memory) -> dict[int, CalibrationStats]:
    if memory.config.confidence == "calibrated" and all(rows.stats for rows in memory.layers.values()):
        return {layer: rows.stats for layer, rows in memory.layers.items()}
    return context_levels(memory)


def context_levels(memory) -> dict[int, CalibrationStats]:
    """By hand: the references' mean similarity to rows of other examples."""
    config, found = memory.config, {}
    for layer, rows in memory.layers.items():
        similar = [similarity(one, rows.scale, config.gamma) for one in rows.distances.tolist()]
        about = dict(threshold=config.context_threshold, width=config.context_width)
        found[layer] = stats_of(memory, layer, reference_mean=mean(similar), **about)
    return found


def assert_as_by_loop(model, memory, ids, mask, stats=None) -> dict[int, torch.Tensor]:
    with attached(model, memory):
        _, distances, confidences = observed(model, ids, mask)
    wanted = by_loop(distances, mask.bool(), memory, stats or levels_in_force(memory))
    for layer, lam in confidences.items():
        torch.testing.assert_close(lam, wanted[layer], atol=2e-5, rtol=1e-4)
        assert not lam[mask == 0].any()
    return confidences


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_rbf_is_the_formula_of_the_paper(model, tokens, gamma):
    memory = random_memory(model, gamma=gamma)
    attach_memory(model, memory)
    _, distances, confidences = observed(model, tokens)
    for layer, rows in memory.layers.items():
        for found, lam in zip(distances[layer].view(-1, 4).tolist(), confidences[layer].view(-1).tolist()):
            assert lam == pytest.approx(similarity(found, rows.scale, gamma), rel=1e-5)
        assert confidences[layer].std() > 0.03


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("half_life", [1.0, 16.0])
@pytest.mark.parametrize("confidence", ["context", "calibrated"])
def test_confidences_in_context_are_those_of_a_loop(family, tokens, confidence, half_life, side):
    model = tiny_model(family)
    wide = dict(context_threshold=0.65, context_width=0.15)
    memory = calibrated_memory(model, confidence=confidence, half_life=half_life, **wide)
    ids, mask = padded(tokens, side)
    for lam in assert_as_by_loop(model, memory, ids, mask).values():
        real = lam[mask == 1]
        assert real.std() > 0.04 and 0.1 < real.mean() < 0.9, real


def test_layers_are_in_context_with_those_before_them_or_alone(tokens, tmp_path):
    model = tiny_model("olmoe", num_hidden_layers=4)
    stats = {i: LEVELS[i % 2] | {"weight": 0.5 + i} for i in range(4)}
    calibrated_memory(model, stats).save_pretrained(tmp_path)
    ids, mask = padded(tokens, "left")
    found = {}
    for layers in ([0, 1, 2, 3], [1, 3], [2]):
        memory = RoutingMemory.from_pretrained(tmp_path, layers=layers)
        found[len(layers)] = assert_as_by_loop(model, memory, ids, mask)
        assert list(found[len(layers)]) == layers


def test_without_the_layers_before_a_layer_s_evidence_is_its_own(tokens):
    """Layers whose lookups did not run, as where a pipeline's other stage holds them, are not averaged."""
    model = tiny_model("olmoe")
    memory = calibrated_memory(model)
    attach_memory(model, memory)
    gate = find_gates(model)[1]
    seen = {}
    gate.module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    _, distances, together = observed(model, tokens)
    alone = []
    x, lookup = seen["x"].reshape(tokens.numel(), -1), RoutingHooks.of(model).current[1]
    with disable_memory(model), watching([lookup], alone.append):
        lookup.route(x, gate.module(x), Tokens(1, len(x)))
    (event,) = alone
    one_row = torch.ones(1, len(x), dtype=torch.bool)
    wanted = by_loop({1: event.neighbors.distances.view(1, len(x), -1)}, one_row, memory, levels_in_force(memory))
    torch.testing.assert_close(event.confidence, wanted[1][0], atol=2e-5, rtol=1e-4)


def test_a_calibration_for_other_options_is_not_used(family, tokens, tmp_path, caplog):
    model = tiny_model(family)
    calibrated_memory(model).save_pretrained(tmp_path)
    ids, mask = padded(tokens, "left")
    wide = dict(context_threshold=0.65, context_width=0.15)
    for change, words in (
        ({}, None),
        (dict(temperature=2.0), None),
        (dict(gamma=0.6), "calibrated for gamma=0.3, not 0.6"),
        (dict(half_life=2.0), "calibrated for half_life=24, not 2"),
        (dict(num_neighbors=9), "calibrated for num_neighbors=4, not 9"),
    ):
        caplog.clear()
        memory = RoutingMemory.from_pretrained(tmp_path, **change, **wide)
        assert change.items() <= memory.config.options().items() and memory.layers[0].stats is not None
        with caplog.at_level(logging.WARNING, "knnmoe_hf"):
            found = assert_as_by_loop(model, memory, ids, mask, context_levels(memory) if words else None)
        assert all(lam.max() > 0.05 for lam in found.values())
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (words is not None) and all(words in line and "falls back" in line for line in said)


def test_constants_may_be_changed_when_a_memory_is_loaded(family, tokens, tmp_path):
    model = tiny_model(family)
    calibrated_memory(model).save_pretrained(tmp_path)
    ids, mask = padded(tokens, "left")
    for change in (dict(context_threshold=0.5), dict(context_width=0.5), dict(gamma=0.6), dict(half_life=2.0)):
        memory = RoutingMemory.from_pretrained(tmp_path, confidence="context", **change)
        assert_as_by_loop(model, memory, ids, mask)
    for confidence in CONFIDENCES:
        memory = RoutingMemory.from_pretrained(tmp_path, confidence=confidence)
        with attached(model, memory):
            assert observed(model, ids, mask)[0].isfinite().all()


def test_a_memory_far_from_open_is_bit_exactly_none(family, tokens):
    model = tiny_model(family)
    with torch.no_grad():
        base = model(input_ids=tokens).logits
    attach_memory(model, with_stats(calibrated_memory(model), LEVELS, threshold=9.0))
    logits, _, confidences = observed(model, tokens)
    assert not any(lam.any() for lam in confidences.values())
    assert torch.equal(logits, base)


def test_a_token_below_a_thousandth_keeps_its_own_route_to_the_bit(family, tokens):
    model = tiny_model(family)
    memory = calibrated_memory(model, half_life=1.0)
    attach_memory(model, with_stats(memory, LEVELS, threshold=0.65, width=0.02))
    gate = find_gates(model)[0]
    seen = {}
    gate.module.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    _, _, confidences = observed(model, tokens)
    lam = confidences[0].view(-1)
    assert ((lam == 0) | (lam >= 1e-3)).all() and 4 < int((lam == 0).sum()) < 32, lam
    x, routes = seen["x"], seen["out"]
    with disable_memory(model):
        own = gate.module(x)
    for mine, used in zip(own, routes):
        same = (mine == used).all(-1)
        assert same[lam == 0].all() and (used is routes[2] or not same[lam > 0.1].any())


def test_half_open_is_at_the_threshold_and_a_wide_open_memory_is_as_sure_as_its_neighbours(tokens):
    model = tiny_model("olmoe")
    for threshold, share in ((-1e3, 1.0), (0.0, 0.5)):
        memory = random_memory(model, gamma=0.0, confidence="calibrated", layers=[0])  # every token is wholly similar
        memory = with_stats(memory, reference_mean=1.5, background_mean=1.0, threshold=threshold)
        with attached(model, memory):
            _, _, confidences = observed(model, tokens)
        torch.testing.assert_close(confidences[0], torch.full((3, 12), share))


def test_without_a_calibration_it_falls_back_to_context_and_says_so(model, tokens, caplog):
    memory = random_memory(model, **DEFAULT)
    assert memory.config.confidence == "calibrated" and memory.layers[0].stats is None
    found = []
    for confidence in ("calibrated", "context"):
        caplog.clear()
        memory.config.confidence = confidence
        with caplog.at_level(logging.WARNING, "knnmoe_hf"), attached(model, memory):
            found.append(observed(model, tokens)[0])
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (confidence == "calibrated") and all("falls back to 'context'" in line for line in said)
    assert torch.equal(*found)
    memory.config.confidence = "calibrated"
    fitted = replace(memory.layers[1], stats=stats_of(memory, 1))  # one layer alone is no calibration
    memory = replace(memory, layers=dict(memory.layers) | {1: fitted})
    with caplog.at_level(logging.WARNING, "knnmoe_hf"), attached(model, memory):
        assert torch.equal(observed(model, tokens)[0], found[0])
    assert "falls back" in caplog.text


# the default confidence, however the tokens reach the model


def close(one, other):
    torch.testing.assert_close(one, other, atol=5e-4, rtol=1e-3)


@pytest.fixture
def remembering(family):
    model = tiny_model(family, **WIDE[family])
    memory = calibrated_memory(model)
    assert {name: memory.config.options()[name] for name in DEFAULT} == DEFAULT
    attach_memory(model, memory)
    return model


def test_the_default_confidence_matters_here(remembering, tokens):
    whole, _, confidences = observed(remembering, tokens)
    assert all(lam.std() > 0.05 for lam in confidences.values())
    with disable_memory(remembering):
        assert (uncached(remembering, tokens) - whole).abs().max() > 0.1
    detach_memory(remembering)
    memory = calibrated_memory(remembering)
    memory.config.half_life = 1e-3  # were it to look at the token alone
    attach_memory(remembering, memory)
    assert (uncached(remembering, tokens) - whole).abs().max() > 0.02


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_what_they_are_alone(remembering, tokens, side):
    ids, mask = padded(tokens, side)
    together = uncached(remembering, ids, mask)
    for row, length in enumerate(LENGTHS):
        close(together[row][mask[row] == 1], uncached(remembering, tokens[row : row + 1, :length])[0])


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6]], ids=["token by token", "in parts"])
@pytest.mark.parametrize("kind", CACHES)
def test_caches_give_what_the_whole_sequence_gives(remembering, tokens, kind, chunks):
    ids, mask = padded(tokens, "left")
    cache, spare = CACHES[kind](remembering), 4 if kind == "static" else 0
    found, _ = fed(remembering, cache, ids, mask, chunks, spare)
    close(found[mask == 1], uncached(remembering, ids, mask)[mask == 1])


def test_packed_sequences_are_what_they_are_alone(remembering, family, tokens):
    wanted = torch.cat([uncached(remembering, tokens[i : i + 1, :n])[0] for i, n in enumerate(LENGTHS)])
    for form, call in packed_calls(tokens, boolean=family != "gpt_oss"):
        if family == "gpt_oss" and form == "positions":
            continue  # it makes no mask of positions
        if family == "gpt_oss":
            call["attention_mask"] = {f"{kind}_attention": call["attention_mask"] for kind in ("full", "sliding")}
        with torch.no_grad():
            close(remembering(**call, use_cache=False).logits[0], wanted)


@pytest.mark.parametrize("options", [{}, dict(cache_implementation="static")], ids=["dynamic", "static"])
def test_generation_sees_what_an_uncached_pass_sees(remembering, tokens, options):
    ids, mask = padded(tokens, "left")
    common = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, disable_compile=True)
    with torch.no_grad():
        out = remembering.generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **common, **options
        )
    mask = torch.nn.functional.pad(mask, (0, 6), value=1)
    close(torch.stack(out.logits, 1), uncached(remembering, out.sequences, mask)[:, 11:-1])
