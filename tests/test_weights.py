"""tinyanl.weights reads what torch reads, runs nothing that a file says, and knows released files
by shape."""

import gzip
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tinyanl import weights
from tinyanl.identify import head_channels, null_class_warning
from tinyanl.weights import TABLE, identify, inspect, load_checkpoint, main

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{w}")
    for w in (
        ".*torch.jit:FutureWarning",
        ".*torch.jit:DeprecationWarning",
        "Detected pickle protocol",
    )
]


def assert_same(a, b):
    assert a.keys() == b.keys() and len(a) > 0
    for k in a:
        assert a[k].dtype == b[k].dtype
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=0)


def tensors():
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return {
        "a.weight": base,
        "a.half": base.half(),
        "t": base.T,
        "slice": base[2:5, 1:3],
        "n": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "bool": base > 0,
        "p": nn.Parameter(torch.randn(3)),
        "u8": torch.arange(5).byte(),
        "double": base.double(),
        "bf": base.bfloat16(),
    }


# containers


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_torch_save_old_and_new_gives_the_tensors_back(tmp_path, zipped, wrapped):
    state = tensors()
    top = {"state_dict": state, "epoch": 3, "betas": torch.ones(2)} if wrapped else state
    torch.save(top, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(load_checkpoint(tmp_path / "model.ckpt"), {k: v.detach() for k, v in state.items()})


def test_a_modules_ordered_state_dict_is_read_and_tied_tensors_stay_tied(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "a.pt")
    state = load_checkpoint(str(tmp_path / "a.pt"))
    assert_same(state, model.state_dict())
    assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr()


def test_tensors_beside_other_things_are_kept_and_the_others_dropped(tmp_path):
    top = {
        "w": torch.ones(2),
        "n": 3,
        "s": "text",
        "list": [torch.ones(1)],
        "sub": {"x": torch.ones(1)},
    }
    torch.save(top, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt")) == ["w"]


def test_a_lightning_checkpoint_loads_although_its_classes_are_not_installed(tmp_path, monkeypatch):
    module = types.ModuleType("no_such_lightning.callbacks")
    exec(
        "class Checkpoint:\n    def __init__(self): self.best = 1.5\n"
        "class Config(dict):\n    pass\n"
        "class Point(tuple):\n    pass\n",
        module.__dict__,
    )
    for cls in (module.Checkpoint, module.Config, module.Point):
        cls.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, "no_such_lightning", types.ModuleType("no_such_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = tensors()
    top = {
        "epoch": 1,
        "state_dict": state,
        "callbacks": {module.Checkpoint: module.Checkpoint()},
        "hparams": module.Config(a=module.Checkpoint(), b={1, 2}),
        "points": {module.Checkpoint(), module.Point((1, 2))},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "dtype": torch.float16,
    }
    torch.save(top, tmp_path / "model.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.delitem(sys.modules, "no_such_lightning")
    with pytest.raises(Exception, match="no_such_lightning"):
        torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert_same(load_checkpoint(tmp_path / "model.ckpt"), {k: v.detach() for k, v in state.items()})


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fp16 = nn.Linear(3, 4).half()
        self.register_buffer("turned", torch.arange(12.0).view(3, 4).t())
        self.register_buffer(
            "passing", torch.zeros(2), persistent=False
        )  # an archive keeps it all the same
        self.mask = torch.ones(2, 2)  # neither parameter nor buffer: not in the state dict

    def forward(self, x):
        return x + self.turned.sum() + self.mask.sum()


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.size = Inner(), 3
        self.again = self.inner
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Conv2d(3, 4, 2), nn.LayerNorm(2)])
        self.tied = nn.Parameter(torch.randn(2, 2))
        self.blocks[0].weight = self.tied
        self.register_buffer("mask", torch.tensor(224))
        self.scale = nn.ParameterList([nn.Parameter(torch.randn(2))])

    def forward(self, x):
        return self.inner(x) + self.mask


@pytest.mark.parametrize(
    "compile_", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(2))]
)
def test_a_torchscript_archive_gives_the_state_dict_that_torch_jit_load_gives(tmp_path, compile_):
    torch.manual_seed(0)
    compile_(Outer().eval()).save(tmp_path / "clip.pt")
    expected = torch.jit.load(tmp_path / "clip.pt").state_dict()
    state = load_checkpoint(tmp_path / "clip.pt")
    assert_same(state, expected)
    assert (
        state["inner.fp16.weight"].dtype == torch.float16
        and "inner.mask" not in state
        and "mask" in state
    )
    assert state["tied"].data_ptr() == state["blocks.0.weight"].data_ptr()


def test_safetensors_are_known_by_content(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {k: v.detach().clone().contiguous() for k, v in tensors().items()}
    safetensors.save_file(state, tmp_path / "model.bin")
    assert_same(load_checkpoint(tmp_path / "model.bin"), state)
    content = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match="cut.safetensors .*download it again"):
        load_checkpoint(tmp_path / "cut.safetensors")


def test_a_safetensors_header_length_that_reads_as_markup_is_no_web_page(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    for pad in range(0x3C20):  # a header of 0x3c20 bytes begins the file with " <"
        content = (
            safetensors.save({"w": torch.ones(1)}, {"pad": "x" * pad}) if pad > 0x3B00 else b""
        )
        if content.startswith(b" <"):
            break
    assert content.startswith(b" <")
    (tmp_path / "a.bin").write_bytes(content)
    assert_same(load_checkpoint(tmp_path / "a.bin"), {"w": torch.ones(1)})


def test_safetensors_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        load_checkpoint(tmp_path / "a")


# nothing in a file runs


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("place", ["beside", "inside", "value of a tensor's neighbour", "top"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_runs_nothing(tmp_path, place, zipped):
    marker, state = tmp_path / "marker", {"w": torch.arange(3.0)}
    bomb = Bomb(marker)
    top = {
        "beside": {"state_dict": state, "callbacks": bomb},
        "inside": {"state_dict": state | {"bomb": bomb}},
        "value of a tensor's neighbour": state | {"deep": [{"er": (bomb,)}]},
        "top": bomb,
    }[place]
    torch.save(top, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    if place == "top" or not zipped:  # torch's own restricted reader refuses an old file as a whole
        with pytest.raises(ValueError, match="model.ckpt"):
            load_checkpoint(tmp_path / "model.ckpt")
    else:
        assert_same(load_checkpoint(tmp_path / "model.ckpt"), state)
    assert (
        main(["check", str(tmp_path / "model.ckpt")]) == 1
    )  # a toy state dict is nothing that tinyanl knows
    assert not marker.exists()
    if zipped:
        torch.load(tmp_path / "model.ckpt", weights_only=False)
        assert marker.exists()  # the bomb was live


def archive(path, pickled, storage=bytes(16)):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", storage)


def tensor_pickle(
    size, stride, offset=0, kind="FloatStorage", rebuild="_rebuild_tensor_v2", key="0"
):
    """What torch.save writes for {"w": tensor}, with numbers of our choice."""

    def put(x):
        return pickle.dumps(x, 2)[2:-1]

    storage = (
        b"("
        + put("storage")
        + f"ctorch\n{kind}\n".encode()
        + put(key)
        + put("cpu")
        + put(4)
        + b"tQ"
    )
    return (
        b"\x80\x02}"
        + put("w")
        + f"ctorch._utils\n{rebuild}\n(".encode()
        + storage
        + put(offset)
        + put(size)
        + put(stride)
        + put(False)
        + b"ccollections\nOrderedDict\n)RtRs."
    )


def test_the_handmade_pickle_is_a_good_one(tmp_path):
    archive(tmp_path / "a.pt", tensor_pickle((2, 2), (2, 1)), torch.arange(4.0).numpy().tobytes())
    assert_same(load_checkpoint(tmp_path / "a.pt"), {"w": torch.arange(4.0).view(2, 2)})


@pytest.mark.parametrize(
    "wrong",
    [
        dict(size=(5,), stride=(1,)),
        dict(size=(2,), stride=(1,), offset=3),
        dict(size=(2, 2), stride=(3, 1)),
        dict(size=(1 << 40,), stride=(0,)),
        dict(size=(1 << 62, 1 << 62), stride=(1, 1)),
        dict(size=(2,), stride=(-1,), offset=1),
        dict(size=(-2,), stride=(1,)),
        dict(size=(2,), stride=(1,), offset=-1),
        dict(size=(2,), stride=()),
        dict(size="ab", stride=(1, 1)),
        dict(size=(2.0,), stride=(1,)),
        dict(size=None, stride=None),
        dict(size=(2,), stride=(1,), kind="NoStorage"),
        dict(size=(2,), stride=(1,), rebuild="_rebuild_sparse_tensor"),
        dict(size=(2,), stride=(1,), key="1"),
        dict(size=(2,), stride=(1,), key="../data.pkl"),
        dict(size=(1 << 40, 0), stride=(1, 1), offset=1 << 70),
    ],
)
def test_a_tensor_that_reaches_beyond_its_bytes_is_a_clean_error(tmp_path, wrong):
    archive(tmp_path / "evil.pt", tensor_pickle(**wrong))
    with pytest.raises(ValueError, match="evil.pt"):
        load_checkpoint(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    "program",
    [
        b'cbuiltins\neval\n(S\'open("marker", "w")\'\ntR.',  # a call
        b"cbuiltins\n__import__\n(S'os'\ntR(dS'system'\nS'x'\nsb.",  # BUILD on the result
        b"cos\nsystem\n}S'name'\nS'torch._utils._rebuild_tensor_v2'\nsb.",  # BUILD on a class
        b"\x80\x02cos\nsystem\nS'touch marker'\n\x85\x81.",  # NEWOBJ
        b"(S'touch marker'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch marker\x85R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"",
        b".",
        b"garbage",
        b"\x80\x02K\x01.",
    ],
)
def test_hostile_or_broken_pickle_programs_end_in_a_clean_error(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "evil.pt", program)
    with pytest.raises(ValueError, match="evil.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "marker").exists()


def test_a_torchscript_module_that_contains_itself_is_a_clean_error(tmp_path):
    archive(tmp_path / "loop.pt", b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.")
    with zipfile.ZipFile(tmp_path / "loop.pt", "a") as file:
        file.writestr("archive/code/__torch__.py", "class M(Module):\n  __parameters__ = []\n")
    with pytest.raises(ValueError, match="loop.pt"):
        load_checkpoint(tmp_path / "loop.pt")


# files that are something else


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [1, 3, 20, 200, 0.1, 0.5, 0.9, -1])
def test_a_cut_off_file_is_named_with_its_size_and_what_to_do(tmp_path, zipped, part):
    torch.save(tensors(), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole.pt").read_bytes()
    content = content[: part if part == -1 or part >= 1 else int(part * len(content))]
    (tmp_path / "cut.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"cut\.pt \({len(content):,} bytes\).*: download it again"
    ):
        load_checkpoint(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"cut\.pt"):
        inspect(tmp_path / "cut.pt")


def test_a_cut_off_file_of_known_size_says_how_much_is_missing(tmp_path):
    torch.save(tensors(), tmp_path / "whole.pt")
    cut = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    cut.write_bytes((tmp_path / "whole.pt").read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"1,500 of 95,628,359 bytes.*cut off"):
        load_checkpoint(cut)
    merges = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    merges.write_bytes(gzip.compress(b"#version: 0.2\n" + b"a b\n" * 99)[:-4])
    with pytest.raises(ValueError, match=r"of 1,356,917 bytes.*cut off"):
        inspect(merges)


def test_a_flipped_byte_is_found(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "bad.pt")
    content = bytearray((tmp_path / "bad.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pt .*CRC.*download it again"):
        load_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty.*download it again"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page.*download it again"),
        (b"<?xml version='1.0'?><Error/>", "web page"),
        (b"hello, this is text\n" * 9, "no checkpoint.*'hello, this.*download it again"),
        (b'{"error": "not found", "code": 404}', "no checkpoint"),
        (b"\x00\xff" * 99, "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
        (gzip.compress(b"no merges"), "gzip"),
        (pickle.dumps({"a": 1}), "download it again"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path, content, message):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.ckpt.*" + message):
        inspect(tmp_path / "model.ckpt")


def test_a_missing_file_lists_what_is_there(tmp_path):
    (tmp_path / "other.pt").touch()
    with pytest.raises(FileNotFoundError, match="model.ckpt.*other.pt"):
        load_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_checkpoint(tmp_path / "nowhere" / "model.ckpt")
    with pytest.raises(FileNotFoundError, match="other.pt"):
        inspect(tmp_path)


def test_no_tensors_a_zip_of_a_checkpoint_and_an_adapter_are_told_apart(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no tensors.*epoch"):
        load_checkpoint(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "vq-f4.zip", "w") as file:
        file.writestr("model.ckpt", b"x")
    with pytest.raises(ValueError, match="model.ckpt.*unzip"):
        load_checkpoint(tmp_path / "vq-f4.zip")
    torch.save({"trained": {"w": torch.ones(1)}, "mu": torch.ones(2)}, tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="adapter.*sample --run"):
        load_checkpoint(tmp_path / "adapter.pt")


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_merges_are_known_by_content(tmp_path, opener):
    with opener(tmp_path / "anything", "wb") as file:
        file.write('"bpe"#version: 0.2\ni n\nt h\na n</w>\n'.encode())
    found, state = inspect(tmp_path / "anything")
    assert found == ("BPE merges, 3 lines", ("merges",), None) and state == {}
    with opener(tmp_path / "anything", "wb") as file:
        file.write(b"#version\nmore than two symbols\n")
    with pytest.raises(ValueError, match="anything"):
        inspect(tmp_path / "anything")


# what a state dict is; meta tensors have a shape and no memory


def meta(module, prefix=""):
    return {prefix + k: v for k, v in module.state_dict().items()}


def ldm(unet=None, classes=None, stage=None, ema=False):
    from tinyanl.autoencoder import Autoencoder
    from tinyanl.unet import UNet

    with torch.device("meta"):
        state = meta(UNet(**(unet or {})), "model.diffusion_model.")
        state |= meta(Autoencoder(**(stage or {})), "first_stage_model.") | {
            "betas": torch.empty(1000)
        }
        if ema:
            state |= {"model_ema.diffusion_modelout2weight": torch.empty(3)}
        if classes:
            state["cond_stage_model.embedding.weight"] = torch.empty(classes)
    return state


CELEBA = dict(channels=224, mult=(1, 2, 3, 4), context_dim=None, head_channels=32)
F8 = dict(
    in_channels=4,
    out_channels=4,
    channels=256,
    mult=(1, 2, 4),
    attention=(True,) * 3,
    head_channels=32,
)
VQ_F8 = dict(mult=(1, 2, 2, 4), z_channels=4, embed_dim=4, codes=16384)
KL_F8 = dict(mult=(1, 2, 4, 4), z_channels=4, embed_dim=4, codes=None)
WHOLE = ("unet", "autoencoder", "classes")


def test_the_papers_base_is_recognised():
    found = identify(ldm(classes=(1001, 512)))
    assert found == (
        "LDM cin256-v2: U-Net 400,920,579 parameters, VQ-f4, 1001 classes",
        WHOLE,
        None,
    )


def test_the_other_cin256_has_a_warning_that_names_the_right_file():
    state = ldm(F8, (1000, 512), VQ_F8)
    found = identify(state)
    assert found.name.startswith("LDM cin256 f8: U-Net ")
    assert found.name.endswith("VQ-f8, 1000 classes")
    assert found.parts == WHOLE and found.problem is None
    warning = null_class_warning(state)
    assert "class 999, the last of 1000, is taken to mean 'no class'" in warning
    assert "ImageNet's own 1,000 classes none does" in warning and "nitro/cin/model.ckpt" in warning
    assert head_channels(state) == 32


def test_faces_are_recognised_with_their_averaged_weights():
    name, parts, problem = identify(ldm(CELEBA, ema=True))
    assert name.startswith("LDM celeba256 or ffhq256: U-Net 274,0") and name.endswith("VQ-f4, EMA")
    assert parts == ("unet", "autoencoder") and problem is None


def test_a_unet_of_any_size_is_described_and_a_part_may_lie_alone():
    small = ldm(
        dict(channels=32, mult=(1, 2, 4), attention=(False, True, True), context_dim=128), (65, 128)
    )
    name, parts, problem = identify(small)
    assert "(32 channels, context 128)" in name and "VQ-f4, 65 classes" in name
    assert parts == WHOLE and problem is None
    alone = {k: v for k, v in small.items() if k.startswith("model.")}
    assert identify(alone).parts == ("unet",) and "VQ" not in identify(alone).name


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"cond_stage_model.transformer.token_emb.weight": (9, 640)}, "text2img256"),
        (
            {"model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": (384, 768)},
            "lsun_churches256",
        ),
        ({"model.diffusion_model.input_blocks.0.0.weight": (192, 7, 3, 3)}, "takes 7 channels"),
        (
            {"model.diffusion_model.input_blocks.4.1.transformer_blocks.1.norm1.weight": (384,)},
            "two transformers",
        ),
    ],
)
def test_ldms_of_other_kinds_are_refused_with_a_remedy(change, problem):
    found = identify(
        ldm(dict(context_dim=640)) | {k: torch.empty(v, device="meta") for k, v in change.items()}
    )
    assert (
        problem in found.problem and "you want cin256-v2" in found.problem and "unet" in found.parts
    )
    assert found.name.startswith("LDM text2img256: ")


@pytest.mark.parametrize(
    "sizes, name",
    [
        ({}, "VQ-f4: 55,322,782 parameters, 8192 codes of 3 numbers"),
        (VQ_F8, "VQ-f8: "),
        (KL_F8, "KL-f8: "),
        (dict(codes=None), "KL-f4: "),
        (dict(mult=(1, 1, 2, 2, 4), codes=16384, embed_dim=8, z_channels=8), "VQ-f16: "),
    ],
)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_first_stages_are_told_apart(sizes, name, prefix):
    from tinyanl.autoencoder import Autoencoder

    with torch.device("meta"):
        state = meta(Autoencoder(**sizes), prefix) | {
            "loss.discriminator.main.0.bias": torch.empty(64)
        }
    found = identify(state)
    assert found.name.startswith(name) and found.parts == ("autoencoder",) and found.problem is None


CLIPS = [
    (dict(), "CLIP ViT-B/32"),
    (dict(patch=16), "CLIP ViT-B/16"),
    (dict(patch=14, vision_width=1024, text_width=768, dim=768), "CLIP ViT-L/14"),
    (
        dict(resolution=336, patch=14, vision_width=1024, text_width=768, dim=768),
        "CLIP ViT-L/14@336px",
    ),
    (
        dict(resolution=64, patch=8, vision_width=192, text_width=128, dim=128),
        "CLIP ViT (64 px, patch 8, width 192, embedding 128)",
    ),
]


@pytest.mark.parametrize("sizes, name", CLIPS)
def test_clips_in_openais_keys(sizes, name):
    from tinyanl.clip import CLIP

    with torch.device("meta"):
        state = meta(CLIP(vision_layers=1, text_layers=1, **sizes))
        state |= {k: torch.empty(()) for k in ("input_resolution", "context_length", "vocab_size")}
    assert identify(state) == (name, ("clip",), None)


def test_clip_in_hugging_faces_keys_as_transformers_writes_them():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=dict(num_hidden_layers=1, projection_dim=512),
                vision_config=dict(num_hidden_layers=1, projection_dim=512),
                projection_dim=512,
            )
        )
    assert identify(model.state_dict()) == ("CLIP ViT-B/32, Hugging Face keys", ("clip",), None)


def test_a_resnet_clip_half_a_clip_and_a_broken_unet_are_problems():
    assert (
        "use ViT-B/32"
        in identify({"visual.layer1.0.conv1.weight": torch.empty(64, 64, 1, 1)}).problem
    )
    assert (
        "missing"
        in identify({"visual.conv1.weight": torch.empty(768, 3, 32, 32, device="meta")}).problem
    )
    assert "missing" in identify({"model.diffusion_model.out.2.weight": torch.empty(3)}).problem
    assert (
        "misshapen"
        in identify({"model.diffusion_model.input_blocks.0.0.weight": torch.empty(3)}).problem
    )


def test_the_inception_of_fid_and_unknown_tensors():
    fid = {"Mixed_7c.branch_pool.conv.weight": torch.empty(192, 2048, 1, 1, device="meta")}
    assert identify(fid | {"fc.weight": torch.empty(1008, 2048)}) == (
        "FID Inception",
        ("inception",),
        None,
    )
    assert "torchvision" in identify(fid | {"fc.weight": torch.empty(1000, 2048)}).problem
    found = identify({"down_blocks.0.weight": torch.empty(1)})
    assert found.parts == () and "down_blocks.0.weight" in found.problem


def test_the_embedded_default_has_every_part_once_and_nothing_wrong():
    folder = Path(weights.__file__).parent / "assets" / "emoji64"
    found = [inspect(path)[0] for path in sorted(folder.iterdir()) if path.suffix != ".md"]
    assert sorted(p for f in found for p in f.parts) == [
        "autoencoder",
        "classes",
        "clip",
        "merges",
        "unet",
    ]
    assert not any(f.problem for f in found)


# the command line


def test_the_table_is_sane_and_printed_whole(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "Nothing is downloaded for you" in out
    assert len({f.name for f in TABLE}) == len({f.saved_as for f in TABLE}) == len(TABLE) == 19
    for f in TABLE:
        assert f.name in out and f.licence and f.loader
        assert all(u.startswith("https://") and u in out for u in f.urls)
        assert f.sha256 is None or len(f.sha256) == 64 and int(f.sha256, 16) and f.sha256 in out
        assert f.bytes is None or f.sha256
        if f.loader == "clip.CLIP" and f.sha256:
            assert f.sha256 in f.urls[0]  # OpenAI's folder names are the hashes
    assert all(len(line) <= 120 or "https://" in line for line in out.splitlines())


def test_check_says_what_a_file_is_and_fails_if_something_is_wrong(tmp_path, capsys, monkeypatch):
    from tinyanl.clip import CLIP

    good, bad = tmp_path / "clip.pt", tmp_path / "bad.pt"
    torch.save(
        CLIP(
            resolution=64,
            patch=32,
            vision_width=64,
            vision_layers=1,
            context_length=4,
            vocab_size=9,
            text_width=64,
            text_layers=1,
            dim=8,
        ).state_dict(),
        good,
    )
    bad.write_text("nothing")
    assert main(["check", str(good)]) == 0
    out = capsys.readouterr().out
    assert "CLIP ViT (64 px, patch 32, width 64, embedding 8)" in out
    assert f"{good.stat().st_size:,} bytes" in out
    assert "no hash is published for this file" in out
    assert main(["check", str(good), str(bad), str(tmp_path / "missing.pt")]) == 1
    out = capsys.readouterr().out
    assert "no checkpoint" in out and "no file" in out and "Traceback" not in out

    sha = out.split("SHA-256  ")[1].split()[0]
    rows = tuple(f._replace(sha256=sha) if f.name == "CLIP ViT-B/32" else f for f in TABLE)
    monkeypatch.setattr(weights, "TABLE", rows)
    assert main(["check", str(good)]) == 0
    assert "matches CLIP ViT-B/32" in capsys.readouterr().out


def test_check_of_no_file_is_a_usage_error():
    with pytest.raises(SystemExit, match="2"):
        main(["check"])


def test_check_says_when_a_known_kind_has_another_hash(tmp_path, capsys):
    (tmp_path / "merges").write_text("#version\na b\n")
    assert main(["check", str(tmp_path / "merges")]) == 0
    assert "is not the published hash of BPE merges" in capsys.readouterr().out
