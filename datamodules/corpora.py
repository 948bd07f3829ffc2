"""From the name of a corpus to its files, one per split.

A corpus is a folder of text files or of nanoGPT's token files, or has a known name: the
documentation of the running Python, extracted from its source without network, or a public
benchmark, downloaded once. Both appear in the cache folder complete or not at all.
"""

import ast
import hashlib
import os
import platform
import re
import shutil
import sysconfig
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from neighborlm.common.errors import InputError
from neighborlm.common.files import NO_ROOM, publish_folder
from neighborlm.common.progress import ReadWithBar, tracked
from neighborlm.datamodules.dictionary import BYTE_ORDER_MARK

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
"""Names under which the files of a split are looked for, in this order."""
TEXT_PATTERNS = ("{}.txt", "wiki.{}.tokens", "wiki.{}.raw")
ID_PATTERN = "{}.bin"
ACCEPTED_FILES = "train.txt, valid.txt and test.txt, or wiki.{train,valid,test}.tokens"
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class CorpusFiles:
    """The files of a corpus, one per split.

    Attributes:
        name: of the folder or of the known corpus, for `runs/<name>` and `datastores/<name>`.
        train: for training and for datastores; None, as the others, where there is none.
        valid: for the choice of checkpoints and settings.
        test: for the perplexity that is reported.
        ids: whether the files hold uint16 ids, and not UTF-8 text.
    """

    name: str
    train: Path | None
    valid: Path | None
    test: Path | None
    ids: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the corpus has."""
        return tuple(split for split in SPLITS if self.split(split) is not None)

    def split(self, name: str) -> Path | None:
        """The file of a split; None where there is none."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [path for path in map(self.split, SPLITS) if path is not None]


def resolve_corpus(corpus: str, cache_dir: Path) -> CorpusFiles:
    """The files of a corpus, made or downloaded if they are missing.

    One process makes or downloads them, and others wait for it. A folder takes precedence over a
    known corpus of the same name.

    Args:
        corpus: a folder with train.txt, valid.txt (or val.txt) and test.txt, or some of them, or
            with wiki.{train,valid,test}.tokens (or .raw), or with nanoGPT's train.bin and val.bin;
            or one of `KNOWN_CORPORA`.
        cache_dir: folder of known corpora, made if it is missing.

    Raises:
        InputError: there is no such corpus, a file is empty or unreadable, or a download failed.
    """
    folder = Path(corpus).expanduser()
    found = "neither a folder nor a known corpus"
    try:
        if corpus and folder.is_dir():
            return _files_in(folder, folder.resolve().name)
        found = "a file" if corpus and folder.exists() else found
    except OSError as error:
        found = f"a place that cannot be read ({error.strerror})"
    if corpus == "python_docs":
        stdlib = Path(sysconfig.get_path("stdlib"))
        made = cache_dir / f"{corpus}-{platform.python_version()}-{_fingerprint_of(stdlib)}"
        publish_folder(made, partial(write_python_docs, stdlib), "--data.cache_dir")
        return _files_in(made, corpus)
    if corpus in DOWNLOADS:
        download = partial(_download_and_unpack, corpus, cache_dir)
        publish_folder(cache_dir / corpus, download, "--data.cache_dir")
        return _files_in(cache_dir / corpus, corpus)
    raise InputError(
        f"--data.corpus {corpus or repr(corpus)} is {found}; expected a folder with "
        f"{ACCEPTED_FILES}, or one of {', '.join(KNOWN_CORPORA)}"
    )


def _files_in(folder: Path, name: str) -> CorpusFiles:
    """The files of a folder, by the pattern of names that most of them have."""
    candidates = [_by_pattern(folder, pattern) for pattern in TEXT_PATTERNS]
    paths = max(candidates, key=lambda paths: sum(path.is_file() for path in paths))
    missing = [path for path in paths if not path.is_file()]
    ids = _by_pattern(folder, ID_PATTERN)
    if missing and all(path.is_file() for path in ids[:2]):
        return _id_files(name, ids)
    if len(missing) == len(paths):
        held = sorted(path.name for path in folder.iterdir())
        holds = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
        raise InputError(f"{folder} holds {holds or 'nothing'}; expected {ACCEPTED_FILES}")
    for path in missing:
        if path.is_dir():
            raise InputError(f"{path} is a folder; expected a text file")
    existing = [None if path in missing else path for path in paths]
    for path in filter(None, existing):
        start = _start_of(path).removeprefix(BYTE_ORDER_MARK.encode())
        if not start.strip():
            raise InputError(f"{path} is empty; expected text with at least one word")
    return CorpusFiles(name, *existing)


def _by_pattern(folder: Path, pattern: str) -> list[Path]:
    """The file of each split under the first of its names that exists."""
    named = [[folder / pattern.format(n) for n in names] for names in SPLIT_NAMES.values()]
    return [next((path for path in paths if path.exists()), paths[0]) for paths in named]


def _id_files(name: str, paths: list[Path]) -> CorpusFiles:
    """Token files as nanoGPT prepares them. Its meta.pkl, which may name the symbols, is not
    opened, as unpickling a file runs the code in it."""
    train, valid, test = paths
    existing = [path for path in paths if path.is_file()]
    for path in existing:
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise InputError(f"{path} has {size} bytes; expected ids of two bytes each (uint16)")
    return CorpusFiles(name, train, valid, test if test in existing else None, ids=True)


def _start_of(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MEBIBYTE)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a file that can be read") from None


# -- python_docs ------------------------------------------------------------------------------

RECIPE = 1  # version of python_docs; raise it when the same source gives another text
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LONG_RUN = re.compile(r"([^\w\s])\1{3,}")
TOKEN = re.compile(r"\w+(?:'\w+)*|([^\w\s])\1*")


def write_python_docs(stdlib: Path, folder: Path) -> None:
    """Writes the documentation in a standard library's source as train.txt, valid.txt, test.txt.

    A document is a topic of Python's `help()` or the docstrings of one module. A hash of its name
    assigns it to one split (90, 5 and 5 % of the documents on average). Its first line names it;
    each further line is a paragraph, with tokens separated by spaces. A paragraph that occurred
    before is left out: topics include one another and docstrings are copied, so that test text
    would otherwise occur verbatim in the training text.

    Args:
        stdlib: folder of the standard library; nothing in it is imported or run.
        folder: an existing folder.

    Raises:
        InputError: `stdlib` has no source with documentation.
    """
    seen: set[str] = set()
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(
                open(folder / f"{split}.txt", "w", encoding="utf-8", errors="replace", newline="\n")
            )
            for split in SPLITS
        }
        for name, texts in _documents(stdlib):
            lines = [line for line in dict.fromkeys(_paragraphs(texts)) if line not in seen]
            seen.update(lines)
            if lines:
                files[_split_of(name)].write("\n".join([tokenize(name), *lines, ""]))
    if not seen:
        raise InputError(f"{stdlib} has no documentation; expected the standard library's source")


def tokenize(text: str) -> str:
    """Words and punctuation marks, separated by spaces.

    A word keeps its apostrophes; a repeated mark is one token of at most three marks.

    >>> tokenize("It's `os.walk()`, e.g.\\n========")
    "It's ` os . walk ( ) ` , e . g . ==="
    """
    squeezed = LONG_RUN.sub(r"\1\1\1", text)
    return " ".join(match.group() for match in TOKEN.finditer(squeezed))


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        lines = map(tokenize, re.split(r"\n\s*\n", text))
        yield from filter(None, lines)


def _split_of(document: str) -> str:
    """The split of a document, the same on every machine."""
    return {0: "valid", 1: "test"}.get(zlib.crc32(document.encode()) % 20, "train")


def _sources(stdlib: Path) -> dict[str, Path]:
    """The source file of every module by the module's name, sorted by name."""
    sources = {}
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = set(subfolders) - LEFT_OUT
        package = Path(folder).relative_to(stdlib).parts
        for file in files:
            if file.endswith(".py"):
                module = ".".join((*package, file.removesuffix(".py")))
                sources[module.removesuffix(".__init__")] = Path(folder, file)
    return dict(sorted(sources.items()))


def _fingerprint_of(stdlib: Path) -> str:
    """Identifies the source files by their names and sizes, without reading them."""
    sizes = [(module, path.stat().st_size) for module, path in _sources(stdlib).items()]
    return hashlib.sha256(repr((RECIPE, sizes)).encode()).hexdigest()[:8]


def _documents(stdlib: Path) -> Iterator[tuple[str, list[str]]]:
    """Names and texts of all documents, topics before modules, each kind sorted by name."""
    sources = _sources(stdlib)
    if "pydoc_data.topics" in sources:
        tree = ast.parse(sources["pydoc_data.topics"].read_bytes())
        topics = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        for topic, text in sorted(ast.literal_eval(topics).items()):
            yield f"Topic: {topic}", [text]
    title = "reading the standard library's docstrings"
    reading = tracked(sources.items(), title, len(sources))
    for module, path in reading:
        yield f"Module: {module}", _docstrings(path)


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a source file in the order of its lines; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    return [text for text in map(ast.get_docstring, _definitions(tree)) if text]


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """The module, classes and functions in a syntax tree, in the order of their lines."""
    if isinstance(node, DOCUMENTED):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for statement in getattr(node, block, ()):
            yield from _definitions(statement)


# -- downloads --------------------------------------------------------------------------------

TIMEOUT_SECONDS = 30
# The hosts of these files answer 403 to urllib's own user agent.
USER_AGENT = "neighborlm"


@dataclass(frozen=True)
class Download:
    """A public corpus.

    Attributes:
        urls: addresses of the same archive, tried in turn.
        sha256: of the archive.
        unpack: writes train.txt, valid.txt and test.txt from the archive to a folder.
    """

    urls: tuple[str, ...]
    sha256: str
    unpack: Callable[[Path, Path], None]


def _unpack_wikitext(archive: Path, folder: Path) -> None:
    """WikiText (Merity et al., 2017), words as tokenised by its authors, `<unk>` included."""
    with zipfile.ZipFile(archive) as members:
        names = {PurePosixPath(name).name: name for name in members.namelist()}
        for split in SPLITS:
            with (
                members.open(names[f"wiki.{split}.tokens"]) as source,
                open(folder / f"{split}.txt", "wb") as out,
            ):
                shutil.copyfileobj(source, out, MEBIBYTE)


ENWIK8_BYTES = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}


def _unpack_enwik8(archive: Path, folder: Path) -> None:
    """The first 10^8 bytes of a Wikipedia dump, cut as in the literature: at 90 and 95 MB."""
    with zipfile.ZipFile(archive) as members, members.open("enwik8") as source:
        for split, size in ENWIK8_BYTES.items():
            (folder / f"{split}.txt").write_bytes(source.read(size))


LM1B_TRAIN = [
    f"training-monolingual.tokenized.shuffled/news.en-{i:05}-of-00100" for i in range(1, 100)
]
LM1B_HELD_OUT = "heldout-monolingual.tokenized.shuffled/news.en.heldout-{:05}-of-00050"


def _unpack_lm1b(archive: Path, folder: Path) -> None:
    """One Billion Word Benchmark (Chelba et al., 2013).

    The training split is all 99 training files, in order. The archive has 50 held-out files and
    does not name a test split: by convention (Jozefowicz et al., 2016, and later work) that is the
    first. The validation split is the second one here, where many use the first again.
    """
    splits = {
        "train": LM1B_TRAIN,
        "valid": [LM1B_HELD_OUT.format(1)],
        "test": [LM1B_HELD_OUT.format(0)],
    }
    shards = {
        name: folder / PurePosixPath(name).name for names in splits.values() for name in names
    }
    with (
        open(archive, "rb") as file,
        closing(ReadWithBar(file, archive.stat().st_size, "unpacking lm1b")) as read,
        tarfile.open(fileobj=read, mode="r|gz") as members,
    ):
        for member in members:
            name = "/".join(PurePosixPath(member.name).parts[-2:])
            if member.isfile() and name in shards:
                with open(shards[name], "wb") as out:
                    shutil.copyfileobj(members.extractfile(member), out, MEBIBYTE)
    for split, names in splits.items():
        _concatenate([shards[name] for name in names], folder / f"{split}.txt")


def _concatenate(parts: list[Path], whole: Path) -> None:
    """Concatenates files, which may be large, into one; deletes each as soon as it is copied."""
    with open(whole, "wb") as out:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, out, MEBIBYTE)
            part.unlink()


DOWNLOADS = {
    "wikitext-2": Download(
        (
            "https://wikitext.smerity.com/wikitext-2-v1.zip",
            "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",
        ),
        "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
        _unpack_wikitext,
    ),
    "wikitext-103": Download(
        (
            "https://wikitext.smerity.com/wikitext-103-v1.zip",
            "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
        ),
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        _unpack_wikitext,
    ),
    "enwik8": Download(
        ("https://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"),
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        _unpack_enwik8,
    ),
    "lm1b": Download(
        (
            "https://www.statmt.org/lm-benchmark/"
            "1-billion-word-language-modeling-benchmark-r13output.tar.gz",
        ),
        "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
        _unpack_lm1b,
    ),
}
KNOWN_CORPORA = ("python_docs", *DOWNLOADS)


def _download_and_unpack(name: str, cache_dir: Path, folder: Path) -> None:
    """Fills `folder` with the splits of a public corpus; deletes the archive afterwards."""
    download = DOWNLOADS[name]
    archive = cache_dir / PurePosixPath(download.urls[0]).name
    if not archive.is_file():
        _fetch(name, download, archive)
    download.unpack(archive, folder)
    archive.unlink()


def _fetch(name: str, download: Download, archive: Path) -> None:
    """Downloads the archive from the first address that gives the right bytes."""
    part = archive.with_name(f"{archive.name}.part")
    failures = []
    for url in download.urls:
        try:
            _stream(url, part)
        except (OSError, HTTPException) as error:
            if getattr(error, "errno", None) in NO_ROOM:
                raise
            failures.append(f"{url} ({_reason(error)})")
            continue
        with open(part, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 == download.sha256:
            os.replace(part, archive)
            return
        part.unlink()
        failures.append(f"{url} (SHA-256 {sha256}, expected {download.sha256})")
    raise InputError(
        f"{name} could not be downloaded from {' nor from '.join(failures)}; put its text in a "
        f"folder as {ACCEPTED_FILES}, and pass --data.corpus FOLDER"
    )


def _stream(url: str, part: Path) -> None:
    """Downloads to `part`, from where an earlier attempt stopped if the server can do that."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except HTTPError as error:
        if error.code == 416:  # the range is empty: all bytes have arrived
            return
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as out:
        _copy_whole(response, out, PurePosixPath(url).name)


def _copy_whole(response: HTTPResponse, out: BinaryIO, title: str) -> None:
    """Copies the body of a response. A connection that ends early raises an error, which
    http.client does not do when it reads in pieces."""
    before = out.tell()
    expected = int(response.headers.get("Content-Length", 0))
    with closing(ReadWithBar(response, expected, f"downloading {title}")) as source:
        shutil.copyfileobj(source, out, MEBIBYTE)
    got = out.tell() - before
    if got < expected:
        raise ConnectionError(f"the connection ended after {got} of {expected} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP status {error.code} {error.reason}"
    cause = getattr(error, "reason", error)  # a URLError wraps the socket's own error
    return getattr(cause, "strerror", None) or str(cause)
