"""Text files: kinds, packings, documents, and what is said of each kind of bad file."""

import gzip
import json
import lzma
import os

import pytest

from mvbert.errors import InputError, MissingExtra
from mvbert.text import readers
from mvbert.text.readers import TextFile, documents, file_kind, text_files

TEXT = "One a\nOne b\n\nTwo é\n \t\r\n\nThree"
DOCUMENTS = ["One a\nOne b\n", "Two é\n", "Three"]


def pack(data, packing):
    if packing == ".gz":
        return gzip.compress(data)
    if packing == ".xz":
        return lzma.compress(data)
    if packing == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return data


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def write_parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=3)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Reads a few bytes at a time, so that every state is met between two reads."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    monkeypatch.setattr(readers, "PACKED_BYTES", 5)
    monkeypatch.setattr(readers, "RECORDS_BYTES", 9)


# ---- which files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", (".txt", "")),
        ("A.TXT.GZ", (".txt", ".gz")),
        ("a.b.jsonl.xz", (".jsonl", ".xz")),
        ("a.jsonl.zst", (".jsonl", ".zst")),
        ("a.parquet", (".parquet", "")),
        ("a.parquet.gz", None),
        ("a.json", None),
        ("a.gz", None),
        ("txt", None),
        (".txt", None),
        ("a.txt.gz.gz", None),
    ],
)
def test_file_kind(name, kind):
    assert file_kind(name) == kind


def test_a_folder_stands_for_its_files_sorted(tmp_path):
    for name in ("b.txt", "a.jsonl.gz", "sub/c.txt", "sub/deep/d.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("README.md", ".hidden.txt", "sub/image.png"):
        (tmp_path / name).write_bytes(b"x")
    names = ["a.jsonl.gz", "b.txt", "sub/c.txt", "sub/deep/d.parquet"]
    assert text_files([tmp_path]) == [tmp_path / name for name in names]
    assert text_files([tmp_path / "b.txt", tmp_path / "sub"]) == [
        tmp_path / name for name in ("b.txt", "sub/c.txt", "sub/deep/d.parquet")
    ]
    assert text_files(str(tmp_path / "b.txt")) == [tmp_path / "b.txt"]


def test_paths_that_are_no_text(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("missing.txt", r"missing\.txt does not exist"),
        ("empty.txt", r"empty\.txt is empty"),
        ("a.pdf", r"a\.pdf: unsupported kind of file; supported are \*\.txt"),
        ("folder", r"the folder .*folder holds no text"),
    ):
        with pytest.raises(InputError, match=message):
            text_files([tmp_path / name])


# ---- documents --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_plain_text(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(pack(TEXT.encode(), packing))
    assert list(documents(path)) == DOCUMENTS


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_packed_parts_one_after_the_other_are_one_text(tmp_path, packing):
    data = TEXT.encode()
    padding = b"\0" * 4 if packing == ".xz" else b""
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(pack(data[:10], packing) + padding + pack(data[10:], packing) + padding)
    assert list(documents(path)) == DOCUMENTS


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_jsonl(tmp_path, packing):
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(pack(b"\xef\xbb\xbf" + jsonl(DOCUMENTS, "body") + b"\n  \n", packing))
    assert list(documents(path, field="body")) == DOCUMENTS


def test_a_lone_surrogate_of_json_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert list(documents(path)) == ["ab \U0001f600"]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    texts = [*DOCUMENTS, None, "", *map(str, range(10)), "é" * 1000]
    expected = [text for text in texts if text is not None]
    for name, kind in (("s", pa.string()), ("l", pa.large_string())):
        write_parquet(tmp_path / f"{name}.parquet", text=pa.array(texts, kind))
        assert list(documents(tmp_path / f"{name}.parquet")) == expected
    write_parquet(tmp_path / "d.parquet", text=pa.array(texts).dictionary_encode())
    assert list(documents(tmp_path / "d.parquet")) == expected


def test_parquet_of_empty_strings_alone(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["", ""])
    assert list(documents(tmp_path / "a.parquet")) == ["", ""]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl.gz", "a.parquet"])
def test_bytes_and_checksum_are_those_of_the_file(tmp_path, name):
    path = tmp_path / name
    kind, packing = file_kind(path)
    if kind == ".parquet":
        write_parquet(path, text=DOCUMENTS)
    else:
        path.write_bytes(pack(jsonl(DOCUMENTS) if kind == ".jsonl" else TEXT.encode(), packing))
    file = TextFile(path)
    for _ in file.chunks() if file.is_plain else file.records():
        pass
    assert file.bytes_read == path.stat().st_size
    assert file.sha256 == readers.sha256_file(path)


# ---- bad files --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.98], ids=["early", "middle", "late"])
def test_a_packed_file_that_is_cut_off_is_named(tmp_path, packing, kept):
    data = pack(os.urandom(300) + TEXT.encode(), packing)
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=rf"a\.txt{packing} is cut off: it ends after \d+ bytes"):
        list(TextFile(path).chunks())


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_a_file_that_is_not_packed_as_its_name_says_is_named(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(b"This is plain text, not packed at all.")
    with pytest.raises(InputError, match=rf"a\.txt{packing} is not {packing}"):
        list(TextFile(path).chunks())


@pytest.mark.parametrize("packing", [".gz", ".xz"])
def test_a_damaged_byte_is_noticed(tmp_path, packing):
    data = bytearray(pack(os.urandom(300), packing))
    data[150] ^= 0xFF
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.txt{packing} is not {packing}, or damaged near"):
        list(TextFile(path).chunks())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl:3: not JSON \(Expecting"),
        (b'["a"]', r"a\.jsonl:3: expected a JSON object, got list"),
        (
            b'{"body": "a", "id": 1}',
            r"a\.jsonl:3: no field 'text' .*its fields: 'body', 'id'; choose",
        ),
        (b"{}", r"a\.jsonl:3: no field 'text' in this line; its fields: none"),
        (b'{"text": null}', r"a\.jsonl:3: field 'text' holds NoneType, expected a string"),
        (b'{"text": "\xff"}', r"a\.jsonl:3: not UTF-8 at byte 26; .*--errors replace"),
        (b"[" * 100_000, r"a\.jsonl:3: (JSON that is nested too deeply|not JSON)"),
    ],
    ids=["not JSON", "a list", "no field", "empty", "null", "not UTF-8", "deep"],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        list(documents(path))


def test_jsonl_that_is_not_utf8_can_be_read_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\xffb"}\n')
    assert list(documents(path, errors="replace")) == ["a\ufffdb"]


def test_parquet_without_the_column_lists_its_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=["a"], id=[1])
    with pytest.raises(
        InputError, match=r"a\.parquet: no column 'text'; its columns: 'body', 'id'"
    ):
        list(documents(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match=r"column 'id' holds int64, expected strings"):
        list(documents(tmp_path / "a.parquet", field="id"))


def test_a_parquet_file_that_is_cut_off_is_named(tmp_path):
    write_parquet(tmp_path / "whole.parquet", text=["a" * 100] * 100)
    data = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"a\.parquet is not a whole \.parquet file"):
        list(documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingExtra, match=rf"needs {module}; run: pip install 'mvbert\[data\]'"):
        list(documents(tmp_path / name))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.mkdir()
    with pytest.raises(InputError, match=r"cannot read .*a\.txt: Is a directory"):
        list(documents(path))
