"""A model in whose sliding window all tokens of these tests have room."""

import pytest

from tests.support.caches import WIDE
from tests.support.models import tiny_model


@pytest.fixture
def model(family):
    return tiny_model(family, **WIDE[family])
