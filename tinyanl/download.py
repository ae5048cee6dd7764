"""Fetches a file whole or not at all, and goes on where an earlier attempt was cut.

What has arrived lies in `.part-NAME` beside the file until it is whole, has the length that the
server and the publisher say, and the published SHA-256. Only then it gets its name.

Copy this file alone: it needs tqdm, nothing else of tinyanl. Usage:

    from pathlib import Path
    from download import fetch
    Path("far.bin").write_bytes(bytes(1000))
    fetch([Path("far.bin").resolve().as_uri()], Path("near.bin"))      # or https://...
    print(Path("near.bin").stat().st_size)
"""
import errno
import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 20
ATTEMPTS = 5  # at one address, each going on where the one before was cut
SECONDS = 60  # of silence, after which a server is given up
# What the network can do wrong. A full disk is an OSError too: write() takes that out of the way.
NETWORK_ERRORS = (OSError, http.client.HTTPException)


class Unfit(Exception):
    """What an address has is not the file that was asked for."""


class CannotWrite(Exception):
    """The disk, not the network, is to blame."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def part_of(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(f".part-{path.name}")


def fetch(urls: list[str], path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Download a file from the first of some addresses that has it, to `path`.

    size, sha256: of the file, where they are published. OSError: no address has it, and why; or the
    disk is full. What had arrived is kept and the next call goes on there, but for a file with a
    wrong hash, which is deleted."""
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()  # OSError: nothing can be written here
    reasons = []
    for url in urls:
        try:
            fetch_from(url, path, size)
            if sha256 and (found := sha256_of(part)) != sha256:
                os.truncate(part, 0)
                raise Unfit(f"has a file with SHA-256 {found}, published is {sha256}")
            os.replace(part, path)
            return
        except CannotWrite as error:
            raise OSError(str(error)) from error
        except (Unfit, *NETWORK_ERRORS) as error:
            reasons.append(f"{url} {reason(error)}")
    kept = f"{part.stat().st_size:,} bytes are kept: the same command goes on there. "
    if part.stat().st_size == 0:
        part.unlink()
        kept = ""
    raise OSError(f"{path.name} cannot be downloaded: {'; '.join(reasons)}. {kept}Try again later, "
                  f"or put the file into {path.parent} by hand")


def reason(error: Exception) -> str:
    """What went wrong at an address, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"answers {error.code} ({error.reason})"
    if isinstance(error, Unfit):
        return str(error)
    if isinstance(error, urllib.error.URLError):
        error = error.reason
    return f"cannot be reached ({error})"


def fetch_from(url: str, path: Path, size: int | None) -> None:
    """Bring the part of a file to its whole length, in a few attempts where the connection is cut
    and every attempt brings something."""
    part = part_of(path)
    for attempt in range(1, ATTEMPTS + 1):
        before = part.stat().st_size
        try:
            total = append(url, part, size)
            arrived = part.stat().st_size
            if total is None or arrived == total:
                return
            cut = f"was cut after {arrived:,} of {total:,} bytes"
        except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
            arrived = part.stat().st_size
            cut = f"was cut after {arrived:,} bytes ({error})"
        if arrived <= before or attempt == ATTEMPTS:
            raise Unfit(cut)


def append(url: str, part: Path, size: int | None) -> int | None:
    """Ask for what is missing of a file and append it to its part. The length of the whole, as far
    as it is known. Unfit: the answer is a web page, or of another length than was published."""
    start = part.stat().st_size
    if start == size:
        return size
    request = urllib.request.Request(url, headers={"User-Agent": "tinyanl"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        # There is nothing behind the part: it is whole, or else longer than the file.
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return start
        os.truncate(part, 0)
        return append(url, part, size)
    with answer:
        start = first_byte(answer) if start else 0
        rest = answer.headers.get("Content-Length")
        total = start + int(rest) if rest else None
        if "html" in (answer.headers.get("Content-Type") or ""):
            raise Unfit("has a web page in place of the file")
        if size is not None and total is not None and total != size:
            raise Unfit(f"has a file of {total:,} bytes, published are {size:,}")
        need_room(part.parent, (total or 0) - start)
        write(answer, part, start, total)
    return total if total is not None else size


def first_byte(answer: http.client.HTTPResponse) -> int:
    """Which byte of the file an answer to a request with a range begins with."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range") or "")
    return int(found[1]) if found and answer.status == 206 else 0


def need_room(folder: Path, missing: int) -> None:
    """CannotWrite: the disk has less room than is needed."""
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise CannotWrite(f"{folder} has {free:,} bytes free and {missing:,} are missing: make "
                          "room, or give another --to")


def write(answer: http.client.HTTPResponse, part: Path, start: int, total: int | None) -> None:
    """Append the body of an answer to a part, from byte `start` on. CannotWrite: a full disk."""
    with (
        open(part, "r+b") as file,
        tqdm(desc=part.name.removeprefix(".part-"), initial=start, total=total, unit="B",
             unit_scale=True, unit_divisor=1024) as bar,
    ):
        file.truncate(start)
        file.seek(start)
        while block := answer.read(BLOCK):
            if file.tell() == 0 and block.lstrip().startswith(b"<"):
                raise Unfit("has a web page in place of the file")
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                remedy = "mend that"
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    remedy = "make room"
                raise CannotWrite(f"{part} cannot be written ({error}): {remedy}, and the same "
                                  "command goes on where it stopped") from error
            bar.update(len(block))
