"""Rows on their way into a memory: checked, refused with a way out, encoded by one process or several."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.memory.provenance import Provenance
from tests.memory.helpers import assert_same, build, rows_for
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda k, v: k.pop(1), "keys are for layers"),
        (lambda k, v: (k.clear(), v.clear()), "keys are for layers"),
        (lambda k, v: (k.update({7: k[0]}), v.update({7: v[0]})), "layer 7 has no gate"),
        (lambda k, v: (k.update(x=k[0]), v.update(x=v[0])), "layer 'x' has no gate"),
        (lambda k, v: k.update({1: k[1][:-1]}), r"keys\[1\] are \[5, 32\]"),
        (lambda k, v: k.update({1: torch.randn(6, 31)}), r"floats of \[6, 32\]"),
        (lambda k, v: v.update({0: torch.randn(6, 9)}), r"floats of \[6, 8\]"),
        (lambda k, v: v.update({0: torch.randn(6)}), r"values\[0\] are \[6\]"),
        (lambda k, v: k.update({0: torch.tensor(1.0)}), r"keys\[0\] are \[\]"),
        (lambda k, v: k.update({0: k[0].long()}), "torch.int64"),
        (lambda k, v: k.update({0: k[0].numpy()}), "ndarray"),
        (lambda k, v: k[1][2, 3].fill_(float("nan")), r"keys\[1\] have values that are not finite"),
        (lambda k, v: v[0][2, 3].fill_(float("inf")), r"values\[0\] have values that are not finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(olmoe, change, words):
    keys, values = rows_for()
    change(keys, values)
    with pytest.raises(ValueError, match=words):
        build(olmoe, keys, values)


@pytest.mark.parametrize(
    "ids, words", [([0] * 5, "5 example_ids are given for 6"), ([0.5] * 6, "0.5 is not an example id")]
)
def test_example_ids_that_do_not_fit_are_refused(olmoe, ids, words):
    for given in (ids, torch.tensor(ids), iter(ids)):
        with pytest.raises(ValueError, match=words):
            build(olmoe, *rows_for(), example_ids=given)


def test_options_and_values_that_do_not_fit_are_refused(olmoe):
    with pytest.raises(ValueError, match="negative"):
        build(olmoe, *rows_for(), value_space="assignment")
    config = KNNMoEConfig()
    config.gamma = -1
    with pytest.raises(ValueError, match="gamma=-1"):
        RoutingMemory.from_rows(config, *rows_for(), olmoe)


# rows that overflow as they are stored


@pytest.mark.parametrize("codec", ["raw", "pca", "logits"])
def test_keys_beyond_float16_are_refused_with_a_way_out_that_works(olmoe, codec):
    keys, values = rows_for()
    keys[1][0, 0] = 1e6
    way_out = r"^keys\[1\] overflow key_dtype='float16': use key_dtype='bfloat16' or 'float32'\.$"
    with pytest.raises(ValueError, match=way_out):
        build(olmoe, keys, values, key_codec=codec, key_whitening=0, key_dtype="float16")
    for dtype in ("bfloat16", "float32", "int8"):
        assert len(build(olmoe, keys, values, key_codec=codec, key_dtype=dtype)) == 6


def test_values_beyond_their_dtype_are_refused_with_a_way_out_that_works(olmoe):
    keys, values = rows_for()
    values[1][0, 0], values[1][1, 0] = 1e6, -1e6
    way_out = r"^values\[1\] overflow value_dtype='float16': use value_dtype='float32'\.$"
    with pytest.raises(ValueError, match=way_out):
        build(olmoe, keys, values, value_dtype="float16", value_experts=None)
    assert len(build(olmoe, keys, values, value_dtype="float32", value_experts=None)) == 6


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_rows_with_which_sums_would_overflow_are_refused(olmoe, side, dtype):
    keys, values = rows_for()
    {"keys": keys, "values": values}[side][1][0, 0] = 3e38
    options = dict(key_codec="raw", key_dtype=dtype, value_dtype=dtype, value_experts=None)
    with pytest.raises(ValueError, match=rf"^{side}\[1\] .*drop"):
        build(olmoe, keys, values, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_default_value_beyond_float16_is_named_and_not_blamed_on_the_codes_or_the_keys(olmoe, dtype):
    keys, values = rows_for()
    values[1][0] = 1e5
    way_out = r"^values\[1\] are too large for the float16 default value of .*: use value_experts=None to store all"
    with pytest.raises(ValueError, match=way_out):
        build(olmoe, keys, values, value_dtype=dtype, value_experts=2)
    assert len(build(olmoe, keys, values, value_dtype="float32", value_experts=None)) == 6


@pytest.mark.parametrize("side", ["keys", "values"])
def test_rows_of_a_build_that_are_not_finite_are_named_as_such(olmoe, side):
    keys, values = rows_for()
    {"keys": keys, "values": values}[side][1][2, 3] = float("nan")
    provenance = Provenance.of_rows(torch.arange(6))
    with pytest.raises(ValueError, match=rf"^{side}\[1\] have values that are not finite: drop those rows\.$"):
        RoutingMemory.build(KNNMoEConfig(), keys, values, olmoe, provenance)


# several processes


class Threads:
    """What encoding asks of `Processes`, for threads of one process; `shared` is the same object in all of them."""

    def __init__(self, index: int, shared: dict):
        self.index, self.shared = index, shared

    def _exchange(self, value) -> list:
        self.shared["values"][self.index] = value
        self.shared["barrier"].wait(timeout=60)
        values = list(self.shared["values"])
        self.shared["barrier"].wait(timeout=60)
        return values

    def gather(self, value) -> list:
        return self._exchange(value)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        tensor.copy_(self._exchange(tensor)[source])


def build_by_two(model, keys, values) -> list:
    """What each of two threads gets, a memory or an error; the first encodes layer 1, the second layer 0."""
    shared = {"values": [None, None], "barrier": threading.Barrier(2)}
    provenance = Provenance.of_rows(torch.arange(len(keys[0])))

    def work(index: int):
        own = [{1 - index: table[1 - index]} for table in (keys, values)]
        try:
            return RoutingMemory.build(KNNMoEConfig(), *own, model, provenance, processes=Threads(index, shared))
        except ValueError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


def test_processes_that_encode_other_layers_get_the_memory_of_one_process(olmoe):
    keys, values = rows_for(40)
    expected = build(olmoe, keys, values)
    for memory in build_by_two(olmoe, keys, values):
        assert_same(memory, expected)


def test_a_layer_that_one_process_cannot_encode_fails_in_all(olmoe):
    keys, values = rows_for()
    values[0][0] = 1e5
    values[0][1, 0] = float("inf")
    errors = build_by_two(olmoe, keys, values)
    assert [str(error) for error in errors] == ["values[0] have values that are not finite: drop those rows."] * 2
