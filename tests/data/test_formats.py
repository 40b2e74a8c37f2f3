"""Every format, compressed or not, by its ending in any case or by content; and what is wrong with other files."""

import codecs
import itertools
import json
import re
from pathlib import Path
from random import Random

import pyarrow
import pytest

from knnmoe_hf.data.files import Files
from tests.data.helpers import COMPRESSIONS, ROWS, TABLES, TEXTS, arrow, as_parquet, jsonl, separated, write

TEXT = "One paragraph\nof two lines.\n\nAnother: drôle, 三.\n"


def columns(path: Path, **options) -> list[dict]:
    rows = list(Files(str(path), None, **options))
    assert [row.problem for row in rows] == [None] * len(rows)
    return [{name: value for name, value in row.columns.items() if value is not None} for row in rows]


def problem(path: Path, **options) -> str:
    """What is wrong with a file, or with the first row of it that cannot be read, as one sentence."""
    try:
        message = next(f"{row.place} {row.problem}." for row in Files(str(path), None, **options) if row.problem)
    except ValueError as error:
        message = str(error)
    assert path.name in message and message.endswith(".") and "\n" not in message and ". " not in message
    return message


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", TABLES)
def test_tables_by_their_ending_in_any_case_and_by_their_content(ending, compression, tmp_path):
    content = COMPRESSIONS[compression](TABLES[ending](ROWS))
    for name in (f"a{ending}{compression}", f"A{ending}{compression}".upper(), f"b{compression}", "c", "d.data"):
        assert columns(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", TEXTS)
def test_text_by_its_ending_in_any_case_and_by_its_content(ending, compression, tmp_path):
    content = COMPRESSIONS[compression](TEXT.encode())
    for name in (f"a{ending}{compression}", f"A{ending}{compression}".upper(), f"b{compression}", "c", "d.2024"):
        assert columns(write(tmp_path / name, content)) == [{"text": TEXT}]
    assert columns(tmp_path / "c", text_field="body") == [{"body": TEXT}]


ENCODED = {
    "utf-8": TEXT.encode(),
    "utf-8 with mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16 with mark, little": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16 with mark, big": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-16 little": TEXT.encode("utf-16-le"),
    "utf-16 big": TEXT.encode("utf-16-be"),
    "utf-32 with mark, little": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "utf-32 with mark, big": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
    "utf-32 little": TEXT.encode("utf-32-le"),
    "crlf": TEXT.replace("\n", "\r\n").encode(),
    "lone cr": TEXT.replace("\n", "\r").encode(),
    "crlf in utf-16": codecs.BOM_UTF16_LE + TEXT.replace("\n", "\r\n").encode("utf-16-le"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_encodings_and_line_ends_are_told_from_the_file(name, tmp_path):
    assert columns(write(tmp_path / "a.txt", ENCODED[name])) == [{"text": TEXT}]
    assert columns(write(tmp_path / "a", ENCODED[name])) == [{"text": TEXT}]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_tables_in_other_encodings(ending, encoding, tmp_path):
    text = TABLES[ending](ROWS).decode().replace("\r\n", "\n").replace("\n", "\r\n")
    assert columns(write(tmp_path / f"a{ending}", text.encode(encoding))) == ROWS


@pytest.mark.parametrize(
    "text", ["一个路由记忆存储每个参考词的输入。\n", "Память хранит ключи\n", "😀 ключ, a memory\n", "a\n"]
)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_scripts_in_utf_16_and_utf_32_without_a_mark(encoding, text, tmp_path):
    for times in (1, 400):
        assert columns(write(tmp_path / "a.txt", (text * times).encode(encoding))) == [{"text": text * times}]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ISO-8859-15", "mac-roman"])
def test_other_encodings_by_name(encoding, tmp_path):
    path = write(tmp_path / "a.txt", "drôle\r\nété".encode(encoding))
    assert columns(path, encoding=encoding) == [{"text": "drôle\nété"}]
    assert "utf-8: byte 2 is 0x" in problem(path) and "--encoding" in problem(path)


def test_a_mark_in_the_file_overrules_the_encoding_that_is_given(tmp_path):
    assert columns(write(tmp_path / "a.txt", codecs.BOM_UTF8 + "été".encode()), encoding="cp1252") == [{"text": "été"}]


def test_the_byte_that_cannot_be_decoded_is_counted_over_the_whole_file(tmp_path):
    for start in (0, 3, 65535, 65536, 200_001):
        path = write(tmp_path / "a.txt", "é".encode() * (start // 2) + b"a" * (start % 2) + b"\xff rest")
        assert f"byte {start} is 0xff" in problem(path)
    assert "byte 2 is 0xc3" in problem(write(tmp_path / "a.txt", b"aa\xc3"))  # the last character is cut off
    assert "utf-16-le" in problem(write(tmp_path / "b.txt", codecs.BOM_UTF16_LE + b"a\0b"))


def test_json_lines_end_at_line_feeds_alone(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\x0bd"}, {"text": "e"}]
    assert columns(write(tmp_path / "a.jsonl", jsonl(rows) + b"\n  \n")) == rows
    (first, second) = Files(str(tmp_path / "a.jsonl"), None)
    assert first.place.endswith("a.jsonl', line 1") and second.place.endswith(", line 2")


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n\n" + json.dumps({"version": 1, "data": ROWS, "tags": ["a"], "empty": []}, indent=2),
        json.dumps({"rows": ROWS}),
        jsonl(ROWS).decode(),
        "\n" + jsonl(ROWS).decode().replace("\n", "\r\n\r\n"),
    ],
)
def test_the_layouts_of_json(content, tmp_path):
    for name in ("a.json", "a.JSON", "b"):
        assert columns(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "parts": [{"x": 1}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"dialog": [{"role": "user", "content": "a"}]},
        {"body": "a"},
    ],
)
def test_one_object_is_one_row(row, tmp_path):
    for indent in (None, 2):
        assert columns(write(tmp_path / "a.json", json.dumps(row, indent=indent))) == [row]


def test_a_json_row_may_lack_its_line_feed_and_be_long(tmp_path):
    rows = [{"text": "x" * 300_000}, {"text": "y"}]
    assert columns(write(tmp_path / "a.jsonl", jsonl(rows).rstrip())) == rows


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_is_found_in_its_header(delimiter, tmp_path):
    assert columns(write(tmp_path / "a.csv", separated(ROWS, delimiter))) == ROWS
    declared = f"sep={delimiter}\r\n".encode() + separated(ROWS, delimiter)
    assert columns(write(tmp_path / "b.csv", declared)) == ROWS
    named = separated([{"id": "1", "my text": "a, b; c | d"}], delimiter)  # no column that is known
    assert columns(write(tmp_path / "c.csv", named)) == [{"id": "1", "my text": "a, b; c | d"}]


def test_cells_of_a_csv(tmp_path):
    content = 'text, id \r\n"two\r\nlines, ""quoted""",1\r\n\r\n,2\r\n"' + "long " * 60_000 + '",3\r\n'
    first, second, third = Files(str(write(tmp_path / "a.csv", content)), None)
    assert first.columns == {"text": 'two\nlines, "quoted"', "id": "1"} and first.place.endswith("row 1 (line 2)")
    assert second.columns == {"text": None, "id": "2"} and second.place.endswith("row 2 (line 5)")
    assert len(third.columns["text"]) == 300_000


BAD_ROWS = {
    "a.jsonl": '{"text": "a"}\n{bad}\n{"text": "b"}\n',
    "cut.jsonl": '{"text": "a"}\n{"text": "b\n{"text": "b"}\n',
    "twice.jsonl": '{"text": "a"}\n{"text": "x", "text": "y"}\n{"text": "b"}\n',
    "list.jsonl": '{"text": "a"}\n["x"]\n{"text": "b"}\n',
    "string.jsonl": '{"text": "a"}\n"x"\n{"text": "b"}\n',
    "zero.jsonl": '{"text": "a"}\n{"text": "x\0"}\n{"text": "b"}\n',
    "half.jsonl": '{"text": "a"}\n{"text": "\\ud83d"}\n{"text": "b"}\n',
    "deep.jsonl": '{"text": "a"}\n' + "[" * 100_000 + '\n{"text": "b"}\n',
    "digits.jsonl": '{"text": "a"}\n{"input_ids": [' + "1" * 5000 + ']}\n{"text": "b"}\n',
    "lines.json": '{"text": "a"}\n{bad}\n{"text": "b"}\n',
    "array.json": '[{"text": "a"}, 3, {"text": "b"}]',
    "byte.jsonl": b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n',
    "byte.json": b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n',
    "nested.jsonl": b'{"text": "a"}\n{"messages": [{"content": "\xe9t"}]}\n{"text": "b"}\n',
    "byte array.json": b'[{"text": "a"}, {"messages": [{"content": "\xe9t"}]}, {"text": "b"}]',
    "byte.csv": b"text,x\na,1\n\xff,1\nb,1\n",
    "byte.tsv": b"text\tx\na\t1\nc\t\xe9\nb\t1\n",
    "many.csv": "text,x\na,1\nb,c,1\nb,1\n",
    "few.csv": "text,x\na,1\nb\nb,1\n",
    "quote.csv": 'text,x\na,1\n"b" c,1\nb,1\n',
    "zero.csv": "text,x\na,1\n\0,1\nb,1\n",
    "few.tsv": "text\tx\na\t1\nb\nb\t1\n",
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_the_others_are_read(name, tmp_path):
    path = write(tmp_path / name, BAD_ROWS[name])
    rows = list(Files(str(path), None))
    assert [row.columns and row.columns["text"] for row in rows] == ["a", None, "b"]
    assert [row.document for row in rows] == [0, 1, 2]
    line = (
        "row 2" if name.endswith("array.json") else "line 2" if name.endswith(("jsonl", "json")) else "row 2 (line 3)"
    )
    assert f"'{path.name}', {line} " in problem(path).replace(f"'...{str(path)[-75:]}", f"'{path.name}").replace(
        str(path), path.name
    )


def test_a_field_that_never_ends_is_told_by_the_line_of_its_quote(tmp_path):
    path = write(tmp_path / "a.csv", 'text,x\na,1\nb,"never\nclosed,1\n')
    rows = list(Files(str(path), None))
    assert rows[0].columns == {"text": "a", "x": "1"} and "line 3 that is not closed" in problem(path)


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.csv", "text,text\na,b\n", "'text' twice"),
        ("a.csv", ",text\n0,a\n", "column 1"),
        ("a.csv", "text, \na,b\n", "column 2"),
        ("a.csv", "text,x\n", "no row"),
        ("a.jsonl", "\n\n", "no row"),
        ("a.json", "[]", "no row"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '[{"text": "a"},]', "not valid JSON"),
        ("a.json", '[{"text": "a"},\n {"text": }]', "line 2"),
        ("a.json", '"text"', "'text', no object"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"y": 2}]}', "several lists of rows"),
        ("a.jsonl", '[\n{"text": "a"}\n]\n', ".json"),
        ("a.txt", " \n\n\t", "no text"),
        ("a.txt", "a\nb\0c", "zero byte in line 2"),
        ("a.parquet", as_parquet(ROWS)[:-20], "damaged"),
        ("a.arrow", arrow(ROWS)[:-60], "a.arrow"),
        ("a.parquet", as_parquet(ROWS)[:4] + b"x" * 50, "damaged"),
        ("a.arrow", arrow(ROWS, pyarrow.ipc.new_stream)[:300], "a.arrow"),
        ("a.parquet", as_parquet([{"text": "a"}]).replace(b"PAR1", b"PARE", 1), "no .parquet file"),
        ("a.parquet", "text", "no .parquet file"),
        ("a.arrow", "text", "no .arrow file"),
        ("a.arrow", as_parquet(ROWS), ".parquet"),
        ("a.jsonl", as_parquet(ROWS), ".parquet"),
        ("a.txt", arrow(ROWS), ".arrow"),
        ("a.txt", jsonl(ROWS), ".jsonl"),
        ("a.md", separated(ROWS, ","), ".csv"),
        ("a.log", separated(ROWS, "\t"), ".tsv"),
        ("a.csv", jsonl(ROWS), ".jsonl"),
        ("a.pdf", "%PDF-1.7", "a PDF"),
        ("a.txt", "%PDF-1.7", "a PDF"),
        ("a", "%PDF-1.7", "a PDF"),
        ("a.zip", "PK\3\4", "an archive"),
        ("a.docx", "PK\3\4", "an office file"),
        ("a.jsonl", "PK\3\4", "an archive"),
        ("a.xlsx", "PK\3\4", "a spreadsheet"),
        ("a.tar", b"x" * 257 + b"ustar", "an archive"),
        ("a.tar.gz", COMPRESSIONS[".gz"](b"x"), "an archive"),
        ("a.TGZ", COMPRESSIONS[".gz"](b"x"), "an archive"),
        ("a.gz", COMPRESSIONS[".gz"](b"x" * 257 + b"ustar"), "an archive"),
        ("a.PNG", b"\x89PNG\r\n", "an image"),
        ("a", b"\x89PNG\r\n", "an image"),
        ("a.jpg", b"\xff\xd8\xff", "an image"),
        ("a.npy", b"\x93NUMPY", "tensors"),
        ("a.dat", b"\x01\x00\x00\x02\x03\x00" * 10, "binary"),
        ("a.safetensors", b"x", "tensors"),
        ("a.sqlite", b"SQLite format 3\0", "a database"),
        ("a.br", b"x", "compressed"),
        ("a.jsonl.gz", jsonl(ROWS), "not compressed with gzip"),
        ("a.txt.zst", COMPRESSIONS[".gz"](b"a"), "not compressed with zstd"),
        ("a.jsonl", COMPRESSIONS[".xz"](jsonl(ROWS)), ".jsonl.xz"),
        ("a.txt.gz", COMPRESSIONS[".gz"](COMPRESSIONS[".gz"](b"text")), "compressed twice"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name, content, named, tmp_path):
    assert named in problem(write(tmp_path / name, content))


@pytest.mark.parametrize("ending", ["", *TABLES, *TEXTS])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_an_empty_file_is_told(ending, compression, tmp_path):
    assert "is empty" in problem(write(tmp_path / f"a{ending}{compression}", b""))
    if compression:
        assert "is empty" in problem(write(tmp_path / f"b{ending}{compression}", COMPRESSIONS[compression](b"")))


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name])
@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".csv", ".parquet"])
def test_a_compressed_file_that_is_cut_off_gives_what_is_before_and_an_error(ending, compression, tmp_path):
    random = Random(0)
    rows = [{"text": f"{number} {random.random()}"} for number in range(8_000)]
    whole = TABLES[ending](rows) if ending in TABLES else jsonl(rows).replace(b'{"text"', b"{text")
    content = COMPRESSIONS[compression](whole)
    path = write(tmp_path / f"a{ending}{compression}", content[: len(content) * 3 // 4])
    read = list(Files(str(path), None))
    assert "cut off before its end" in read[-1].problem and all(row.problem is None for row in read[:-1])
    if ending in (".jsonl", ".csv") and compression not in (".bz2", ".lz4"):  # whose blocks are larger than the file
        assert len(read) > 1000
    assert "cut off" in problem(write(tmp_path / f"b{ending}{compression}", content[:20]))
    write(tmp_path / f"c{compression}", content[:20])
    assert re.search("cut off|damaged", problem(tmp_path / f"c{compression}"))


def test_no_more_of_a_file_is_read_than_is_asked_for(tmp_path):
    random = Random(0)
    rows = [{"text": str(random.random())} for _ in range(20_000)]
    path = write(tmp_path / "a.jsonl.gz", COMPRESSIONS[".gz"](jsonl(rows))[:-30_000])
    assert len(list(itertools.islice(Files(str(path), None), 100))) == 100  # the end of the file is damaged


def test_columns_of_the_same_name_in_an_arrow_file(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert "columns of the same name" in problem(write(tmp_path / "a.arrow", sink.getvalue().to_pybytes()))


def test_types_of_columns_in_binary_tables(tmp_path):
    rows = [{"input_ids": [1, 2], "messages": [{"role": "user", "content": "a"}]}, {"input_ids": [3]}]
    for ending in (".parquet", ".arrow", ".feather"):
        assert columns(write(tmp_path / f"a{ending}", TABLES[ending](rows))) == rows


@pytest.mark.parametrize("name", ["utf-99", "base64", "", "rot13"])
def test_an_encoding_that_does_not_exist_is_refused(name, tmp_path):
    from knnmoe_hf.data.sources import open_source

    with pytest.raises(ValueError, match=r"^encoding=.* is not known: .*\.$"):
        open_source(str(write(tmp_path / "a.txt", "a")), encoding=name)
