"""Scores equal those of a plain loop over the logits; the bootstrap interval of a change resamples sequences."""

import math

import pytest
import torch

from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.evaluation import Change, Scores, paired_bootstrap, score
from knnmoe_hf.evaluation.scores import mean_change
from tests.support.models import tiny_model


def examples() -> list[dict]:
    """Of different lengths, one with ignored labels, one padded to the left, one without a target."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(96, (length,), generator=generator).tolist() for length in (9, 4, 7, 6, 5)]
    rows = [{"input_ids": ids[0]}, {"input_ids": ids[1]}]
    rows.append({"input_ids": ids[2], "labels": [IGNORED] * 3 + ids[2][3:]})
    rows.append({"input_ids": [0, 0] + ids[3], "attention_mask": [0, 0] + [1] * 6})
    rows.append({"input_ids": ids[4], "labels": [IGNORED] * 5})
    return prepare_dataset(rows, None, None)


def made_up(nll, tokens) -> Scores:
    tokens = torch.tensor(tokens, dtype=torch.float64)
    return Scores(torch.tensor(nll, dtype=torch.float64), torch.zeros_like(tokens), tokens)


@torch.no_grad()
def plain_loop(model, row: dict) -> tuple[float, int, int]:
    """NLL, hits and targets of one example, token by token."""
    ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["attention_mask"]])
    logits = model(input_ids=ids, attention_mask=mask).logits[0].double()
    nll = hits = targets = 0
    for place in range(len(row["input_ids"]) - 1):
        token = row["labels"][place + 1]
        if token != IGNORED and mask[0, place] and mask[0, place + 1]:
            nll -= logits[place].log_softmax(-1)[token].item()
            hits += logits[place].argmax().item() == token
            targets += 1
    return nll, hits, targets


def test_scores_are_those_of_a_plain_loop_over_the_logits(model):
    rows = examples()
    nll, hits, targets = zip(*(plain_loop(model, row) for row in rows))
    scores = score(model, rows, batch_size=2)
    assert scores.tokens.tolist() == list(targets) == [8, 3, 4, 5, 0]
    torch.testing.assert_close(scores.nll, torch.tensor(nll, dtype=torch.float64), atol=1e-4, rtol=1e-5)
    assert scores.hits.tolist() == list(hits)
    assert scores.mean_nll == pytest.approx(sum(nll) / 20, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(sum(nll) / 20), rel=1e-4)
    assert scores.accuracy == sum(hits) / 20


def test_a_target_with_the_highest_probability_is_a_hit():
    model = tiny_model("olmoe")
    ids = [3, 17, 60, 5]
    with torch.no_grad():
        best = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    row = {"input_ids": ids, "labels": [IGNORED, best[0], best[1], (best[2] + 1) % 96]}
    assert score(model, prepare_dataset([row], None, None)).accuracy == pytest.approx(2 / 3)


def test_scores_do_not_depend_on_the_batch_size():
    model, rows = tiny_model("gpt_oss"), examples()
    alone = score(model, rows, batch_size=1)
    for batch_size in (2, 5, 100):
        together = score(model, rows, batch_size)
        torch.testing.assert_close(together.nll, alone.nll, atol=1e-4, rtol=1e-5)
        assert torch.equal(together.hits, alone.hits) and torch.equal(together.tokens, alone.tokens)


def test_scoring_uses_eval_mode_and_restores_training_flags():
    model = tiny_model("qwen3_moe", attention_dropout=0.5)
    rows, still = examples(), score(model, examples())
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    assert torch.equal(score(model, rows).nll, still.nll)
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(IndexError):
        score(model, [rows[0] | {"input_ids": [1000] * 9}])
    assert [module.training for module in model.modules()] == flags


def test_no_rows_give_no_scores():
    assert score(tiny_model("olmoe"), []).tokens.shape == (0,)


def test_the_bootstrap_resamples_sequences_and_not_tokens():
    # in 10 texts of 100 tokens, all of a text's tokens change alike: that is 10 observations and not 1000
    base = made_up([100.0] * 10, [100] * 10)
    changed = made_up([100.0 + (60 if i % 2 else -40) for i in range(10)], [100] * 10)
    change = paired_bootstrap(base, changed)
    of_sequences = 1.96 * 0.5 / math.sqrt(10)  # half of an interval
    of_tokens = 1.96 * 0.5 / math.sqrt(1000)
    assert change.mean == pytest.approx(0.1)
    assert (change.high - change.low) / 2 == pytest.approx(of_sequences, rel=0.15)
    assert (change.high - change.low) / 2 > 8 * of_tokens
    assert change.low < 0 < change.high


def test_examples_are_paired():
    # texts differ by far more than the memory changes any of them
    nll = torch.linspace(10, 1000, 20).tolist()
    change = paired_bootstrap(made_up(nll, [10] * 20), made_up([n - 2 for n in nll], [10] * 20))
    assert (change.mean, change.low, change.high) == pytest.approx((-0.2, -0.2, -0.2))


def test_a_long_text_weighs_as_much_as_it_has_tokens():
    tokens, changed = [90, 10] * 3, [90, -10] * 3
    change = paired_bootstrap(made_up([0] * 6, tokens), made_up(changed, tokens))
    assert change.mean == pytest.approx(0.8)
    assert change.low < 0.5 and 0.9 < change.high < 1


def test_about_95_percent_of_intervals_contain_the_true_change():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        difference = 3 + torch.randn(40, generator=generator, dtype=torch.float64) * 5
        change = paired_bootstrap(made_up([0] * 40, [1] * 40), made_up(difference.tolist(), [1] * 40), resamples=500)
        covered += change.low <= 3 <= change.high
    assert 175 <= covered <= 199


def test_the_bootstrap_is_seeded():
    generator = torch.Generator().manual_seed(4)
    base, changed = (made_up(torch.rand(30, generator=generator).tolist(), [1] * 30) for _ in range(2))
    first = paired_bootstrap(base, changed)
    torch.rand(7)
    assert paired_bootstrap(base, changed) == first
    assert paired_bootstrap(base, changed, seed=1) != first


def test_examples_without_a_target_change_nothing():
    tokens = [4, 0, 4, 4, 0, 4, 4, 0]
    change = paired_bootstrap(made_up([5] * 8, tokens), made_up([3 if n else 5 for n in tokens], tokens))
    assert (change.mean, change.low, change.high, change.windows) == pytest.approx((-0.5, -0.5, -0.5, 5))


@pytest.mark.parametrize("with_target", [1, 2, 4])
def test_fewer_than_five_windows_have_no_interval(with_target):
    tokens = [4] * with_target + [0] * 5  # windows without a target do not count
    base, changed = made_up([8] * len(tokens), tokens), made_up([6] * len(tokens), tokens)
    for metric, mean in (("nll", -0.5), ("hits", 0)):
        change = paired_bootstrap(base, changed, metric)
        assert change == Change(mean, None, None, with_target)
    assert change.text(100, 1) == "+0.0 [n/a]"


def test_the_text_of_a_change_has_its_interval():
    assert Change(-0.25, -0.5, 0.125, 9).text() == "-0.2500 [-0.5000, +0.1250]"
    assert Change(-0.25, -0.5, 0.125).text(100, 1) == "-25.0 [-50.0, +12.5]"


def test_examples_of_one_text_are_one_window():
    generator = torch.Generator().manual_seed(5)
    difference, tokens = torch.randn(6, generator=generator).tolist(), [3, 1, 4, 1, 5, 9]
    once = paired_bootstrap(made_up([0] * 6, tokens), made_up(difference, tokens))
    groups = torch.tensor([7, 3, 5, 0, 1, 2]).repeat_interleave(4)
    base, changed = (
        made_up(sum(([x] * 4 for x in row), []), sum(([n] * 4 for n in tokens), [])) for row in ([0] * 6, difference)
    )
    often = paired_bootstrap(base, changed, groups=groups)
    assert often.windows == 6 and often.mean == pytest.approx(once.mean)
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.1)
    apart = paired_bootstrap(base, changed)
    assert apart.windows == 24 and apart.high - apart.low < 0.7 * (once.high - once.low)
    assert paired_bootstrap(base, changed, groups=torch.arange(24) // 8).low is None


def test_the_change_of_hits_is_separate_from_that_of_nll():
    tokens = torch.tensor([4.0, 4.0], dtype=torch.float64)
    base = Scores(tokens, torch.tensor([1.0, 1.0], dtype=torch.float64), tokens)
    changed = Scores(tokens, torch.tensor([3.0, 3.0], dtype=torch.float64), tokens)
    assert paired_bootstrap(base, changed, "hits").mean == 0.5
    assert paired_bootstrap(base, changed, "nll").mean == 0


def test_scores_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="2 and 1 examples do not pair"):
        paired_bootstrap(made_up([1, 1], [1, 1]), made_up([1], [1]))
    with pytest.raises(ValueError, match="do not pair"):
        paired_bootstrap(made_up([1, 1], [1, 2]), made_up([1, 1], [2, 1]))
    with pytest.raises(ValueError, match="no example has a target"):
        paired_bootstrap(made_up([0], [0]), made_up([0], [0]))
    with pytest.raises(ValueError, match="metric='accuracy' is not allowed"):
        paired_bootstrap(made_up([1], [1]), made_up([1], [1]), "accuracy")


def test_the_interval_of_many_items_is_that_of_one_large_draw():
    before = torch.rand(4001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    after = before + torch.randn(4001, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = mean_change(before, after)
    drawn = torch.randint(4001, (2000, 4001), generator=torch.Generator().manual_seed(0))
    bounds = torch.quantile((after - before)[drawn].mean(-1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert (change.low, change.high) == pytest.approx(bounds.tolist(), rel=1e-12)
    with pytest.raises(ValueError, match="do not pair"):
        mean_change(before, after[:-1])
