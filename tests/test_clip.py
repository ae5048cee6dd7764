"""CLIP against transformers at full published sizes, in both key layouts, and its preprocessing."""

import pytest
import torch
from parity import randomise, relative_error
from PIL import Image
from torch.testing import assert_close
from torchvision import transforms
from transformers import CLIPConfig, CLIPModel

from tinyanl.clip import CLIP, openai_keys

# Resolution, patch, vision width and layers, text width and layers, embedding, context, vocabulary
SIZES = {
    "ViT-B/32": (224, 32, 768, 12, 512, 12, 512, 77, 49408),
    "ViT-B/16": (224, 16, 768, 12, 512, 12, 512, 77, 49408),
    "ViT-L/14": (224, 14, 1024, 24, 768, 12, 768, 77, 49408),
    "embedded": (64, 8, 192, 6, 128, 4, 128, 32, 2048),
}
PARAMETERS = {"ViT-B/32": 151_277_313, "ViT-B/16": 149_620_737, "ViT-L/14": 427_616_513}


def hugging_face(
    resolution, patch, vision_width, vision_layers, text_width, text_layers, dim, context, vocab
):
    config = CLIPConfig(
        projection_dim=dim,
        vision_config=dict(
            image_size=resolution,
            patch_size=patch,
            hidden_size=vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_width // 64,
            intermediate_size=4 * vision_width,
            hidden_act="quick_gelu",
        ),
        text_config=dict(
            hidden_size=text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_width // 64,
            intermediate_size=4 * text_width,
            max_position_embeddings=context,
            vocab_size=vocab,
            hidden_act="quick_gelu",
            eos_token_id=vocab - 1,
            bos_token_id=vocab - 2,
            pad_token_id=0,
        ),
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    model = model.to_empty(device="cpu")
    for part in (model.vision_model.embeddings, model.text_model.embeddings):
        part.position_ids.copy_(torch.arange(part.position_ids.shape[1])[None])
    with torch.no_grad():
        ids = {name: value.clone() for name, value in model.named_buffers()}
        randomise(model)
        for name, value in model.named_buffers():
            value.copy_(ids[name])
        for (
            name,
            p,
        ) in (
            model.named_parameters()
        ):  # rows of 512 to 1024 numbers, not fan-in: embeddings of unit scale
            if "embedding" in name and p.dim() == 2:
                p.copy_(
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.5
                )
        model.logit_scale.fill_(2.0)
    return model.eval()


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in PARAMETERS), "embedded"]
)
def test_towers_equal_transformers(name):
    theirs = hugging_face(*SIZES[name])
    resolution, *_, context, vocab = SIZES[name]
    ours = CLIP.from_checkpoint(theirs.state_dict()).eval()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, resolution, resolution, generator=g)
    tokens = torch.zeros(2, context, dtype=torch.int64)
    lengths = (3, context - 2)  # a short text and one that fills the context
    for row, words in zip(tokens, lengths, strict=True):
        row[: words + 2] = torch.tensor(
            [vocab - 2, *torch.randint(1, vocab - 2, (words,), generator=g).tolist(), vocab - 1]
        )
    with torch.no_grad():
        images = theirs.visual_projection(theirs.vision_model(pixel_values=x).pooler_output)
        texts = theirs.text_projection(theirs.text_model(input_ids=tokens).pooler_output)
        assert relative_error(ours.encode_image(x), images) < 1e-4
        assert relative_error(ours.encode_text(tokens), texts) < 1e-4


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    resolution, patch, vw, vl, tw, tl, dim, context, vocab = SIZES[name]
    with torch.device("meta"):
        model = CLIP(resolution, patch, vw, vl, context, vocab, tw, tl, dim)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.fixture(scope="module")
def small():
    resolution, patch, vw, vl, tw, tl, dim, context, vocab = SIZES["embedded"]
    torch.manual_seed(0)
    return randomise(CLIP(resolution, patch, vw, vl, context, vocab, tw, tl, dim)).eval()


def test_openai_keys_load_without_conversion_in_half_precision_and_with_their_extra_numbers(small):
    state = {k: v.half() for k, v in small.state_dict().items()}
    state |= {
        "input_resolution": torch.tensor(64),
        "context_length": torch.tensor(32),
        "vocab_size": torch.tensor(2048),
    }
    again = CLIP.from_checkpoint(state)
    assert again.resolution == 64 and again.context_length == 32 and again.dim == 128
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32
        assert_close(value, small.state_dict()[name].half().float(), atol=0, rtol=0)


def test_hugging_face_keys_become_exactly_openais(small):
    theirs = hugging_face(*SIZES["embedded"]).state_dict()
    assert openai_keys(theirs).keys() == small.state_dict().keys()
    assert {k: v.shape for k, v in openai_keys(theirs).items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }


def test_the_text_is_read_at_its_end_token_and_no_further(small):
    tokens = torch.tensor([[2046, 5, 9, 2047, 0, 0, 0, 0]])
    changed, earlier = tokens.clone(), tokens.clone()
    changed[0, 5], earlier[0, 1] = 77, 6
    with torch.no_grad():
        expected = small.encode_text(tokens)
        assert_close(small.encode_text(changed), expected)
        assert_close(small.encode_text(tokens[:, :4]), expected)
        assert not torch.allclose(small.encode_text(earlier), expected, atol=1e-3)


def test_what_does_not_fit_is_an_error(small):
    state = small.state_dict()
    for wrong, words in (
        (state | {"visual.layer1.0.conv1.weight": torch.zeros(1)}, "ResNet"),
        ({k: v for k, v in state.items() if k != "ln_final.bias"}, "missing ln_final.bias"),
        (state | {"surplus": torch.zeros(1)}, "unexpected surplus"),
        ({"a": torch.zeros(1)}, "not a complete CLIP"),
    ):
        with pytest.raises(ValueError, match=words):
            CLIP.from_checkpoint(wrong)
    with pytest.raises(ValueError, match="preprocess"):
        small.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="at most 32"):
        small.encode_text(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(64, 64), (101, 67), (67, 230), (40, 300)])
def test_preprocess_is_the_released_composition(small, mode, size):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=g, dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy()).convert(mode)
    released = transforms.Compose(
        [
            transforms.Resize(64, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            ),
        ]
    )
    assert torch.equal(small.preprocess(picture), released(picture))
