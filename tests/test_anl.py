"""The ANL block: identity at the start, its counts, what one token means, and attention by hand."""

import pytest
import torch
import torch.nn.functional as F
from parity import randomise
from torch.testing import assert_close

from tinyanl.anl import ANL, HEAD, ANLs
from tinyanl.models import EMBEDDED
from tinyanl.unet import UNet


@pytest.fixture(scope="module")
def embedded():
    state = torch.load(EMBEDDED / "ldm.ckpt", weights_only=True)["state_dict"]
    unet = UNet.from_checkpoint(state).requires_grad_(False)
    return unet, state["cond_stage_model.embedding.weight"][-1].float().expand(2, 1, -1)


@pytest.mark.parametrize(
    "tokens, blocks, in_all", [(1, 123_951_360, 123_951_360), (4, 139_397_760, 140_448_384)]
)
def test_parameters_on_cin256_v2(tokens, blocks, in_all):
    with torch.device("meta"):
        anls = ANLs(UNet().sites, cond_dim=512, tokens=tokens)
    assert len(anls.blocks) == 22
    assert sum(p.numel() for p in anls.blocks.parameters()) == blocks
    assert sum(p.numel() for p in anls.parameters()) == in_all
    assert any(
        "to_q" in name or "to_k" in name or "norm_q" in name for name in anls.state_dict()
    ) == (tokens > 1)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_fresh_set_leaves_the_unet_bit_equal_and_alone_gets_gradients(embedded, tokens):
    unet, context = embedded
    torch.manual_seed(0)
    anls, cond = ANLs(unet.sites, 128, tokens), torch.randn(2, 128)
    z, t = torch.randn(2, unet.in_channels, 16, 16), torch.tensor([20, 700])
    out = unet(z, t, context, anls.bind(cond))
    assert torch.equal(out, unet(z, t, context))
    out.square().mean().backward()
    last = [
        p.grad.abs().max()
        for name, p in anls.named_parameters()
        if "to_out" in name or "from_hidden" in name
    ]
    assert len(last) == 4 * len(unet.sites) and min(last) > 0
    torch.optim.SGD(anls.parameters(), lr=0.1).step()
    anls.zero_grad()  # the layers before the zeros get theirs once the zeros have moved
    unet(z, t, context, anls.bind(cond)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in anls.parameters())
    assert all(p.grad is None for p in unet.parameters())


def by_hand(anl, h, cond_tokens):
    """The block from its definition, head by head, with an explicit softmax."""
    x = h.flatten(2).transpose(1, 2)  # B N C
    v, heads = anl.to_v(cond_tokens), []
    if (
        anl.tokens == 1
    ):  # it has no queries and keys: whatever they were, a softmax over one key is 1
        g = torch.Generator().manual_seed(2)
        q, k = torch.randn(x.shape, generator=g), torch.randn(v.shape, generator=g)
    else:
        q, k = anl.to_q(anl.norm_q(x)), anl.to_k(cond_tokens)
    for i in range(0, h.shape[1], HEAD):
        one = slice(i, i + HEAD)
        weights = (torch.einsum("bnd,bkd->bnk", q[..., one], k[..., one]) / HEAD**0.5).softmax(-1)
        heads.append(torch.einsum("bnk,bkd->bnd", weights, v[..., one]))
    x = x + anl.to_out(torch.cat(heads, dim=-1))
    value, gate = anl.to_hidden(anl.norm_mlp(x)).chunk(2, dim=-1)
    return (x + anl.from_hidden(value * F.gelu(gate))).transpose(1, 2).view_as(h)


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_block_equals_its_definition(tokens):
    anl, g = randomise(ANL(64, cond_dim=16, tokens=tokens)), torch.Generator().manual_seed(1)
    h, cond = torch.randn(2, 64, 4, 6, generator=g), torch.randn(2, tokens, 16, generator=g)
    assert_close(anl(h, cond), by_hand(anl, h, cond), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(anl(h, cond), h)


def test_tokens_are_cut_from_the_condition_by_one_shared_map():
    anls, g = (
        randomise(ANLs({"a": 32, "b": 64}, cond_dim=16, tokens=3)),
        torch.Generator().manual_seed(1),
    )
    cond, h = torch.randn(2, 16, generator=g), torch.randn(2, 64, 4, 4, generator=g)
    extra, tokens = anls.bind(cond), anls.to_tokens(cond).view(2, 3, 16)
    for hidden in (h, -h):  # bound once, used at every step
        assert_close(extra("b", hidden), anls.blocks["b"](hidden, tokens))


def test_gradients_are_right():
    anl = randomise(ANL(32, cond_dim=4, tokens=2, ratio=1)).double()
    g = torch.Generator().manual_seed(1)
    h, cond = (
        torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 32, 1, 2), (1, 2, 4))
    )
    assert torch.autograd.gradcheck(anl, (h, cond))


def test_channels_that_do_not_split_into_heads_are_an_error():
    with pytest.raises(ValueError, match="channels=100"):
        ANL(100, cond_dim=8)
