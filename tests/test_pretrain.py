"""Pretraining on drawn shapes: art and captions, twenty deterministic steps, resuming, and weights that load."""
import gzip
import itertools
import json
import random
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image, ImageDraw

from tinyanl.pretrain import stages as pretrain
from tinyanl.pretrain.art import COLOURS, composite, read_art, say
from tinyanl.pretrain.codes import k_means
from tinyanl.pretrain.merges import learn_merges, write_merges
from tinyanl.models import load_base
from tinyanl.tokenizer import Tokenizer
from tinyanl.train import train
from tinyanl.weights import load_checkpoint

from commands import one_line

SUBGROUPS = ["animal-bird", "face-smiling", "plant-flower", "transport-ground", "food-fruit"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Forty cut-outs of five subgroups, with labels and tags, and a folder of opaque pictures with texts."""
    art, photos = tmp_path_factory.mktemp("art"), tmp_path_factory.mktemp("photos")
    lines = []
    for i, (subgroup, shape, colour) in enumerate(itertools.product(SUBGROUPS, ("ellipse", "rectangle"), range(4))):
        picture = Image.new("RGBA", (50, 50))
        getattr(ImageDraw.Draw(picture), shape)((5, 5 + colour, 44, 44), fill=list(COLOURS.values())[colour + 3])
        picture.save(art / f"{i}.png")
        lines.append({"file": f"{i}.png", "label": f"{shape} {subgroup}", "tags": [shape, "shape"], "style": "noto",
                      "subgroup": subgroup})
    (art / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"file": f"{i}.png", "text": f"a {colour} square"} for i, colour in enumerate(COLOURS)]
    for line, rgb in zip(lines, COLOURS.values()):
        Image.new("RGB", (80, 80), rgb).save(photos / line["file"])
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [art, photos]


@pytest.fixture(autouse=True)
def few_codes(monkeypatch):
    monkeypatch.setattr(pretrain, "CODES", 64)


def pretrained(shapes, out, seed=0):
    pretrain.clip(shapes, out, steps=20, batch=12, seed=seed)
    pretrain.autoencoder(shapes, out, steps=20, batch=2, seed=seed)
    pretrain.unet(shapes[:1], out, steps=20, batch=4, seed=seed, looks=16)
    return out


@pytest.fixture(scope="module")
def weights(shapes, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "CODES", 64)
        return pretrained(shapes, tmp_path_factory.mktemp("weights"))


def tensors(folder):
    files = [torch.load(folder / name, weights_only=True) for name in ("clip.pt", "ldm.ckpt")]
    return files[0] | files[1]["state_dict"]


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(shapes, weights, tmp_path):
    one, two = tensors(weights), tensors(pretrained(shapes, tmp_path / "two"))
    assert one.keys() == two.keys() and len(one) > 500
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (weights / "merges.txt.gz").read_bytes() == (tmp_path / "two" / "merges.txt.gz").read_bytes()
    pretrain.clip(shapes, tmp_path / "three", steps=20, batch=12, seed=1)
    three = torch.load(tmp_path / "three" / "clip.pt", weights_only=True)
    assert not torch.equal(one["visual.proj"], three["visual.proj"])


def test_the_three_parts_are_a_weights_folder_to_transfer_from(shapes, weights, tmp_path):
    base = load_base(weights)
    assert base.size == 64 and base.latent_shape == (3, 16, 16) and base.null.shape == (1, 1, 128)
    assert all(v.dtype == torch.float16 for k, v in tensors(weights).items() if k != "image_size")
    assert {p.name for p in (weights / "training").iterdir()} >= {
        "clip.pt", "clip pictures with text.png", "autoencoder pictures with label.png", "unet.png"}
    train(data=shapes[1], weights=weights, steps=1, batch=2, out=tmp_path / "run")
    assert (tmp_path / "run" / "adapter.pt").exists()


@pytest.mark.parametrize("part, settings", [(pretrain.clip, {"batch": 12}), (pretrain.autoencoder, {"batch": 2}),
                                            (pretrain.unet, {"batch": 4, "looks": 16})])
def test_a_part_that_was_stopped_goes_on_to_the_same_tensors(part, settings, shapes, weights, tmp_path, monkeypatch):
    name, out = part.__name__, tmp_path / "out"
    (out / "training").mkdir(parents=True)
    for file in ("clip.pt", "ldm.ckpt"):
        (out / file).write_bytes((weights / file).read_bytes())
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 5)
    steps, generator = [], pretrain.generator

    def stops(seed, step):
        steps.append(step)
        if 0 <= step < 20 and len([s for s in steps if s >= 0]) == 13:
            raise KeyboardInterrupt
        return generator(seed, step)

    monkeypatch.setattr(pretrain, "generator", stops)
    data = shapes[:1] if name == "unet" else shapes
    with pytest.raises(KeyboardInterrupt):
        part(data, out, steps=20, **settings)
    part(data, out, steps=20, **settings)
    assert [s for s in steps if 0 <= s < 20] == [*range(13), *range(10, 20)]
    once, twice = (torch.load(folder / "training" / f"{name}.pt", weights_only=True) for folder in (weights, out))
    assert all(torch.equal(once["ema"][k], twice["ema"][k]) for k in once["ema"])
    with pytest.raises(ValueError, match="'steps': 20.*'steps': 21.*another --out"):
        part(data, out, steps=21, **settings)


def test_fast_runs_every_part_and_measures_it(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # which takes minutes
    pretrain.clip(shapes, tmp_path, steps=1, batch=4, fast=True)
    pretrain.autoencoder(shapes, tmp_path, steps=1, batch=2, fast=True)
    figures = pretrain.unet(shapes[:1], tmp_path, steps=1, batch=2, looks=16, fast=True)
    assert len(figures) == 3 and all(figure > 0 for figure in figures.values())
    load_base(tmp_path)


def test_the_unet_never_meets_the_families(shapes, weights, tmp_path, monkeypatch):
    met = set()

    def watched(art, *args):
        met.update(row["subgroup"] for row in art.rows)
        return composite(art, *args)

    monkeypatch.setattr(pretrain, "composite", watched)
    (tmp_path / "training").mkdir()
    for file in ("clip.pt", "ldm.ckpt"):
        (tmp_path / file).write_bytes((weights / file).read_bytes())
    pretrain.unet(shapes[:1], tmp_path, steps=1, batch=2, looks=16)
    assert met == {"animal-bird", "food-fruit"}


def test_init_keeps_what_the_classes_mean_where_they_are_the_same(shapes, weights, tmp_path, monkeypatch):
    key, out = "cond_stage_model.embedding.weight", tmp_path / "out"
    before = load_checkpoint(weights / "ldm.ckpt")[key].float()
    for same in (True, False):
        shutil.copytree(weights, out, ignore=shutil.ignore_patterns("training"))
        pretrain.unet(shapes[:1], out, steps=1, batch=2, looks=16, init=weights)
        after = load_checkpoint(out / "ldm.ckpt")[key].float()
        assert (after.shape == before.shape and bool((after - before).abs().max() < 0.01)) is same
        shutil.rmtree(out)
        monkeypatch.setattr(pretrain, "FAMILIES", {"flowers": "plant-flower"})  # faces and vehicles are classes too


def test_families_become_folders_to_train_on(shapes, tmp_path, capsys):
    pretrain.main(["families", "--data", str(shapes[0]), "--out", str(tmp_path)])
    assert "faces: 8" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "vehicles" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and rows[0]["text"].startswith("a ellipse transport-ground ")
    assert {row["subgroup"] for row in rows} == {"transport-ground"}  # so that they stay out of a U-Net's data
    assert Image.open(tmp_path / "vehicles" / rows[0]["file"]).size == (64, 64)


def test_a_composite_is_the_picture_on_the_background_it_names(shapes):
    art = read_art(shapes)
    x, index, behind = composite(art, 256, 64, torch.Generator().manual_seed(0))
    again, *_ = composite(art, 256, 64, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and -1 <= x.min() and x.max() <= 1
    cut = torch.tensor([not art.rows[i]["text"] for i in index])
    assert 0.3 < cut.float().mean() < 0.7  # 40 cut-outs, 12 opaque pictures: folders are drawn from equally often
    for picture, i, colour in zip(x, index.tolist(), behind):
        corner, middle = (picture[:, 0, 0] + 1) * 127.5, (picture[:, 32, 32] + 1) * 127.5
        if not art.rows[i]["text"]:
            inside = torch.tensor(COLOURS[list(COLOURS)[i % 4 + 3]]).float()
            assert (middle - inside).abs().max() < 3
            assert colour is None or (corner - torch.tensor(COLOURS[colour])).abs().max() < 0.04 * 255 * 5
        else:
            torch.testing.assert_close(corner, torch.tensor(COLOURS[art.rows[i]["text"].split()[1]]).float(),
                                       atol=1, rtol=0)
    assert {(bool(one), colour is None) for colour, one in zip(behind, cut)} == {(1, 1), (1, 0), (0, 1)}


def test_art_is_read_as_pictures_are_with_its_transparency_kept(tmp_path):
    Image.new("I;16", (20, 20), 0x8080).save(tmp_path / "grey.png")  # convert() alone would make it white
    Image.new("RGBA", (20, 10), (200, 100, 50, 128)).save(tmp_path / "glass.png")
    (tmp_path / "metadata.jsonl").write_text('{"file": "grey.png"}\n{"file": "glass.png"}')
    grey, glass = read_art([tmp_path]).pixels
    assert grey[:, 40, 40].tolist() == [128, 128, 128, 255]
    assert glass[:, 40, 40].tolist() == [100, 50, 25, 128] and glass[:, 5, 40].tolist() == [0, 0, 0, 0]


def test_all_words_of_a_caption_are_in_the_description():
    rows = [{"label": "red apple", "text": None, "tags": ["fruit", "health food"], "style": "fluent3d"},
            {"label": "picture", "text": "a white daisy on a stem", "tags": ["white", "daisy", "flower"]},
            {"label": "x", "text": None, "tags": []}]
    seen = set()
    for row, behind, seed in itertools.product(rows, ("blue", None), range(50)):
        said, facts = say(row, behind, random.Random(seed))
        assert set(said.split()) <= set(facts.split())
        seen.add(said)
    assert {"red apple", "a 3d icon of a red apple on a blue background", "a flower", "a white flower",
            "a white daisy on a stem", "a picture of a x"} <= seen


def test_codes_are_the_means_of_what_is_nearest_to_them():
    torch.manual_seed(0)
    clusters = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    points = clusters[torch.arange(300) % 3] + torch.randn(300, 2) * 0.1
    codes = k_means(points, 16, rounds=30)
    nearest = torch.cdist(points, codes).argmin(1)
    for code in nearest.unique():
        torch.testing.assert_close(codes[code], points[nearest == code].mean(0))
    first = k_means(points, 16, rounds=0)
    error, first_error = (torch.cdist(points, some).amin(1).square().mean() for some in (codes, first))
    assert error < 0.8 * first_error


def test_each_learned_merge_is_the_most_frequent_pair_of_its_time(tmp_path):
    """By the definition: cut the text with the merges so far, count the pairs of neighbours, compare."""
    words = "low " * 5 + "lower " * 2 + "newest " * 6 + "Widest " * 3  # the example of Sennrich et al.
    write_merges(learn_merges([words], 10), tmp_path / "merges.gz")
    merges = gzip.decompress((tmp_path / "merges.gz").read_bytes()).decode().splitlines()[1:]
    assert len(merges) == 10 and merges[0] == "s t</w>" and merges[1] == "e st</w>"
    for n, merge in enumerate(merges):
        (tmp_path / "so_far").write_text("\n".join(["#version: test", *(merges[:n] or ["x y"])]))
        tokenizer, pairs = Tokenizer(tmp_path / "so_far"), Counter()
        for word in words.lower().split():
            pairs.update(itertools.pairwise(tokenizer.vocab[i] for i in tokenizer.encode(word)))
        assert pairs[tuple(merge.split())] == max(pairs.values())


def test_learning_ends_where_every_word_is_one_symbol(tmp_path):
    write_merges(learn_merges(["cat cab", "cat"], 99), tmp_path / "merges.gz")
    tokenizer = Tokenizer(tmp_path / "merges.gz")
    assert tokenizer.vocab_size == 512 + 2 + 3  # c a, ca t</w>, ca b</w>
    assert [len(tokenizer.encode(word)) for word in ("cat", "cab", "tab")] == [1, 1, 3]


@pytest.mark.parametrize("line, said", [
    ('{"file": "gone.png", "label": "x"}', "gone.png"), ('{"file": 1}', "metadata.jsonl:1"), ("", "no pictures"),
    ('{"file": "a.png", "tags": [1]}', '"tags" must be text'), ('{"file": "a.png"}', "no pictures are left")])
def test_bad_data_is_one_line(line, said, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["clip", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "1"])
    out = capsys.readouterr().err
    assert stop.value.code == 2 and said in out and out.count("\n") == 1


@pytest.mark.parametrize("argv", [["clip", "--out", "x"], ["painter"], ["clip", "--data", "not there", "--out", "x"],
                                  ["families", "--data", "x", "--out", "y", "--fast"]])
def test_bad_arguments_end_with_2(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(argv)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("number", ["--batch", "--steps", "--looks"])
def test_too_small_a_number_is_named_before_the_data_is_looked_for(number, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert number in one_line(pretrain.main, ["unet", "--data", "x", "--out", "y", number, "0"], capsys)
