"""Pretraining on drawn shapes: pictures and captions, a few deterministic steps, resuming, and
weights that load. The networks are narrow; their layers are those of the embedded weights."""
import gzip
import io
import itertools
import json
import random
import shutil
import tarfile
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import one_line
from PIL import Image, ImageDraw
from torch.testing import assert_close

from tinyanl import flowers
from tinyanl.models import generator, load_base
from tinyanl.pretrain import autoencoder, clip, emoji, training, unet
from tinyanl.pretrain.__main__ import main
from tinyanl.pretrain.art import COLOURS, caption, composite, description, read_art
from tinyanl.pretrain.linear import Details, PatchCode, fit_convolution
from tinyanl.pretrain.merges import learn_merges, write_merges
from tinyanl.tokenizer import Tokenizer
from tinyanl.train import train
from tinyanl.weights import load_checkpoint

SUBGROUPS = ["animal-bird", "face-smiling", "plant-flower", "transport-ground", "food-fruit"]
STEPS = 6

pytestmark = pytest.mark.filterwarnings("ignore:16 samples of 128 features")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Forty cut-outs of five subgroups, with labels and tags; and opaque pictures with texts."""
    art = tmp_path_factory.mktemp("art")
    lines = []
    kinds = itertools.product(SUBGROUPS, ("ellipse", "rectangle"), range(4))
    for i, (subgroup, shape, colour) in enumerate(kinds):
        picture = Image.new("RGBA", (50, 50))
        draw = getattr(ImageDraw.Draw(picture), shape)
        draw((5, 5 + colour, 44, 44), fill=list(COLOURS.values())[colour + 3])
        picture.save(art / f"{i}.png")
        line = {"file": f"{i}.png", "label": f"{shape} {subgroup}", "tags": [shape, "shape"]}
        lines.append({**line, "style": "noto", "subgroup": subgroup})
    (art / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))

    photos = tmp_path_factory.mktemp("photos")
    lines = []
    for i, (colour, rgb) in enumerate(COLOURS.items()):
        lines.append({"file": f"{i}.png", "text": f"a {colour} square"})
        Image.new("RGB", (80, 80), rgb).save(photos / f"{i}.png")
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [art, photos]


@pytest.fixture(autouse=True, scope="module")
def narrow():
    """Narrow networks, and samples of two steps."""
    denoise = unet.denoise

    def quick_denoise(*args, **options):
        return denoise(*args, **{**options, "steps": 2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "SIZES", {**clip.SIZES, "vision_width": 64, "text_width": 64})
        patch.setattr(autoencoder, "CHANNELS", 8)
        patch.setattr(autoencoder, "LATENT_CHANNELS", 5)
        patch.setattr(unet, "CHANNELS", 32)
        patch.setattr(unet, "denoise", quick_denoise)
        yield


def train_clip(data, out, steps=STEPS, seed=0, fast=False):
    return clip.train_clip(data, out, steps, batch=12, lr=1e-3, seed=seed, fast=fast)


def train_autoencoder(data, out, steps=STEPS, seed=0, init=None, fast=False):
    how = {"batch": 2, "lr": 1e-3, "seed": seed, "init": init, "fast": fast}
    return autoencoder.train_autoencoder(data, out, steps, **how)


def train_unet(data, out, steps=STEPS, seed=0, init=None, fast=False):
    how = {"batch": 4, "lr": 1e-3, "seed": seed, "looks": 16, "init": init, "fast": fast}
    return unet.train_unet(data[:1], out, steps, **how)


def pretrain(data, out):
    train_clip(data, out)
    train_autoencoder(data, out)
    train_unet(data, out)
    return out


@pytest.fixture(scope="module")
def weights(shapes, tmp_path_factory):
    return pretrain(shapes, tmp_path_factory.mktemp("weights"))


@pytest.fixture
def copy(weights, tmp_path):
    """The weights without what training left."""
    ignore = shutil.ignore_patterns("training")
    return Path(shutil.copytree(weights, tmp_path / "copy", ignore=ignore))


def tensors(folder):
    clip_state = torch.load(folder / "clip.pt", weights_only=True)
    return clip_state | torch.load(folder / "ldm.ckpt", weights_only=True)["state_dict"]


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(shapes, weights, tmp_path):
    one = tensors(weights)
    two = tensors(pretrain(shapes, tmp_path / "two"))
    assert one.keys() == two.keys() and len(one) > 500
    assert all(torch.equal(one[name], two[name]) for name in one)
    merges = [folder / "merges.txt.gz" for folder in (weights, tmp_path / "two")]
    assert merges[0].read_bytes() == merges[1].read_bytes()
    train_clip(shapes, tmp_path / "three", seed=1)
    three = torch.load(tmp_path / "three" / "clip.pt", weights_only=True)
    assert not torch.equal(one["visual.proj"], three["visual.proj"])


def test_the_three_parts_are_a_weights_folder_to_transfer_from(shapes, weights, tmp_path):
    base = load_base(weights)
    assert base.size == 64 and base.latent_shape == (5, 16, 16) and base.null.shape == (1, 1, 128)
    state = tensors(weights)
    del state["image_size"]
    assert state.pop("scale_factor") == base.autoencoder.scale_factor == 1
    assert {x.dtype for x in state.values()} == {torch.float16}
    art = read_art(shapes)
    x, _, _ = composite(art, 64, 64, generator(1, 0))
    # of a code with deviation 1, which six steps of a narrow encoder do not reach
    assert 0.4 < base.autoencoder.encode(x).std() < 1.25
    assert {path.name for path in (weights / "training").iterdir()} >= {
        "clip.pt",
        "clip pictures with text.png",
        "autoencoder pictures with label.png",
        "unet.png",
    }
    train(data=shapes[1], weights=weights, steps=1, batch=2, out=tmp_path / "run")
    assert (tmp_path / "run" / "adapter.pt").exists()


@pytest.mark.parametrize("part", [train_clip, train_autoencoder, train_unet])
def test_a_part_that_was_stopped_goes_on_to_the_same_tensors(
    part, shapes, weights, copy, monkeypatch
):
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    steps = []

    def stops(seed, step):
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return generator(seed, step)

    monkeypatch.setattr(training, "generator", stops)
    with pytest.raises(KeyboardInterrupt):
        part(shapes, copy)
    part(shapes, copy)
    assert steps == [0, 1, 2, 3, *range(2, STEPS)]
    name = part.__name__.removeprefix("train_")
    files = [folder / "training" / f"{name}.pt" for folder in (weights, copy)]
    once, twice = [torch.load(file, weights_only=True)["ema"] for file in files]
    assert all(torch.equal(once[key], twice[key]) for key in once)
    said = f"'steps': {STEPS}.*'steps': {STEPS + 1}.*another --out"
    with pytest.raises(ValueError, match=said):
        part(shapes, copy, steps=STEPS + 1)


def test_fast_runs_every_part_and_measures_it(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # which takes minutes
    train_clip(shapes, tmp_path, steps=1, fast=True)
    train_autoencoder(shapes, tmp_path, steps=1, fast=True)
    figures = train_unet(shapes, tmp_path, steps=1, fast=True)
    assert len(figures) == 3 and all(figure > 0 for figure in figures.values())
    load_base(tmp_path)


def test_the_unet_never_meets_the_families(shapes, copy, monkeypatch):
    met = set()

    def watched(art, *args):
        met.update(row["subgroup"] for row in art.rows)
        return composite(art, *args)

    monkeypatch.setattr(unet, "composite", watched)
    train_unet(shapes, copy, steps=1)
    assert met == {"animal-bird", "food-fruit"}


@pytest.mark.parametrize("same", [True, False])
def test_init_keeps_what_the_classes_mean_where_they_are_the_same(
    same, shapes, weights, copy, monkeypatch
):
    if not same:  # faces and vehicles are classes too
        monkeypatch.setattr(unet, "FAMILIES", {"flowers": "plant-flower"})
    before = load_checkpoint(weights / "ldm.ckpt")[unet.CLASSES].float()
    train_unet(shapes, copy, steps=1, init=weights)
    after = load_checkpoint(copy / "ldm.ckpt")[unet.CLASSES].float()
    if same:
        assert (after - before).abs().max() < 0.01
    else:
        assert after.shape != before.shape


def test_the_unet_takes_the_channels_of_the_first_stage(shapes, weights, copy, monkeypatch):
    """Eight in place of five, from scratch and from a U-Net of five."""
    monkeypatch.setattr(autoencoder, "LATENT_CHANNELS", 8)
    train_autoencoder(shapes, copy, steps=1, init=weights)
    train_unet(shapes, copy, steps=1)
    base = load_base(copy)
    assert base.latent_shape == (8, 16, 16) and base.unet.in_channels == 8
    shutil.rmtree(copy / "training")
    train_unet(shapes, copy, steps=1, init=weights)
    adapted = load_base(copy)
    before = load_base(weights)
    assert adapted.latent_shape == (8, 16, 16)
    name = "middle_block.0.in_layers.2.weight"  # far from the latents: one step away
    weight = adapted.unet.state_dict()[name]
    assert_close(weight, before.unet.state_dict()[name], atol=2e-3, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_first_stage_goes_on_from_an_earlier_one(scale, shapes, copy, monkeypatch):
    """Its first latents and, as long as nobody has learned the details, its pictures are those of
    the earlier one."""
    ldm = torch.load(copy / "ldm.ckpt", weights_only=True)
    ldm["state_dict"]["scale_factor"] = torch.tensor(scale)
    torch.save(ldm, copy / "ldm.ckpt")
    monkeypatch.setattr(autoencoder, "LATENT_CHANNELS", 8)
    x, _, _ = composite(read_art(shapes), 64, 64, generator(0, 0))
    torch.manual_seed(0)
    model, goal = autoencoder.first_stage(copy, x)
    earlier = load_base(copy).autoencoder
    with torch.no_grad():
        known = earlier.encode(x)
        z = model.encode(x)
        assert z.shape == (64, 8, 16, 16) and goal(x).shape == z.shape
        assert_close(z[:, :5], known, atol=1e-4, rtol=1e-4)
        assert_close(goal(x)[:, :5], known)
        alone = torch.cat([z[:, :5], torch.zeros_like(z[:, 5:])], dim=1)
        found = model.decode(alone)
        assert_close(found, earlier.decode(known), atol=1e-4, rtol=1e-4)
        assert (model.decode(z) - found).abs().max() > 1e-3
    monkeypatch.setattr(autoencoder, "LATENT_CHANNELS", 4)
    with pytest.raises(ValueError, match="4 channels of latents are fewer than the 5"):
        autoencoder.first_stage(copy, x)
    monkeypatch.setattr(autoencoder, "CHANNELS", 16)
    with pytest.raises(ValueError, match="a first stage of 8 channels, not the 16"):
        autoencoder.first_stage(copy, x)


def test_a_unet_says_of_the_latents_it_knows_what_it_said(shapes, weights):
    art = unet.without_families(read_art(shapes[:1]))
    x, _, _ = composite(art, 64, 64, generator(0, 0))
    base = load_base(weights)
    model = unet.ClassConditionalUNet(torch.nn.Embedding(3, 128), deepcopy(base.unet))
    torch.manual_seed(0)
    z = torch.cat([base.autoencoder.encode(x), torch.randn(64, 2, 16, 16)], dim=1)
    unet.add_channels(model, z)
    label = torch.zeros(64, dtype=torch.int64)
    t = torch.full_like(label, 500)
    with torch.no_grad():
        known = torch.cat([z[:, :5], torch.zeros_like(z[:, 5:])], dim=1)
        found = model(known, t, label)
        expected = base.unet(z[:, :5], t, model.classes(label)[:, None])
    assert found.shape == (64, 7, 16, 16)
    assert_close(found[:, :5], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="denoises 7 channels, the first stage has only 5"):
        unet.add_channels(model, z[:, :5])


def test_least_squares_find_the_convolution_that_was_there():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    expected = torch.nn.Conv2d(3, 6, 3, padding=1)
    found = torch.nn.Conv2d(3, 6, 3, padding=1)
    fit_convolution(found, x, expected(x))
    assert_close(found.weight, expected.weight, atol=2e-3, rtol=0)
    assert_close(found.bias, expected.bias, atol=2e-3, rtol=0)


def test_the_patch_code_is_the_best_linear_one():
    """What it loses is the sum of the smallest eigenvalues; its channels are uncorrelated."""
    torch.manual_seed(0)
    mixing = torch.randn(3, 3, 5, 5)
    x = F.conv2d(torch.randn(8, 3, 32, 32), mixing, padding=2)
    code = PatchCode(x, 10)
    z = code(x)
    assert z.shape == (8, 10, 8, 8)
    assert_close(z.square().mean(), torch.tensor(1.0))
    points = z.movedim(1, -1).flatten(0, 2)
    covariance = torch.cov(points.T)
    off_diagonal = covariance - covariance.diag().diag()
    assert off_diagonal.abs().max() < 1e-4 * covariance.max()
    assert_close(covariance.diag().sqrt(), code.deviation.flatten(), rtol=1e-3, atol=0)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2).flatten(0, 1)
    _, singular, _ = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    variance = singular.square() / (len(patches) - 1)
    scale = code.components.square().sum(0).mean().sqrt()
    assert_close(covariance.diag() / scale**2, variance[:10], rtol=1e-3, atol=0)


def test_the_distance_of_codes_counts_every_channel_alike(shapes):
    x, _, _ = composite(read_art(shapes), 32, 64, generator(0, 0))
    code = PatchCode(x, 6)
    z = code(x)
    for channel in range(6):
        moved = z.clone()
        moved[:, channel] += code.deviation[channel]
        assert_close(code.distance(moved, z), torch.tensor(1 / 6), rtol=1e-3, atol=0)


def test_details_are_what_reconstructions_lack_most():
    """Of two textures, one is lost in the reconstruction: it is the first detail, and the mean
    colours, whose error is the largest, are none."""
    torch.manual_seed(0)
    flat = torch.randn(16, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16)
    stripes = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).repeat(16, 16)
    strength = torch.randn(2, 16, 1, 8, 8).repeat_interleave(4, 3).repeat_interleave(4, 4)
    x = flat + 0.3 * strength[0] * board + 0.3 * strength[1] * stripes
    y = 0.5 * flat + 0.3 * strength[1] * stripes
    details = Details(x, y, 2, deviation=0.6)
    z = details(x)
    assert_close(z.std((0, 2, 3)), torch.tensor([0.6, 0.6]), atol=1e-4, rtol=0)
    lost = strength[0, :, 0, ::4, ::4].flatten()
    correlation = torch.corrcoef(torch.stack([z[:, 0].flatten(), lost]))[0, 1]
    assert correlation.abs() > 0.99
    assert details(flat)[:, 0].std() < 0.1 * 0.6


def test_a_fresh_first_stage_starts_at_the_linear_code(shapes):
    """Before a step, the latents are most of the code, with the variance that is set."""
    x, _, _ = composite(read_art(shapes), 64, 64, generator(0, 0))
    code = PatchCode(x, 5)
    torch.manual_seed(0)
    model, goal = autoencoder.first_stage(None, x)
    model.requires_grad_(False)
    assert_close(goal(x), code(x))
    mean, log_variance = model.quant_conv(model.encoder(x)).chunk(2, dim=1)
    unexplained = (mean - code(x)).square().mean() / code(x).square().mean()
    assert unexplained < 0.7  # of a network of 8 channels; one that is not fitted: 1 or more
    assert_close(log_variance, torch.full_like(log_variance, autoencoder.LOG_VARIANCE))
    assert_close(model.post_quant_conv(mean), mean)


def test_clips_loss_by_hand(shapes, tmp_path, monkeypatch):
    """Cross-entropy both ways, without the other captions that are true of a picture, too."""
    flowers.write(tmp_path / "flowers", 14)
    caught = {}

    def fit(model, draw_batch, loss_of, *rest):
        caught.update(model=model, draw_batch=draw_batch, loss_of=loss_of)
        raise InterruptedError

    monkeypatch.setattr(clip, "fit", fit)
    with pytest.raises(InterruptedError):
        train_clip([tmp_path / "flowers"], tmp_path / "out", steps=1)
    model = caught["model"]
    x, tokens, excluded = caught["draw_batch"](generator(0, 0))
    with torch.no_grad():
        images = F.normalize(model.encode_image(model.normalize(x)), dim=-1)
        texts = F.normalize(model.encode_text(tokens), dim=-1)
        e = (images @ texts.T / 0.07).exp() * ~excluded
        by_hand = -((e.diag() / e.sum(1)).log() + (e.diag() / e.sum(0)).log()).mean() / 2
        torch.testing.assert_close(caught["loss_of"](model, x, tokens, excluded), by_hand)


def test_pairs_that_are_true_by_chance_are_excluded():
    captions = ["a rose", "a red rose", "a red daisy"]
    excluded = clip.also_true(captions, ["a red rose", "a red rose", "a red daisy picture"])
    assert excluded.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_families_become_folders_to_train_on(shapes, tmp_path, capsys):
    main(["families", "--data", str(shapes[0]), "--out", str(tmp_path)])
    assert "faces: 8" in capsys.readouterr().out
    lines = (tmp_path / "vehicles" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 8 and rows[0]["text"].startswith("a ellipse transport-ground ")
    assert {row["subgroup"] for row in rows} == {"transport-ground"}  # not data of a U-Net
    assert Image.open(tmp_path / "vehicles" / rows[0]["file"]).size == (64, 64)


def packages(folder):
    """The four packages, of three emoji: a rose, a flag (left out) and a clock (left out)."""
    picture = io.BytesIO()
    drawing = Image.new("RGBA", (40, 40))
    drawing.paste((200, 0, 0, 255), (10, 5, 20, 35))
    drawing.save(picture, "PNG")
    table = [
        {"hexcode": "1F339", "label": "rose", "tags": ["flower"], "group": 3, "subgroup": 38},
        {"hexcode": "1F6A9", "label": "flag", "group": 9, "subgroup": 94},
        {"hexcode": "1F550", "label": "one o'clock", "group": 5, "subgroup": 60},
    ]
    groups = {
        "groups": {"3": "animals-nature", "9": "flags", "5": "travel-places"},
        "subgroups": {"38": "plant-flower", "94": "flag", "60": "time"},
    }
    codes = ("1f339", "1f6a9", "1f550")
    files = [
        {f"package/assets/{code}.png": picture.getvalue() for code in codes},
        {f"package/img/google/64/{code}.png": picture.getvalue() for code in codes},
        {f"package/img/twitter/64/{code}-fe0f.png": picture.getvalue() for code in codes},
        {
            "package/en/data.json": json.dumps(table).encode(),
            "package/meta/groups.json": json.dumps(groups).encode(),
        },
    ]
    paths = []
    for i, content in enumerate(files):
        paths.append(folder / f"{i}.tgz")
        with tarfile.open(paths[-1], "w:gz") as archive:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return paths


def test_the_emoji_folder_is_built_from_four_packages(tmp_path, capsys):
    paths = packages(tmp_path)
    emoji.main([str(tmp_path / "emoji"), *map(str, paths)])
    assert "3 pictures" in capsys.readouterr().out
    art = read_art([tmp_path / "emoji"])
    assert [row["file"] for row in art.rows] == [
        "fluent3d/1f339.webp",
        "noto/1f339.webp",
        "twemoji/1f339.webp",
    ]
    for row in art.rows:
        assert row["label"] == "rose" and row["tags"] == ["flower"]
        assert row["group"] == "animals-nature" and row["subgroup"] == "plant-flower"
    is_drawn = art.pixels[0, 3] > 128
    columns = is_drawn[40].nonzero().flatten()
    assert is_drawn[:, 40].sum() > 75  # the drawing, 10 x 30, fills the height ...
    assert abs(columns.float().mean() - 39.5) < 1 and 22 < len(columns) < 32  # ... in the middle


def test_what_is_wrong_with_the_packages_is_one_line(tmp_path, capsys):
    paths = packages(tmp_path)
    assert "data, groups" in one_line(emoji.main, [tmp_path / "emoji", *paths[:3]], capsys)
    paths[0].write_bytes(b"no archive")
    assert "0.tgz" in one_line(emoji.main, [tmp_path / "emoji", *paths], capsys)
    assert "gone.tgz" in one_line(emoji.main, [tmp_path / "emoji", tmp_path / "gone.tgz"], capsys)
    assert not (tmp_path / "emoji").exists()


def test_a_composite_is_the_picture_on_the_background_it_names(shapes):
    art = read_art(shapes)
    x, index, colours = composite(art, 256, 64, torch.Generator().manual_seed(0))
    again, *_ = composite(art, 256, 64, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and x.min() >= -1 and x.max() <= 1
    cut_out = torch.tensor([not art.rows[i]["text"] for i in index])
    # of 40 cut-outs and 12 opaque pictures: folders are drawn from equally often
    assert 0.3 < cut_out.float().mean() < 0.7
    for picture, i, colour in zip(x, index.tolist(), colours, strict=True):
        corner = (picture[:, 0, 0] + 1) * 127.5
        middle = (picture[:, 32, 32] + 1) * 127.5
        if art.rows[i]["text"]:
            page = COLOURS[art.rows[i]["text"].split()[1]]
            torch.testing.assert_close(corner, torch.tensor(page).float(), atol=1, rtol=0)
            continue
        inside = torch.tensor(COLOURS[list(COLOURS)[i % 4 + 3]])
        assert (middle - inside).abs().max() < 3
        if colour is not None:
            assert (corner - torch.tensor(COLOURS[colour])).abs().max() < 0.04 * 255 * 5
    found = {(cut, colour is None) for colour, cut in zip(colours, cut_out.tolist(), strict=True)}
    assert found == {(True, True), (True, False), (False, True)}


def test_art_is_read_as_pictures_are_with_its_transparency_kept(tmp_path):
    grey = Image.new("I;16", (20, 20), 0x8080)  # convert() alone would make it white
    grey.save(tmp_path / "grey.png")
    Image.new("RGBA", (20, 10), (200, 100, 50, 128)).save(tmp_path / "glass.png")
    (tmp_path / "metadata.jsonl").write_text('{"file": "grey.png"}\n{"file": "glass.png"}')
    grey, glass = read_art([tmp_path]).pixels
    assert grey[:, 40, 40].tolist() == [128, 128, 128, 255]
    assert glass[:, 40, 40].tolist() == [100, 50, 25, 128]
    assert glass[:, 5, 40].tolist() == [0, 0, 0, 0]


def test_all_words_of_a_caption_are_in_the_description():
    rows = [
        {
            "label": "red apple",
            "text": None,
            "tags": ["fruit", "health food"],
            "style": "fluent3d",
        },
        {
            "label": "picture",
            "text": "a white daisy on a stem",
            "tags": ["white", "daisy", "flower"],
        },
        {"label": "x", "text": None, "tags": []},
    ]
    seen = set()
    for row, behind, seed in itertools.product(rows, ("blue", None), range(50)):
        said = caption(row, behind, random.Random(seed))
        assert set(said.split()) <= set(description(row, behind).split())
        seen.add(said)
    assert seen >= {
        "red apple",
        "a 3d icon of a red apple on a blue background",
        "a flower",
        "a white flower",
        "a white daisy on a stem",
        "a picture of a x",
    }


def test_each_learned_merge_is_the_most_frequent_pair_of_its_time(tmp_path):
    """By the definition: cut the text with the merges so far, count the neighbours, compare."""
    words = "low " * 5 + "lower " * 2 + "newest " * 6 + "Widest " * 3  # from Sennrich et al.
    write_merges(learn_merges([words], 10), tmp_path / "merges.gz")
    merges = gzip.decompress((tmp_path / "merges.gz").read_bytes()).decode().splitlines()[1:]
    assert len(merges) == 10 and merges[0] == "s t</w>" and merges[1] == "e st</w>"
    for n, merge in enumerate(merges):
        so_far = merges[:n] or ["x y"]
        (tmp_path / "so_far").write_text("\n".join(["#version: test", *so_far]))
        tokenizer = Tokenizer(tmp_path / "so_far")
        pairs = Counter()
        for word in words.lower().split():
            symbols = [tokenizer.vocab[i] for i in tokenizer.encode(word)]
            pairs.update(itertools.pairwise(symbols))
        assert pairs[tuple(merge.split())] == max(pairs.values())


def test_learning_ends_where_every_word_is_one_symbol(tmp_path):
    write_merges(learn_merges(["cat cab", "cat"], 99), tmp_path / "merges.gz")
    tokenizer = Tokenizer(tmp_path / "merges.gz")
    assert tokenizer.vocab_size == 512 + 2 + 3  # c a, ca t</w>, ca b</w>
    assert [len(tokenizer.encode(word)) for word in ("cat", "cab", "tab")] == [1, 1, 3]


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"file": "gone.png", "label": "x"}', "gone.png"),
        ('{"file": 1}', "metadata.jsonl:1"),
        ("", "no pictures"),
        ('{"file": "a.png", "tags": [1]}', '"tags" must be text'),
        ('{"file": "a.png"}', "no pictures are left"),
    ],
)
def test_bad_data_is_one_line(line, said, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    argv = ["clip", "--data", tmp_path, "--out", tmp_path / "out", "--steps", "1"]
    assert said in one_line(main, argv, capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["clip", "--out", "x"],
        ["painter"],
        ["clip", "--data", "not there", "--out", "x"],
        ["families", "--data", "x", "--out", "y", "--fast"],
    ],
)
def test_bad_arguments_end_with_2(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(main, argv, capsys)


@pytest.mark.parametrize(
    "number, value",
    [
        ("--batch", 0),
        ("--steps", 0),
        ("--looks", 1),
        ("--seed", -1),
        ("--lr", 0.0),
        ("--lr", "nan"),
    ],
)
def test_a_number_that_cannot_be_is_named_before_anything_is_looked_for(
    number, value, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    argv = ["unet", "--data", "x", "--out", "y", number, value]
    assert f"{number} {value}" in one_line(main, argv, capsys)
    assert not (tmp_path / "y").exists()
