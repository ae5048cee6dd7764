"""The tokenizer against open_clip's, which ships the released merges, on awkward strings; and by
hand on a toy file."""

import gzip
import json
from pathlib import Path

import open_clip.tokenizer
import pytest
import torch

from tinyanl.models import EMBEDDED as ASSETS
from tinyanl.tokenizer import Tokenizer

EMBEDDED = ASSETS / "merges.txt.gz"
RELEASED = Path(open_clip.tokenizer.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
AWKWARD = Path(__file__).with_name("awkward_texts.json")


def strings():
    """The awkward texts, one by one and in runs of four, each once."""
    pieces = json.loads(AWKWARD.read_text())
    runs = {" ".join(pieces[i : i + 4]) for i in range(0, len(pieces) - 4, 7)}
    alone = {*pieces, " ", "|", "a|b", "it'ſ", "<b> &amp;amp; &amp;lt;"} - {"<|startoftext|>"}
    return sorted(alone | runs)


@pytest.mark.parametrize("merges", [RELEASED, EMBEDDED], ids=["released", "embedded"])
def test_equals_open_clip_on_awkward_strings(merges):
    ours, theirs = Tokenizer(merges), open_clip.tokenizer.SimpleTokenizer(str(merges))
    texts = strings()
    assert len(texts) >= 140
    assert ours.vocab_size == (49408 if merges == RELEASED else 2048)
    different = [
        (text, ours.encode(text), theirs.encode(text))
        for text in texts
        if ours.encode(text) != theirs.encode(text)
    ]
    assert not different, different[:5]


def test_batches_equal_open_clip_padding_included():
    ours, theirs = Tokenizer(RELEASED), open_clip.tokenizer.SimpleTokenizer(str(RELEASED))
    texts = ["a red rose", "", "two   words"]
    assert torch.equal(ours(texts), theirs(texts, context_length=77))
    assert torch.equal(ours("a red rose")[0], ours(texts)[0])


def test_the_special_tokens_are_the_last_two_ids_also_when_written_out():
    """As in OpenAI's. open_clip calls them <start_of_text> and <end_of_text>: no oracle here."""
    tokenizer = Tokenizer(RELEASED)
    assert tokenizer.encode("<|startoftext|>") + tokenizer.encode("<|endoftext|>") == [49406, 49407]
    assert tokenizer.encode("a <|endoftext|> b") == [320, 49407, 321]


def test_a_toy_vocabulary_by_hand(tmp_path):
    """512 bytes, then "ca" = 512, "cat</w>" = 513, start = 514, end = 515."""
    path = tmp_path / "merges.txt"
    path.write_text("#version: toy\nc a\nca t</w>\n")
    tokenizer = Tokenizer(path)
    letter = {c: ord(c) - 33 for c in "abct"}
    assert tokenizer.encode("cat") == [513]
    assert tokenizer.encode("CAT's cab") == [
        513,
        ord("'") - 33,
        256 + ord("s") - 33,
        512,
        256 + letter["b"],
    ]
    assert tokenizer(["cat"], context_length=4).tolist() == [[514, 513, 515, 0]]
    assert tokenizer.decode(tokenizer.encode("cat cab")).strip() == "cat cab"
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert Tokenizer(tmp_path / "zipped.gz").encode("cat") == [513]


def test_too_long_is_an_error_that_counts_and_wrong_files_are_named(tmp_path):
    tokenizer = Tokenizer(EMBEDDED)
    with pytest.raises(ValueError, match="rose rose"):
        tokenizer("rose " * 100, context_length=32)
    cut = tokenizer(["rose " * 100, "rose"], context_length=32, cut=True)
    assert cut[0].tolist() == [
        tokenizer.start,
        *tokenizer.encode("rose " * 100)[:30],
        tokenizer.end,
    ]
    assert torch.equal(cut[1], tokenizer("rose", 32)[0])
    (tmp_path / "no.txt").write_text("just text\n")
    with pytest.raises(ValueError, match="no.txt is no merges file"):
        Tokenizer(tmp_path / "no.txt")
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "none.gz")
