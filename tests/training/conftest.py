"""The folder of an interrupted build."""

from pathlib import Path

import pytest

from tests.training.checkpoints import At, new_trainer


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """A folder in which a build was interrupted after five of its six batches."""
    with pytest.raises(KeyboardInterrupt):
        new_trainer(tmp_path, callbacks=[At(5)]).train()
    return tmp_path
