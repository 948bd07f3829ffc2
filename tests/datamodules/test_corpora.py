"""Corpora: folders and their errors, downloads from a server on this machine, and python_docs."""

import errno
import hashlib
import io
import os
import random
import re
import socket
import sysconfig
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from neighborlm.common.errors import InputError
from neighborlm.datamodules import corpora
from neighborlm.datamodules.corpora import Download, resolve_corpus, tokenize, write_python_docs

WIKI = {split: f" \n = {split} = \n a <unk> @-@ é \n".encode() for split in corpora.SPLITS}


# -- folders ----------------------------------------------------------------------------------


def fill(folder: Path, pattern: str = "{}.txt", **texts: str) -> Path:
    """A folder of split files, each with a word unless `texts` says otherwise."""
    folder.mkdir(exist_ok=True)
    for split in corpora.SPLITS:
        (folder / pattern.format(split)).write_text(texts.get(split, f"{split}\n"))
    return folder


@pytest.mark.parametrize("pattern", ["{}.txt", "wiki.{}.tokens"])
def test_a_folder_of_text_files(tmp_path, pattern):
    folder = fill(tmp_path / "peps", pattern)
    files = resolve_corpus(f"{folder}/", tmp_path / "cache")
    assert files.name == "peps"
    for split in corpora.SPLITS:
        assert files.split(split) == getattr(files, split) == folder / pattern.format(split)
    assert not (tmp_path / "cache").exists()


def test_the_current_folder_has_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path / "peps"))
    assert resolve_corpus(".", tmp_path / "cache").name == "peps"


def test_a_complete_naming_wins_over_a_stray_file(tmp_path):
    folder = fill(tmp_path / "wiki", "wiki.{}.tokens")
    (folder / "train.txt").write_text("stray\n")
    assert resolve_corpus(str(folder), tmp_path).train.name == "wiki.train.tokens"


def test_a_folder_wins_over_a_known_name(tmp_path, monkeypatch):
    fill(tmp_path / "enwik8")
    monkeypatch.chdir(tmp_path)
    assert resolve_corpus("enwik8", tmp_path / "cache").train == Path("enwik8/train.txt")


def refusal(corpus: object, cache_dir: Path) -> str:
    """The message with which a corpus is refused, which must be one line."""
    with pytest.raises(InputError) as caught:
        resolve_corpus(str(corpus), cache_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_name_lists_both_possibilities(tmp_path):
    message = refusal("wikitext-3", tmp_path)
    assert message.startswith("--data.corpus wikitext-3 is neither a folder nor a known corpus")
    assert "train.txt, valid.txt and test.txt" in message
    assert all(name in message for name in corpora.KNOWN_CORPORA)


def test_a_file_is_no_corpus(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("word\n")
    assert f"{path} is a file; expected a folder" in refusal(path, tmp_path)


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    assert f"{folder} holds nothing; expected train.txt" in refusal(folder, tmp_path)
    for number in range(7):
        (folder / f"{number}.csv").touch()
    assert "holds 0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 2 more;" in refusal(folder, tmp_path)


def test_some_splits_are_enough(tmp_path):
    folder = fill(tmp_path / "corpus", "wiki.{}.tokens")
    (folder / "wiki.valid.tokens").unlink()
    assert resolve_corpus(str(folder), tmp_path).splits == ("train", "test")
    (folder / "wiki.train.tokens").unlink()
    assert resolve_corpus(str(folder), tmp_path).splits == ("test",)


def test_a_folder_in_the_place_of_a_text_is_named(tmp_path):
    folder = fill(tmp_path / "corpus")
    (folder / "valid.txt").unlink()
    (folder / "valid.txt").mkdir()
    assert "valid.txt is a folder; expected a text file" in refusal(folder, tmp_path)


def test_the_validation_split_may_be_called_val(tmp_path):
    folder = fill(tmp_path / "corpus")
    (folder / "val.txt").write_text("other\n")
    assert resolve_corpus(str(folder), tmp_path).valid == folder / "valid.txt"
    (folder / "valid.txt").unlink()
    assert resolve_corpus(str(folder), tmp_path).valid == folder / "val.txt"


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000])
def test_names_that_no_folder_has(tmp_path, name):
    assert "--data.corpus " in refusal(name, tmp_path)


def test_a_cache_that_is_a_file(wikitext, tmp_path):
    (tmp_path / "cache").write_text("")
    assert "or another one named as --data.cache_dir" in refusal("wikitext-2", tmp_path / "cache")


def test_a_full_disk_ends_a_download_which_then_goes_on(wikitext, tmp_path, monkeypatch):
    def full(url, part):
        part.write_bytes(wikitext.body[:60])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_stream", full)
        assert f"{tmp_path}: has no more room (" in refusal("wikitext-2", tmp_path)
    assert_wikitext(tmp_path)
    assert wikitext.requests[-1]["Range"] == "bytes=60-"


@pytest.mark.parametrize("text", ["", " \n\t\n", "\ufeff\n"])
def test_an_empty_split_is_named(tmp_path, text):
    folder = fill(tmp_path / "corpus", test=text)
    assert refusal(folder, tmp_path).startswith(f"{folder / 'test.txt'} is empty; expected")


# -- downloads --------------------------------------------------------------------------------


class Home(ThreadingHTTPServer):
    """A server of one file that keeps the headers of all requests.

    Attributes:
        ranges: whether it can send a part of the file.
        sent_at_most: bytes after which it ends the connection.
        error: the status with which it refuses everything.
    """

    ranges = True
    error: int | None = None
    sent_at_most: int | None = None

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/corpus.archive"


class Handler(BaseHTTPRequestHandler):
    server: Home

    def do_GET(self) -> None:
        home = self.server
        home.requests.append(dict(self.headers))
        start = 0
        if home.ranges and "Range" in self.headers:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        error = home.error or (416 if start >= len(home.body) else None)
        if error:
            self.send_error(error)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(home.body) - start))
        self.end_headers()
        self.wfile.write(home.body[start:][: home.sent_at_most])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts a server of the given bytes; without proxies between it and the test."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    homes = []

    def start(body: bytes) -> Home:
        home = Home(body)
        threading.Thread(target=home.serve_forever, args=(0.01,), daemon=True).start()
        homes.append(home)
        return home

    yield start
    for home in homes:
        home.shutdown()
        home.server_close()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def move(monkeypatch, name: str, body: bytes, *urls: str) -> None:
    """Makes `urls` the addresses of a known corpus whose archive is `body`."""
    unpack = corpora.DOWNLOADS[name].unpack
    download = Download(urls, hashlib.sha256(body).hexdigest(), unpack)
    monkeypatch.setitem(corpora.DOWNLOADS, name, download)


@pytest.fixture
def wikitext(serve, monkeypatch):
    """An address that serves wikitext-2."""
    members = {f"wikitext-2/wiki.{split}.tokens": text for split, text in WIKI.items()}
    home = serve(zipped({"../evil.txt": b"evil", **members, "wikitext-2/README": b"read me"}))
    move(monkeypatch, "wikitext-2", home.body, home.url)
    return home


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_wikitext(cache_dir: Path) -> None:
    files = resolve_corpus("wikitext-2", cache_dir)
    assert files.name == "wikitext-2"
    assert {split: files.split(split).read_bytes() for split in corpora.SPLITS} == WIKI


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_wikitext_is_downloaded_once_and_only_its_splits_unpacked(wikitext, tmp_path):
    cache_dir = tmp_path / "a" / "cache"
    assert_wikitext(cache_dir)
    assert_wikitext(cache_dir)
    assert len(wikitext.requests) == 1
    assert not wikitext.requests[0]["User-Agent"].startswith("Python-urllib")
    splits = [f"wikitext-2/{split}.txt" for split in ("test", "train", "valid")]
    assert everything_in(cache_dir) == ["wikitext-2", "wikitext-2.lock", *splits]
    assert not list(tmp_path.rglob("evil*"))


def test_processes_that_ask_at_once_share_one_download(wikitext, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(assert_wikitext, [tmp_path] * 4))
    assert len(wikitext.requests) == 1


def test_what_a_killed_run_left_is_not_taken_for_the_corpus(wikitext, tmp_path):
    fill(tmp_path / "wikitext-2.making", train="half", more="junk")
    assert_wikitext(tmp_path)
    assert not (tmp_path / "wikitext-2.making").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_is_continued(wikitext, tmp_path, ranges):
    wikitext.ranges = ranges
    (tmp_path / "corpus.archive.part").write_bytes(wikitext.body[:100])
    assert_wikitext(tmp_path)
    assert wikitext.requests[0]["Range"] == "bytes=100-"


def test_a_download_with_nothing_left_to_send_is_complete(wikitext, tmp_path):
    (tmp_path / "corpus.archive.part").write_bytes(wikitext.body)
    assert_wikitext(tmp_path)


def test_a_connection_that_ends_early_is_an_error_and_the_next_call_goes_on(wikitext, tmp_path):
    wikitext.sent_at_most = 50
    assert f"ended after 50 of {len(wikitext.body)} bytes" in refusal("wikitext-2", tmp_path)
    wikitext.sent_at_most = None
    assert_wikitext(tmp_path)
    assert wikitext.requests[-1]["Range"] == "bytes=50-"


def test_another_archive_is_refused(serve, wikitext, tmp_path, monkeypatch):
    other = serve(b"<html>moved</html>")
    move(monkeypatch, "wikitext-2", wikitext.body, other.url)
    message = refusal("wikitext-2", tmp_path)
    for body in (other.body, wikitext.body):
        assert hashlib.sha256(body).hexdigest() in message
    assert everything_in(tmp_path) == ["wikitext-2.lock"]


def test_the_next_home_is_tried(serve, wikitext, tmp_path, monkeypatch):
    offline = f"http://127.0.0.1:{closed_port()}/corpus.archive"
    other = serve(b"<html>moved</html>")
    move(monkeypatch, "wikitext-2", wikitext.body, offline, other.url, wikitext.url)
    assert_wikitext(tmp_path)


def test_offline_is_one_sentence(wikitext, tmp_path, monkeypatch):
    url = f"http://127.0.0.1:{closed_port()}/corpus.archive"
    move(monkeypatch, "wikitext-2", wikitext.body, url)
    assert refusal("wikitext-2", tmp_path) == (
        f"wikitext-2 could not be downloaded from {url} ({os.strerror(errno.ECONNREFUSED)}); "
        "put its text in a folder as train.txt, valid.txt and test.txt, or "
        "wiki.{train,valid,test}.tokens, and pass --data.corpus FOLDER"
    )


def test_a_refusing_server_is_named_with_its_status(wikitext, tmp_path):
    wikitext.error = 403
    assert f"{wikitext.url} (HTTP status 403 Forbidden)" in refusal("wikitext-2", tmp_path)


def test_enwik8_is_cut_at_bytes_and_not_changed(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "ENWIK8_BYTES", {"train": 90, "valid": 5, "test": 5})
    text = bytes(range(100, 200)).replace(b"z", b"\r").replace(b"y", b"\n")
    home = serve(zipped({"enwik8": text}))
    move(monkeypatch, "enwik8", home.body, home.url)
    files = resolve_corpus("enwik8", tmp_path)
    parts = [files.split(split).read_bytes() for split in corpora.SPLITS]
    assert [len(part) for part in parts] == [90, 5, 5]
    assert b"".join(parts) == text


def test_lm1b_is_put_together_in_the_order_of_its_shards(serve, tmp_path, monkeypatch):
    names = [*corpora.LM1B_TRAIN, *(corpora.LM1B_HELD_OUT.format(i) for i in range(50))]
    random.Random(0).shuffle(names)
    names += ["../evil", "training-monolingual.tokenized.shuffled/.svn/news.en-00001-of-00100"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in names:
            line = name.encode() + b"\n"
            member = tarfile.TarInfo(f"1-billion-word/{name}")
            member.size = len(line)
            archive.addfile(member, io.BytesIO(line))
    home = serve(buffer.getvalue())
    move(monkeypatch, "lm1b", home.body, home.url)
    files = resolve_corpus("lm1b", tmp_path)
    assert files.train.read_text().splitlines() == corpora.LM1B_TRAIN
    assert files.valid.read_text().splitlines() == [corpora.LM1B_HELD_OUT.format(1)]
    assert files.test.read_text().splitlines() == [corpora.LM1B_HELD_OUT.format(0)]
    assert len(everything_in(files.train.parent)) == 3


def test_every_public_corpus_is_pinned_and_comes_over_https():
    assert corpora.KNOWN_CORPORA == ("python_docs", "wikitext-2", "wikitext-103", "enwik8", "lm1b")
    for download in corpora.DOWNLOADS.values():
        assert re.fullmatch("[0-9a-f]{64}", download.sha256)
        assert all(url.startswith("https://") for url in download.urls)
        assert len({Path(url).name for url in download.urls}) == 1


# -- python_docs ------------------------------------------------------------------------------

SOURCE = r'''
"""Module {0}.

    The same
    everywhere."""
import never_imported
class Outer:
    "Outer {0}"
    if True:
        async def inner(self):
            r"""Inner {0}\d."""
            def innermost(): "Innermost {0}, isn't it"
    try: pass
    except OSError:
        def handler(): """Handler {0}"""
def undocumented(): return "no docstring"
def last():
    "\d is an escape that warns {0}"
'''


@pytest.fixture
def stdlib(tmp_path):
    """A small standard library, with everything that is left out of the real one."""
    root = tmp_path / "stdlib"
    sources = {f"package{i}/__init__.py": SOURCE.format(f"p{i}") for i in range(30)}
    sources |= {f"package{i}/module.py": SOURCE.format(f"m{i}") for i in range(30)}
    sources["pydoc_data/topics.py"] = "topics = {'zip': 'Z\\n=====\\n\\nLast.', 'and': 'First.'}"
    sources |= {f"{folder}/x.py": "'left out'" for folder in corpora.LEFT_OUT}
    sources |= {"package0/tests/x.py": "'left out'", "bad.py": "def", "null.py": "'\0'"}
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (root / "latin.py").write_bytes(b"'not utf-8: \xff'")
    return root


def written(stdlib: Path, folder: Path) -> dict[str, str]:
    folder.mkdir()
    write_python_docs(stdlib, folder)
    return {split: (folder / f"{split}.txt").read_text() for split in corpora.SPLITS}


def test_python_docs_is_the_same_every_time(stdlib, tmp_path):
    assert written(stdlib, tmp_path / "a") == written(stdlib, tmp_path / "b")


@pytest.mark.filterwarnings("error")
def test_python_docs_has_every_docstring_once_in_order(stdlib, tmp_path):
    texts = written(stdlib, tmp_path / "docs")
    lines = "".join(texts.values()).splitlines()
    assert len(lines) == len(set(lines))
    assert "left out" not in lines
    assert sum(line == "The same everywhere ." for line in lines) == 1
    document = """\
Module : package7 . module
Module m7 .
Outer m7
Inner m7 \\ d .
Innermost m7 , isn't it
Handler m7
\\ d is an escape that warns m7
"""
    assert sum(document in text for text in texts.values()) == 1
    topics = [line for line in lines if line.startswith("Topic")]
    assert sorted(topics) == ["Topic : and", "Topic : zip"]
    assert "Z ===" in lines


def test_a_folder_without_documentation_makes_no_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere'} has no documentation" in refusal("python_docs", tmp_path)
    assert [Path(name).suffix for name in everything_in(tmp_path)] == [".lock"]


def test_python_docs_of_this_python(tmp_path):
    files = resolve_corpus("python_docs", tmp_path)
    assert files.name == "python_docs"
    lines = {split: files.split(split).read_text().splitlines() for split in corpora.SPLITS}
    together = [line for split in corpora.SPLITS for line in lines[split]]
    assert len(together) == len(set(together))
    assert all(line == " ".join(line.split()) != "" for line in together)
    tokens = {split: sum(len(line.split()) for line in lines[split]) for split in lines}
    assert tokens["train"] > 100_000
    assert all(0.02 < tokens[split] / tokens["train"] < 0.2 for split in ("valid", "test"))
    headings = [line for line in together if re.match("(Topic|Module) : ", line)]
    assert {"Topic : while", "Module : asyncio . tasks"} <= set(headings)
    assert resolve_corpus("python_docs", tmp_path) == files


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's `os.walk()`, e.g.", "It's ` os . walk ( ) ` , e . g ."),
        ("========\n>>> a == b...", "=== >>> a == b ..."),
        ("naïve_1\u2028x 'quoted'", "naïve_1 x ' quoted '"),
        (" \f\n", ""),
    ],
)
def test_tokens_are_words_and_marks(text, tokens):
    assert tokenize(text) == tokens
