"""A custom `data_collator` gets what it needs and says what its rows say, or is refused when the trainer is made."""

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

from knnmoe_hf.data.batches import collate
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer
from tests.support.training import build, examples, trainer_for

UNEVEN = [*examples(3), *examples(2, length=7, seed=4), *examples(2, length=12, seed=5)]


def tokenizer(side: str = "right", pad: str = "!"):
    made = byte_tokenizer()
    made.pad_token, made.mask_token, made.padding_side = pad, "?", side
    return made


def padded(rows, names=("input_ids", "labels", "attention_mask"), side="right", fillers=(0, -100, 0)):
    """The columns of rows as tensors, padded."""
    length, batch = max(len(row["input_ids"]) for row in rows), {}
    for name, filler in zip(("input_ids", "labels", "attention_mask"), fillers):
        if name in names:
            fill = [[filler] * (length - len(row[name])) for row in rows]
            columns = (f + row[name] if side == "left" else row[name] + f for row, f in zip(rows, fill))
            batch[name] = torch.tensor(list(columns))
    return batch


def by_length(rows):
    return padded(sorted(rows, key=lambda row: len(row["input_ids"])))


def with_ids(rows):
    return padded(rows) | {"example_id": torch.tensor([row["example_id"] for row in rows])}


def in_place(rows):
    """Pads the rows themselves."""
    length = max(len(row["input_ids"]) for row in rows)
    for row in rows:
        for name, filler in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            row[name] += [filler] * (length - len(row[name]))
    return default_data_collator(rows)


GOOD = {
    "a lambda": lambda rows: padded(rows),
    "ours, called by another": lambda rows: collate(rows),
    "ids": with_ids,
    "left": lambda rows: padded(rows, side="left"),
    "in place": in_place,
    "seq2seq": DataCollatorForSeq2Seq(tokenizer()),
    "seq2seq, left": DataCollatorForSeq2Seq(tokenizer("left")),
    "token classification": DataCollatorForTokenClassification(tokenizer()),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_collator_that_says_what_its_rows_say_gives_the_same_memory(name, tmp_path):
    wanted = build(tiny_model("olmoe"), tmp_path, rows=UNEVEN)
    memory = build(tiny_model("olmoe"), tmp_path, rows=UNEVEN, trainer={"data_collator": GOOD[name]})
    assert torch.equal(memory.provenance.example_ids, wanted.provenance.example_ids)  # of several batches
    assert torch.equal(memory.provenance.positions, wanted.provenance.positions)
    for layer in wanted.layers:
        torch.testing.assert_close(memory.layers[layer].decoded_keys, wanted.layers[layer].decoded_keys)


REFUSED = {
    "mlm": (DataCollatorForLanguageModeling(tokenizer(), mlm=True), "fails on rows"),
    "language modelling": (DataCollatorForLanguageModeling(tokenizer(), mlm=False), "fails on rows"),
    "flattening": (DataCollatorWithFlattening(), "of shape (1, 15) for 3 rows"),
    "padding": (
        DataCollatorWithPadding(tokenizer()),
        "fails on rows of input_ids, labels, attention_mask of different",
    ),
    "default": (default_data_collator, "fails on rows of input_ids, labels, attention_mask of different lengths"),
    "raw columns": (lambda rows: {"input_ids": [row["text"] for row in rows]}, "KeyError: 'text'"),
    "no labels": (lambda rows: padded(rows, ["input_ids", "attention_mask"]), "returns labels=None"),
    "no mask": (lambda rows: padded(rows, ["input_ids", "labels"]), "pads and returns no attention_mask"),
    "other labels": (
        lambda rows: padded(rows) | {"labels": padded(rows)["input_ids"]},
        "changes the labels",
    ),
    "labelled padding": (lambda rows: padded(rows, fillers=(0, 0, 0)), "gives padding labels other than -100"),
    "all real": (lambda rows: padded(rows, fillers=(0, -100, 1)), "changes the input_ids"),
    "sorted": (by_length, "changes the input_ids"),
    "cut": (lambda rows: {name: part[:, :4] for name, part in padded(rows).items()}, "changes the input_ids"),
    "one row": (lambda rows: padded(rows[:1]), "of shape (1, 4) for 3 rows"),
    "lists": (lambda rows: {name: [row[name] for row in rows] for name in rows[0]}, "no tensor of integers"),
    "floats": (lambda rows: {name: part.float() for name, part in padded(rows).items()}, "no tensor of integers"),
    "a list": (lambda rows: rows, "returns list and no dict"),
    "no function": ("collate", "pass a function"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_collator_is_refused_when_the_trainer_is_made(name, tmp_path):
    collator, told = REFUSED[name]
    with pytest.raises(ValueError) as error:
        trainer_for(tiny_model("olmoe", vocab_size=300), tmp_path, UNEVEN, trainer={"data_collator": collator})
    message = str(error.value)
    assert message.startswith("data_collator=") and told in message and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("collator", [default_data_collator, DataCollatorWithPadding(tokenizer())])
def test_one_that_cannot_pad_will_do_for_examples_of_one_length(collator, tmp_path):
    memory = build(tiny_model("olmoe"), tmp_path, trainer={"data_collator": collator})
    assert memory.provenance.example_ids.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mlm", [True, False])
def test_one_that_makes_labels_of_its_own_will_not_do_for_any(mlm, tmp_path):
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=mlm)
    with pytest.raises(ValueError, match="^data_collator="):
        trainer_for(tiny_model("olmoe", vocab_size=300), tmp_path, examples(), trainer={"data_collator": collator})


class Stream(IterableDataset):
    def __iter__(self):
        yield from UNEVEN


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_one_that_fails_later_costs_nothing_that_was_solved(stream, workers, tmp_path):
    def failing(rows):
        if max(len(row["input_ids"]) for row in rows) > 10:
            raise RuntimeError("too long")
        return padded(rows)

    options = dict(max_steps=9) if stream else {}
    trainer = trainer_for(
        tiny_model("olmoe"),
        tmp_path,
        Stream() if stream else UNEVEN,
        trainer={"data_collator": failing},
        dataloader_num_workers=workers,
        **options,
    )
    with pytest.raises(RuntimeError, match="too long"):
        trainer.train()
    assert trainer.memory.provenance.example_ids.unique().tolist() == [0, 1, 2, 3]


def test_evaluation_uses_it_too(tmp_path):
    collator = {"data_collator": GOOD["left"]}
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, UNEVEN, trainer=collator, allow_overlap=True)
    trainer.train()
    assert trainer.evaluate(UNEVEN)["eval_loss"] < trainer.evaluate(UNEVEN)["eval_base_loss"]
