"""The lab's training script, on a few steps."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from knnmoe_hf.lab import train as script


class Interrupted(Exception):
    pass


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_an_interrupted_training_goes_on_where_it_was(family, tmp_path, monkeypatch):
    monkeypatch.setitem(script.LAB_MODELS, family, tmp_path / "whole")
    script.train(family, steps=4, rows_per_step=1, work=tmp_path / "work", save_steps=2)
    assert not (tmp_path / "work" / family).exists()

    monkeypatch.setitem(script.LAB_MODELS, family, tmp_path / "resumed")
    plain, steps = Trainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise Interrupted
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying)
    with pytest.raises(Interrupted):
        script.train(family, steps=4, rows_per_step=1, work=tmp_path / "work", save_steps=2)
    script.train(family, steps=4, rows_per_step=1, work=tmp_path / "work", save_steps=2)
    assert len(steps) == 4 + 2  # two of the four steps were saved

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=2e-2, rtol=2e-2)
    report = json.loads((tmp_path / "resumed" / "held_out.json").read_text())
    assert report.keys() >= {"steps", "tokens", "minutes", "python", "tables", "topics"}
    shutil.rmtree(tmp_path / "work")
