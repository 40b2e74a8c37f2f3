"""What a cache keeps of running sums, beside the generation that `test_sequence` runs on it."""

import copy

import torch

from knnmoe_hf.sequence.cache import Owner, SumsLayer

SERIES = [(None, 8.0), (0, 8.0), (1, 8.0)]


def filled(tokens: int = 3) -> SumsLayer:
    layer = SumsLayer(Owner())
    layer.append({series: torch.arange(tokens)[None] + 10.0 * place for place, series in enumerate(SERIES)})
    return layer


def test_series_that_go_on_keep_their_own_sums_and_others_are_gone():
    layer = filled()
    layer.append({SERIES[2]: torch.tensor([[25.0]]), SERIES[0]: torch.tensor([[5.0]])})
    assert {series: sums.item() for series, sums in layer.last().items()} == {SERIES[2]: 25.0, SERIES[0]: 5.0}
    layer.crop(1)
    assert {series: sums.item() for series, sums in layer.last().items()} == {SERIES[2]: 22.0, SERIES[0]: 2.0}


def test_a_copied_layer_goes_on_by_itself():
    layer = filled()
    layer.append({series: torch.zeros(1, 1) for series in SERIES})
    twin = copy.copy(layer)
    twin.append({series: torch.full((1, 1), 7.0) for series in SERIES})
    layer.append({series: torch.full((1, 1), 9.0) for series in SERIES})
    assert [sums.item() for sums in twin.last().values()] == [7.0] * 3
