"""Converting dataset rows of every form to token ids and labels, and to padded batches."""

import pickle
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from knnmoe_hf.data.batches import collate, target_mask
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.errors import BadRowError
from tests.support.tokenizers import GENERATING, MARKED, PLAIN, byte_tokenizer

CHAT = [
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": "thus"},
]


def prepared(row: dict, tokenizer=None, max_length: int | None = None) -> dict:
    return prepare_dataset([row], tokenizer, max_length)[0]


def target_text(row: dict, tokenizer) -> str:
    """The text of the targets; checks that every label is -100 or its own token."""
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return tokenizer.decode([label for label in row["labels"] if label != -100])


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_every_token_of_a_text_is_a_target():
    tokenizer = byte_tokenizer()
    row = prepared({"text": "a gate"}, tokenizer)
    assert row["input_ids"] == tokenizer("a gate")["input_ids"] == row["labels"]
    assert row["attention_mask"] == [1] * 6 and row["example_id"] == 0


def test_tokenised_rows_are_unchanged_and_need_no_tokenizer():
    row = prepared({"input_ids": torch.tensor([5, 6, 7]), "labels": [-100, 6, 9]})
    assert row == {"input_ids": [5, 6, 7], "labels": [-100, 6, 9], "attention_mask": [1, 1, 1], "example_id": 0}


@pytest.mark.parametrize("labels", [{}, {"labels": None}])
def test_without_labels_every_token_that_is_not_padding_is_a_target(labels):
    row = prepared({"input_ids": [0, 6, 7], "attention_mask": [0, 1, 1]} | labels)
    assert row["labels"] == [-100, 6, 7] and row["attention_mask"] == [0, 1, 1]


def test_only_the_completion_and_the_end_are_targets():
    tokenizer = byte_tokenizer()
    row = prepared({"prompt": "2+2=", "completion": "4"}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "2+2=4<end>"
    assert row["labels"] == [-100] * 4 + row["input_ids"][4:] and len(row["labels"]) == 6


def test_a_completion_ends_without_an_end_token_if_the_tokenizer_has_none():
    tokenizer = byte_tokenizer(eos=False)
    assert target_text(prepared({"prompt": "2+2=", "completion": "4"}, tokenizer), tokenizer) == "4"


def test_a_completion_that_begins_as_its_prompt_is_a_target_as_a_whole():
    tokenizer = byte_tokenizer()
    assert target_text(prepared({"prompt": "aa", "completion": "aab"}, tokenizer), tokenizer) == "aab<end>"


def test_a_completion_of_messages_is_the_target_and_not_the_generation_prompt():
    tokenizer = byte_tokenizer(GENERATING)
    row = prepared({"prompt": CHAT[:3], "completion": CHAT[3:]}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "<user>why;<assistant>so;<user>how;<assistant>thus;"
    assert target_text(row, tokenizer) == "thus;"


def test_all_tokens_of_a_conversation_are_targets_if_its_template_marks_none():
    tokenizer = byte_tokenizer(PLAIN)
    text = "<user>why;<assistant>so;<user>how;<assistant>thus;"
    assert target_text(prepared({"messages": CHAT}, tokenizer), tokenizer) == text


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation %}", "{%generation%}"])
def test_the_assistants_tokens_are_the_targets_if_the_template_marks_them(tag):
    tokenizer = byte_tokenizer(MARKED.replace("{% generation %}", tag))
    row = prepared({"messages": CHAT}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "<user>why;<assistant>so;<user>how;<assistant>thus;"
    assert target_text(row, tokenizer) == "so;thus;"


@pytest.mark.parametrize(
    "kind",
    [
        list,
        Rows,
        Stream,
        datasets.Dataset.from_list,
        lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
        lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
        lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset().map(dict),
    ],
    ids=["list", "torch", "torch stream", "datasets", "datasets as tensors", "datasets stream", "unknown columns"],
)
def test_every_kind_of_dataset_gives_the_same_examples(kind):
    rows = [{"text": "one", "topic": 1}, {"text": "three", "topic": 2}]
    ready = list(prepare_dataset(kind(rows), byte_tokenizer(), 4, ignore_columns=["topic"]))
    assert [set(row) for row in ready] == [{"input_ids", "labels", "attention_mask", "example_id"}] * 2
    assert [int(row["example_id"]) for row in ready] == [0, 1]
    batch = collate(ready)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert byte_tokenizer().decode(batch["input_ids"][1]) == "thre"


def test_an_example_id_of_the_dataset_is_kept_and_none_is_the_index():
    rows = [{"text": "a", "example_id": 70}, {"text": "b", "example_id": None}]
    for kind in (list, datasets.Dataset.from_list):
        ready = prepare_dataset(kind(rows), byte_tokenizer(), None)
        assert [row["example_id"] for row in ready] == [70, 1]


def test_each_document_of_a_packed_row_has_an_id_of_its_own():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "seq_lengths": [2, 1, 3]},
        {"input_ids": [7, 8]},
        {"input_ids": [9, 10], "position_ids": [0, 0]},
        {"input_ids": [11, 12]},
    ]
    for kind in (list, Stream):
        ready = list(prepare_dataset(kind(rows), None, None))
        assert [row["example_id"] for row in ready] == list(range(7))
        assert [row["input_ids"] for row in ready] == [[1, 2], [3], [4, 5, 6], [7, 8], [9], [10], [11, 12]]


def test_rows_that_are_skipped_leave_their_ids_free():
    rows = [{"text": "a"}, {"text": ""}, {"text": "b"}]
    for kind in (list, Stream, datasets.Dataset.from_list):
        ready = prepare_dataset(kind(rows), byte_tokenizer(), None, skip_bad_rows=True)
        assert [row["example_id"] for row in ready] == [0, 2] and ready.report.skipped == 1
        with pytest.raises(BadRowError, match="^row 1 of train_dataset: column 'text' is empty"):
            list(prepare_dataset(kind(rows), byte_tokenizer(), None))
    with pytest.raises(
        ValueError, match="^all 2 rows were skipped, the first because of row 0 of eval_dataset: column"
    ):
        prepare_dataset([{"text": ""}] * 2, byte_tokenizer(), None, skip_bad_rows=True, name="eval_dataset")


def test_an_id_that_comes_twice_is_found_with_its_row():
    ids = torch.arange(6).tolist()
    rows = [{"input_ids": ids, "example_id": one} for one in (7, 2, 7)]
    for kind in (list, Stream):
        with pytest.raises(BadRowError, match="^row 2 of train_dataset: example_id 7 comes twice"):
            list(prepare_dataset(kind(rows), None, None))
        skipping = prepare_dataset(kind(rows), None, None, skip_bad_rows=True)
        for _ in range(2):  # every pass begins anew
            assert [row["example_id"] for row in skipping] == [7, 2]
        with pytest.raises(BadRowError, match="^row 1 of train_dataset: its example_id 1 comes twice, because some"):
            list(prepare_dataset(kind([rows[0] | {"example_id": 1}, {"input_ids": ids}]), None, None))


@pytest.mark.parametrize(
    "given", ["texts.jsonl", Path("texts.jsonl"), {"text": ["a"]}, pandas.DataFrame({"text": ["a"]})]
)
def test_what_is_no_data_set_is_refused(given):
    with pytest.raises(
        ValueError, match=r"^train_dataset of type \w+ is not allowed: pass a list of rows, or a Dataset"
    ):
        prepare_dataset(given, byte_tokenizer(), None)


def test_some_rows_can_be_read_under_their_own_numbers():
    rows = [{"text": "a"}, {"text": ""}, {"text": "b"}, {"text": ""}]
    ready = prepare_dataset(rows, byte_tokenizer(), None, indices=[0, 2])
    assert [row["example_id"] for row in ready] == [0, 2]
    with pytest.raises(BadRowError, match="^row 3 of "):
        prepare_dataset(rows, byte_tokenizer(), None, indices=[0, 3])


def test_examples_are_a_sequence_of_their_own_copies():
    rows = [{"input_ids": [5, 6], "labels": [-100, 9]}, {"input_ids": [7]}, {"input_ids": [8, 9, 10]}]
    examples = prepare_dataset(rows, None, None)
    first = {"input_ids": [5, 6], "labels": [-100, 9], "attention_mask": [1, 1], "example_id": 0}
    assert len(examples) == 3 and examples[0] == first and examples[-3] == first and examples[:1] == [first]
    assert [row["example_id"] for row in examples[::-1]] == [2, 1, 0] == [row["example_id"] for row in examples][::-1]
    examples[0]["input_ids"][0] = 1
    assert examples[0] == first and examples.lengths.tolist() == [2, 1, 3]
    with pytest.raises(IndexError):
        examples[3]
    copied = pickle.loads(pickle.dumps(examples))
    assert list(copied) == list(examples) and copied.report == examples.report


def test_examples_that_are_prepared_again_stay_the_same_and_keep_their_report():
    rows = [{"text": "long text"}, {"text": ""}, {"text": "short"}]
    examples = prepare_dataset(rows, byte_tokenizer(), 6, skip_bad_rows=True)
    again = prepare_dataset(examples, None, 6)
    assert list(again) == list(examples) and again.report == examples.report
    shorter = prepare_dataset(examples, None, 4)
    assert [row["input_ids"] for row in shorter] == [row["input_ids"][:4] for row in examples]
    assert (shorter.report.rows, shorter.report.skipped) == (3, 1)


@pytest.mark.parametrize("kind", [datasets.DatasetDict, datasets.IterableDatasetDict])
def test_splits_are_refused(kind):
    with pytest.raises(ValueError, match=r"of \['train'\] is not allowed: pass one of its splits"):
        prepare_dataset(kind({"train": datasets.Dataset.from_list([{"text": "a"}])}), byte_tokenizer(), None)


def test_a_dataset_of_two_forms_fills_its_columns_with_none():
    columns = {"text": ["abc", None], "prompt": [None, "de"], "completion": [None, "f"]}
    rows = datasets.Dataset.from_dict(columns)
    tokenizer = byte_tokenizer()
    texts = [target_text(row, tokenizer) for row in prepare_dataset(rows, tokenizer, None)]
    assert texts == ["abc", "f<end>"]


def test_max_length_cuts_all_columns_and_keeps_the_beginning():
    long = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "attention_mask": [1, 1, 1, 1]}
    row = prepared(long, max_length=3)
    assert (row["input_ids"], row["labels"], row["attention_mask"]) == ([1, 2, 3], [-100, 2, 3], [1, 1, 1])
    assert len(prepared(long, max_length=None)["input_ids"]) == 4


@pytest.mark.parametrize(
    "row, tokenizer, named",
    [
        ({"sentence": "a", "label": 1}, byte_tokenizer(), "['label', 'sentence']"),
        ({"prompt": "a"}, byte_tokenizer(), "prompt and completion"),
        ("bare text", byte_tokenizer(), "'bare text'"),
        ({"text": "a"}, None, "tokenizer"),
        ({"input_ids": [1, 2], "labels": [1]}, None, "'labels' has 1 values for 2 input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, None, "'attention_mask' has 1 values for 2 input_ids"),
        ({"messages": CHAT}, byte_tokenizer(), "chat_template"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, byte_tokenizer(), "chat_template"),
        ({"prompt": "a", "completion": CHAT[1:2]}, byte_tokenizer(PLAIN), "str and list"),
    ],
)
def test_a_bad_row_is_refused_in_one_sentence_that_names_it(row, tokenizer, named):
    with pytest.raises(ValueError) as error:
        prepare_dataset([row], tokenizer, None)
    message = str(error.value)
    assert named in message and message.endswith(".") and "\n" not in message and ". " not in message


def test_a_batch_is_padded_to_the_right():
    rows = [
        {"input_ids": [7, 8, 9], "labels": [7, 8, 9], "attention_mask": [1, 1, 1], "example_id": 4},
        {"input_ids": [5], "labels": [5], "attention_mask": [1], "example_id": 2},
    ]
    batch = collate(rows)
    assert batch["input_ids"][:, 0].tolist() == [7, 5]
    assert batch["labels"].tolist() == [[7, 8, 9], [5, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["example_id"].tolist() == [4, 2]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_rows_with_padding_keep_their_own_mask():
    rows = prepare_dataset(
        [{"input_ids": [0, 0, 8, 9], "attention_mask": [0, 0, 1, 1]}, {"input_ids": [6, 7]}], None, None
    )
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9], [6, 7, -100, -100]]


def test_a_batch_of_empty_texts_is_all_padding():
    batch = collate([{"input_ids": [], "labels": [], "attention_mask": [], "example_id": one} for one in range(2)])
    assert batch["input_ids"].shape == (2, 1) and batch["input_ids"].dtype == torch.int64
    assert not batch["attention_mask"].any() and (batch["labels"] == -100).all()


def test_a_token_predicts_a_target_if_the_next_label_is_not_ignored():
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 4]])
    assert target_mask(labels, None).tolist() == [[False, True, True, False], [False, False, True, False]]


def test_neither_side_of_a_target_may_be_padding():
    labels = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]])
    assert target_mask(labels, mask).tolist() == [[False, True, True, False], [True, False, False, False]]
