"""The first stage of latent diffusion (Rombach et al. 2022; VQGAN, Esser et al. 2021): pictures to
latents and back.

    x (B 3 H W) in [-1, 1]  ->  encode  ->  z (B C H/f W/f)  ->  decode  ->  x

Attribute names are the released keys, sizes come from the tensors: VQ-f4 (cin256-v2, celeba256,
ffhq256), VQ-f8, VQ-f16, KL-f4 to KL-f32. Diffusion runs on the latent before quantisation: a VQ
encode does not quantise, a VQ decode does.
B batch, C latent channels, f downsampling factor, N = positions, V codes.

Copy this file alone: it needs torch and einops, nothing else of tinyanl. Usage:

    import torch
    from autoencoder import Autoencoder
    model = Autoencoder(channels=32, mult=(1, 2), blocks=1, codes=64)    # Autoencoder() is VQ-f4
    again = Autoencoder.from_checkpoint(model.state_dict(), prefix="")   # sizes from the tensors
    z = again.encode(torch.rand(1, 3, 32, 32) * 2 - 1)
    print(z.shape, again.decode(z).shape)
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups at every released width. Fewer in a narrow model: groups of one channel would erase
    flat colours."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.norm2 = group_norm(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return h + x


class AttnBlock(nn.Module):
    """Self-attention over positions, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        layers = (self.q, self.k, self.v)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in layers)
        h = F.scaled_dot_product_attention(q, k, v)  # B 1 N C
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the resolution, by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below only, as released


class Upsample(nn.Sequential):
    """Twice the resolution: nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        nearest = nn.Upsample(scale_factor=2)
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        super().__init__(OrderedDict(nearest=nearest, conv=conv))


class Level(nn.Module):
    """One resolution: residual blocks, with attention after each where the model has it, and then
    a change of resolution where there is one."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        blocks: int,
        attention: bool,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ):
        super().__init__()
        self.block = nn.ModuleList()
        for i in range(blocks):
            self.block.append(ResnetBlock(c_out if i else c_in, c_out))
        self.attn = nn.ModuleList()
        if attention:
            self.attn.extend(AttnBlock(c_out) for _ in range(blocks))
        if downsample:
            self.downsample = downsample
        if upsample:
            self.upsample = upsample

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                h = getattr(self, name)(h)
        return h


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them or without."""

    def __init__(self, channels: int, attention: bool):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.block_2 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Pictures (B 3 H W) -> (B z H/f W/f), level by level."""

    def __init__(
        self,
        channels: int,
        mult: tuple[int, ...],
        blocks: int,
        attention: tuple[bool, ...],
        mid_attention: bool,
        z: int,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Sequential()
        c = channels
        for i, m in enumerate(mult):
            downsample = Downsample(channels * m) if i < len(mult) - 1 else None
            self.down.append(Level(c, channels * m, blocks, attention[i], downsample=downsample))
            c = channels * m
        self.mid = Middle(c, mid_attention)
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.mid(self.down(self.conv_in(x))))))


class Decoder(nn.Module):
    """(B z h w) -> pictures (B 3 f*h f*w), level by level."""

    def __init__(
        self,
        channels: int,
        mult: tuple[int, ...],
        blocks: int,
        attention: tuple[bool, ...],
        mid_attention: bool,
        z: int,
    ):
        super().__init__()
        c = channels * mult[-1]
        self.conv_in = nn.Conv2d(z, c, 3, padding=1)
        self.mid = Middle(c, mid_attention)
        self.up = nn.ModuleList()
        # Levels are computed from the lowest resolution on, but stored from the highest on.
        for i, m in reversed(list(enumerate(mult))):
            upsample = Upsample(channels * m) if i else None
            level = Level(c, channels * m, blocks + 1, attention[i], upsample=upsample)
            self.up.insert(0, level)
            c = channels * m
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    """Replaces each latent vector by the nearest of V codes."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)

    def forward(self, z: Tensor) -> Tensor:
        flat = rearrange(z, "b c h w -> b (h w) c")
        # One picture at a time: its distances to all codes are N x V numbers.
        index = torch.stack([torch.cdist(x, self.embedding.weight).argmin(1) for x in flat])  # B N
        return rearrange(self.embedding(index), "b (h w) c -> b c h w", h=z.shape[2])


class Autoencoder(nn.Module):
    """VQ where `codes` is a number, KL where it is None. The defaults are VQ-f4 of cin256-v2:
    55,322,782 parameters.

    `scale_factor` is 1 unless a checkpoint says otherwise: LDM multiplies the latents of KL models
    by it (its scale_by_std), so that diffusion runs on unit variance."""

    def __init__(
        self,
        channels: int = 128,
        mult: tuple[int, ...] = (1, 2, 4),
        blocks: int = 2,
        attention: tuple[bool, ...] = (),
        mid_attention: bool = True,
        z_channels: int = 3,
        embed_dim: int = 3,
        codes: int | None = 8192,
    ):
        super().__init__()
        attention = attention or (False,) * len(mult)
        moments = 1 if codes else 2  # a KL encoder gives mean and log variance
        levels = (channels, mult, blocks, attention, mid_attention)
        self.factor = 2 ** (len(mult) - 1)
        self.scale_factor = 1.0
        self.encoder = Encoder(*levels, moments * z_channels)
        self.decoder = Decoder(*levels, z_channels)
        self.quant_conv = nn.Conv2d(moments * z_channels, moments * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.quantize = Quantizer(codes, embed_dim) if codes else None

    def encode(self, x: Tensor) -> Tensor:
        """x (B 3 H W) in [-1, 1] -> z (B C H/f W/f): unquantised, of a KL model the mean.

        ValueError where f does not divide H and W."""
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"picture sides {tuple(x.shape[2:])} must be multiples of "
                             f"{self.factor}")
        z = self.quant_conv(self.encoder(x))
        if self.quantize is None:  # a KL model: mean and log variance
            z = z.chunk(2, dim=1)[0]
        return z * self.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """z (B C h w) -> x (B 3 f*h f*w), about [-1, 1], not clipped.

        A VQ model moves z to the nearest codes first."""
        z = z / self.scale_factor
        if self.quantize is not None:
            z = self.quantize(z)
        return self.decoder(self.post_quant_conv(z))

    @classmethod
    def from_checkpoint(
        cls, state: dict[str, Tensor], prefix: str = "first_stage_model."
    ) -> "Autoencoder":
        """A float32 autoencoder with the sizes and weights of `state`. A first stage that was
        published alone has the prefix "".

        `loss.*` (the discriminator it was trained with) is left out. The file of a whole LDM may
        hold a scale_factor. ValueError: there is no autoencoder under `prefix`. RuntimeError: a
        tensor is missing or left over."""
        weights = {}
        for name, value in state.items():
            if name.startswith(prefix) and not name.startswith(prefix + "loss."):
                weights[name.removeprefix(prefix)] = value.float()
        if "encoder.conv_in.weight" not in weights:
            raise ValueError(f"no LDM autoencoder under {prefix!r}: the keys begin with "
                             f"{sorted(state)[:3]}")
        channels = len(weights["encoder.conv_in.weight"])
        mult = []
        attention = []
        while (conv := f"encoder.down.{len(mult)}.block.0.conv1.weight") in weights:
            attention.append(f"encoder.down.{len(mult)}.attn.0.q.weight" in weights)
            mult.append(len(weights[conv]) // channels)
        blocks = 0
        while f"encoder.down.0.block.{blocks}.conv1.weight" in weights:
            blocks += 1
        codes = weights.get("quantize.embedding.weight")
        with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
            model = cls(
                channels,
                tuple(mult),
                blocks,
                tuple(attention),
                mid_attention="encoder.mid.attn_1.q.weight" in weights,
                z_channels=weights["decoder.conv_in.weight"].shape[1],
                embed_dim=weights["post_quant_conv.weight"].shape[1],
                codes=None if codes is None else len(codes),
            )
        model.load_state_dict(weights, strict=True, assign=True)
        model.scale_factor = float(state.get("scale_factor", 1.0))
        return model
