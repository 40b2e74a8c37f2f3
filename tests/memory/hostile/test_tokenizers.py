"""The tokenizer of a stranger's memory: none of its code is executed, no file that it names is read."""

import json
import os
import sys

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.files import file_digest
from tests.memory.helpers import edit_config, refused, tiny_tokenizer
from tests.memory.hostile.helpers import digest_again, edit_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and alarms")


@pytest.mark.parametrize(
    "entries",
    [
        {"vocab_file": "/etc/passwd"},
        {"tokenizer_file": "/etc/passwd"},
        {"gguf_file": "/etc/passwd"},
        {"special_tokens_map_file": "/home/somebody/.cache/x"},
    ],
    ids=str,
)
def test_files_that_a_tokenizer_names_are_not_read(folder, entries):
    edit_tokenizer(folder, **entries)
    opened = RoutingMemory.from_pretrained(folder)
    assert opened.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "entries",
    [
        {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]},
        {"fast_tokenizer_files": "x"},
        {"mecab_kwargs": {"mecab_dic": "/etc/passwd"}},
        {"anything": ["x", {"y": "../../z"}]},
    ],
    ids=str,
)
def test_paths_that_lead_out_of_the_folder_are_refused(folder, entries):
    edit_tokenizer(folder, **entries)
    refused(folder, "tokenizer_config.json", next(iter(entries)))


def test_a_chat_template_cannot_reach_python(folder):
    edit_tokenizer(folder, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = RoutingMemory.from_pretrained(folder).tokenizer
    with pytest.raises(Exception, match="unsafe|undefined"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_a_file_of_a_tokenizer_has_a_largest_size_and_a_user_s_own_beside_it_has_none(folder):
    for name in ("vocab.txt", "table.parquet"):
        (folder / name).write_bytes(b"")
        os.truncate(folder / name, 2**40)  # takes no room on the disk
    refused(folder, "vocab.txt", "bytes")
    (folder / "vocab.txt").unlink()
    assert RoutingMemory.from_pretrained(folder).tokenizer is not None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_the_tokenizer_that_is_missing_or_changed_is_named(folder, name):
    (folder / name).write_text((folder / name).read_text() + " ")
    refused(folder, name, "not the file that was saved")
    (folder / name).unlink()
    refused(folder, name, "does not exist")


def test_a_tokenizer_that_makes_rust_panic_or_is_no_tokenizer_is_refused(folder):
    for content in ({}, {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}, {"model": 3}, []):
        (folder / "tokenizer.json").write_text(json.dumps(content))
        digest_again(folder, "tokenizer.json")
        refused(folder, str(folder), "tokenizer")


def test_nobody_is_told_to_trust_the_code_of_a_tokenizer(folder, memory):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
    }
    path.write_text(json.dumps(content))
    (folder / "own.py").write_text("raise SystemExit(3)")
    edit_config(folder, lambda found: found["memory"]["digests"].update({path.name: file_digest(path)}))
    assert "trust_remote_code" not in refused(folder, "code of its own, which is never run")
