"""The data of a page is that of the trace, and nothing in it is markup."""

import html
import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from knnmoe_hf import attach_memory, trace_routing
from knnmoe_hf.explain import packed
from knnmoe_hf.explain.page import lead, to_html
from knnmoe_hf.memory.levels import at_level
from tests.explain.pages import HARD, data_of, fixed, lab_trace, numbers
from tests.memory.helpers import full_memory, tiny_tokenizer
from tests.support.models import random_memory, tiny_model


@pytest.fixture(scope="module")
def trace():
    return lab_trace(recall="both")


@pytest.fixture(scope="module")
def page(trace):
    return to_html(trace)


def test_figures_of_the_page_are_those_of_the_trace(trace, page):
    data = data_of(page)
    assert numbers(data["ids"], "<i4").tolist() == trace.token_ids.tolist()
    assert np.array_equal(numbers(data["logProb"], "<f4"), trace.log_prob.numpy(), equal_nan=True)
    assert np.array_equal(numbers(data["baseLogProb"], "<f4"), trace.base_log_prob.numpy(), equal_nan=True)
    rows = numbers(data["references"]["rows"], "<i4")
    for shown, (layer, found) in zip(data["layers"], trace.layers.items(), strict=True):
        assert shown["layer"] == layer
        assert np.array_equal(rows[numbers(shown["rows"], "<i4")], found.rows.flatten().numpy())
        scale = trace.memory.layers[layer].scale
        for name, values in (
            ("confidence", found.confidence),
            ("divergence", found.divergence),
            ("weights", found.weights),
            ("distances", found.distances / scale),
        ):
            np.testing.assert_allclose(fixed(shown[name]), values.flatten().numpy(), atol=values.max() * 1e-5)
        for name, ids, weights in (
            ("own", found.own_experts, found.own_weights),
            ("mixed", found.mixed_experts, found.mixed_weights),
        ):
            assert np.array_equal(numbers(shown[name]["ids"], "<i2"), ids.flatten().numpy())
            np.testing.assert_allclose(fixed(shown[name]["weights"]), weights.flatten().numpy(), atol=2e-5)
    np.testing.assert_allclose(fixed(data["recalled"]["weight"]), trace.recalled.weight.numpy(), atol=2e-5)


def test_the_text_on_the_page_is_the_text_and_no_markup(trace, page):
    data = data_of(page)
    texts = [data["vocabulary"][place] for place in numbers(data["tokens"], "<i4")]
    content = b"".join(
        bytes.fromhex(text) if kind == "b" else text.encode() for text, kind in texts if kind in ("t", "b")
    )
    readable = re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), content.decode())
    assert readable == HARD
    assert "<b>" not in page and "alert(1)</script>" not in page and "<!-- " not in page
    assert len(re.findall("<script", page)) == 2 and "\u202e" not in page and "\u2028" not in page


def test_each_neighbour_has_its_passage_around_it(trace, page):
    data = data_of(page)
    found, memory = data["references"], trace.memory
    rows, positions = numbers(found["rows"], "<i4"), numbers(found["positions"], "<i4")
    passage_of = numbers(found["passageOf"], "<i4")
    texts = memory.provenance.tokens()
    places = {id: [] for id in texts}
    for place, row in enumerate(rows):
        example, position = int(memory.provenance.example_ids[row]), int(memory.provenance.positions[row])
        assert positions[place] == position and numbers(found["examples"], "<f8")[place] == example
        passage, start = numbers(found["passages"][passage_of[place]], "<i2"), found["starts"][passage_of[place]]
        low, high = max(position - 12, 0), min(position + 13, len(texts[example]))
        shown = [data["vocabulary"][one][0] for one in passage[low - start : high - start]]
        assert len(shown) == high - low
        token = memory.tokenizer.decode([int(texts[example][position])])
        if "�" not in token and token.isprintable():
            assert data["vocabulary"][passage[position - start]][0] == token
        places[example].append(place)
    assert all(places.values())


@pytest.mark.parametrize("level, has", [("ids", True), ("none", False)])
def test_without_the_text_the_page_says_so_and_shows_what_remains(tokens, level, has):
    model = tiny_model("olmoe")
    attach_memory(model, at_level(full_memory(model, tokenizer=tiny_tokenizer()), level))
    with torch.no_grad(), trace_routing(model) as trace:
        model(input_ids=tokens)
    page = to_html(trace)
    data = data_of(page)
    assert trace.provenance().replace("'", "&#39;") in page
    assert data["references"]["passages"] is None and (data["references"]["examples"] is not None) == has


def test_a_memory_without_a_tokenizer_shows_ids(tokens):
    model = tiny_model("gpt_oss")
    attach_memory(model, random_memory(model))
    with torch.no_grad(), trace_routing(model, log_probs=False) as trace:
        model(input_ids=tokens)
    page = to_html(trace)
    data = data_of(page)
    assert data["vocabulary"][0] == [str(trace.token_ids[0].item()), "u"] and "shown by their ids" in page
    assert "are not known" in page and 'value="gain"' not in page
    assert "log-probability" not in lead(trace)


def test_a_page_of_many_tokens_and_layers_has_at_most_ten_megabytes(monkeypatch):
    model = tiny_model("olmoe", num_hidden_layers=16, num_experts=16, num_experts_per_tok=8)
    attach_memory(model, random_memory(model, rows=400, num_neighbors=16))
    ids = torch.randint(96, (8, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace_routing(model, log_probs=False) as trace:
        model(input_ids=ids)
    page = to_html(trace)
    data = data_of(page)
    assert len(trace) == 4000 and len(trace.layers) == 16
    assert 5_000_000 < len(page) < 10_000_000
    assert 1 <= data["neighbors"] < data["allNeighbors"] == 16
    monkeypatch.setattr(packed, "LARGEST_PAGE", 100_000_000)
    assert data_of(to_html(trace))["neighbors"] == 16


@pytest.mark.parametrize("share, context", [(1.0, 12), (0.85, 12), (0.05, 3)])
def test_passages_count_where_what_fits_into_a_page_is_chosen(trace, monkeypatch, share, context):
    def size(data: dict) -> int:
        return len(json.dumps(data | {"vocabulary": None}, separators=(",", ":")))

    full = size(packed.pack(trace))
    monkeypatch.setattr(packed, "_RESERVED", 3_000)  # for names and numbers of layers
    monkeypatch.setattr(packed, "LARGEST_PAGE", share * full + 3_000)
    data = packed.pack(trace)
    assert data["context"] == context and (data["neighbors"] == data["allNeighbors"]) == (share == 1)
    assert size(data) <= share * full + 3_000 or (data["neighbors"], context) == (1, 3)


def test_a_path_of_this_machine_is_not_on_the_page(trace, page):
    assert str(trace.memory.config.base_model_name_or_path) not in page


def test_a_notebook_shows_the_page_in_a_frame(trace, page):
    shown = trace._repr_html_()
    assert shown.startswith("<iframe") and html.unescape(shown.partition('srcdoc="')[2].partition('"')[0]) == page


def test_a_token_that_is_markup_stays_text(tokens):
    words = {f"</script><b>{place}": place for place in range(96)}
    backend = Tokenizer(models.WordLevel(words, unk_token="</script><b>0"))
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model))
    with torch.no_grad(), trace_routing(model, log_probs=False) as trace:
        model(input_ids=tokens)
    page = to_html(trace, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    assert "<b>" not in page and page.count("</script>") == 2
    inside = page.partition('id="data">')[2].partition("</script>")[0]
    assert inside and not set("<>&") & set(inside)
    assert data_of(page)["vocabulary"][0][0].startswith("</script><b>")
