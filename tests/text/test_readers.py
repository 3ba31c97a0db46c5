"""Text files: kinds, packings, documents, and what is said of each kind of bad file."""

import codecs
import gzip
import json
import lzma
import os
import random
import re
import socket
import tempfile
from pathlib import Path

import pytest

from mvbert import _core
from mvbert.errors import InputError, MissingExtra
from mvbert.text import readers
from mvbert.text.readers import TextFile, documents, file_kind, find_texts

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
    assert find_texts([tmp_path]).files == [tmp_path / name for name in names]
    assert find_texts([tmp_path / "b.txt", tmp_path / "sub"]).files == [
        tmp_path / name for name in ("b.txt", "sub/c.txt", "sub/deep/d.parquet")
    ]
    assert find_texts(str(tmp_path / "b.txt")).files == [tmp_path / "b.txt"]


def test_paths_that_are_no_text(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("missing.txt", r"missing\.txt does not exist"),
        ("empty.txt", r"empty\.txt is empty"),
        ("a.pdf", r"a\.pdf: unsupported kind of file; supported: \*\.txt"),
        ("folder", r"the folder .*folder has no text files"),
    ):
        with pytest.raises(InputError, match=message):
            find_texts([tmp_path / name])


def test_what_is_no_regular_file_is_skipped_in_a_folder_and_refused_by_name(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"x")
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket.txt"))
        (folder / "device.txt").symlink_to(os.devnull)
        found = find_texts([folder])
    assert found.files == [folder / "a.txt"]
    assert found.left_out == {"repeated": 0, "empty": 0, "unsupported": 0, "not_regular": 4}
    for name, kind in (("pipe.txt", "a pipe"), ("socket.txt", "a socket"), ("device.txt", "a dev")):
        with pytest.raises(InputError, match=rf"{name} is {kind}.*, expected a file or a folder"):
            find_texts([folder / name])


def test_a_link_to_a_folder_around_it_is_not_followed_again(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "sub" / "up").symlink_to("..")
    found = find_texts([tmp_path])
    assert found.files == [tmp_path / "a.txt", tmp_path / "sub" / "b.txt"]
    assert found.left_out["repeated"] == 2


def test_a_file_met_again_by_another_path_or_a_link_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"x")
    (tmp_path / "link.txt").symlink_to("a.txt")
    os.link("a.txt", "sub/hard.txt")
    found = find_texts(["a.txt", "./a.txt", "sub/../a.txt", tmp_path / "link.txt", "sub"])
    assert found.files == [Path("a.txt")]
    assert found.left_out["repeated"] == 4
    assert find_texts([tmp_path, tmp_path]).left_out["repeated"] == 3  # two files, one folder


def test_a_link_that_leads_nowhere_is_named_with_its_target(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x")
    (tmp_path / "note").symlink_to("gone")  # could not have been text
    assert find_texts([tmp_path]).left_out["unsupported"] == 1
    (tmp_path / "b.txt").symlink_to("gone.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    message = r"b\.txt is a link to gone\.txt, which does not exist"
    for path, expected in (
        (tmp_path, message),
        (tmp_path / "b.txt", message),
        (tmp_path / "loop.txt", r"cannot read .*loop\.txt: Too many levels"),
    ):
        with pytest.raises(InputError, match=expected):
            find_texts([path])


@pytest.fixture
def open_folder():
    """A folder below which permissions count, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(me)


def test_a_folder_or_file_without_permission_is_named_before_anything_is_read(open_folder):
    me = os.geteuid()
    os.seteuid(os.getuid())
    (open_folder / "a.txt").write_bytes(b"x")
    (open_folder / "sub").mkdir()
    (open_folder / "sub").chmod(0)
    os.seteuid(me)
    with pytest.raises(InputError, match=r"cannot read the folder .*sub: Permission denied"):
        find_texts([open_folder])
    os.seteuid(os.getuid())
    (open_folder / "sub").chmod(0o755)
    (open_folder / "sub" / "z.txt").write_bytes(b"x")
    (open_folder / "sub" / "z.txt").chmod(0)
    os.seteuid(me)
    with pytest.raises(InputError, match=r"cannot read .*z\.txt: Permission denied"):
        find_texts([open_folder])


def test_an_empty_file_among_others_is_left_out(tmp_path):
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"has no text files; empty files: 2; supported"):
        find_texts([tmp_path])
    (tmp_path / "c.txt").write_bytes(b"x")
    found = find_texts([tmp_path])
    assert (found.files, found.left_out["empty"]) == ([tmp_path / "c.txt"], 2)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_git_lfs_pointer_is_not_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    )
    with pytest.raises(InputError, match=rf"{name} is a Git LFS pointer, not the file itself"):
        find_texts([tmp_path])


def test_files_of_other_kinds_are_counted(tmp_path):
    for name in ("a.txt", "b.json", "c.txt.bz2", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    assert find_texts([tmp_path]).left_out["unsupported"] == 2


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


def test_records_without_text_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    write_parquet(tmp_path / "a.parquet", text=["a", None, "b", None])
    for name, nulls in (("a.jsonl", 1), ("a.parquet", 2)):
        assert list(documents(tmp_path / name)) == ["a", "b"]
        file = TextFile(tmp_path / name)
        assert len(list(file.records())) > 0
        assert file.nulls == nulls


def test_a_parquet_column_of_nulls_alone_has_no_type(tmp_path):
    pa = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", text=pa.nulls(4))
    file = TextFile(tmp_path / "a.parquet")
    assert list(file.records()) == []
    assert file.nulls == 4
    write_parquet(tmp_path / "b.parquet", text=pa.nulls(0))
    assert list(documents(tmp_path / "b.parquet")) == []


def test_files_with_byte_order_marks_may_be_concatenated(tmp_path):
    marked = codecs.BOM_UTF8 + jsonl(DOCUMENTS)
    (tmp_path / "a.jsonl").write_bytes(marked + marked + codecs.BOM_UTF8 + b"\n")
    assert list(documents(tmp_path / "a.jsonl")) == DOCUMENTS * 2
    (tmp_path / "b.jsonl").write_bytes(marked + codecs.BOM_UTF8 + b'{"text": "\xff"}')
    with pytest.raises(InputError, match=rf"b\.jsonl:4: not UTF-8 at byte {len(marked) + 13};"):
        list(documents(tmp_path / "b.jsonl"))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    texts = [*DOCUMENTS, None, "", *map(str, range(10)), "é" * 1000]
    expected = [text for text in texts if text is not None]
    for name, kind in (("s", pa.string()), ("l", pa.large_string()), ("v", pa.string_view())):
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
    with pytest.raises(InputError, match=rf"a\.txt{packing} is truncated: it ends after \d+ bytes"):
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
    with pytest.raises(InputError, match=rf"a\.txt{packing} is not {packing}, or corrupt near"):
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
        (b'{"text": 7}', r"a\.jsonl:3: field 'text' holds int, expected a string"),
        (b'{"text": "\xff"}', r"a\.jsonl:3: not UTF-8 at byte 26; .*iconv -f WINDOWS-1252"),
        (b"[" * 100_000, r"a\.jsonl:3: (JSON is nested too deeply|not JSON)"),
    ],
    ids=["not JSON", "a list", "no field", "empty", "a number", "not UTF-8", "deep"],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        list(documents(path))


def test_jsonl_that_is_not_utf8_can_be_read_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\xffb"}\n{"text": "\xe4\xb8 \xed\xa0\x80"}\n')
    assert list(documents(path, errors="replace")) == ["a\ufffdb", "\ufffd \ufffd"]
    file = TextFile(path, errors="replace")
    assert len(list(file.records())) > 0
    assert file.replaced == 3


ENGLISH = "It was a bright day, and the clocks were striking.\n\nThe hallway smelt of it.\n"
GREEK = "Ἦτο μία φωτεινὴ ἡμέρα, καὶ τὰ ὡρολόγια ἐσήμαινον.\n\n"


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-16-le", ENGLISH),
        ("utf-16-be", ENGLISH),
        ("utf-16-le", "\ufeff" + GREEK),
        ("utf-16-be", "\ufeff" + GREEK),
        ("utf-32-le", ENGLISH),
        ("utf-32-be", ENGLISH),
        ("utf-32-le", "\ufeff" + GREEK),
        ("utf-32-be", "\ufeff" + GREEK),
    ],
)
@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("chunk", [30, 1 << 10])
def test_wide_encodings_are_named_and_never_patched(
    tmp_path, monkeypatch, encoding, text, kind, packing, errors, chunk
):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(pack(text.encode(encoding), packing))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(InputError, match=rf"{name}, not UTF-8; convert it: iconv -f {name} -t"):
        list(documents(path, errors=errors))


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("chunk", [30, 31, 1 << 10])
@pytest.mark.parametrize("data", [b"\x00\x01\x02abc", b"\x01\x00\x02\x00a\x00b\x00"])
def test_control_characters_are_no_wide_encoding(tmp_path, monkeypatch, data, chunk, errors):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(data * 50)
    with pytest.raises(InputError, match="is binary, not text"):
        list(documents(path, errors=errors))


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ("café, naïve, Straße".encode("latin-1"), "it looks like Latin-1; convert it: iconv -f W"),
        ("“quotes” – and dashes".encode("cp1252"), "it looks like Latin-1; convert it: iconv -f W"),
        ("Съешь же ещё этих мягких".encode("koi8-r"), "another encoding; convert it: iconv"),
        ("今日は良い天気です".encode("shift_jis"), "another encoding; convert it: iconv"),
        ("今日は良い天気です".encode("gb18030"), "another encoding; convert it: iconv"),
        ("naïve 今日は\xff".encode() + b"\xe4\xb8 x", "corrupt there; errors=.replace"),
        (random.Random(1).randbytes(256), "it looks like a binary file"),
    ],
    ids=["Latin-1", "Windows-1252", "KOI8-R", "Shift JIS", "GB 18030", "damaged", "binary"],
)
@pytest.mark.parametrize("before", [0, 300_000])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_the_advice_depends_on_what_is_around_the_byte(
    tmp_path, monkeypatch, data, advice, before, packing
):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(readers, "PACKED_BYTES", 1 << 14)
    monkeypatch.setattr(readers, "SAMPLE_BYTES", 1 << 5)
    good = b"some words of text. " * (before // 20)
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(pack(good + data + good, packing))
    offset = _core.utf8_error(good + data)
    assert re.search(advice, TextFile(path).advice(offset))


def test_a_few_zero_bytes_are_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\0\0\0" + b"words " * 30)
    assert len(list(documents(path))) == 1
    path.write_bytes(b"\0\1\0\2\0\0words" * 30)
    with pytest.raises(InputError, match=r"a\.txt is binary, not text: \d+ of \d+ bytes are zero"):
        list(documents(path))


@pytest.mark.parametrize("inside", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("outside", ["", ".gz", ".xz"])
def test_text_packed_more_often_than_its_name_says(tmp_path, inside, outside):
    path = tmp_path / f"a.txt{outside}"
    path.write_bytes(pack(pack(TEXT.encode(), inside), outside))
    kind = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}[inside]
    message = (
        rf"is compressed more than once: decompressed, it is {kind}"
        if outside
        else rf"is {kind}, not"
    )
    with pytest.raises(InputError, match=message):
        list(documents(path))


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
    with pytest.raises(InputError, match=r"a\.parquet is not a complete \.parquet file"):
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
