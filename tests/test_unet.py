"""The U-Net against diffusers at full published size, released keys, sites, averaged weights, and
its sense of time."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from parity import randomise, relative_error, renamed
from torch import nn
from torch.testing import assert_close

from tinyanl.models import EMBEDDED
from tinyanl.unet import (
    AttentionBlock,
    FeedForward,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    UNet,
    Upsample,
    attend,
    averaged_weights,
    memory_format,
)

SITES = {"in_1": 192, "in_2": 192, "in_4": 384, "in_5": 384}
SITES |= {"in_7": 576, "in_8": 576, "in_10": 960, "in_11": 960, "mid_0": 960, "mid_1": 960}
SITES |= {f"out_{i}": c for i, c in enumerate([960] * 3 + [576] * 3 + [384] * 3 + [192] * 3)}
CELEBA = dict(channels=224, mult=(1, 2, 3, 4), context_dim=None, head_channels=32)
SMALL = dict(channels=32, mult=(1, 2), attention=(False, True), context_dim=16)
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def diffusers_name(head_channels):
    """Released names -> diffusers', for four levels of two blocks."""

    def rename(name, tensor):
        for ours, theirs in OUTER.items():
            if name.startswith(ours + "."):
                return [(name.replace(ours, theirs), tensor)]
        part, i, *rest = name.split(".")
        rest = ".".join(rest)
        if part == "middle_block":
            place = {
                "0": "mid_block.resnets.0",
                "1": "mid_block.attentions.0",
                "2": "mid_block.resnets.1",
            }[i]
        else:
            layer, rest = rest.split(".", 1)
            level, n = divmod(int(i) - 1, 3) if part == "input_blocks" else divmod(int(i), 3)
            place = f"{'down' if part == 'input_blocks' else 'up'}_blocks.{level}."
            if rest.startswith(("op.", "conv.")):  # a change of resolution
                kind = "downsamplers" if rest.startswith("op.") else "upsamplers"
                return [(f"{place}{kind}.0.conv.{rest.split('.')[1]}", tensor)]
            place += f"{'resnets' if layer == '0' else 'attentions'}.{n}"
        for ours, theirs in RESNET.items():
            rest = rest.replace(ours, theirs)
        if (
            head_channels and "attentions" in place
        ):  # AttentionBlock: each head's q, k and v lie side by side
            if rest.startswith("qkv"):
                q, k, v = tensor.view(-1, 3, head_channels, *tensor.shape[1:2]).unbind(1)
                return [
                    (f"{place}.to_{x}.{rest.split('.')[1]}", value.reshape(-1, *tensor.shape[1:2]))
                    for x, value in zip("qkv", (q, k, v), strict=True)
                ]
            rest = rest.replace("norm", "group_norm").replace("proj_out", "to_out.0")
            return [(f"{place}.{rest}", tensor.squeeze(-1) if tensor.dim() == 3 else tensor)]
        return [(f"{place}.{rest}", tensor)]

    return rename


def compare(ours, theirs, head_channels, **inputs):
    rename = diffusers_name(head_channels)
    theirs.load_state_dict(renamed(ours.state_dict(), rename), strict=True, assign=True)
    for (
        name,
        norm,
    ) in (
        ours.named_modules()
    ):  # eps moves the output by 1e-6, which no output could tell from rounding
        if isinstance(norm, (nn.GroupNorm, nn.LayerNorm)):
            other = theirs.get_submodule(
                rename(f"{name}.weight", norm.weight)[0][0].removesuffix(".weight")
            )
            assert norm.eps == other.eps and getattr(norm, "num_groups", 0) == getattr(
                other, "num_groups", 0
            ), name
    g = torch.Generator().manual_seed(1)
    z, t = (
        torch.randn(2, 3, 16, 16, generator=g),
        torch.tensor([3, 871]),
    )  # 16 -> 2 at the lowest level
    with torch.no_grad():
        again = UNet.from_checkpoint(
            {"model.diffusion_model." + k: v for k, v in ours.state_dict().items()},
            head_channels=head_channels,
        )
        mine = again(z, t, *inputs.values())
        assert relative_error(mine, theirs.eval()(z, t, **inputs).sample) < 1e-4


@pytest.fixture(scope="module")
def cin256_v2():
    return randomise(UNet()).eval()


@pytest.mark.slow
def test_cin256_v2_equals_diffusers(cin256_v2):
    with_a_context(cin256_v2, (192, 384, 576, 960))


def test_a_small_unet_with_a_context_equals_diffusers():
    """Of four levels, as diffusers_name wants, and wide enough for 32 groups at every norm."""
    ours = UNet(channels=128, mult=(1, 1, 2, 2), context_dim=48)
    with_a_context(randomise(ours).eval(), (128, 128, 256, 256))


def with_a_context(ours, widths):
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            block_out_channels=widths,
            layers_per_block=2,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
            cross_attention_dim=ours.context_dim,
            up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
            attention_head_dim=1,
        )  # heads, in this class
    # three tokens: to a single one, every query and key attends alike, and theirs would go untested
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(2, 3, ours.context_dim, generator=generator)
    compare(ours, theirs, None, encoder_hidden_states=context)


@pytest.mark.slow
def test_celeba256_and_ffhq256_equal_diffusers():
    without_a_context(randomise(UNet(**CELEBA)).eval(), (224, 448, 672, 896))


def test_a_small_unet_without_a_context_equals_diffusers():
    ours = UNet(channels=128, mult=(1, 1, 2, 2), context_dim=None, head_channels=32)
    without_a_context(randomise(ours).eval(), (128, 128, 256, 256))


def without_a_context(ours, widths):
    with torch.device("meta"):
        theirs = UNet2DModel(
            sample_size=64,
            block_out_channels=widths,
            layers_per_block=2,
            attention_head_dim=32,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
            up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
            flip_sin_to_cos=True,
            freq_shift=0,
            downsample_padding=1,
            norm_eps=1e-5,
        )
    compare(ours, theirs, 32)


def test_celeba256_has_as_many_parameters_as_its_configuration_says():
    with torch.device("meta"):
        unet = UNet(**CELEBA)
    assert sum(p.numel() for p in unet.parameters()) == 274_056_163


def test_cin256_v2_has_the_published_counts_and_22_sites():
    with torch.device("meta"):
        unet = UNet()
    assert sum(p.numel() for p in unet.parameters()) == 400_920_579
    assert len(unet.state_dict()) == 688
    transformers = [m for m in unet.modules() if isinstance(m, SpatialTransformer)]
    assert (
        len(transformers) == 16
        and sum(p.numel() for m in transformers for p in m.parameters()) == 169_550_400
    )
    assert list(unet.sites.items()) == list(SITES.items())


def small_unet(**kw):
    torch.manual_seed(0)
    return UNet(**SMALL, **kw)


def test_extra_is_called_at_every_site_in_order_with_its_channels():
    unet, seen = small_unet(), {}

    def extra(site, h):
        seen[site] = h.shape[1]
        return h

    unet(torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 1, 16), extra)
    assert list(seen.items()) == list(unet.sites.items())


@pytest.mark.parametrize("site", list(small_unet().sites))
def test_extra_at_a_site_is_what_a_hook_on_the_last_layer_of_its_block_would_be(site):
    unet, g = small_unet(), torch.Generator().manual_seed(4)
    where, i = site.split("_")
    layers = {"in": unet.input_blocks, "out": unet.output_blocks}.get(where, [])
    last = unet.middle_block[1 + int(i)] if where == "mid" else layers[int(i)][-1]
    if isinstance(
        last, Upsample
    ):  # the site comes before a change of resolution, and after a transformer
        last = layers[int(i)][-2]
    z, t, context = (
        torch.randn(2, 3, 8, 8, generator=g),
        torch.tensor([5, 700]),
        torch.randn(2, 3, 16, generator=g),
    )
    with torch.no_grad():
        plain = unet(z, t, context)
        extra = unet(z, t, context, lambda s, h: h * 1.5 if s == site else h)
        last.register_forward_hook(lambda module, args, out: out * 1.5)
        assert torch.equal(extra, unet(z, t, context)) and not torch.allclose(extra, plain)


def test_the_feed_forward_has_the_exact_gelu():
    """By its definition: 1e-4 is too coarse to tell it from the tanh approximation."""
    ff, x = (
        randomise(FeedForward(8)).double(),
        torch.linspace(-3, 3, 40, dtype=torch.float64).view(1, 5, 8),
    )
    value, gate = ff.net[0].proj(x).chunk(2, dim=-1)
    assert_close(
        ff(x), ff.net[2](value * gate * (1 + torch.erf(gate / 2**0.5)) / 2), atol=1e-12, rtol=1e-10
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_group_norm_is_its_definition_and_puts_channels_last(layout):
    norm, h = (
        randomise(GroupNorm(64)).double(),
        torch.randn(2, 64, 4, 6, dtype=torch.float64) * 3 + 1,
    )
    out = norm(h.contiguous(memory_format=layout))
    groups = h.view(2, 16, -1)
    expected = (groups - groups.mean(2, keepdim=True)) / (
        groups.var(2, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    assert_close(out, expected.view_as(h) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_channels_lie_last_at_every_site_and_where_they_lie_changes_nothing():
    unet = randomise(small_unet())
    z, t, context, seen = torch.randn(2, 3, 8, 8), torch.tensor([5, 700]), torch.randn(2, 1, 16), []

    def extra(site, h):
        seen.append(h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous())
        return h

    for model in (unet, UNet.from_checkpoint(unet.state_dict(), "")):
        out = model(z, t, context, extra)
        assert all(seen) and len(seen) == len(unet.sites), seen
        seen.clear()
    assert_close(out, unet.to(memory_format=torch.contiguous_format)(z, t, context))


def test_on_mps_tensors_stay_contiguous_and_elsewhere_channels_lie_last():
    """The layout only: no test machine has MPS."""
    assert memory_format(torch.device("mps")) == torch.contiguous_format
    assert memory_format(torch.device("cuda")) == torch.channels_last
    assert memory_format(torch.device("cpu")) == torch.channels_last


def test_fresh_weights_are_those_that_a_seed_has_always_given():
    """The order in which layers draw their numbers: a seed of pretraining must keep its meaning."""
    torch.manual_seed(1)
    unet = UNet(3, 3, 32, (1, 2), 1, (True, True), None, 16)
    torch.manual_seed(1)
    time = nn.Linear(32, 128), nn.Linear(128, 128)
    conv_in = nn.Conv2d(3, 32, 3)
    attention = AttentionBlock(32, 16)
    block = ResBlock(32, 32, 128)
    assert torch.equal(unet.time_embed[2].weight, time[1].weight)
    assert torch.equal(unet.input_blocks[0][0].weight, conv_in.weight)
    assert torch.equal(unet.input_blocks[1][1].qkv.weight, attention.qkv.weight)
    assert torch.equal(unet.input_blocks[1][0].in_layers[2].weight, block.in_layers[2].weight)


def test_one_head_as_wide_as_its_block_attends_like_torchs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 48, requires_grad=True) for n in (6, 5, 5))
    ours, theirs = attend(q, k, v, 1), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (ours, theirs)))


def test_averaged_weights_are_used_where_a_file_has_them():
    live, averaged = small_unet().state_dict(), randomise(small_unet()).state_dict()
    state = {"model.diffusion_model." + k: v for k, v in live.items()}
    state |= {
        "model_ema." + ("diffusion_model." + k).replace(".", ""): v for k, v in averaged.items()
    }
    state["model_ema.decay"] = torch.tensor(0.9999)
    assert "model_ema.diffusion_modelinput_blocks00weight" in state  # as LDM writes it
    loaded = UNet.from_checkpoint(state).state_dict()
    assert all(torch.equal(loaded[k], averaged[k]) for k in averaged)
    with pytest.raises(RuntimeError, match="Missing key.*out.2.bias"):
        UNet.from_checkpoint({k: v for k, v in state.items() if not k.endswith("modelout2bias")})
    alone = {k: v for k, v in state.items() if k.startswith("model_ema.")}
    loaded = UNet.from_checkpoint(alone).state_dict()
    assert loaded.keys() == averaged.keys()
    assert all(torch.equal(loaded[k], averaged[k]) for k in averaged)


@pytest.mark.parametrize("kind", ["cin256-v2", "celeba256", "embedded"])
def test_every_name_comes_back_from_averaged_weights_which_have_lost_their_dots(kind):
    sizes = {"cin256-v2": {}, "celeba256": CELEBA, "embedded": SMALL}[kind]
    with torch.device("meta"):
        state = UNet(**sizes).state_dict()
    averaged = {
        "model_ema." + ("diffusion_model." + k).replace(".", ""): v for k, v in state.items()
    }
    found = averaged_weights(averaged)
    assert found.keys() == state.keys() and all(found[k] is state[k] for k in state)


def test_what_pruning_leaves_of_averaged_weights_is_none():
    live = small_unet().state_dict()
    state = {"model.diffusion_model." + k: v for k, v in live.items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    assert averaged_weights(state) == {}
    loaded = UNet.from_checkpoint(state).state_dict()
    assert all(torch.equal(loaded[k], live[k]) for k in live)


def test_an_averaged_tensor_that_belongs_to_nothing_is_an_error():
    weights = small_unet().state_dict()
    state = {"model.diffusion_model." + k: v for k, v in weights.items()}
    state |= {
        "model_ema." + ("diffusion_model." + k).replace(".", ""): v for k, v in weights.items()
    }
    with pytest.raises(ValueError, match="diffusion_modelsurplus"):
        UNet.from_checkpoint(state | {"model_ema.diffusion_modelsurplus": torch.zeros(1)})


def test_half_precision_files_become_float32_and_foreign_ones_are_errors():
    state = {"model.diffusion_model." + k: v.half() for k, v in small_unet().state_dict().items()}
    assert all(v.dtype == torch.float32 for v in UNet.from_checkpoint(state).state_dict().values())
    with pytest.raises(RuntimeError, match="Unexpected key.*surplus"):
        UNet.from_checkpoint(state | {"model.diffusion_model.surplus": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key.*out.0.bias"):
        UNet.from_checkpoint({k: v for k, v in state.items() if not k.endswith("model.out.0.bias")})
    with pytest.raises(ValueError, match="no LDM U-Net"):
        UNet.from_checkpoint({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="no context was given"):
        small_unet()(torch.randn(1, 3, 8, 8), torch.tensor([5]))


@pytest.mark.parametrize(
    "dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)]
)
def test_it_computes_in_the_type_it_is_cast_to(dtype, bound):
    torch.manual_seed(0)
    unet, z, t, context = (
        small_unet(),
        torch.randn(2, 3, 8, 8),
        torch.tensor([5, 900]),
        torch.randn(2, 1, 16),
    )
    with torch.no_grad():
        exact, cast = unet(z, t, context), unet.to(dtype)(z.to(dtype), t, context.to(dtype))
    assert cast.dtype == dtype and relative_error(cast.float(), exact) < bound


def sense_of_time(block: ResBlock, h, early, late):
    """Relative change of a block's residual between two time embeddings, at the same h."""
    a, b = (block(h, emb, None) - block.skip_connection(h) for emb in (early, late))
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize(
    "name, count", [("embedded", 11), pytest.param("cin256-v2", 22, marks=pytest.mark.slow)]
)
def test_every_residual_changes_with_time(name, count, request):
    """The embedded U-Net with its own weights, the published one with random weights; hidden states
    of a real pass."""
    embedded = name == "embedded"
    unet = (
        UNet.from_checkpoint(torch.load(EMBEDDED / "ldm.ckpt", weights_only=True)["state_dict"])
        if embedded
        else request.getfixturevalue("cin256_v2")
    )
    blocks, inputs = [m for m in unet.modules() if isinstance(m, ResBlock)], {}
    hooks = [
        block.register_forward_hook(lambda m, args, out: inputs.__setitem__(m, args[:2]))
        for block in blocks
    ]
    z = torch.randn(2, unet.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    context = torch.zeros(2, 1, unet.context_dim)
    with torch.no_grad():
        unet(z, torch.tensor([10, 10]), context)
        early = inputs[blocks[0]][1]
        unet(z, torch.tensor([900, 900]), context)
        late = inputs[blocks[0]][1]
        for hook in hooks:
            hook.remove()
        changes = [sense_of_time(block, inputs[block][0], early, late) for block in blocks]
    assert len(changes) == count and min(changes) > 1e-2


@pytest.mark.parametrize("blind", [False, True])
def test_a_narrow_block_has_no_groups_of_one_channel_which_would_be_blind_to_time(blind):
    torch.manual_seed(0)
    block = ResBlock(32, 32, 128)
    if blind:
        block.out_layers[0] = nn.GroupNorm(32, 32)
    with torch.no_grad():
        change = sense_of_time(
            block, torch.randn(2, 32, 8, 8), torch.randn(2, 128), torch.randn(2, 128)
        )
    assert change < 1e-4 if blind else change > 1e-2


def test_one_context_token_is_a_bias_and_exactly_what_attention_to_it_gives():
    unet = randomise(
        UNet(channels=32, mult=(1, 2), attention=(True, True), context_dim=16)
    ).requires_grad_(False)
    z, t, context = torch.randn(2, 3, 8, 8), torch.tensor([10, 900]), torch.randn(2, 1, 16)
    twice = unet(
        z, t, context.repeat(1, 2, 1)
    )  # two equal tokens: queries and keys are used, and weigh them alike
    torch.testing.assert_close(unet(z, t, context), twice, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients_from_fewer_activations():
    torch.manual_seed(0)
    unet = UNet(3, 3, 32, (1, 2), 1, (False, True), 16).requires_grad_(False)
    modules = torch.nn.ModuleDict(
        {site: torch.nn.Conv2d(c, c, 1) for site, c in unet.sites.items()}
    )
    z, t, context = torch.randn(2, 3, 8, 8), torch.tensor([10, 900]), torch.randn(2, 1, 16)

    def gradients() -> tuple[list[torch.Tensor], int]:
        kept = []  # what autograd holds on to after the forward pass
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x
        ):
            loss = unet(z, t, context, lambda site, h: h + modules[site](h)).square().mean()
        modules.zero_grad()
        loss.backward()
        return [p.grad for p in modules.parameters()], sum(kept)

    plain, many = gradients()
    unet.checkpointing = True
    again, few = gradients()
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert few < many / 2
