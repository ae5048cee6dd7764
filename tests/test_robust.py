"""What is tried on tinyanl, and what happens.

    what                                          tried   what happens
    kill -9 of a run, at any moment, in a save        5   it leaves the same bytes again (kills.py)
    Ctrl-C, SIGTERM, a connection that closes         3   saves, says how to go on, exit 130
    the same in sample, augment, evaluate            10   what is finished is kept (test_sample ...)
    readers that leave, folders without locks         6   not a word; it is said (test_commands)
    a run's pictures: moved, renamed, replaced        3   refused, names --trained-on (test_models)
    one cache for two sets, one process's mistake     3   no mix-up; all of them stop (test_encode)
    a full disk, a file too large                     2   one line; what was saved is whole
    a loss, gradient, latent that is no number        3   stops in time; names the pictures
    --resume: other arguments, pictures, weights     11   what may change is said, the rest refused
    awkward files in one folder                     101   63 good ones are used, 38 bad ones named
    what may not be read; odd names                   3   named; nothing crashes for a name
    lines of metadata.jsonl                           8   file, line number, reason
    checkpoints                                      24   file, reason, remedy (test_weights: 70)
    bombs: archives, memo, strings, storages          5   memory grows by less than 3 times the file
    adapters                                         13   one line, and nothing in them runs
    arguments of every command                       48   one line, exit 2, before models are loaded
    folders in use, taken, closed                    10   one line, nothing overwritten
"""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from commands import flags, one_line
from kills import left, same
from PIL import Image

from tinyanl import dataset, flowers, models, sample, train, weights
from tinyanl import loss as loss_module
from tinyanl.data import scan
from tinyanl.encode import encode
from tinyanl.models import EMBEDDED, load_base, load_run
from tinyanl.pretrain import __main__ as pretrain

HERE = Path(__file__).parent
TINY = dict(batch=4, sample_every=10, save_every=2, seed=3, device="cpu")


@pytest.fixture(autouse=True)
def quick(base, monkeypatch):
    """The models are loaded once: that is not what is tried here."""
    monkeypatch.setattr(train, "load_base", lambda *args: base)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        flowers.draw(i)[0].save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def finished(base, pictures, tmp_path_factory):
    """A run of ten steps that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_base", lambda *args: base)
        return train.train(
            pictures, steps=10, out=tmp_path_factory.mktemp("runs") / "finished", **TINY
        )


@pytest.fixture
def ten(finished, tmp_path):
    """A copy of it, to spoil."""
    return shutil.copytree(finished, tmp_path / "whole")


# --- runs that end early


def test_killed_runs_go_on_as_if_nothing_had_happened(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "kills.py", "5", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] >= 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_between_two_steps_and_saves(
    pictures, ten, tmp_path, number, capsys, monkeypatch
):
    batches = dataset.training_batch

    def interrupted(*args):
        if args[-1] == 7:  # which is drawn while step 6 is computed
            signal.raise_signal(number)
        return batches(*args)

    monkeypatch.setattr(dataset, "training_batch", interrupted)
    argv = ["--data", pictures, "--steps", "10", "--out", tmp_path / "run"]
    argv += flags(**TINY)
    said = one_line(train.main, argv, capsys, code=130)
    assert "saved at step 7" in said and "--resume" in said
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    monkeypatch.setattr(dataset, "training_batch", batches)
    train.main([str(word) for word in [*argv, "--resume"]])
    whole, again = left(ten), left(tmp_path / "run")
    assert same(again[0], whole[0])


def full_disk(folder, monkeypatch):
    """A disk of 130 MB with 70 MB free: state.pt and adapter.pt are 41 MB at first, but then a
    state has 55 MB."""
    mounted = ["mount", "-t", "tmpfs", "-o", "size=130m", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    filler = folder / "filler"
    filler.write_bytes(bytes(60 << 20))
    return lambda: filler.unlink()


def file_too_large(folder, monkeypatch):
    """Files may have 31 MB: state.pt has more, once Adam has its averages."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30 << 20, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "trouble, words",
    [
        (full_disk, r"No space left .*free.*Make room"),
        (file_too_large, r"File too large.*free.*Mend that"),
    ],
)
def test_a_full_disk_is_said_and_nothing_is_lost(
    pictures, ten, tmp_path, monkeypatch, trouble, words
):
    out = tmp_path / "small"
    out.mkdir()
    make_room = trouble(out, monkeypatch)
    try:
        with pytest.raises(OSError, match=rf"(state|adapter)\.pt cannot be written .*{words}"):
            train.train(pictures, steps=10, out=out, **TINY)
        # without Adam's averages it had fitted
        assert torch.load(out / "state.pt", weights_only=True)["step"] == 0
        assert not list(out.rglob(".part-*"))
        make_room()
        train.train(pictures, steps=10, out=out, resume=True, **TINY)
        assert same(left(out)[0], left(ten)[0])
    finally:
        if trouble is file_too_large:
            make_room()
        else:
            subprocess.run(["umount", "-l", out], check=True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_first_number_that_is_none_stops_the_run_before_the_weights_change(
    pictures, tmp_path, what, monkeypatch
):
    batches, loss_of, steps = dataset.training_batch, loss_module.denoising_loss, []
    monkeypatch.setattr(train, "cosine", lambda highest, step, steps: highest)  # for five or ten
    five = train.train(pictures, steps=5, out=tmp_path / "five", **TINY)

    def watched(*args):
        steps.append(args[-1])
        return batches(*args)

    def poisoned(run, *batch):
        loss, p = loss_of(run, *batch), next(run.model.parameters())
        if steps[-1] != 5 or not p.requires_grad:
            return loss
        if what == "loss":
            return loss * math.nan
        return loss + (p - p.detach()).sum().sqrt()  # its slope at 0 is infinite

    monkeypatch.setattr(dataset, "training_batch", watched)
    monkeypatch.setattr(loss_module, "denoising_loss", poisoned)
    numbers = "nan, gradient norm nan" if what == "loss" else r"0\.\d+, gradient norm (nan|inf)"
    with pytest.raises(
        ValueError, match=f"step 5: loss {numbers}, learning rate 0.003\\..*--lr.*\\.png"
    ):
        train.train(pictures, steps=10, out=tmp_path / "run", **TINY)
    before, kept = (
        torch.load(folder / "state.pt", weights_only=True) for folder in (five, tmp_path / "run")
    )
    assert all(same(kept[part], before[part]) for part in ("step", "live", "ema", "optimizer"))


def test_a_picture_that_becomes_no_number_is_named(base, pictures, monkeypatch):
    monkeypatch.setattr(
        base.autoencoder, "encode", lambda x: torch.full((len(x), *base.latent_shape), math.nan)
    )
    with pytest.raises(ValueError, match="0.png becomes numbers that are not finite"):
        encode(base, [pictures / "0.png"])


# --- resuming with something changed


@pytest.mark.parametrize("change", [dict(batch=5), dict(lr=1e-3), dict(train_mask=0.2)])
def test_a_resumed_run_may_change_this_and_says_so(pictures, ten, change, capsys):
    train.train(pictures, steps=12, out=ten, resume=True, **TINY | change)
    ((name, value),) = change.items()
    said = capsys.readouterr().out
    assert (
        f"changed    {name} was" in said
        and f"is {value}" in said
        and "resumed    at step 10" in said
    )
    assert json.loads((ten / "config.json").read_text())[name] == value
    assert torch.load(ten / "state.pt", weights_only=True)["step"] == 12


@pytest.mark.parametrize(
    "change", [dict(tokens=2), dict(ratio=2), dict(seed=4), dict(weights="elsewhere")]
)
def test_a_resumed_run_may_not_change_this(pictures, ten, change):
    ((name, value),) = change.items()
    before = left(ten)
    with pytest.raises(ValueError, match=f"{name} was .*, is {value}.*--out"):
        train.train(pictures, steps=12, out=ten, resume=True, **TINY | change)
    assert same(left(ten), before)


def test_a_resumed_run_needs_the_same_pictures_and_the_same_base(
    pictures, tmp_path, base, monkeypatch
):
    mine = shutil.copytree(pictures, tmp_path / "mine")
    out = train.train(mine, steps=2, out=tmp_path / "run", **TINY)
    (mine / "0.png").rename(mine / "zero.png")
    with pytest.raises(ValueError, match="other pictures than there are now"):
        train.train(mine, steps=4, out=out, resume=True, **TINY)
    (mine / "zero.png").rename(mine / "0.png")
    monkeypatch.setattr(models.Base, "fingerprints", lambda self: {"unet": "another"})
    with pytest.raises(ValueError, match="other weights than there are now"):
        train.train(mine, steps=4, out=out, resume=True, **TINY)


def test_a_finished_run_says_that_nothing_is_left_and_mends_its_adapter(pictures, ten, capsys):
    (ten / "adapter.pt").unlink()  # as if killed between the last state and the last adapter
    train.train(pictures, steps=10, out=ten, resume=True, **TINY)
    assert "nothing is left to do" in capsys.readouterr().out
    assert torch.load(ten / "adapter.pt", weights_only=True)["step"] == 10


@pytest.mark.parametrize("name, content", [("state.pt", b"PK\x03\x04 cut"), ("state.pt", b"")])
def test_a_damaged_run_is_not_resumed(pictures, ten, name, content):
    (ten / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        train.train(pictures, steps=12, out=ten, resume=True, **TINY)


# --- folders


class Awkward:
    """A folder of awkward files: the names of the good ones, and of the bad ones with a word of the
    reason."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.good: set[str] = set()
        self.bad: dict[str, str] = {}
        self.formats()
        self.modes()
        self.sizes_and_turns()
        self.names_and_contents()
        self.links()

    def put(self, name, image=None, reason="", content=None, **options):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            image.save(path, **options)
        else:
            path.write_bytes(content)
        if reason:
            self.bad[name] = reason
        else:
            self.good.add(name)

    def formats(self):
        nothing = "empty, or not a picture"
        for kind in ("jpg", "png", "webp", "bmp", "gif", "tif", "ppm", "jp2"):
            self.put(f"plain.{kind}", noise())
            content = (self.folder / f"plain.{kind}").read_bytes()
            self.put(f"UPPER.{kind.upper()}", content=content)
            self.put(f"empty.{kind}", reason=nothing, content=b"")
            text = b"I am a text file under another name."
            self.put(f"text.{kind}", reason=nothing, content=text)
            if kind not in ("jp2", "webp"):
                half = content[: len(content) // 2]
                self.put(f"cut.{kind}", reason="truncated", content=half)

    def modes(self):
        kinds = {"CMYK": "jpg tif", "L": "jpg png", "1": "png bmp", "LA": "png", "P": "png gif",
                 "RGBA": "png webp", "YCbCr": "jpg", "LAB": "tif"}
        for mode, extensions in kinds.items():
            for kind in extensions.split():
                self.put(f"mode {mode}.{kind}", noise().convert(mode))
        for kind in ("png", "tif"):
            self.put(f"mode I16.{kind}", Image.new("I;16", (70, 66), 40_000))
        self.put("mode F.tif", noise("F"), "floating-point")
        self.put("palette with transparency.png", noise("P"), transparency=3)
        self.put("animated.gif", noise("P"), save_all=True, append_images=[noise("P")] * 4)
        self.put("animated.webp", noise(), save_all=True, append_images=[noise()] * 2)

    def sizes_and_turns(self):
        exif = Image.Exif()
        for turn in range(1, 9):
            exif[0x0112] = turn
            self.put(f"exif {turn}.jpg", noise(), exif=exif)
        self.put("broken exif.jpg", noise(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
        sizes = {"1x1.png": (1, 1), "20000x10.png": (20_000, 10), "10x20000.jpg": (10, 20_000),
                 "1x3000.png": (1, 3000), "2x2.jpg": (2, 2), "large.jpg": (3000, 2000)}
        for name, size in sizes.items():
            self.put(name, noise(size=size))
        noise(size=(8, 8)).save(self.folder / "bomb.png")
        content = bytearray((self.folder / "bomb.png").read_bytes())
        content[16:24] = (60_000).to_bytes(4, "big") * 2  # the header says 60,000 x 60,000
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        self.put("bomb.png", reason="pixels", content=bytes(content))

    def names_and_contents(self):
        names = ["with spaces.png", "émoji 🌹.png", "new\nline.png", "quote's \"two\".png",
                 "-rf.png", "%d {x} $HOME.png",
                 "nested/" * 10 + "deep.png", "twice.png", "twice again.png",
                 "a" * 240 + ".png", "CON.png", "two.dots.png", "photo.jpeg", "photo.jfif"]
        for name in names:
            self.put(name, Image.new("RGB", (64, 64), "red"))
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
        contents = {
            "page.jpg": b"<!DOCTYPE html><html>quota exceeded</html>",
            "archive.png": b"PK\x03\x04" + bytes(60),
            "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "zeros.jpg": bytes(5000),
            "pointer.png": pointer,
            "header alone.png": b"\x89PNG\r\n\x1a\n",
            "header alone.jpg": b"\xff\xd8\xff\xe0",
            "gif head.gif": b"GIF89a",
            "random.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(40),
            "pickle.png": pickle.dumps([1]),
        }
        for name, content in contents.items():
            self.put(name, reason=" ", content=content)

    def links(self):
        (self.folder / "link to nothing.png").symlink_to(self.folder / "gone.png")
        (self.folder / "link to itself.png").symlink_to(self.folder / "link to itself.png")
        os.mkfifo(self.folder / "a pipe.png")
        (self.folder / "loop").symlink_to(self.folder, target_is_directory=True)
        (self.folder / "a folder.png").mkdir()
        self.bad["link to nothing.png"] = "No such file"
        self.bad["link to itself.png"] = "symbolic links"
        self.bad["a pipe.png"] = "not a file"
        self.bad["loop"] = "again"


def noise(mode="RGB", size=(70, 66)):
    return Image.effect_noise(size, 80).convert(mode)


def test_of_a_hundred_awkward_files_the_good_are_used_and_the_bad_are_named(tmp_path, capsys):
    data = tmp_path / "data"
    made = Awkward(data)
    good, bad = made.good, made.bad
    assert (len(good), len(bad)) == (63, 38)  # as the table above says
    folder = scan(data, 64)
    assert {str(p.path.relative_to(data)) for p in folder.pictures} == good
    reasons = {str(path.relative_to(data)): reason for path, reason in folder.skipped}
    assert reasons.keys() == bad.keys()
    assert not {
        name: (reason, bad[name]) for name, reason in reasons.items() if bad[name] not in reason
    }
    train.main(flags(data=data, steps=1, batch=2, out=tmp_path / "run", device="cpu"))
    said = capsys.readouterr().out
    assert f"{len(good)} pictures" in said and f"{len(bad)} skipped" in said
    assert not [name for name in bad if repr(name)[1:-1] not in said]
    assert (tmp_path / "run" / "adapter.pt").exists()


def as_nobody(action):
    """Root may read and write everything: be somebody else for a while."""
    if os.geteuid():
        return action()
    os.seteuid(65534)
    try:
        return action()
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    # pytest's own are closed to others
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_named(open_folder):
    for name in ("good.png", "closed.png", "closed/inside.png"):
        (open_folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(open_folder / name)
    (open_folder / "closed.png").chmod(0)
    (open_folder / "closed").chmod(0)
    folder = as_nobody(lambda: scan(open_folder, 64))
    (open_folder / "closed").chmod(0o755)
    assert [p.path.name for p in folder.pictures] == ["good.png"]
    assert {(path.name, reason) for path, reason in folder.skipped} == {
        ("closed.png", "Permission denied"),
        ("closed", "Permission denied"),
    }


def test_a_file_name_that_no_terminal_can_show_does_no_harm(tmp_path, capsys):
    for name in (b"good.png", b"good too.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name.decode())
    with open(os.path.join(os.fsencode(tmp_path), b"\xff\xfe.png"), "wb"):
        pass
    train.main(["--data", str(tmp_path), "--dry-run", "--device", "cpu"])
    assert r"\udcff\udcfe.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"file": "../outside.png"}', "'../outside.png' is no file in"),
        ('{"file": "sub/../../x.png"}', "is no file in"),
        ('{"file": "/etc/passwd"}', "'/etc/passwd' is no file in"),
        ('{"file": "gone.png"}', "'gone.png' is no file in"),
        ('{"file": ""}', "'' is no file in"),
        ('{"file": "a.png\\u0000"}', "is no file in"),
        ('{"file": "a.png", "text": "x"', 'not {"file": "a.jpg"'),
        ("x" * 10_000, 'not {"file": "a.jpg"'),
    ],
)
def test_a_line_of_metadata_that_points_nowhere_is_named(tmp_path, line, said, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in (data / "a.png", tmp_path / "outside.png"):
        Image.new("RGB", (64, 64)).save(path)
    (data / "metadata.jsonl").write_text('{"file": "a.png"}\n' + line + "\n")
    error = one_line(train.main, ["--data", data, "--out", tmp_path / "run"], capsys)
    assert "metadata.jsonl:2: " in error and said in error and len(error) < 500


# --- checkpoints


def change(name, make):
    def mutate(state):
        state[name] = make(state[name])

    return mutate


def drop(name):
    return lambda state: state.pop(name)


UNET = "model.diffusion_model."
STAGE = "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"
CHECKPOINTS = {  # file, what is done to its state dict
    "a missing U-Net tensor": ("ldm.ckpt", drop(UNET + "out.2.bias")),
    "a missing convolution": ("ldm.ckpt", drop(UNET + "input_blocks.1.0.in_layers.2.weight")),
    "a missing first stage tensor": ("ldm.ckpt", drop(STAGE + "decoder.conv_out.bias")),
    "no convolution before the latent": ("ldm.ckpt", drop(STAGE + "quant_conv.weight")),
    "no classes": ("ldm.ckpt", drop(CLASSES)),
    "a missing CLIP tensor": ("clip.pt", drop("visual.proj")),
    "a missing CLIP norm": ("clip.pt", drop("transformer.resblocks.0.ln_1.bias")),
    "a surplus U-Net tensor": (
        "ldm.ckpt",
        lambda s: s.update({UNET + "extra.weight": torch.zeros(3)}),
    ),
    "a surplus first stage tensor": (
        "ldm.ckpt",
        lambda s: s.update({STAGE + "decoder.extra": torch.zeros(3)}),
    ),
    "a surplus CLIP tensor": ("clip.pt", lambda s: s.update({"visual.extra": torch.zeros(3)})),
    "averaged tensors of nothing": (
        "ldm.ckpt",
        lambda s: s.update({"model_ema.diffusion_modelx": torch.zeros(3)}),
    ),
    "a misshapen U-Net tensor": ("ldm.ckpt", change(UNET + "out.2.weight", lambda v: v[:, :-1])),
    "a flat convolution": (
        "ldm.ckpt",
        change(UNET + "input_blocks.0.0.weight", lambda v: v.flatten()),
    ),
    "a misshapen first stage tensor": (
        "ldm.ckpt",
        change(STAGE + "encoder.conv_in.weight", lambda v: v[:7]),
    ),
    "a misshapen CLIP tensor": ("clip.pt", change("text_projection", lambda v: v[:, :5])),
    "too few positions": ("clip.pt", change("visual.positional_embedding", lambda v: v[:-3])),
    "classes of another width": ("ldm.ckpt", change(CLASSES, lambda v: v[:, :5])),
    "integers for weights": ("ldm.ckpt", change(UNET + "out.2.weight", lambda v: (v * 99).char())),
    "integers in CLIP": ("clip.pt", change("token_embedding.weight", lambda v: (v * 99).long())),
    "a U-Net of size 0": ("ldm.ckpt", change(UNET + "input_blocks.0.0.weight", lambda v: v[:0])),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_with_other_tensors_is_one_line(case, tmp_path, capsys):
    name, mutate = CHECKPOINTS[case]
    for file in ("ldm.ckpt", "clip.pt", "merges.txt.gz"):
        shutil.copy(EMBEDDED / file, tmp_path)
    top = torch.load(tmp_path / name, weights_only=True)
    mutate(top.get("state_dict", top))
    torch.save(top, tmp_path / name)
    with pytest.raises(ValueError) as error:
        load_base(tmp_path, "cpu")
    said = str(error.value)
    assert said.count("\n") == 0 and len(said) < 700 and name in said, said
    assert any(remedy in said for remedy in ("weights.md", "get the ", "no file of")), said


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + bytes(99), bytes(5000), b"<html>404</html>"]
)
def test_a_file_that_is_no_checkpoint_is_one_line(content, tmp_path):
    shutil.copy(EMBEDDED / "clip.pt", tmp_path)
    (tmp_path / "ldm.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"ldm\.ckpt .*download it again") as error:
        load_base(tmp_path, "cpu")
    assert str(error.value).count("\n") == 0


BOMBS = """
import resource, sys, zipfile, torch
from pathlib import Path
from tinyanl.runs import load
from tinyanl.weights import inspect
kind, folder = sys.argv[1], Path(sys.argv[2])
path, tensor = folder / "bomb.pt", torch.zeros(4_000_000)

def archive(pickled, storage=bytes(16), how=zipfile.ZIP_STORED, copies=1):
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("archive/data.pkl", pickled)
        for i in range(copies):
            file.writestr(f"archive/data/{i}", storage)

if kind == "deflated":
    torch.save({"w": tensor}, folder / "whole.pt")
    with (zipfile.ZipFile(folder / "whole.pt") as whole,
          zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file):
        for name in whole.namelist():
            file.writestr(name, whole.read(name))
elif kind == "memo":
    # memo number 536,870,912: 4 GB in C
    archive(b"\\x80\\x02}r\\x00\\x00\\x00\\x20.")
elif kind == "long string":
    # says that a terabyte follows
    archive(b"\\x80\\x04\\x8e" + (1 << 40).to_bytes(8, "little") + b"x.")
elif kind == "shared":
    base = torch.zeros(1_000_000)
    torch.save({f"w{i}": base[: 999_000 + i] for i in range(900)}, path)
elif kind == "adapter":
    torch.save({"trained": {"w": tensor}}, folder / "whole.pt")
    with (zipfile.ZipFile(folder / "whole.pt") as whole,
          zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file):
        for name in whole.namelist():
            file.writestr(name, whole.read(name))
del tensor
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load(path, {"trained"}) if kind == "adapter" else inspect(path)
    print("not refused")
except ValueError as error:
    print(error)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print("grown", max(0, grown - 3 * path.stat().st_size))
"""


@pytest.mark.parametrize("kind", ["deflated", "memo", "long string", "shared", "adapter"])
def test_a_bomb_is_refused_without_the_memory_it_asks_for(kind, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, kind, tmp_path],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    said, grown = done.stdout.strip().splitlines()
    assert "bomb.pt" in said, done.stdout + done.stderr
    if kind in ("deflated", "adapter"):  # not for running out of something else
        assert "would unpack" in said
    assert int(grown.split()[1]) < 20 << 20  # Python's own


# --- adapters


class Bomb:
    def __reduce__(self):
        return os.system, ("touch marker",)


ADAPTERS = {
    "an empty file": b"",
    "a text": b"hello",
    "a cut file": 0.5,
    "another pickle": pickle.dumps({"trained": {}}),
    "code": lambda a: a.update(config=Bomb()),
    "a missing class": lambda a: a.update(mu=Path("x")),
    "no ANLs": lambda a: a.pop("trained"),
    "no centre": lambda a: a.pop("mu"),
    "a missing tensor": lambda a: a["trained"].popitem(),
    "a surplus tensor": lambda a: a["trained"].update(x=torch.zeros(1)),
    "another shape": lambda a: a["trained"].update(
        {k: v[..., :1] for k, v in [next(iter(a["trained"].items()))]}
    ),
    "a billion tokens": lambda a: a["config"].update(tokens=10**9),
    "a centre of another width": lambda a: a.update(mu=a["mu"][:5]),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_bad_adapter_is_one_line_and_runs_nothing(case, ten, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, what = ten / "adapter.pt", ADAPTERS[case]
    if callable(what):
        adapter = torch.load(path, weights_only=True)
        what(adapter)
        torch.save(adapter, path)
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if isinstance(what, float) else what)
    said = one_line(sample.main, ["--run", ten, "--n", "1", "--steps", "2"], capsys)
    assert "adapter.pt" in said and "train again" in said and not (tmp_path / "marker").exists()


# --- arguments

TRAIN = [
    ("--steps", "0"),
    ("--steps", "-5"),
    ("--steps", "many"),
    ("--batch", "0"),
    ("--lr", "0"),
    ("--lr", "-1"),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--tokens", "0"),
    ("--ratio", "0"),
    ("--train-mask", "-0.1"),
    ("--train-mask", "1"),
    ("--sample-every", "0"),
    ("--save-every", "-1"),
    ("--seed", "-1"),
    ("--seed", str(2**40)),
    ("--tune", "nothing"),
    ("--resume", "--overwrite"),
    ("--bogus",),
    ("--data", "nowhere"),
    ("--steps",),
]
SAMPLE = [
    ("--n", "0"),
    ("--mask-rate", "1.5"),
    ("--mask-rate", "nan"),
    ("--guidance", "inf"),
    ("--steps", "7"),
    ("--steps", "1000"),
    ("--text", ""),
    ("--text", "a rose", "  "),
    ("--text", "a", "b", "--n", "1"),
    ("--text", "a", "--like", "b"),
    ("--seed", "-1"),
    ("--bogus",),
    ("--run", "nowhere"),
]
OTHERS = [
    (flowers.main, []),
    (flowers.main, ["x", "--n", "0"]),
    (flowers.main, ["x", "--size", "8"]),
    (pretrain.main, []),
    (pretrain.main, ["clip"]),
    (pretrain.main, ["unet", "--data", "x", "--out", "y", "--looks", "1"]),
    (weights.main, ["frobnicate"]),
    (weights.main, ["check"]),
]


def test_the_table_above_counts_what_is_tried():
    assert len(TRAIN) + len(SAMPLE) + len(OTHERS) + 3 + 3 == 48  # devices, prompts
    assert len(CHECKPOINTS) + 4 == 24 and len(ADAPTERS) == 13


@pytest.mark.parametrize(
    "main, argv",
    [*((train.main, argv) for argv in TRAIN), *((sample.main, argv) for argv in SAMPLE), *OTHERS],
)
def test_a_mistake_in_the_arguments_is_one_line_before_anything_is_loaded(
    main, argv, pictures, finished, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_base", lambda *args: pytest.fail("models were loaded"))

    def loading(run, *args):
        if str(run) != "nowhere":
            pytest.fail("models were loaded")
        return load_run("nowhere")

    monkeypatch.setattr(sample, "load_run", loading)
    known = {train.main: ["--data", pictures], sample.main: ["--run", finished]}.get(main, [])
    said = one_line(main, [*known, *argv], capsys)
    assert len(said) < 400
    assert not (tmp_path / "runs").exists()


def test_a_device_that_is_not_there_is_one_line(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_base", load_base)
    for device in ("tpu", "meta", "cuda:99"):
        argv = flags(data=pictures, out=tmp_path / device[:3], device=device)
        said = one_line(train.main, argv, capsys)
        assert f"device '{device}'" in said


def test_a_prompt_too_long_and_a_folder_with_no_pictures(ten, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert "context" in one_line(sample.main, ["--run", ten, "--text", "a red rose " * 99], capsys)
    assert "no readable picture" in one_line(
        sample.main, ["--run", ten, "--like", tmp_path / "none"], capsys
    )
    assert "nowhere does not exist" in one_line(
        sample.main, ["--run", ten, "--like", tmp_path / "nowhere"], capsys
    )


# --- two runs, and no right to write


def test_a_folder_in_use_is_left_alone(pictures, ten, tmp_path):
    hold = (
        "import sys, time; from tinyanl.runs import claim; from pathlib import Path; "
        "lock = claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, ten], stdout=subprocess.PIPE, text=True, cwd=HERE.parent
    )
    try:
        assert other.stdout.readline() == "held\n"
        before = left(ten)
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OSError, match="in use by another process"):
                train.train(pictures, steps=12, out=ten, **how, **TINY)
        assert same(left(ten), before)
    finally:
        other.kill()
        other.wait()
    train.train(pictures, steps=12, out=ten, resume=True, **TINY)  # its death has let go


def test_nothing_is_overwritten_without_being_asked(pictures, ten, tmp_path, capsys):
    before = left(ten)
    with pytest.raises(FileExistsError, match="--resume continues.*--overwrite replaces"):
        train.train(pictures, steps=10, out=ten, **TINY)
    assert same(left(ten), before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "filmstrip.png").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match="already has a filmstrip.png"):
        train.train(pictures, steps=10, out=tmp_path / "mine", **TINY)
    sample.main(["--run", str(ten), "--n", "1", "--steps", "2", "--out", str(tmp_path / "drawn")])
    assert "already holds something" in one_line(
        sample.main, ["--run", ten, "--out", tmp_path / "drawn"], capsys
    )
    train.train(pictures, steps=4, out=ten, overwrite=True, **TINY)
    assert torch.load(ten / "state.pt", weights_only=True)["step"] == 4
    assert {p.name for p in (ten / "samples").iterdir()} == {"step_000000.png", "step_000004.png"}


def test_a_folder_that_may_not_be_written_to_is_said_at_once(
    pictures, open_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "load_base", lambda *args: pytest.fail("models were loaded"))
    (open_folder / "closed").mkdir(mode=0o555)
    shutil.copytree(pictures, open_folder / "pictures")
    with pytest.raises(PermissionError, match="closed"):
        as_nobody(
            lambda: train.train(
                open_folder / "pictures", out=open_folder / "closed" / "run", **TINY
            )
        )
    with pytest.raises(PermissionError, match="closed"):
        as_nobody(lambda: train.train(open_folder / "pictures", out=open_folder / "closed", **TINY))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        train.train(pictures, out=tmp_path / "file", **TINY)
