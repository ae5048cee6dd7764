"""The first stages against diffusers at full published size, quantisation, released keys."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from parity import randomise, relative_error, renamed
from torch import nn
from torch.testing import assert_close

from tinyanl.autoencoder import Autoencoder


def as_linear(tensor):
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def diffusers_name(levels):
    def rename(name, tensor):
        name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
        name = name.replace("mid.block_1", "mid_block.resnets.0").replace(
            "mid.block_2", "mid_block.resnets.1"
        )
        name = name.replace("mid.attn_1", "mid_block.attentions.0")
        for part, theirs in (
            ("encoder.down.", "encoder.down_blocks."),
            ("decoder.up.", "decoder.up_blocks."),
        ):
            if name.startswith(part):
                i, rest = name.removeprefix(part).split(".", 1)
                i = (
                    i if "down" in part else str(levels - 1 - int(i))
                )  # diffusers counts the decoder from the bottom
                rest = rest.replace("block.", "resnets.").replace("attn.", "attentions.")
                rest = rest.replace("downsample.", "downsamplers.0.").replace(
                    "upsample.", "upsamplers.0."
                )
                name = f"{theirs}{i}.{rest}"
        if "attentions" in name:
            for ours, theirs in (
                ("norm.", "group_norm."),
                ("q.", "to_q."),
                ("k.", "to_k."),
                ("v.", "to_v."),
            ):
                head, tail = name.rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
                if tail.startswith(ours):
                    return [(f"{head}.{tail.replace(ours, theirs)}", as_linear(tensor))]
            return [(name.replace("proj_out", "to_out.0"), as_linear(tensor))]
        return [(name, tensor)]

    return rename


def compare(ours, theirs, levels, encode, side=64):
    ours = randomise(ours).eval()
    g, rename = torch.Generator().manual_seed(1), diffusers_name(levels)
    x = torch.rand(2, 3, side, side, generator=g) * 2 - 1
    if ours.quantize:  # codes spread like the latents they stand for
        with torch.no_grad():
            z, codes = ours.encode(x), ours.quantize.embedding.weight
            codes.copy_(
                z.mean((0, 2, 3)) + z.std((0, 2, 3)) * torch.randn(codes.shape, generator=g)
            )
    theirs.load_state_dict(renamed(ours.state_dict(), rename), strict=True)
    theirs.eval()
    for (
        name,
        norm,
    ) in (
        ours.named_modules()
    ):  # eps moves the output by 1e-6, which no output could tell from rounding
        if isinstance(norm, nn.GroupNorm):
            other = theirs.get_submodule(
                rename(f"{name}.weight", norm.weight)[0][0].removesuffix(".weight")
            )
            assert (norm.eps, norm.num_groups) == (other.eps, other.num_groups), name
    again = Autoencoder.from_checkpoint(
        {"first_stage_model." + k: v for k, v in ours.state_dict().items()}
        | {"first_stage_model.loss.discriminator.weight": torch.zeros(3)}
    )
    with torch.no_grad():
        z = again.encode(x)
        assert (
            not ours.quantize
            or len(again.quantize(z).flatten(2).unique(dim=2)[0, 0]) > z[0, 0].numel() // 4
        )
        assert relative_error(z, encode(theirs, x)) < 1e-4
        assert relative_error(again.decode(z), theirs.decode(z).sample) < 1e-4


def plain_blocks(n):
    return {
        "down_block_types": ("DownEncoderBlock2D",) * n,
        "up_block_types": ("UpDecoderBlock2D",) * n,
    }


@pytest.mark.slow
def test_vq_f4_encodes_and_decodes_as_diffusers():
    ours = Autoencoder()
    theirs = VQModel(
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=8192,
        vq_embed_dim=3,
        **plain_blocks(3),
    )
    compare(ours, theirs, 3, lambda m, x: m.encode(x).latents)


@pytest.mark.slow
def test_vq_f8_with_attention_in_its_last_level_equals_diffusers():
    ours = Autoencoder(
        channels=128,
        mult=(1, 2, 2, 4),
        attention=(False, False, False, True),
        z_channels=4,
        embed_dim=4,
        codes=16384,
    )
    theirs = VQModel(
        block_out_channels=(128, 256, 256, 512),
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=16384,
        vq_embed_dim=4,
        down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
    )
    compare(ours, theirs, 4, lambda m, x: m.encode(x).latents)


@pytest.mark.slow
def test_kl_f8_encodes_to_the_mean_and_decodes_as_diffusers():
    ours = Autoencoder(**KL_F8)
    theirs = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        **plain_blocks(4),
    )
    compare(ours, theirs, 4, lambda m, x: m.encode(x).latent_dist.mean)


KL_F8 = dict(mult=(1, 2, 4, 4), z_channels=4, embed_dim=4, codes=None)


@pytest.mark.parametrize("sizes, count", [({}, 55_322_782), (KL_F8, 83_653_863)])
def test_parameters_are_as_many_as_published(sizes, count):
    with torch.device("meta"):
        model = Autoencoder(**sizes)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("attention", [False, True])
def test_a_small_vq_model_equals_diffusers(attention):
    """128 channels: the fewest that have 32 groups at every norm."""
    ours = Autoencoder(mult=(1, 1), blocks=1, attention=(False, attention), codes=256)
    name = "Attn" if attention else ""
    theirs = VQModel(
        block_out_channels=(128, 128),
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=256,
        down_block_types=("DownEncoderBlock2D", f"{name}DownEncoderBlock2D"),
        up_block_types=(f"{name}UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    compare(ours, theirs, 2, lambda m, x: m.encode(x).latents)


def test_a_small_kl_model_equals_diffusers():
    ours = Autoencoder(mult=(1, 1), blocks=1, z_channels=4, embed_dim=4, codes=None)
    theirs = AutoencoderKL(
        block_out_channels=(128, 128), layers_per_block=1, latent_channels=4, **plain_blocks(2)
    )
    compare(ours, theirs, 2, lambda m, x: m.encode(x).latent_dist.mean)


def small(**kw):
    torch.manual_seed(0)
    return randomise(Autoencoder(channels=32, mult=(1, 2), blocks=1, codes=50, **kw))


def test_decode_quantises_to_the_nearest_code_and_encode_does_not():
    model, z = small(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    codes = model.quantize.embedding.weight
    distance = ((z.permute(0, 2, 3, 1)[..., None, :] - codes) ** 2).sum(-1)  # B h w V
    nearest = codes[distance.argmin(-1)].permute(0, 3, 1, 2)
    with torch.no_grad():
        assert_close(model.quantize(z), nearest, atol=0, rtol=0)
        assert_close(model.decode(z), model.decode(nearest))
        x = torch.rand(1, 3, 16, 16) * 2 - 1
        encoded = model.encode(x)
        assert_close(encoded, model.quant_conv(model.encoder(x)))
        assert not torch.equal(encoded, model.quantize(encoded))


@pytest.mark.parametrize(
    "settings", [dict(), dict(mid_attention=False), dict(attention=(False, True))]
)
def test_sizes_come_back_from_the_tensors_of_a_file_of_its_own(settings):
    model = small(**settings)
    again = Autoencoder.from_checkpoint(
        {k: v.half() for k, v in model.state_dict().items()}, prefix=""
    )
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(v.dtype == torch.float32 for v in again.state_dict().values())


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="multiples of 2"):
        small().encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="no LDM autoencoder"):
        Autoencoder.from_checkpoint({"encoder.weight": torch.zeros(1)})
    state = small().state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*surplus"):
        Autoencoder.from_checkpoint(state | {"decoder.surplus": torch.zeros(1)}, prefix="")
    del state["decoder.conv_out.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*conv_out"):
        Autoencoder.from_checkpoint(state, prefix="")
