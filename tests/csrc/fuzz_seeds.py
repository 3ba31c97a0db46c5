"""Writes seeds for the fuzz targets: long runs of every kind of character.

    python tests/csrc/fuzz_seeds.py words build/fuzz/words-seeds

Most are in the short form that FuzzInput::Text in fuzz_input.h expands; a few are written out.
"""

import sys
from pathlib import Path

KINDS = [
    *(b" ", b"\n", b"\t", b"\r\n", "\u3000".encode(), "\u2028".encode()),
    *(b"!", b"[", b"[MASK]", b"#", b"<", "\u201c".encode(), "\u4e2d".encode()),
    *(b"a", b"A", "\u00e9".encode(), "\u043e".encode(), "\ud55c".encode(), "\u1112".encode()),
    *("\u0301".encode(), "\u0301\u0323".encode(), "\U0001d165".encode(), "\u0338".encode()),
    *(b"\x00", b"\x01", b"\x7f", "\u200b".encode(), "\ufffd".encode(), "\ue000".encode()),
    *(b"\xff", b"\x80", b"\xe4\xb8", b"\xed\xa0\x80"),
]

# What each target reads before the text: every choice of flags that matters to long runs.
HEADERS = {
    "words": [b"\x00\x00", b"\x57\x02"],
    "tokenizer": [b""],
    "rows": [b"\x19\x00\x00", b"\x0b\x05\x00", b"\x33\x14\x00", b"\x78\x00\x00"],
    "corpus": [b"\x02\x20\x00\x40\x00", b"\x0b\x01\x00\x00\x00"],
    "learner": [b"\x20\x00\x00\x05\x00\x00"],
}


def run(unit: bytes, count: int) -> bytes:
    """`count` times `unit`, in the short form."""
    return b"\xfe" + bytes([len(unit) - 1]) + count.to_bytes(2, "little") + unit


def main(target: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    headers = HEADERS[target]
    for i, unit in enumerate(KINDS):
        other = KINDS[(7 * i + 5) % len(KINDS)]
        texts = [
            run(unit, 20000) + b"word",
            b"word " + run(unit, 4000) + run(other, 4000) + b"a",
            b"a" + run((unit + other)[:8], 3000) + b" [MASK]",
        ]
        for j, text in enumerate(texts):
            header = headers[(i + j) % len(headers)]
            (folder / f"{i:02}-{j}").write_bytes(header + text)
    (folder / "written-out").write_bytes(headers[0] + b" " * 20000 + b"the hello " * 3000)
    (folder / "longest").write_bytes(headers[0] + run(b" ", 65535) + run("\u0301".encode(), 65535))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
