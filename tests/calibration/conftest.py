"""Calibrated memories of tiny models, made once for all tests of this folder, since each takes a calibration."""

import pytest

from tests.calibration.helpers import Case
from tests.conftest import FAMILIES, tiny_model


@pytest.fixture(scope="package", params=FAMILIES)
def case(request) -> Case:
    return Case(request.param)


@pytest.fixture(scope="package")
def olmoe() -> Case:
    return Case("olmoe")


@pytest.fixture(scope="package")
def bytewise():
    return tiny_model("olmoe", vocab_size=260)
