"""What the library is for, on every routing rule: held-out text of a domain that the model never saw."""

import pytest

from examples.router_only_baseline import main
from knnmoe_hf.lab import LAB_MODELS

IN, OFF = "lab:topics/test", "lab:python/test"
LARGE = ("olmoe", "qwen3_moe", "gpt_oss")  # 32 experts in each of four layers; the others have 16 in three
LABS = (*LARGE, "deepseek_v3")  # of the other small models, benchmarks/results/families.md has the gains


@pytest.mark.slow
@pytest.mark.parametrize("lab", LABS)
def test_a_memory_helps_in_its_domain_beats_tuned_routers_and_does_no_harm_elsewhere(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = main(["--model", str(LAB_MODELS[lab]), "--max-tokens", "40000", "--test-examples", "64"])
    nll, hits = table["memory"][IN]
    large = lab in LARGE
    assert nll.mean <= (-0.10 if large else -0.05) and nll.high < 0
    assert hits.mean > 0 and (hits.mean >= 0.01 and hits.low > 0 or not large)
    assert table["memory"][OFF][0].mean <= 0.02
    assert nll.mean < table["router-only"][IN][0].mean
