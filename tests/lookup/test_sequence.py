"""What a cache keeps of running sums, beside the generation that `test_sequence` runs on it."""

import copy

import torch

from knnmoe_hf.models.kv_state import StateOwner, SumsLayer

SERIES = [(None, 8.0), (0, 8.0), (1, 8.0)]


def filled(tokens: int = 3) -> SumsLayer:
    layer = SumsLayer(StateOwner())
    layer.append(
        tuple(SERIES), torch.stack([torch.arange(tokens)[None] + 10.0 * place for place in range(len(SERIES))])
    )
    return layer


def last(layer: SumsLayer) -> dict:
    return dict(zip(layer.series, layer.last().flatten().tolist()))


def test_series_that_go_on_keep_their_own_sums_and_others_are_gone():
    layer = filled()
    layer.append((SERIES[2], SERIES[0]), torch.tensor([[[25.0]], [[5.0]]]))
    assert last(layer) == {SERIES[2]: 25.0, SERIES[0]: 5.0}
    layer.crop(1)
    assert last(layer) == {SERIES[2]: 22.0, SERIES[0]: 2.0}


def test_a_copied_layer_goes_on_by_itself():
    layer = filled()
    layer.append(tuple(SERIES), torch.zeros(3, 1, 1))
    twin = copy.copy(layer)
    twin.append(tuple(SERIES), torch.full((3, 1, 1), 7.0))
    layer.append(tuple(SERIES), torch.full((3, 1, 1), 9.0))
    assert twin.last().flatten().tolist() == [7.0] * 3
