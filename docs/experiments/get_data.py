"""Downloads the public data that studies, benches and documentation read, from its publishers.

    python docs/experiments/get_data.py              # everything: 1 GB to download, 0.4 GB kept
    python docs/experiments/get_data.py vocab sst-2  # some of it; --help lists the names
    export MVBERT_DATA=/big/disk/data                # the folder, here and in mvbert

Files go to --out or MVBERT_DATA; without either, to the folder where mvbert looks for `data:NAME`.
What is there already is checked and kept. A download that was cut off continues with the same
command. A file appears under its name when it is complete, never before.

SHA-256: ITEMS holds the hash of every download with fixed bytes. GLUE's are those that TensorFlow
Datasets (url_checksums/glue.txt) and Hugging Face Datasets publish; those of Snips were computed
from the files of that commit; those of the vocabularies and of Wikipedia are pinned by several
other projects. The archive of the books is packed on request and has no fixed hash. data.lock.json,
beside the data, records the hash of every download and of every file made when it first arrives;
from then on a file with another hash is refused.
"""

import argparse
import hashlib
import html
import http.client
import io
import json
import lzma
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mvbert.errors import InputError, require_extra
from mvbert.files import (
    data_folder,
    read_json_object,
    sha256_file,
    sync_file,
    write_error,
    write_json,
)
from mvbert.progress import Progress

LOCK = "data.lock.json"
TIMEOUT = 60  # seconds without a byte

progress = Progress("data")


@dataclass(frozen=True)
class Source:
    """A file at its publisher; without size and hash where it is packed on request."""

    url: str
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Item:
    """Files made from the same downloads by `convert(downloads, folder)`."""

    files: tuple[str, ...]
    sources: tuple[Source, ...]
    convert: Callable[[list[Path], Path], None]


# ---- converting ----------------------------------------------------------------------------------


def vocabularies(downloads: list[Path], folder: Path) -> None:
    for download, name in zip(downloads, VOCABULARIES, strict=True):
        shutil.copyfile(download, folder / name)


def pack(path: Path, members: dict[str, bytes]) -> None:
    """Writes a .tar.xz; the same members give the same bytes."""
    with tarfile.open(path, "w:xz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def glue(
    task: str, *parts: str, columns: tuple[str, ...] = ()
) -> Callable[[list[Path], Path], None]:
    """Repacks a task's .tsv files as they are, or only their columns of these names."""

    def convert(downloads: list[Path], folder: Path) -> None:
        with zipfile.ZipFile(downloads[0]) as archive:
            members = {f"{task}/{part}.tsv": archive.read(f"{task}/{part}.tsv") for part in parts}
        if columns:
            members = {name: only(columns, data) for name, data in members.items()}
        pack(folder / f"glue-{task.lower()}.tar.xz", members)

    return convert


def only(columns: tuple[str, ...], table: bytes) -> bytes:
    """The columns of a .tsv file that have these names, in this order."""
    header, *rows = (line.split("\t") for line in table.decode().rstrip("\n").split("\n"))
    places = [header.index(column) for column in columns]
    return "".join("\t".join(row[p] for p in places) + "\n" for row in [header, *rows]).encode()


def mrpc(downloads: list[Path], folder: Path) -> None:
    """Microsoft's training set split into GLUE's train and dev, and its labelled test set."""
    train, test, dev_ids = (path.read_bytes().decode("utf-8-sig") for path in downloads)
    in_dev = {tuple(line.split("\t")) for line in dev_ids.split("\n") if line}
    header, *rows = train.rstrip("\n").split("\n")
    parts: dict[bool, list[str]] = {False: [header], True: [header]}
    for row in rows:
        parts[tuple(row.split("\t")[1:3]) in in_dev].append(row)
    texts = {"train": parts[False], "dev": parts[True], "test": test.rstrip("\n").split("\n")}
    pack(
        folder / "glue-mrpc.tar.xz",
        {
            f"MRPC/{name}.tsv": "".join(f"{x}\n" for x in rows).encode()
            for name, rows in texts.items()
        },
    )


def snips(downloads: list[Path], folder: Path) -> None:
    members = {f"snips/{n}": d.read_bytes() for n, d in zip(SNIPS, downloads, strict=True)}
    pack(folder / "snips.tar.xz", members)


class Documents:
    """A text file being written: the title, a paragraph a line, a blank line after a document."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.bytes = file, 0

    def add(self, title: str, paragraphs: list[str]) -> None:
        self.bytes += self.file.write(("\n".join([title, *paragraphs]) + "\n\n").encode())


PART_BYTES = 105_000_000  # of text in a part of Wikipedia
HELD_OUT_EVERY = 150  # articles


def wikipedia(downloads: list[Path], folder: Path) -> None:
    """Articles in turn to four parts; prose only, every paragraph once."""
    parquet = pyarrow_parquet()
    seen: set[bytes] = set()
    kept = 0
    with ExitStack() as stack:
        *parts, heldout = (
            Documents(stack.enter_context(lzma.open(folder / name, "wb", preset=1)))
            for name in ITEMS["wiki"].files
        )
        table = stack.enter_context(parquet.ParquetFile(downloads[0]))
        with progress.steps(table.metadata.num_rows, 0):
            articles = (
                row
                for batch in table.iter_batches(256, columns=["title", "text"])
                for row in batch.to_pylist()
            )
            for count, article in enumerate(articles):
                paragraphs = list(prose(article["text"], seen))
                if sum(map(len, paragraphs)) < 400:
                    continue
                kept += 1
                smallest = min(parts, key=lambda part: part.bytes)
                if smallest.bytes >= PART_BYTES:
                    break
                chosen = heldout if kept % HELD_OUT_EVERY == 0 else smallest
                chosen.add(" ".join(article["title"].split()), paragraphs)
                progress.advance(count)


def prose(article: str, seen: set[bytes]) -> Iterator[str]:
    """The lines of an article that are sentences, less those seen before."""
    for line in article.split("\n"):
        line = " ".join(line.split())
        if len(line) < 40 or line[-1] not in ".!?:\"')”’":
            continue
        digest = hashlib.blake2b(line.encode(), digest_size=8).digest()
        if digest not in seen:
            seen.add(digest)
            yield line


def pyarrow_parquet():
    """pyarrow.parquet, or what to install."""
    with require_extra("data", "the Wikipedia sample, a .parquet file,"):
        import pyarrow.parquet
    return pyarrow.parquet


LAST_YEAR = 1928  # of the books: older ones are in the public domain in the United States
BOOKS_KEPT = 3  # one of so many
# In small-pd.txt, in this order; their authors had died by 1946.
SMALL_BOOKS = (
    "Alice's Adventures in Wonderland", "Pride and Prejudice", "The Time Machine",
    "The Call of the Wild", "The Wonderful Wizard of Oz", "On the Origin of Species",
    "The Autobiography of Benjamin Franklin", "Narrative of the Life of Frederick Douglass",
    "Walden", "The Railway Children", "Common Sense", "The Importance of Being Earnest",
)  # fmt: skip


def books(downloads: list[Path], folder: Path) -> None:
    """Every third book, and twelve famous ones, out of an archive of Markdown files."""
    small: dict[str, list[str]] = {}
    with (
        lzma.open(folder / "books-train-00.txt.xz", "wb", preset=1) as file,
        tarfile.open(downloads[0], "r:gz") as archive,
    ):
        train = Documents(file)
        for member in archive:
            if not member.name.endswith(".md") or (content := archive.extractfile(member)) is None:
                continue
            text = content.read().decode()
            title = re.search(r"^# Title: *(.*?)\s*$", text, re.MULTILINE)
            year = re.search(r"^## Year: *(\d+)", text, re.MULTILINE)
            if title is None or year is None or int(year[1]) > LAST_YEAR:
                continue
            if title[1] in SMALL_BOOKS:
                small[title[1]] = book_paragraphs(text)
            elif zlib.crc32(title[1].encode()) % BOOKS_KEPT == 0:
                train.add(title[1], book_paragraphs(text))
    with (folder / "small-pd.txt").open("wb") as file:
        famous = Documents(file)
        for name in SMALL_BOOKS:
            famous.add(name, small[name])


def book_paragraphs(text: str) -> list[str]:
    """The paragraphs of a book in Markdown: no markup, headings, short lines or repetitions."""
    body = text.partition("\n-------")[2]
    paragraphs = []
    for block in re.split(r"\n\s*\n", body):
        lines = (re.sub(r"^[>\s]*", "", line) for line in block.split("\n"))
        joined = " ".join(line for line in lines if not line.startswith("#"))
        joined = re.sub(r"\*+|(?<!\w)_+|_+(?!\w)|`", "", joined)
        joined = " ".join(html.unescape(re.sub(r"\\(\W)", r"\1", joined)).split())
        letters = sum(c.isalpha() or c == " " for c in joined)
        if len(joined) >= 30 and letters >= 0.75 * len(joined):
            paragraphs.append(joined)
    return list(dict.fromkeys(paragraphs))


# ---- what there is, and where --------------------------------------------------------------------

GLUE = "https://dl.fbaipublicfiles.com/glue/data"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
HUB = "https://huggingface.co"

VOCABULARIES = {
    "vocab.txt": Source(
        f"{HUB}/google-bert/bert-base-uncased/resolve/main/vocab.txt", 231_508,
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
    "vocab-cased.txt": Source(
        f"{HUB}/google-bert/bert-base-cased/resolve/main/vocab.txt", 213_450,
        "eeaa9875b23b04b4c54ef759d03db9d1ba1554838f8fb26c5d96fa551df93d02",
    ),
    "vocab-multilingual-cased.txt": Source(
        f"{HUB}/google-bert/bert-base-multilingual-cased/resolve/main/vocab.txt", 995_526,
        "fe0fda7c425b48c516fc8f160d594c8022a0808447475c1a7c6d6479763f310c",
    ),
}  # fmt: skip

SNIPS_COMMIT = (
    "https://raw.githubusercontent.com/MiuLab/SlotGated-SLU/"
    "61f0307c729b1fad479ef1de94aa5ac5dee601b0/data/snips"
)
SNIPS = {
    name: Source(f"{SNIPS_COMMIT}/{name}", size, sha256)
    for name, size, sha256 in (
        ("train/seq.in", 617_079,
         "04ad1e3f2121d83c6478f9a4b17d2dbdc21d06d6127f73cb7af835ed733f9855"),
        ("train/seq.out", 950_926,
         "fd5f2121d8055827e5d6b3d3bac30f3d7e94e82a5d437751960cbdd9e1b4f6d3"),
        ("train/label", 184_532,
         "bfd7df6cf9dd76c5da5d8b61bc85f90386197bdd3d7510c1d324c051537b962f"),
        ("valid/seq.in", 33_629,
         "64e0f6d8ad8aab3a3828164d7d53731a0993d3ca1aed437ceaca6d3d568d410e"),
        ("valid/seq.out", 50_626,
         "712e6d34feb8d52d208b820a5f8bae6e6ff990f08374507dfde22de389088319"),
        ("valid/label", 9_900,
         "9c1dd041216f647bcfca838aaf1a48eb5781e4404256d31ff07cd38a5436c52f"),
        ("test/seq.in", 33_121,
         "c1e341173fcea2951a8ca371956a6f81c76de87b9583c62eb87edd6158fa3a7c"),
        ("test/seq.out", 50_918,
         "58c07c9097d5e1f78889765c2a535a160f6455b90b3142055c8051847afcca47"),
        ("test/label", 10_120,
         "37a26da3ad079bb41c42c85a3a8f827eb47efec4c5917ce5d08f4b2736e4f830"),
    )
}  # fmt: skip


def glue_item(archive: str, size: int, sha256: str, task: str, *parts: str, **options) -> Item:
    source = Source(f"{GLUE}/{archive}", size, sha256)
    parts = parts or ("train", "dev", "test")
    return Item((f"glue-{task.lower()}.tar.xz",), (source,), glue(task, *parts, **options))


ITEMS = {
    "vocab": Item((*VOCABULARIES,), (*VOCABULARIES.values(),), vocabularies),
    "sst-2": glue_item(
        "SST-2.zip", 7_439_277,
        "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa", "SST-2",
    ),
    "cola": glue_item(
        "CoLA.zip", 376_971,
        "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff", "CoLA",
    ),
    "mrpc": Item(
        ("glue-mrpc.tar.xz",),
        (
            Source(
                f"{SENTEVAL}/msr_paraphrase_train.txt", 1_047_044,
                "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
            ),
            Source(
                f"{SENTEVAL}/msr_paraphrase_test.txt", 441_275,
                "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
            ),
            Source(
                f"{GLUE}/mrpc_dev_ids.tsv", 6_222,
                "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
            ),
        ),
        mrpc,
    ),
    "sts-b": glue_item(
        "STS-B.zip", 802_872,
        "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85", "STS-B",
    ),
    "qqp": glue_item(
        "QQP-clean.zip", 0,
        "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0", "QQP",
    ),
    "mnli": glue_item(
        "MNLI.zip", 312_783_507,
        "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
        "MNLI", "train", "dev_matched", "dev_mismatched",
        columns=("index", "sentence1", "sentence2", "gold_label"),
    ),
    "qnli": glue_item(
        "QNLIv2.zip", 10_627_589,
        "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5", "QNLI",
    ),
    "rte": glue_item(
        "RTE.zip", 697_150,
        "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee", "RTE",
    ),
    "snips": Item(("snips.tar.xz",), (*SNIPS.values(),), snips),
    "wiki": Item(
        (*(f"wiki-train-0{i}.txt.xz" for i in range(4)), "wiki-heldout.txt.xz"),
        (
            Source(
                f"{HUB}/datasets/wikimedia/wikipedia/resolve/"
                "b04c8d1ceb2f5cd4588862100d08de323dccfbaa/20231101.en/"
                "train-00000-of-00041.parquet",
                420_296_449,
                "382e7f6f09e488b24793a7f7cfc659879d5a22da2cf2efec6491665f0c019677",
            ),
        ),
        wikipedia,
    ),
    "books": Item(
        ("books-train-00.txt.xz", "small-pd.txt"),
        (
            Source(
                "https://github.com/mlschmitt/classic-books-markdown/archive/"
                "944882722e9a96fa6cf2739dc2ea757e101f412f.tar.gz"
            ),
        ),
        books,
    ),
}  # fmt: skip

# ---- downloading ---------------------------------------------------------------------------------


def download(source: Source, path: Path) -> None:
    """Brings `source` to `path`, continuing with what an earlier attempt left beside it.

    Raises:
        InputError: the server is missing, refuses, or cuts every attempt off without a byte.
    """
    part = path.with_name(path.name + ".part")
    while True:
        before = size_of(part)
        try:
            attempt(source, part)
            break
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise InputError(f"{source.url}: HTTP {error.code} {error.reason}") from None
            part.unlink()  # it is longer than the file, or ends where the file does
        except (OSError, http.client.HTTPException) as error:
            if size_of(part) > before:
                progress.note(f"{source.url} was cut off at {size_of(part):,} bytes; continuing")
                continue
            reason = getattr(error, "reason", None) or error
            kept = f"; {size_of(part):,} bytes are kept" if size_of(part) else ""
            raise InputError(
                f"{source.url} cannot be downloaded: {reason}{kept}; the same command continues"
            ) from None
    part.rename(path)


def attempt(source: Source, part: Path) -> None:
    """One request for the bytes that `part` lacks, or for all of them.

    Without a fixed hash nothing would tell whether two parts are of the same file.
    """
    headers = {"User-Agent": "mvbert-get-data"}
    if size_of(part) and source.sha256:
        headers["Range"] = f"bytes={size_of(part)}-"
    request = urllib.request.Request(source.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        continues = response.status == http.HTTPStatus.PARTIAL_CONTENT
        length = response.headers.get("Content-Length")
        done = size_of(part) if continues else 0
        total = done + int(length) if length else 0
        with (
            part.open("ab" if continues else "wb") as file,
            progress.steps(total >> 10, done >> 10),
        ):
            while block := response.read(1 << 16):
                done += file.write(block)
                progress.advance(done >> 10)
    if done < total:
        raise ConnectionError(f"{done:,} of {total:,} bytes came")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---- making items --------------------------------------------------------------------------------


class Store:
    """The data folder: its files, and the record of their hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / ".get_data"  # downloads and unfinished files
        self.lock = folder / LOCK
        self.recorded: dict = {"downloads": {}, "files": {}}
        if self.lock.exists():
            self.recorded |= read_json_object(self.lock)

    def complete(self, name: str) -> bool:
        """Whether the files of an item are there.

        Raises:
            InputError: one has changed since it was made, or only some are there and not ours.
        """
        files = ITEMS[name].files
        present = [file for file in files if (self.folder / file).exists()]
        known = self.recorded["files"]
        for file in present:
            found = sha256_file(self.folder / file) if file in known else ""
            if file in known and found != known[file]:
                raise InputError(
                    f"{self.folder / file}: SHA-256 is {found}, {LOCK} recorded {known[file]}; "
                    "delete the file to make it again"
                )
            if file not in known and len(present) < len(files):
                missing = next(other for other in files if other not in present)
                raise InputError(
                    f"{self.folder / file} was not made by this script, and {missing}, which "
                    "belongs to it, is missing; give another folder with --out"
                )
        return len(present) == len(files)

    def make(self, name: str) -> None:
        """Downloads and converts an item."""
        item, made = ITEMS[name], self.work / f"{name}.files"
        if name == "wiki":
            pyarrow_parquet()
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.work, error) from None
        downloads = [self.downloaded(name, i) for i in range(len(item.sources))]
        progress.note(f"{name}: converting")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            item.convert(downloads, made)
        except OSError as error:
            raise write_error(made, error) from None
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            if isinstance(error, InputError):
                raise
            for path in downloads:
                path.unlink()
            raise InputError(
                f"{item.sources[0].url} is not what is expected of {name} ({error}); the download "
                "was deleted"
            ) from None
        # Recorded first: a file that is there without a record would be taken for the user's own.
        for file in item.files:
            sync_file(made / file)
            self.recorded["files"][file] = sha256_file(made / file)
        write_json(self.lock, self.recorded)
        for file in item.files:
            (made / file).replace(self.folder / file)
        shutil.rmtree(self.work)

    def downloaded(self, name: str, index: int) -> Path:
        """A verified download, made now or by an earlier command that stopped after it."""
        source = ITEMS[name].sources[index]
        path = self.work / f"{name}.{index}"
        if not path.exists():
            size = f" ({source.bytes / 1e6:.1f} MB)" if source.bytes else ""
            progress.note(f"{name}: {source.url}{size}")
            download(source, path)
        found, recorded = sha256_file(path), self.recorded["downloads"]
        expected = source.sha256 or recorded.get(source.url, found)
        if found != expected:
            path.unlink()
            where = "get_data.py" if source.sha256 else LOCK
            raise InputError(
                f"{source.url}: SHA-256 is {found}, {where} has {expected}; the download was "
                "deleted: run the command again, and if it differs again, the publisher has "
                "replaced the file"
            )
        recorded[source.url] = found
        write_json(self.lock, self.recorded)
        return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=f"names: {', '.join(ITEMS)}"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to get (none: everything)")
    parser.add_argument("-o", "--out", type=Path, help="folder (default: MVBERT_DATA, else data)")
    args = parser.parse_args(arguments)
    try:
        for name in args.names:
            if name not in ITEMS:
                raise InputError(f"{name!r} is not one of {', '.join(ITEMS)}")
        store = Store(args.out or data_folder())
        for name in args.names or ITEMS:
            if store.complete(name):
                progress.note(f"{name}: complete")
            else:
                store.make(name)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    files = [file for name in args.names or ITEMS for file in ITEMS[name].files]
    print(json.dumps({"output": str(store.folder), "files": files}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
