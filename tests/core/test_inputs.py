import json
from pathlib import Path

import pytest

from grating_core.inputs import read_documents


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
        ("d.jsonl", json.dumps({"text": "a"}) + "\n{", "line 2 is not JSON"),
        ("d.jsonl", '{"text": 3}', "line 1 has no text in the field 'text'"),
        ("d.jsonl", '["a"]', "line 1"),
        ("d.csv", "title\nx", r"no column 'text', it has \['title'\]"),
        ("d.csv", "", "no column"),
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
