"""`weights get` against a server on the loopback interface that does what servers do: what is on
the disk afterwards."""
import errno
import gzip
import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from commands import one_line

from tinyanl import download, weights
from tinyanl.download import fetch
from tinyanl.weights import SETS, TABLE, File, main, rows

BIG = b"#version: toy\n" + b"c a\n" * 700_000  # more than one block


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, path -> bytes, and cuts, refuses or lies as its attributes say."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.cut_after = None  # bytes of each answer, then the connection is closed
        self.ranges = True
        self.requests = []  # (path, range) of each
        self.stall = None  # an event: wait for it in the middle of an answer

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        """A quiet server."""

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        content = server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        start = int(wanted[len("bytes=") : -1]) if wanted and server.ranges else 0
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if b"<html" in content else "binary/x")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: server.cut_after] if server.cut_after else body)
        self.wfile.flush()
        if server.stall:
            server.stall.wait(20)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def left(folder):
    """Name -> bytes of everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_a_whole_file_arrives_with_the_hash_checked(server, tmp_path):
    server.files["a"] = BIG
    fetch([server.url("a")], tmp_path / "deep" / "a", len(BIG), sha(BIG))
    assert left(tmp_path) == {"deep/a": BIG}
    fetch([server.url("a")], tmp_path / "b")  # nothing is published of it
    assert left(tmp_path) == {"deep/a": BIG, "b": BIG}


def test_a_cut_connection_goes_on_by_itself_and_then_by_the_next_call(server, tmp_path):
    server.files["a"] = BIG
    server.cut_after = 1_000_000
    fetch([server.url("a")], tmp_path / "a", None, sha(BIG))  # in three answers
    assert left(tmp_path) == {"a": BIG}
    assert [wanted for _, wanted in server.requests] == [None, "bytes=1000000-", "bytes=2000000-"]

    server.cut_after = 100_000  # five times that is not enough
    with pytest.raises(OSError, match=r"b cannot be downloaded.*was cut after 500,000 of 2,800,014 "
                                      r"bytes.*500,000 bytes are kept"):
        fetch([server.url("a")], tmp_path / "b")
    assert left(tmp_path) == {"a": BIG, ".part-b": BIG[:500_000]}
    server.cut_after = None
    fetch([server.url("a")], tmp_path / "b", len(BIG), sha(BIG))
    assert left(tmp_path) == {"a": BIG, "b": BIG}
    assert server.requests[-1] == ("/a", "bytes=500000-")


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.files["a"] = BIG
    server.ranges = False
    (tmp_path / ".part-a").write_bytes(b"x" * 1000)
    fetch([server.url("a")], tmp_path / "a", None, sha(BIG))
    assert left(tmp_path) == {"a": BIG}


@pytest.mark.parametrize("part", [BIG, BIG + b"more"])
def test_a_part_that_is_whole_already_or_longer_than_the_file(server, tmp_path, part):
    server.files["a"] = BIG
    (tmp_path / ".part-a").write_bytes(part)
    fetch([server.url("a")], tmp_path / "a")
    assert left(tmp_path) == {"a": BIG}


def test_a_wrong_hash_leaves_nothing_and_the_next_address_is_asked(server, tmp_path):
    server.files |= {"bad": BIG[:-1] + b"!", "good": BIG}
    with pytest.raises(OSError, match=f"a cannot be downloaded.*SHA-256.*published is {sha(BIG)}"):
        fetch([server.url("bad")], tmp_path / "a", len(BIG), sha(BIG))
    assert left(tmp_path) == {}
    fetch([server.url("bad"), server.url("good")], tmp_path / "a", len(BIG), sha(BIG))
    assert left(tmp_path) == {"a": BIG}


@pytest.mark.parametrize("name, content, said", [
    ("none", None, "answers 404"),
    ("page", b"<html>quota</html>", "a web page in place of the file"),
    ("page", b"\n <!DOCTYPE x>", "a web page in place of the file"),
    ("long", BIG + b"c a\n", "has a file of 2,800,018 bytes, published are 2,800,014"),
    ("short", BIG[:-4], "has a file of 2,800,010 bytes, published are 2,800,014"),
])
def test_an_address_without_the_file_is_named_and_the_second_one_asked(
    server, tmp_path, name, content, said
):
    server.files |= {"good": BIG} | ({name: content} if content else {})
    size = len(BIG) if name in ("long", "short") else None
    with pytest.raises(OSError) as error:
        fetch([server.url(name)], tmp_path / "a", size)
    assert said in str(error.value) and server.url(name) in str(error.value)
    assert "\n" not in str(error.value) and "Try again later" in str(error.value)
    assert left(tmp_path) == {}
    fetch([server.url(name), server.url("good")], tmp_path / "a", size)
    assert left(tmp_path) == {"a": BIG}


def test_no_network_is_one_line(tmp_path):
    server = Server()
    url = server.url("a")
    server.server_close()  # nobody listens there now
    with pytest.raises(OSError, match="a cannot be downloaded: .* cannot be reached"):
        fetch([url], tmp_path / "a")
    assert left(tmp_path) == {}


def test_a_full_disk_is_seen_beforehand_or_keeps_what_has_arrived(server, tmp_path, monkeypatch):
    server.files["a"] = BIG
    usage = download.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match="1,000 bytes free and 2,800,014 are missing: make room"):
            fetch([server.url("a")], tmp_path / "a")

    class Full(io.FileIO):
        def write(self, block):
            if self.tell():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(block)

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", lambda path, mode: Full(path, "r+"), raising=False)
        with pytest.raises(OSError, match="a cannot be written.*make room, and the same command"):
            fetch([server.url("a")], tmp_path / "a")
    assert left(tmp_path) == {".part-a": BIG[: 1 << 20]}
    fetch([server.url("a")], tmp_path / "a", len(BIG), sha(BIG))
    assert left(tmp_path) == {"a": BIG}


# the command

@pytest.fixture
def table(server, monkeypatch):
    """The paper's set, but from the loopback server and small."""
    merges = gzip.compress(b"#version: toy\nc a\nca t</w>\n", mtime=0)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.ckpt", merges)
    server.files |= {"merges.gz": merges, "first.zip": packed.getvalue()}
    table = (
        File("BPE merges", (server.url("gone"), server.url("merges.gz")), "merges.txt.gz",
             "a licence", "tokenizer", len(merges), sha(merges)),
        File("First", (server.url("first.zip"),), "first.ckpt", "MIT", "autoencoder"),
    )
    monkeypatch.setattr(weights, "TABLE", table)
    monkeypatch.setattr(weights, "SETS", {"both": ("BPE merges", "First")})
    return merges


def test_get_fetches_a_set_unpacks_it_and_says_what_check_says(table, server, tmp_path, capsys):
    assert main(["get", "both", "--to", str(tmp_path / "w")]) == 0
    assert left(tmp_path / "w") == {"merges.txt.gz": table, "first.ckpt": table}
    out = capsys.readouterr().out
    assert "licence a licence" in out and "licence MIT" in out
    assert out.count("BPE merges, 2 lines") == 2 and "matches BPE merges" in out
    asked = len(server.requests)
    assert main(["get", "bpe MERGES", "--to", str(tmp_path / "w")]) == 0
    assert "is there already" in capsys.readouterr().out and len(server.requests) == asked


def test_get_of_what_is_wrong_is_one_line(table, server, tmp_path, capsys):
    said = one_line(main, ["get", "no such", "--to", tmp_path], capsys)
    assert "'no such' is not in the table: choose from both, 'BPE merges', 'First'" in said
    assert "get what? both" in one_line(main, ["get"], capsys)
    assert "into which folder? --to DIR" in one_line(main, ["get", "First"], capsys)
    server.files["first.zip"] = server.files["first.zip"][:-30]
    said = one_line(main, ["get", "First", "--to", tmp_path], capsys)
    assert "first.zip is damaged" in said and "delete it and get it again" in said
    assert list(left(tmp_path)) == ["first.zip"]
    del server.files["first.zip"]
    (tmp_path / "first.zip").unlink()
    said = one_line(main, ["get", "First", "--to", tmp_path], capsys)
    assert "first.zip cannot be downloaded" in said and "answers 404" in said
    assert left(tmp_path) == {}


def test_ctrl_c_keeps_what_has_arrived_and_ends_with_130(server, tmp_path):
    server.files["a"] = BIG
    server.cut_after = 1_500_000
    server.stall = threading.Event()
    code = f"""
from tinyanl import weights
weights.TABLE = (weights.File("A", ({server.url("a")!r},), "a", "MIT", "x"),)
raise SystemExit(weights.main(["get", "A", "--to", {str(tmp_path)!r}]))
"""
    root = Path(weights.__file__).parents[1]
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root)},
                             preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                              signal.default_int_handler))
    part = tmp_path / ".part-a"
    for _ in range(1200):
        if part.exists() and part.stat().st_size:
            break
        try:
            child.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=60)[1]
    server.stall.set()
    assert child.returncode == 130 and "Traceback" not in error, error
    assert "what has arrived is kept, and the same command goes on there" in error
    arrived = part.stat().st_size
    assert list(left(tmp_path)) == [".part-a"] and part.read_bytes() == BIG[:arrived]
    server.stall = server.cut_after = None
    fetch([server.url("a")], tmp_path / "a", len(BIG), sha(BIG))
    assert left(tmp_path) == {"a": BIG}


def test_the_papers_set_is_what_weights_md_says():
    assert SETS["imagenet256"] == ("LDM cin256-v2", "CLIP ViT-B/32", "BPE merges")
    files = rows(["imagenet256"])
    assert [file.saved_as for file in files] == ["model.ckpt", "ViT-B-32.pt",
                                                "bpe_simple_vocab_16e6.txt.gz"]
    faces = [file.saved_as for file in rows(["celebahq256"])]
    assert {"unet/config.json", "vqvae/config.json", "scheduler/scheduler_config.json"} < {*faces}
    assert len(rows(["imagenet256", "celebahq256", "imagenet256"])) == 8
    assert len(rows([file.name for file in TABLE])) == len(TABLE)


def test_a_reader_that_leaves_early_ends_the_table_without_a_word():
    root = Path(weights.__file__).parents[1]
    line = f"{sys.executable} -m tinyanl.weights | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(root)})
    assert done.stdout == "LDM cin256-v2\n" and done.stderr == ""
