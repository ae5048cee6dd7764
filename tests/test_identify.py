"""Whatever wrapping a file comes in, `check` and `load_base` agree on it; and diffusers' layout
against diffusers itself."""
import json
import shutil

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from parity import randomise, relative_error
from transformers import CLIPConfig, CLIPModel

from tinyanl.autoencoder import Autoencoder
from tinyanl.clip import CLIP
from tinyanl.identify import identify, inspect
from tinyanl.layouts import first_stage_from_diffusers, unet_from_diffusers
from tinyanl.models import EMBEDDED, load_base
from tinyanl.schedule import ldm_alpha_bar
from tinyanl.unet import UNet
from tinyanl.weights import main

U, STAGE = "model.diffusion_model.", "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"
SMALL = dict(channels=32, mult=(1, 2), blocks=1, attention=(False, True), context_dim=16)
FIRST_STAGE = dict(channels=32, mult=(1, 2), blocks=1)


@pytest.fixture(scope="module")
def ldm():
    """A small LDM whose pictures have 256 pixels, with 11 classes."""
    torch.manual_seed(0)
    state = {U + k: v for k, v in randomise(UNet(**SMALL)).state_dict().items()}
    stage = randomise(Autoencoder(**FIRST_STAGE, codes=64))
    state |= {STAGE + k: v for k, v in stage.state_dict().items()}
    return state | {CLASSES: torch.randn(11, 16), "alphas_cumprod": ldm_alpha_bar().float()}


@pytest.fixture(scope="module")
def clip():
    return torch.load(EMBEDDED / "clip.pt", weights_only=True)


def averaged(state):
    return {"model_ema." + k.removeprefix("model.").replace(".", ""): v for k, v in state.items()
            if k.startswith(U)}


def without(state, prefix):
    return {k: v for k, v in state.items() if not k.startswith(prefix)}


def only(state, prefix):
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


COUNTS = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}
# Name -> (what the LDM's state dict becomes, a word of what is said). Every one of them loads.
WRAPPED = {
    "plain": (lambda s: s, "LDM (32 channels, context 16)"),
    "module.": (lambda s: prefixed(s, "module."), "wrapped as in module."),
    "_orig_mod.": (lambda s: prefixed(s, "_orig_mod."), "wrapped as in _orig_mod."),
    "model.": (lambda s: prefixed(s, "model."), "wrapped as in model."),
    "nested": (lambda s: prefixed(s, "module._orig_mod.model."), "wrapped as in module."),
    "a compiled U-Net inside": (
        lambda s: without(s, U) | prefixed(only(s, U), U + "_orig_mod."), "LDM (32 channels"),
    "what pruning leaves": (lambda s: s | COUNTS, "11 classes"),
    "averaged too": (lambda s: s | averaged(s) | COUNTS, "11 classes, EMA"),
    "averaged only": (lambda s: without(s, U) | averaged(s) | COUNTS, "11 classes, EMA"),
    "half": (lambda s: {k: v.half() for k, v in s.items()}, "11 classes"),
    "bf16": (lambda s: {k: v.bfloat16() for k, v in s.items()}, "11 classes"),
    "float64": (lambda s: {k: v.double() for k, v in s.items()}, "11 classes"),
    "1,001 classes": (lambda s: s | {CLASSES: torch.randn(1001, 16)}, "1001 classes"),
    "1,000 classes": (lambda s: s | {CLASSES: torch.randn(1000, 16)}, "class 999, the last"),
    "a scale": (lambda s: s | {"scale_factor": torch.tensor(0.5)}, "latents scaled by 0.5"),
}
REFUSED = {
    "another schedule": (
        lambda s: s | {"alphas_cumprod": ldm_alpha_bar(0.00085, 0.012)}, "another noise schedule"),
    "steps": (lambda s: s | {"alphas_cumprod": torch.ones(4000)}, "another noise schedule"),
    "a scale of 0": (lambda s: s | {"scale_factor": torch.tensor(0.0)}, "no positive number"),
    "two scales": (lambda s: s | {"scale_factor": torch.ones(2)}, "no positive number"),
    "a tensor too few": (lambda s: without(s, U + "out.0.bias"), "out.0.bias"),
    "an averaged tensor of nothing": (
        lambda s: s | {"model_ema.diffusion_modelx": torch.zeros(3)}, "diffusion_modelx"),
    "a prefix for some": (
        lambda s: prefixed(only(s, U), "unet.") | without(s, U), "unet is missing"),
}


def folder_with(tmp_path, name, state, *beside):
    for file in beside:
        shutil.copy(EMBEDDED / file, tmp_path)
    torch.save(state, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("case", WRAPPED)
def test_check_and_load_base_take_every_wrapping_for_the_same(case, ldm, tmp_path, capsys):
    wrap, word = WRAPPED[case]
    state = wrap(ldm)
    path = folder_with(tmp_path, "a", {"state_dict": state}, "clip.pt", "merges.txt.gz")
    assert main(["check", str(path)]) == 0
    assert word in capsys.readouterr().out
    base = load_base(tmp_path, "cpu")
    warned = "warning" in capsys.readouterr().out
    assert warned == (case != "1,001 classes")  # 11 classes: which of them is none?
    exact = case not in ("half", "bf16")
    for name, value in base.unet.state_dict().items():
        torch.testing.assert_close(value, ldm[U + name], atol=0 if exact else 0.02, rtol=0.01)
    classes = next(value for name, value in state.items() if name.endswith(CLASSES))
    assert torch.equal(base.null[0, 0], classes[-1].float())


@pytest.mark.parametrize("case", REFUSED)
def test_check_and_load_base_refuse_alike(case, ldm, tmp_path, capsys):
    wrap, word = REFUSED[case]
    path = folder_with(tmp_path, "a", {"state_dict": wrap(ldm)}, "clip.pt", "merges.txt.gz")
    with pytest.raises(ValueError) as error:
        load_base(tmp_path, "cpu")
    assert word in str(error.value) and "\n" not in str(error.value)
    is_other_parts = "missing" in word  # a folder's fault: the file itself is a first stage
    assert main(["check", str(path)]) == (0 if is_other_parts else 1)
    assert is_other_parts or word in capsys.readouterr().out


def test_a_bare_unet_and_a_first_stage_of_its_own_load(ldm, tmp_path, capsys):
    for prefix in ("", "diffusion_model.", "module."):
        folder_with(tmp_path, "unet.pt", prefixed(only(ldm, U), prefix), "clip.pt", "merges.txt.gz")
        torch.save(only(ldm, STAGE), tmp_path / "stage.pt")
        torch.save({CLASSES: ldm[CLASSES]}, tmp_path / "classes.pt")
        assert main(["check", str(tmp_path / "unet.pt"), str(tmp_path / "stage.pt")]) == 0
        base = load_base(tmp_path, "cpu")
        assert torch.equal(base.unet.out[2].weight, ldm[U + "out.2.weight"])
        assert torch.equal(base.null[0, 0], ldm[CLASSES][-1])
        found, state = inspect(tmp_path / "unet.pt")
        assert found.parts == ("unet",) and U + "out.2.bias" in state


def test_latents_of_a_scaled_model_have_unit_variance_and_are_part_of_the_fingerprint(
    ldm, tmp_path
):
    torch.manual_seed(0)
    stage = randomise(Autoencoder(**FIRST_STAGE, codes=None))
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        z = stage.encode(x)
    state = without(ldm, STAGE) | prefixed(stage.state_dict(), STAGE)
    folder_with(tmp_path, "a", state, "clip.pt", "merges.txt.gz")
    plain = load_base(tmp_path, "cpu")
    state["scale_factor"] = 1 / z.std()
    folder_with(tmp_path, "a", state)
    base = load_base(tmp_path, "cpu")
    with torch.no_grad():
        scaled = base.autoencoder.encode(x)
        torch.testing.assert_close(scaled.std(), torch.tensor(1.0))
        torch.testing.assert_close(scaled, z / z.std())
        torch.testing.assert_close(base.autoencoder.decode(scaled), stage.decode(z))
    one, other = plain.fingerprints(), base.fingerprints()
    assert one["autoencoder"] != other["autoencoder"] and one["unet"] == other["unet"]


# CLIP

def test_open_clips_two_towers_load_and_embed_as_open_clip(tmp_path):
    torch.manual_seed(0)
    sizes = dict(embed_dim=64, quick_gelu=True)
    vision = dict(image_size=64, patch_size=16, width=64, layers=2, head_width=64)
    text = dict(context_length=16, vocab_size=100, width=64, heads=1, layers=2)
    model = open_clip.model.CustomTextCLIP(**sizes, vision_cfg=vision, text_cfg=text).eval()
    assert any(name.startswith("text.") for name in model.state_dict())
    torch.save({"state_dict": prefixed(model.state_dict(), "module.")}, tmp_path / "clip.pt")
    assert main(["check", str(tmp_path / "clip.pt")]) == 0
    found, state = inspect(tmp_path / "clip.pt")
    assert "CustomTextCLIP" in found.name and found.parts == ("clip",)
    ours = CLIP.from_checkpoint(state)
    x, tokens = torch.randn(2, 3, 64, 64), torch.tensor([[98, 5, 7, 99] + [0] * 12] * 2)
    with torch.no_grad():
        assert relative_error(ours.encode_image(x), model.encode_image(x)) < 1e-4
        assert relative_error(ours.encode_text(tokens), model.encode_text(tokens)) < 1e-4


TIMM = {"cls_token": torch.zeros(1, 1, 64), "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}


@pytest.mark.parametrize("tower, name", [
    (lambda s: {k: v for k, v in s.items() if k.startswith("visual.")}, "image tower"),
    (lambda s: {k: v for k, v in s.items() if not k.startswith("visual.")}, "text tower"),
    (lambda s: TIMM, "image tower"),
])
def test_one_tower_of_a_clip_is_named_and_refused(clip, tower, name, tmp_path, capsys):
    torch.save(tower(clip), tmp_path / "a.pt")
    assert main(["check", str(tmp_path / "a.pt")]) == 1
    out = capsys.readouterr().out
    assert f"the {name} of a CLIP alone" in out and "get a file with both towers" in out
    with pytest.raises(ValueError, match="tower of a CLIP alone"):
        load_base(tmp_path, "cpu")


def test_a_clip_in_transformers_layout_with_another_activation_is_refused(tmp_path, capsys):
    tower = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=256)
    config = CLIPConfig(vision_config=dict(tower, image_size=64, patch_size=16), projection_dim=64,
                        text_config=dict(tower, vocab_size=100, max_position_embeddings=16))
    torch.save(CLIPModel(config).state_dict(), tmp_path / "pytorch_model.bin")
    path = tmp_path / "config.json"
    for activation, code in (("quick_gelu", 0), ("gelu", 1)):
        path.write_text(json.dumps({"vision_config": {"hidden_act": activation}}))
        assert main(["check", str(tmp_path / "pytorch_model.bin")]) == code
    assert "only CLIPs trained with QuickGELU" in capsys.readouterr().out
    path.write_text("{")
    assert main(["check", str(tmp_path / "pytorch_model.bin")]) == 1
    assert "config.json is damaged" in capsys.readouterr().out


# diffusers' layout

def unet2d(widths, blocks, head):
    n = len(widths) - 1
    return dict(sample_size=64, block_out_channels=widths, layers_per_block=blocks,
                attention_head_dim=head, down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * n),
                up_block_types=(*["AttnUpBlock2D"] * n, "UpBlock2D"), norm_num_groups=32)


def vqmodel(widths, blocks, codes):
    n = len(widths)
    return dict(block_out_channels=widths, layers_per_block=blocks, latent_channels=3,
                num_vq_embeddings=codes, down_block_types=("DownEncoderBlock2D",) * n,
                up_block_types=("UpDecoderBlock2D",) * n)


def old_names(state):
    """As files from before diffusers 0.12 call an attention's layers."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    out = {}
    for name, value in state.items():
        for now, before in new.items():
            name = name.replace(f".{now}.", f".{before}.")
        out[name] = value
    return out


def write_diffusers(folder, unet, vq, naming=lambda state: state):
    """The folders that save_pretrained writes, and the schedule of the released model."""
    for name, model in (("unet", unet), ("vqvae", vq)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        torch.save(naming(model.state_dict()), folder / name / "diffusion_pytorch_model.bin")
        config = {"_class_name": type(model).__name__, **model.config}
        (folder / name / "config.json").write_text(json.dumps(config, default=list))
    schedule = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear",
                    num_train_timesteps=1000, trained_betas=None, clip_sample=False)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    for file in ("clip.pt", "merges.txt.gz"):
        shutil.copy(EMBEDDED / file, folder)


def compare(folder, unet, vq):
    """A folder in diffusers' layout, loaded as a base, against diffusers' own models."""
    base = load_base(folder, "cpu")
    assert base.null is None and base.size == 64 * base.autoencoder.factor
    g = torch.Generator().manual_seed(1)
    z, t = torch.randn(1, 3, 16, 16, generator=g), torch.tensor([871])
    x = torch.rand(1, 3, 64, 64, generator=g) * 2 - 1
    with torch.no_grad():
        assert relative_error(base.unet(z, t), unet.eval()(z, t).sample) < 1e-4
        latents = vq.eval().encode(x).latents
        assert relative_error(base.autoencoder.encode(x), latents) < 1e-4
        assert relative_error(base.autoencoder.decode(latents), vq.decode(latents).sample) < 1e-4


@pytest.fixture(scope="module")
def small_diffusers():
    torch.manual_seed(0)
    unet = randomise(UNet2DModel(**unet2d((128, 256), 1, 64)))
    return unet, randomise(VQModel(**vqmodel((128, 128), 1, 64)))


@pytest.mark.parametrize("naming", [lambda state: state, old_names])
def test_a_small_model_in_diffusers_layout_equals_diffusers(
    small_diffusers, tmp_path, naming, capsys
):
    write_diffusers(tmp_path, *small_diffusers, naming)
    files = [tmp_path / name / "diffusion_pytorch_model.bin" for name in ("unet", "vqvae")]
    assert main(["check", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert out.count("problem  none") == 2
    # A folder: all that load_base would look into. What a shell makes of a star: more than that.
    assert main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("problem  none") == 4
    assert main(["check", *map(str, tmp_path.rglob("*"))]) == 0
    assert capsys.readouterr().out.count("config.json\n  what     settings or text, not") >= 2
    compare(tmp_path, *small_diffusers)


@pytest.mark.slow
def test_ldm_celebahq_256_at_its_full_size_equals_diffusers(tmp_path):
    """The sizes of its config.json files, attention_head_dim 32, with random weights."""
    unet = randomise(UNet2DModel(**unet2d((224, 448, 672, 896), 2, 32)))
    vq = randomise(VQModel(**vqmodel((128, 256, 512), 2, 8192)))
    write_diffusers(tmp_path, unet, vq, old_names)
    found, _ = inspect(tmp_path / "unet" / "diffusion_pytorch_model.bin")
    assert found.name.startswith("LDM celeba256 or ffhq256: U-Net 274,056,163 parameters")
    compare(tmp_path, unet, vq)


@pytest.mark.parametrize("full", [False, True])
def test_every_name_is_renamed_to_a_released_one_both_ways(full):
    widths, blocks = ((224, 448, 672, 896), 2) if full else ((128, 256), 1)
    with torch.device("meta"):
        theirs = UNet2DModel(**unet2d(widths, blocks, 32)).state_dict()
        ours = UNet(channels=widths[0], mult=tuple(w // widths[0] for w in widths), blocks=blocks,
                    attention=(False, *[True] * (len(widths) - 1)), context_dim=None,
                    head_channels=32).state_dict()
        stage = VQModel(**vqmodel((128, 256, 512), 2, 8192)).state_dict()
        expected = Autoencoder().state_dict()
    for found, wanted in ((unet_from_diffusers(theirs, 32), ours),
                          (first_stage_from_diffusers(stage), expected)):
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    with pytest.raises(ValueError, match="surplus.weight is no name of diffusers' UNet2DModel"):
        unet_from_diffusers(theirs | {"surplus.weight": torch.zeros(1)}, 32)
    with pytest.raises(ValueError, match="encoder.mid_block.x is no name of diffusers' VQModel"):
        first_stage_from_diffusers(stage | {"encoder.mid_block.x": torch.zeros(1)})


@pytest.mark.parametrize("part, changes, said", [
    ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos is False, not True"),
    ("unet", {"freq_shift": 1}, "freq_shift is 1, not 0"),
    ("unet", {"norm_eps": 1e-6}, "norm_eps is 1e-06"),
    ("unet", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ("unet", {"attention_head_dim": "wide"}, "attention_head_dim is 'wide'"),
    ("unet", {"attention_head_dim": 0}, "attention_head_dim is 0"),
    ("unet", {"attention_head_dim": 48}, "get the whole file"),  # divides no block
    ("vqvae", {"norm_type": "spatial"}, "norm_type is 'spatial'"),
    ("scheduler", {"beta_end": 0.012}, "scheduler_config.json says that beta_end is 0.012"),
    ("scheduler", {"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
])
def test_settings_that_leave_no_trace_in_tensors_are_read(
    small_diffusers, tmp_path, part, changes, said
):
    write_diffusers(tmp_path, *small_diffusers)
    path = next((tmp_path / part).glob("*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=said):
        load_base(tmp_path, "cpu")
    weights = "unet" if part == "scheduler" else part
    assert main(["check", str(tmp_path / weights / "diffusion_pytorch_model.bin")]) == 1


def test_a_misshapen_attention_in_diffusers_layout_is_no_traceback(small_diffusers, tmp_path):
    write_diffusers(tmp_path, *small_diffusers)
    path = tmp_path / "unet" / "diffusion_pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    name = "mid_block.attentions.0.to_q.weight"
    for wrong in (state[name][:-1], state[name].flatten()):
        torch.save(state | {name: wrong}, path)
        assert main(["check", str(path)]) == 1
        with pytest.raises(ValueError, match="get the whole file"):
            load_base(tmp_path, "cpu")


def test_heads_are_as_wide_as_config_json_says_and_unknown_without_it(small_diffusers, tmp_path):
    write_diffusers(tmp_path, *small_diffusers)
    assert load_base(tmp_path, "cpu").unet.middle_block[1].heads == 4
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_head_dim": None}))
    assert load_base(tmp_path, "cpu").unet.middle_block[1].heads == 1
    path.unlink()
    with pytest.raises(ValueError, match="its config.json is not beside it"):
        load_base(tmp_path, "cpu")


def test_the_released_size_is_known_without_a_config():
    with torch.device("meta"):
        state = UNet2DModel(**unet2d((224, 448, 672, 896), 2, 32)).state_dict()
    found = identify(state)
    assert found.problem is None and found.parts == ("unet",)
    assert found.name.startswith("LDM celeba256 or ffhq256: U-Net 274,056,163 parameters")


def test_what_else_is_in_diffusers_layout_is_named_and_refused():
    widths = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
    with torch.device("meta"):
        blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        stable = [UNet2DConditionModel(**widths, **blocks, cross_attention_dim=dim).state_dict()
                  for dim in (768, 1024)]
        vae = AutoencoderKL(**widths, down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2).state_dict()
        narrow = UNet2DModel(**widths, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                             up_block_types=("AttnUpBlock2D", "UpBlock2D")).state_dict()
    for state, version in zip(stable, "12", strict=True):
        found = identify(state)
        assert found.name == f"a Stable Diffusion {version} U-Net in diffusers' layout"
        assert "conditioned on texts" in found.problem and "ldm-celebahq-256" in found.problem
    found = identify(vae)
    assert "AutoencoderKL" in found.name and "trained on its latents" in found.problem
    config = {"_class_name": "UNet2DModel", "norm_num_groups": 32}
    assert "other groups" in identify(narrow, config).problem
    with torch.device("meta"):
        narrow = VQModel(**(vqmodel((32, 64), 1, 8) | {"norm_num_groups": 8})).state_dict()
    assert "other groups" in identify(narrow).problem
