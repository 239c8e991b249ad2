import io
import json
import sys
from pathlib import Path

import pytest

import grating_core.cli.inputs
from grating_core.cli.inputs import Record, read_documents, read_records


def written(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def test_a_unicode_line_separator_does_not_split_a_document(tmp_path: Path) -> None:
    text = "one\u2028document\x0c"
    assert read_documents(written(tmp_path, "d.txt", f"{text}\nanother\r\n")) == [text, "another"]


def test_json_lines_are_known_by_their_content(tmp_path: Path) -> None:
    assert read_documents(written(tmp_path, "data", '\ufeff{"text": "a\\nb"}\n\n{"text": ""}\n')) == ["a\nb", ""]


def test_what_is_not_structured_is_lines_or_one_text(tmp_path: Path) -> None:
    text = "one\n\ntwo\r\n"
    path = written(tmp_path, "d.txt", text)
    assert read_documents(path) == ["one", "two"]
    assert read_documents(path, plain="text") == read_documents(path, format="text") == [text]
    assert read_documents(written(tmp_path, "d", '{"text": "a"}'), plain="text") == ["a"]


def test_csv_with_line_breaks_and_long_fields(tmp_path: Path) -> None:
    long = "word " * 50_000
    assert read_documents(written(tmp_path, "d.csv", f'n,text\n1,"a\nb"\n2,{long}\n3\n')) == ["a\nb", long, ""]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("d.jsonl", json.dumps({"text": "a"}) + "\n{", "d.jsonl, line 2, column 2, is not JSON"),
        ("d.jsonl", '{"text": 3}', "line 1, has no text in the field 'text'; it has 'text'"),
        ("d.jsonl", '["a"]', "line 1"),
        ("d.csv", "title\nx", r"no column 'text', it has \['title'\]"),
        ("d.csv", "", "d.csv is empty"),
    ],
)
def test_malformed_input_is_refused_with_its_place(tmp_path: Path, name: str, content: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_documents(written(tmp_path, name, content))


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes("Straße".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_documents(str(path))


RECORDS = [{"id": 7, "text": 'a, "b"\nc', "title": "T"}, {"id": "x", "text": ""}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.json", json.dumps(RECORDS, indent=2)),
        ("d", json.dumps(RECORDS)),
        ("d.json", "\n".join(map(json.dumps, RECORDS))),  # JSON Lines by another name
        ("d.jsonl", "\n".join(map(json.dumps, RECORDS))),
    ],
)
def test_records_come_whole(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path, name, content)
    assert read_records(path) == [Record(record["text"], record) for record in RECORDS]


def test_json_of_strings_and_one_object(tmp_path: Path) -> None:
    assert read_documents(written(tmp_path, "d", '["one", "two"]')) == ["one", "two"]
    assert read_documents(written(tmp_path, "d", '{\n  "text": "one"\n}')) == ["one"]
    assert read_documents(written(tmp_path, "d.jsonl", '"one"\n"two"\n')) == ["one", "two"]
    assert read_documents(written(tmp_path, "d.json", "[]")) == []


@pytest.mark.parametrize("text", ["[1] A footnote, not JSON.", "{\\bf LaTeX}", "[", "{"])
def test_text_that_begins_with_a_bracket_is_text(tmp_path: Path, text: str) -> None:
    assert read_documents(written(tmp_path, "d.txt", text)) == [text]


def test_tables_with_tabs(tmp_path: Path) -> None:
    path = written(tmp_path, "d.tsv", 'id\ttext\n1\ta 5" pipe, and more\n2\t"two\tlines\n"""\n\n')
    assert [record.text for record in read_records(path)] == ['a 5" pipe, and more', 'two\tlines\n"']
    assert read_records(path)[0].fields == {"id": "1", "text": 'a 5" pipe, and more'}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("d.csv", 'text\none\n"two\nthree\n', r"d\.csv, line 3, column 1: this quote is never closed"),
        ("d.csv", 'id,text\n1,"a"b"\n', r"line 2, column 6: 'b' follows a closing quote"),
        ("d.csv", "id,text\n1,a,b\n", r"line 2: the row has 3 fields, the header only 2"),
        ("d.csv", "text,text\na,b\n", r"line 1, has 2 columns 'text'"),
        ("d.csv", 'text\n"a\n\nb"\nc,d\n', r"line 5: the row has 2 fields"),
        ("d.tsv", "id\tbody\n1\ta\n", r"line 1, has no column 'text'.*--field"),
        ("d.json", '[{"text": "a"},\n {"text": ]', r"d\.json, line 2, column 11, is not JSON"),
        ("d.json", '[{"text": "a"}, 3]', r"entry 1, has no text"),
        ("d.json", '{"documents": []}', r"has no text in the field 'text'; it has 'documents'"),
        ("d.json", "[" * 100_000, r"line 1: the JSON is nested too deeply"),
        ("d.jsonl", '{"text": "a"}\n{"text": ' + "[" * 100_000, r"line 2: the JSON is nested too deeply"),
        ("d.jsonl", "", r"d\.jsonl is empty"),
        ("d.json", "\n \n", r"d\.json is empty"),
        ("d.txt", "", r"d\.txt is empty"),
    ],
)
def test_what_is_damaged_is_refused_with_file_line_and_column(
    tmp_path: Path, name: str, content: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        read_records(written(tmp_path, name, content))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
@pytest.mark.parametrize("source", ["/dev/zero", "-", "file"])
def test_an_input_without_an_end_is_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grating_core.cli.inputs, "MOST_BYTES", 3 << 20)
    whole = "w" * (3 << 20)
    assert read_documents(written(tmp_path, "whole", whole)) == [whole]
    if source == "file":
        source = written(tmp_path, "larger", whole + "w")
    with Path("/dev/zero").open("rb") as zeros:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(zeros))
        with pytest.raises(ValueError, match=r"has more than 3,145,728 bytes, or no end\. Divide it"):
            read_documents(source)
