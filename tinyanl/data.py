"""A folder of images -> verified pictures, captions and labels.

    DIR/*.jpg                        pictures at any depth, sorted by path so that runs repeat
    DIR/cats/*.jpg DIR/dogs/*.jpg    every picture in one of two or more sub-folders: classes
    DIR/train DIR/val DIR/test       train/ is read as DIR would be, the others are not trained on
    DIR/metadata.jsonl               {"file": "a.jpg", "text": "a rose"}: these files, in this order
    DIR/a.jpg DIR/a.txt              or a caption beside each picture

In metadata.jsonl "file" may be called "file_name", and "text" may be called "caption" or "prompt".
metadata.csv holds the same columns. Both may lie in a sub-folder and then name its pictures; those
that they leave out are skipped. Where captions lie in several places, the upper folder goes first,
and in one folder metadata.jsonl before metadata.csv before .txt.

Linked folders are followed. Hidden files, what systems leave behind (@eaDir, $RECYCLE.BIN) and
tinyanl's own run folders are no data. Whatever else is left out stands in `skipped` or `notes`.

Copy this file alone: it needs torch, torchvision and tqdm, nothing else of tinyanl. Usage:

    from PIL import Image
    from data import describe, open_rgb, scan, to_square
    Image.new("RGB", (96, 64), "orange").save("a.png")
    folder = scan(".", size=64)
    x = to_square(open_rgb(folder.pictures[0].path), size=64)
    print(describe(folder), *folder.notes, sep="\\n")
    print(tuple(x.shape), x.min().item(), x.max().item())
"""
import csv
import hashlib
import io
import json
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torchvision.transforms.functional as TF
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

COPY = "a copy of another picture, it seems, so one may be trained on and the other held out"
FEW = 5  # a model trained on fewer pictures can only repeat them
Skipped = list[tuple[Path, str]]  # file, reason
Notes = list[str]  # sentences for the user
# Functions below that are given one of these lists add to it.


class Picture(NamedTuple):
    path: Path
    text: str | None
    label: int | None  # index into classes


class Folder(NamedTuple):
    pictures: list[Picture]  # a picture with five captions stands here five times
    classes: list[str]
    skipped: Skipped
    enlarged: int  # pictures whose shorter side is below the wanted size
    notes: Sequence[str] = ()  # what its user must hear besides: print a line for each


def scan(root: str | Path, size: int) -> Folder:
    """Find and decode the pictures of a folder (or one picture file) that will be used at `size`
    pixels. FileNotFoundError: no such path. ValueError: no readable picture, an archive, or a bad
    line in a metadata file."""
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(
            f"{root.absolute()} does not exist: name a folder of images, or one image")
    if root.is_file():
        return scan_file(root, size)

    skipped = []  # the steps below add to this list,
    notes = []  # and to this one
    files = find_files(root, skipped, notes)
    found = [file for file in files if is_picture(root / file)]
    apart = find_held_out(found, notes)
    files = [file for file in files if not is_in(file, apart)]
    pictures = [file for file in found if not is_in(file, apart)]
    top = find_top(pictures)

    rows, unnamed, captions = find_captions(root, files, pictures, notes)
    rows = [row for row in rows if top in row[0].parents and not is_in(row[0], apart)]
    opened = open_all(root, dict.fromkeys(file for file, _ in rows), size, skipped, notes)
    skipped += unnamed
    others = count_kinds(set(files).difference(pictures, captions, opened))
    if not opened:
        holds = ", ".join([*others, describe(Folder([], [], skipped, 0))])
        raise ValueError(f"no readable picture in {root}: it holds {holds}. {remedy(files)}")

    classes = find_classes(list(opened), pictures, top, notes)
    labels = {name: i for i, name in enumerate(classes)}
    used = [Picture(root / file, text, labels.get(file.parts[len(top.parts)]))
            for file, text in rows if file in opened]
    if len(opened) < len(used):
        notes.append(f"{len(opened)} different pictures, each as often as it has captions")
    if len(opened) < FEW:
        notes.append(f"fewer than {FEW} pictures: a model trained on so few will repeat them")
    if others:
        notes.append(f"passed over: {', '.join(others)}")
    return Folder(used, classes, skipped, sum(opened.values()), notes)


def scan_file(path: Path, size: int) -> Folder:
    """One picture in place of a folder."""
    if path.suffix.lower() in ARCHIVES:
        raise ValueError(f"{path} is an archive: unzip it first, and name the folder that it gives")
    picture = open_rgb(path)
    notes = [f"{path.name}: {note}" for note in picture.info["notes"]]
    return Folder([Picture(path, None, None)], [], [], int(min(picture.size) < size), notes)


def describe(folder: Folder) -> str:
    """What `scan` found, in one line that names up to five of the skipped files. The notes are
    lines of their own."""
    pictures, classes, skipped, enlarged, _ = folder
    parts = [plural(len(pictures), "picture")]
    if classes:
        parts[0] += f" in {len(classes)} classes"
    if captions := sum(picture.text is not None for picture in pictures):
        parts.append(f"{captions} with text")
    if skipped:
        paths = [picture.path for picture in pictures] + [path for path, _ in skipped]
        root = os.path.commonpath({path.parent for path in paths}) or "."
        names = [f"{shown(os.path.relpath(path, root))} ({reason})" for path, reason in skipped]
        parts.append(f"{len(skipped)} skipped: {', '.join(names[:5])}")
        if len(skipped) > 5:
            parts[-1] += f" and {len(skipped) - 5} more"
    text = ", ".join(parts)
    if enlarged:
        text += f"; {enlarged} smaller than the model's size, enlarged"
    return text


def open_all(root: Path, files: Iterable[Path], size: int, skipped: Skipped, notes: Notes
             ) -> dict[Path, bool]:
    """Decode every file once: {readable file: is it smaller than `size`}. The others are added to
    `skipped`; what open_rgb remarks is added to `notes`, once with the files that it is true of."""
    opened = {}
    identities = set()
    remarks = defaultdict(list)
    for file in tqdm(files, "reading pictures", leave=False, delay=5):
        try:
            picture = open_rgb(root / file)
        except ValueError as error:
            skipped.append((root / file, str(error).removeprefix(f"{root / file}: ")))
            continue
        opened[file] = min(picture.size) < size
        identity = file_identity(root / file)
        if identity in identities:
            remarks[COPY].append(file)
        identities.add(identity)
        for remark in picture.info["notes"]:
            remarks[remark].append(file)
    notes += [f"{some(remarks[remark])}: {remark}" for remark in remarks]
    return opened


# --- which files are pictures

SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin",
                  "recycler", "system volume information", "lost+found"}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
# Pillow opens these too, but they are films, pages, measurements and drawings.
NO_PICTURES = {".mpg", ".mpeg", ".fli", ".flc", ".pdf", ".ps", ".eps", ".wmf", ".emf", ".fit",
               ".fits", ".grib", ".bufr", ".h5", ".hdf", ".iim", ".gbr"}
# These are tried even where Pillow cannot read them: then they are skipped with a reason.
HEIC = {".heic", ".heif", ".hif"}
TRIED = HEIC | {".avif", ".webp", ".jp2", ".mpo", ".pjpeg", ".pjp"}
# Copies, unfinished downloads and previews of films are not read, even if they hold a picture.
LEFTOVERS = {".bak", ".orig", ".old", ".tmp", ".part", ".crdownload", ".thm"}
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
PICTURE_BEGINS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP", re.DOTALL)


def find_files(root: Path, skipped: Skipped, notes: Notes) -> list[Path]:
    """All files below a folder that may be data, sorted, as paths relative to it."""
    files = []
    runs = []
    missing = []
    seen = {}  # real path -> where it was met

    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), error.strerror))

    for top, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        here = Path(top).relative_to(root)
        first = seen.setdefault(os.path.realpath(top), top)
        if first != top:  # a link to a folder above would never end
            skipped.append((Path(top), f"the folder {first} again"))
            folders.clear()
            continue
        if is_run(folders, names):
            runs.append(here)
            if here.name:  # the root itself was asked for
                folders.clear()
                continue
        folders[:] = sorted(name for name in folders if not is_system(name))
        files += [here / name for name in names if not is_system(name)]
        missing += [here / name for name in names if name.endswith(".icloud")]
    if missing:
        notes.append(f"not downloaded from iCloud yet, so not used: {some(missing)}")
    if runs and not runs[0].name:
        notes.append("this is a run folder of tinyanl: the pictures in it were drawn by a model")
    elif runs:
        notes.append(f"passed over, as run folders of tinyanl: {some(runs)}")
    return sorted(files, key=Path.as_posix)


def is_system(name: str) -> bool:
    """Hidden, or left behind by an operating system or a network disk."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


def is_run(folders: list[str], names: list[str]) -> bool:
    """Did tinyanl.train write this folder?"""
    trained = "adapter.pt" in names or "state.pt" in names
    return trained or ("config.json" in names and "samples" in folders)


def is_picture(path: Path) -> bool:
    """By its extension; a file with an unusual one, or none, by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in extensions():
        return True
    if suffix in LEFTOVERS | NO_PICTURES or suffix.endswith("~") or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return PICTURE_BEGINS.match(file.read(12)) is not None
    except OSError:
        return False


@cache
def extensions() -> set[str]:
    """The extensions of pictures that this Pillow opens, and some that are worth a reason."""
    has_heif()
    kinds = Image.registered_extensions()
    return {suffix for suffix in kinds if kinds[suffix] in Image.OPEN} - NO_PICTURES | TRIED


@cache
def has_heif() -> bool:
    """Teach Pillow to read HEIC, where the package that does it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def count_kinds(files: Iterable[Path]) -> list[str]:
    """Such as ["8 .txt", "3 .jxl"], the most frequent first."""
    kinds = Counter(shown(file.suffix.lower()) or "extension-less" for file in sorted(files))
    return [f"{n} {kind}" for kind, n in kinds.most_common()]


def remedy(files: list[Path]) -> str:
    """What to do where no picture was found."""
    if any(file.suffix.lower() in ARCHIVES for file in files):
        return "Unzip the archive first"
    return "Put png or jpg there"


# --- folders: what is trained on, and classes

# "valid" and "dev" may well be classes, unless there is a train/ beside them.
TRAIN = {"train", "training"}
HELD_OUT = {"test", "testing", "val", "validation"}
HELD_OUT_BESIDE_TRAIN = HELD_OUT | {"valid", "dev", "eval"}
# No name of a class: what lies beside it may be masks.
PICTURES_FOLDER = {"image", "images", "img", "imgs", "jpegimages", "pictures", "photos"}


def find_held_out(pictures: list[Path], notes: Notes) -> set[Path]:
    """The folders (and single pictures) to leave out because they are kept for tests: what lies
    beside a train/ and a test/ (or val/ ...); where there is no train/, a test/ beside others."""
    folders = {folder for file in pictures for folder in file.parents if folder.name}
    training = {folder for folder in folders if folder.name.lower() in TRAIN}
    tests = {folder for folder in folders if folder.name.lower() in HELD_OUT_BESIDE_TRAIN}
    split = {folder.parent for folder in training} & {folder.parent for folder in tests}
    if split:
        used = some(sorted(folder for folder in training if folder.parent in split), "/")
        apart = Counter(branch for file in pictures for folder in split.intersection(file.parents)
                        if (branch := child(file, folder)) not in training)
    else:
        used = "the rest"
        top = common_folder(pictures)
        branches = Counter(child(file, top) for file in pictures)
        apart = {branch: n for branch, n in branches.items()
                 if branch in tests and branch.name.lower() in HELD_OUT}
        if len(apart) == len(branches):  # then there is no rest
            apart = {}
    if apart:
        names = []
        for branch, n in sorted(apart.items()):
            name = shown(branch.as_posix())
            names.append(f"{name}/ ({plural(n, 'picture')})" if branch in folders else name)
        verb = "is" if len(names) == 1 else "are"
        notes.append(f"{used} is used; {shorten(names)} {verb} not trained on")
    return set(apart)


def find_top(pictures: list[Path]) -> Path:
    """The folder whose sub-folders are classes: a train/ that holds all pictures, or the root."""
    parts = common_folder(pictures).parts
    for i, name in enumerate(parts, start=1):
        if name.lower() in TRAIN:
            return Path(*parts[:i])
    return Path()


def find_classes(opened: list[Path], pictures: list[Path], top: Path, notes: Notes) -> list[str]:
    """The names of the sub-folders of `top`, where every picture is in one of two or more."""
    stray = [file for file in opened if file.parent == top]
    names = sorted({child(file, top).name for file in opened if file.parent != top})
    folders = some([Path(name) for name in names], "/")
    if len(names) < 2:
        inner = {child(file, top / names[0]) for file in opened} if names and not stray else set()
        if len(inner) >= 2 and inner.isdisjoint(opened):
            notes.append(f"no classes: all pictures are in {folders}. Name that folder to take "
                         f"{some(sorted(inner), '/')} for classes")
        return []
    if stray:
        notes.append(f"no classes: {some(stray)} is not in one of the folders {folders} as the "
                     "others are. Move it into one of them, or away, to have classes")
        return []
    if all(name.lower() in HELD_OUT_BESIDE_TRAIN | TRAIN for name in names):
        notes.append(f"no classes: {folders} are parts of a data set, and all are used")
        return []

    doubtful = [name for name in names if name.lower() in PICTURES_FOLDER]
    if doubtful:
        notes.append(f"the folders {folders} are taken for classes: if only {doubtful[0]}/ holds "
                     "what to train on, name that folder")
    empty = {child(file, top) for file in pictures if top in file.parents and file.parent != top}
    empty -= {child(file, top) for file in opened}
    if empty:
        notes.append(f"no class, as no picture of it can be used: {some(sorted(empty), '/')}")
    return names


def common_folder(files: list[Path]) -> Path:
    """The deepest folder that holds all files."""
    return Path(os.path.commonpath({file.parent for file in files})) if files else Path()


def child(file: Path, folder: Path) -> Path:
    """What of `folder` leads to the file: a sub-folder, or the file itself."""
    return Path(*file.parts[: len(folder.parts) + 1])


def is_in(file: Path, places: set[Path]) -> bool:
    """Is the file one of these places, or below one?"""
    return bool(places) and (file in places or not places.isdisjoint(file.parents))


# --- captions

METADATA = ("metadata.jsonl", "metadata.csv")  # the first that a folder holds is read
FILE_KEYS = ("file", "file_name", "filename", "image", "image_name", "path")
TEXT_KEYS = ("text", "caption", "prompt", "description")  # the first that a line fills is read
EXAMPLE = '{"file": "a.jpg", "text": "a rose"}'
BESIDE = (".txt", ".caption")  # captions beside the pictures
BOXES = re.compile(r"[\s\d.,eE+-]+")  # where things are: "0 0.5 0.5 0.2 0.3"
# What else may hold captions, and is named.
TABLES = {".csv", ".tsv", ".jsonl", ".parquet"}
CAPTION_NAME = re.compile("caption|metadata|prompt|annotation", re.IGNORECASE)


def find_captions(root: Path, files: list[Path], pictures: list[Path], notes: Notes) -> tuple[
        list[tuple[Path, str | None]], list[tuple[Path, str]], list[Path]]:
    """Rows of (picture, caption or None), one for each caption that a picture has; what a metadata
    file leaves out, with that as the reason; and the files that captions were read from."""
    tables = find_tables(root, files, notes)
    rows = []
    for table in tables:
        lines = read_table(root / table)
        tell_keys(table, lines, notes)
        rows += [(table.parent / line["file"], line["text"]) for line in lines]
    named = {file for file, _ in rows}
    by_folder = {table.parent: table for table in tables}
    unnamed = []
    rest = []
    for file in pictures:
        table = find_above(file, by_folder)
        if table is None:
            rest.append(file)
        elif file not in named:
            unnamed.append((root / file, f"not named in {table.as_posix()}"))
    beside = find_beside(files, rest)
    texts, told = read_beside(root, set(beside.values()), notes)
    rows += [(file, texts.get(beside.get(file))) for file in rest]
    tell_unread(set(files).difference(pictures, texts, told), pictures, tables, notes)
    return rows, unnamed, [*tables, *texts]


def find_tables(root: Path, files: list[Path], notes: Notes) -> list[Path]:
    """The metadata files that count: below one that is read, no other is."""
    found = [file for file in files if file.name.lower() in METADATA]
    found.sort(key=lambda file: (len(file.parts), METADATA.index(file.name.lower()), file))
    tables = {}
    for file in found:
        above = find_above(file, tables)
        names = columns(root / file) if file.suffix.lower() == ".csv" else ["file"]
        if above:
            notes.append(f"{file.as_posix()} is not read: {above.as_posix()} goes before it")
        elif find_key(names, FILE_KEYS) is None:
            notes.append(f"{file.as_posix()} is not read: none of its columns is file_name "
                         f"({shown(', '.join(names))})")
        else:
            tables[file.parent] = file
    return sorted(tables.values())


def find_above(file: Path, tables: dict[Path, Path]) -> Path | None:
    """The metadata file of the folder that a file is in, or of one above."""
    return next((tables[folder] for folder in file.parents if folder in tables), None)


def read_metadata(root: Path) -> list[dict]:
    """The lines of metadata.jsonl (or else metadata.csv) in a folder, with "file" (below that
    folder), "text" (which may be None) and whatever else they hold. A line with a list of texts
    gives a line for each. OSError: there is none. ValueError names the file and the line."""
    for name in METADATA:
        if (root / name).exists():
            return read_table(root / name)
    return read_table(root / METADATA[0])  # which says that it is not there


def read_table(path: Path) -> list[dict]:
    """The lines of one metadata file, as `read_metadata` says."""
    rows = []
    spellings = None  # found when the first name needs them
    lines = read_csv(path) if path.suffix.lower() == ".csv" else read_jsonl(path)
    for where, line in lines:
        file = line.get(find_key(line, FILE_KEYS))
        text = line.get(find_key([key for key in line if line[key]], TEXT_KEYS))
        texts = text if isinstance(text, list) and text else [text]
        if not isinstance(file, str) or not all(isinstance(text, str | None) for text in texts):
            raise ValueError(f"{where}: {shown(json.dumps(line)[:80])}, not {EXAMPLE}")
        if not is_file_below(path.parent, file):
            spellings = spellings or find_spellings(path.parent)
            if spell(file) not in spellings:
                raise ValueError(f"{where}: {file!r} is no file in {path.parent}: "
                                 "mend the line or take it out")
            file = spellings[spell(file)]
        rows += [{**line, "file": file, "text": text or None} for text in texts]
    return rows


def read_jsonl(path: Path) -> list[tuple[str, dict]]:
    """(file:line, object) of every line that is not empty."""
    lines = []
    for i, text in enumerate(io.StringIO(decode(path.read_bytes()), newline=None), start=1):
        where = f"{path}:{i}"
        if not text.strip():
            continue
        if not is_text(text):
            raise ValueError(f"{where}: {text[:80]!r} is no UTF-8. Save the file as UTF-8, with "
                             f"lines like {EXAMPLE}")
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {text[:80]!r}, not {EXAMPLE}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{where}: {text[:80]!r}, not {EXAMPLE}")
        lines.append((where, line))
    return lines


def read_csv(path: Path) -> list[tuple[str, dict]]:
    """(file:line, {column: value}) of every line below the first, which names the columns."""
    lines = []
    reader = open_csv(path)
    try:
        for line in reader:
            where = f"{path}:{reader.line_num}"
            if None in line:
                raise ValueError(f"{where}: more values than columns. Put a text that has a "
                                 f"{reader.reader.dialect.delimiter} in it between double quotes")
            if not all(is_text(value or "") for value in line.values()):
                raise ValueError(f"{where}: this is no UTF-8. Save the file as UTF-8")
            lines.append((where, line))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.reader.line_num}: {error}") from error
    return lines


def open_csv(path: Path) -> csv.DictReader:
    """A table whose columns end at , or ; or | or tabs: what its first line has most of."""
    text = decode(path.read_bytes())
    if text.startswith("sep="):  # Excel's own way to name the delimiter
        text = text.partition("\n")[2]
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                          skipinitialspace=True)


def columns(path: Path) -> list[str]:
    try:
        return list(open_csv(path).fieldnames or [])
    except csv.Error:
        return []


def find_beside(files: list[Path], pictures: list[Path]) -> dict[Path, Path]:
    """Picture -> the caption file beside it: for a.png that is a.txt, or a.png.txt."""
    captions = {}
    for suffix in reversed(BESIDE):  # the first goes before the others
        for file in files:
            if file.suffix.lower() == suffix:
                captions[spell(str(file.with_suffix("")))] = file
    beside = {}
    for picture in pictures if captions else []:
        for name in (picture, picture.with_suffix("")):
            if spell(str(name)) in captions:
                beside[picture] = captions[spell(str(name))]
    return beside


def read_beside(root: Path, files: set[Path], notes: Notes) -> tuple[dict[Path, str], list[Path]]:
    """The texts of caption files, and those of which `notes` say that there is none in them."""
    texts = {}
    remarks = defaultdict(list)
    for file in sorted(files):
        text, remark = read_caption(root / file)
        if text:
            texts[file] = text
        if remark:
            remarks[remark].append(file)
    notes += [f"{some(remarks[remark])}: {remark}" for remark in remarks]
    return texts, [file for told in remarks.values() for file in told]


def read_caption(path: Path) -> tuple[str | None, str | None]:
    """The words in a file, and what is to be said about them."""
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        return None, f"no caption, as it cannot be read ({error.strerror})"
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not is_text(text):
        return None, "no caption, as it is no UTF-8: save it as UTF-8"
    if not lines:
        return None, "no caption, as it is empty"
    if BOXES.fullmatch(text):
        return None, "no caption, as it holds numbers only"
    if len(lines) > 1:
        return " ".join(lines), "its lines are read as one caption"
    return lines[0], None


def tell_keys(table: Path, lines: list[dict], notes: Notes) -> None:
    """Say what of a metadata file is not read as a caption."""
    keys = dict.fromkeys(key for line in lines for key in line if key not in ("file", "text"))
    if lines and all(line["text"] is None for line in lines):
        notes.append(f"no captions: no line of {table.as_posix()} has a {' or '.join(TEXT_KEYS)}, "
                     f"only {shown(', '.join(['file', *keys]))}")
    for key in keys:
        if key.lower() in TEXT_KEYS and any(
                line.get(key) and line["text"] not in line[key] for line in lines):
            notes.append(f"{table.as_posix()}: {key!r} is not read where another key has the text")


def tell_unread(files: set[Path], pictures: list[Path], tables: list[Path], notes: Notes) -> None:
    """Name what looks like captions and was not read as such."""
    stems = {file.with_suffix("") for file in pictures}
    looks = []
    for file in sorted(files):
        suffix = file.suffix.lower()
        is_beside = suffix in (*BESIDE, ".json") and file.with_suffix("") in stems
        if file.name.lower() in METADATA:
            continue  # find_tables has named it
        if is_beside or suffix in TABLES or CAPTION_NAME.search(file.stem):
            looks.append(file)
    if looks and tables:
        notes.append(f"not read, as {some(tables)} goes before: {some(looks)}")
    elif looks:
        notes.append(f"not read: {some(looks)}. Captions come from metadata.jsonl, metadata.csv, "
                     "or a .txt beside each picture")


def find_key(keys: Iterable[str], wanted: tuple[str, ...]) -> str | None:
    """The first wanted key that is there, in whatever case it is written."""
    written = {key.strip().lower(): key for key in keys}
    return next((written[key] for key in wanted if key in written), None)


def is_file_below(folder: Path, name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and os.path.isfile(folder / path)


def find_spellings(folder: Path) -> dict[str, str]:
    """{spell(file): file} of all files below a folder."""
    files = (Path(top, name).relative_to(folder).as_posix()
             for top, _, names in os.walk(folder) for name in names)
    return {spell(file): file for file in files}


def spell(name: str) -> str:
    """One spelling for names that mean the same file: systems write é as one character or as two,
    and paths with / or with a backslash, and some do not tell A from a."""
    return unicodedata.normalize("NFC", Path(name.replace("\\", "/")).as_posix()).casefold()


def decode(raw: bytes) -> str:
    """UTF-8 or UTF-16, with or without a mark in front. What is neither fails `is_text`."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", "surrogateescape")
    if raw[1:2] == b"\0":
        return raw.decode("utf-16-le", "surrogateescape")
    if raw[:1] == b"\0":
        return raw.decode("utf-16-be", "surrogateescape")
    return raw.decode("utf-8-sig", "surrogateescape")


def is_text(text: str) -> bool:
    """Were all its bytes decoded?"""
    return re.search("[\udc80-\udcff]", text) is None


# --- one picture

BITS_PER_SAMPLE, PHOTOMETRIC, EXTRA_SAMPLES, INTEROP = 258, 262, 338, 0xA005  # tags
WHITE_IS_ZERO = 0  # a value of PHOTOMETRIC
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # colour space of a profile -> mode
BROKEN_PROFILE = ("its colour profile is broken, or made for another kind of picture, so it is "
                  "taken for sRGB")
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}


def open_rgb(path: str | Path, keep_alpha: bool = False) -> Image.Image:
    """The picture (of an animation, the first frame), upright, with the colours that its profile
    means, in RGB on white, or in RGBA with its transparency.

    ValueError names an unreadable file. What can be read, but may not be what was meant, is
    remarked in `picture.info["notes"]`, a list of sentences without the file's name."""
    has_heif()
    remarks = []
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("not a file that can be read from its start")
        with warnings.catch_warnings(record=True), Image.open(path) as file:
            deep = ";16" in str(file.tile)  # gone once it is decoded
            picture = cut_strip(turn_upright(file, remarks), remarks)
            picture = to_8_bits(picture, file, deep, remarks)
            picture, alpha = split_alpha(picture, file, remarks)
            picture = to_srgb(picture, file, remarks)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, MemoryError ...
        raise ValueError(f"{path}: {explain(path, error)}") from error
    if alpha is not None:
        picture.putalpha(alpha)
        if not keep_alpha:  # white is the page that cut-outs are made for
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    mode = "RGBA" if keep_alpha else "RGB"
    if picture.mode != mode:  # or it would be copied
        picture = picture.convert(mode)
    picture.info = {"notes": remarks}  # not the profile: the colours are sRGB now
    return picture


def turn_upright(file: Image.Image, remarks: Notes) -> Image.Image:
    """The decoded picture, turned as its EXIF says that the camera was held."""
    file.load()
    try:
        picture = ImageOps.exif_transpose(file)
        interop = file.getexif().get_ifd(INTEROP)
    except Exception:  # of many kinds, all from EXIF, as the pixels are there
        remarks.append("its EXIF is broken, so it may lie on its side")
        return file.copy()
    if interop.get(1) == "R03" and "icc_profile" not in file.info:
        remarks.append("Adobe RGB, as its camera says, but without a profile it is taken for sRGB")
    return picture


def cut_strip(picture: Image.Image, remarks: Notes) -> Image.Image:
    """The middle of a very long picture: resized whole, it could fill the memory."""
    longest = 16 * min(picture.size)
    if max(picture.size) <= longest:
        return picture
    remarks.append("longer than 16 times its width, so only the middle is used")
    return TF.center_crop(picture, [min(n, longest) for n in reversed(picture.size)])


def to_8_bits(picture: Image.Image, file: Image.Image, deep: bool, remarks: Notes) -> Image.Image:
    """16-bit grey by 65535 / 257 = 255, where convert() clips most to white; others as they are.
    ValueError: numbers of which nobody knows what is white."""
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if picture.mode == "I" and file.format not in ("PNG", "PPM"):  # theirs are of 16 bits
        raise ValueError("32-bit and signed pixels have no agreed range")
    if picture.mode[0] != "I":
        if deep:  # Pillow has kept the upper 8 of 16 bits
            brightest = max(high for _, high in picture.convert("RGB").getextrema())
            remark_bits(8 + brightest.bit_length(), remarks)
        return picture
    tags = getattr(file, "tag_v2", {})
    white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    grey = picture.convert("I")
    if white == 65535:
        remark_bits(grey.getextrema()[1].bit_length(), remarks)
    scale = 255 / white
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = grey.point(lambda v: v * -scale + 255.5)
    else:
        grey = grey.point(lambda v: v * scale + 0.5)
    grey = grey.convert("L")
    grey.info.pop("transparency", None)  # a value of 16 bits
    return grey


def remark_bits(bits: int, remarks: Notes) -> None:
    """Cameras store 10 or 12 bits unchanged in 16: their white, 4095, comes out as black."""
    if 0 < bits <= 14:
        remarks.append(f"dark, as only {bits} of 16 bits are used: if that is not meant, multiply "
                       f"the values by {2 ** (16 - bits)}")


def split_alpha(picture: Image.Image, file: Image.Image, remarks: Notes
                ) -> tuple[Image.Image, Image.Image | None]:
    """Colours, and how opaque they are (L), if the picture says so."""
    if "transparency" in picture.info:  # a colour, or a table beside the palette
        picture = picture.convert("RGBA")
    if picture.mode[-1] not in "Aa":
        return picture, None
    picture = picture.convert("LA" if picture.mode in ("LA", "La") else "RGBA")
    alpha = picture.getchannel("A")
    colours = picture.convert(picture.mode[:-1])
    if not names_alpha(file):
        remarks.append("its last band is not declared as transparency (it may be near infrared), "
                       "so it is left out")
        return colours, None
    if alpha.getextrema()[1] == 0:
        remarks.append("wholly transparent, so on white nothing is seen of it")
    return colours, alpha


def names_alpha(file: Image.Image) -> bool:
    """TIFF and JPEG 2000 may have a fourth band of anything: they say which one is transparency."""
    if file.format == "TIFF":
        return any(file.tag_v2.get(EXTRA_SAMPLES, ()))
    if file.format == "JPEG2000":
        with open(file.filename, "rb") as raw:
            head = raw.read(4096)
        return b"cdef" in head or b"jP  " not in head  # a bare code stream cannot say it
    return True


def to_srgb(picture: Image.Image, file: Image.Image, remarks: Notes) -> Image.Image:
    """To RGB, by the colour profile of the file if there is one."""
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode not in PROFILE_MODES.values():  # palettes and the like
        picture = picture.convert("RGB")
    profile = file.info.get("icc_profile")
    if not profile:
        remark_space(file, remarks)
        return picture.convert("RGB")
    try:
        mode, transform = find_transform(profile)
    except (ImageCms.PyCMSError, OSError, ImportError, KeyError, ValueError):
        remarks.append(BROKEN_PROFILE)
        return picture.convert("RGB")
    if picture.mode == "L" and mode == "RGB":  # allowed, and frequent
        picture = picture.convert("RGB")
    if picture.mode != mode:
        remarks.append(BROKEN_PROFILE)
        return picture.convert("RGB")
    return transform.apply(picture) if transform else picture.convert("RGB")


def remark_space(file: Image.Image, remarks: Notes) -> None:
    """What says that the colours of a file without a profile are not sRGB's."""
    gamma = file.info.get("gamma", 1 / 2.2)
    if "icc_profile" in file.info:  # Pillow found one, but could not read it
        remarks.append(BROKEN_PROFILE)
    elif abs(gamma * 2.2 - 1) > 0.1 and "srgb" not in file.info:
        remarks.append(f"made for a gamma of {1 / max(gamma, 1e-5):.3g}, but taken for sRGB")


@lru_cache(maxsize=64)
def find_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of pictures that a profile is for, and what turns them into sRGB. None: they are
    sRGB already. Profiles of many names and sizes say so: what they do to all colours decides."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = PROFILE_MODES[source.profile.xcolor_space.strip()]
    srgb = ImageCms.createProfile("sRGB")
    if mode != "CMYK":
        levels = bytes(range(0, 256, 17 if mode == "RGB" else 1))
        colours = bytes(v for colour in product(levels, repeat=len(mode)) for v in colour)
        probe = Image.frombytes(mode, (len(colours) // len(mode), 1), colours)
        exact = ImageCms.buildTransform(source, srgb, mode, "RGB",
                                        ImageCms.Intent.RELATIVE_COLORIMETRIC)
        difference = ImageChops.difference(exact.apply(probe), probe.convert("RGB"))
        if max(high for _, high in difference.getextrema()) <= 2:  # rounding in the profile
            return mode, None
    # lcms would replace the curve of grey by 33 points, which is 10 levels off in the shadows
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    return mode, ImageCms.buildTransform(source, srgb, mode, "RGB", flags=flags)


def explain(path: str | Path, error: Exception) -> str:
    """Why a picture cannot be read, in a few words."""
    if "truncated" in str(error).lower():
        return "truncated"
    if isinstance(error, UnidentifiedImageError):
        return identify(Path(path))
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def identify(path: Path) -> str:
    """What a file is that Pillow does not know, and what helps."""
    with open(path, "rb") as file:
        head = file.read(32)
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in HEIC_BRANDS or path.suffix.lower() in HEIC:
        if not has_heif():
            return "HEIC: to have it read, pip install pillow-heif, or save it as jpg"
    elif brand == b"avif":
        return "AVIF, which a newer Pillow reads: pip install -U pillow, or save it as png"
    elif head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL, which Pillow does not read: save it as png"
    elif head.startswith((b"II*\0", b"MM\0*")):
        return "a broken TIFF, or one whose bands or bits Pillow does not read: save it as png"
    elif head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: fetch the picture with git lfs pull"
    return "empty, or not a picture Pillow knows"


def to_square(picture: Image.Image, size: int) -> Tensor:
    """RGB picture -> (3 size size) in [-1, 1]: the shorter side is resized to `size` (bicubic,
    antialiased), then the centre is cut out."""
    picture = TF.center_crop(TF.resize(picture, size, TF.InterpolationMode.BICUBIC), size)
    return TF.pil_to_tensor(picture).float() / 127.5 - 1                              # 3 size size


def file_identity(path: str | Path) -> str:
    """Size in bytes and a hash of the first 64 KiB, such as "5120 9f86d081884c7d65".

    Two pictures of one name and two identities are different pictures. What lies behind the first
    64 KiB is not read: 200,000 pictures take seconds and not minutes. OSError: unreadable."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        beginning = file.read(1 << 16)
    return f"{size} {hashlib.sha256(beginning).hexdigest()[:16]}"


# --- words

def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def shown(text: str) -> str:
    """Without characters that a terminal cannot show."""
    return repr(text)[1:-1]


def some(paths: Iterable[Path], end: str = "") -> str:
    return shorten([f"{shown(path.as_posix())}{end}" for path in paths])


def shorten(names: list[str]) -> str:
    """The first three, and how many more there are."""
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"
