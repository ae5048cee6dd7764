"""The tokenizer against open_clip's, which ships the released merges, on awkward strings; and by hand on a toy file."""
import gzip
from pathlib import Path

import open_clip.tokenizer
import pytest
import torch

from tinyanl.models import EMBEDDED as ASSETS
from tinyanl.tokenizer import Tokenizer

EMBEDDED = ASSETS / "merges.txt.gz"
RELEASED = Path(open_clip.tokenizer.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
AWKWARD = """a photo of a cat.|A PHOTO OF A CAT!|  leading and   inner\t white\nspace  |don't|DON'T|I'LL we'VE they'Re he'D she'S I'm
it's 5 o'clock|rock'n'roll|'s|''s|'' '|"quoted"|“curly” ‘quotes’|em—dash – en-dash - hyphen|ellipsis… and ...|1234567890|3.14159|1,000,000
½ ² ³ ① Ⅷ|x_y_z __init__|under_score|snake_case_and-kebab|C++ && C#|a/b\\c|50% off|$9.99 €10 £5 ¥7|#hashtag @user|user@example.com
https://example.com/?q=a&b=c#d|&amp;|&lt;b&gt;|&amp;amp;|&amp;lt;i&amp;gt;|&eacute;t&eacute;|&#9731;|&nbsp;x|caf\u00e9|cafe\u0301|na\u00efve r\u00e9sum\u00e9
stra\u00dfe STRASSE|\u0130stanbul|\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2|\u00c5ngstr\u00f6m|\ufb01ne \ufb02ow|\uff26\uff35\uff2c\uff2c width|\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440|\u0645\u0631\u062d\u0628\u0627|\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd|\u0928\u092e\u0938\u094d\u0924\u0947
\u4f60\u597d\uff0c\u4e16\u754c|\u3053\u3093\u306b\u3061\u306f\u4e16\u754c|\uc548\ub155\ud558\uc138\uc694|\u30ab\u30bf\u30ab\u30ca|\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35|\ud83c\udf38|\U0001f338\U0001f33b\U0001f339|\U0001f468\u200d\U0001f469\u200d\U0001f467|\U0001f44d\U0001f3fd|\U0001f1e9\U0001f1ea|\u2764\ufe0f
\u263a smile|zero\u200bwidth|zero\u200djoiner|soft\u00adhyphen|no\u00a0break|\u3000ideographic\u3000space|\ufeffbom|tab\there|line\r\nbreak|\u2028separator
schÃ¶n|caf\u00c3\u00a9|don\u00e2\u20ac\u2122t|\u00e2\u20ac\u0153hi\u00e2\u20ac\u009d|<|startoftext|>|<html>|<b>bold</b>|{json: "x"}|[a](b)|a|z
antidisestablishmentarianism|pneumonoultramicroscopicsilicovolcanoconiosis|aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa|xzxzxzxzqqq|hello hello hello|!!!!!!!!!!|?!?!?!|-----|=====>|(((o)))|~*~|:-) ;-P <3|^_^|\\n\\t
a red rose with green leaves|an oil painting of a fox, 1890s|ViT-B/32 @ 224px|iPhone 15 Pro|e=mc\u00b2|H\u2082O|\u00b0C \u00b1 \u00b5|\u221e \u2211 \u222b|a1b2c3|ABCdef|McDonald's|O'Reilly|'tis the season|y'all'd've|'RE you're
the quick brown fox jumps over the lazy dog|THE|The|tHe|\u0301|\u200b|0|_|.|'|&|\\"""


def strings():
    pieces = AWKWARD.encode("utf-16", "surrogatepass").decode("utf-16").replace("\n", "|").split("|")
    return sorted({*pieces, " ", "|", "a|b", "it'ſ", "<b> &amp;amp; &amp;lt;"} - {"<|startoftext|>"} | {" ".join(pieces[i : i + 4]) for i in range(0, len(pieces) - 4, 7)})


@pytest.mark.parametrize("merges", [RELEASED, EMBEDDED], ids=["released", "embedded"])
def test_equals_open_clip_on_awkward_strings(merges):
    ours, theirs = Tokenizer(merges), open_clip.tokenizer.SimpleTokenizer(str(merges))
    texts = strings()
    assert len(texts) >= 140
    assert ours.vocab_size == (49408 if merges == RELEASED else 2048)
    different = [(text, ours.encode(text), theirs.encode(text)) for text in texts if ours.encode(text) != theirs.encode(text)]
    assert not different, different[:5]


def test_batches_equal_open_clip_padding_included():
    ours, theirs = Tokenizer(RELEASED), open_clip.tokenizer.SimpleTokenizer(str(RELEASED))
    texts = ["a red rose", "", "two   words"]
    assert torch.equal(ours(texts), theirs(texts, context_length=77))
    assert torch.equal(ours("a red rose")[0], ours(texts)[0])


def test_the_special_tokens_are_the_last_two_ids_also_when_written_out():
    """As in OpenAI's; open_clip calls them <start_of_text> and <end_of_text>, so it is no oracle here."""
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
    assert tokenizer.encode("CAT's cab") == [513, ord("'") - 33, 256 + ord("s") - 33, 512, 256 + letter["b"]]
    assert tokenizer(["cat"], context_length=4).tolist() == [[514, 513, 515, 0]]
    assert tokenizer.decode(tokenizer.encode("cat cab")).strip() == "cat cab"
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert Tokenizer(tmp_path / "zipped.gz").encode("cat") == [513]


def test_too_long_is_an_error_that_counts_and_wrong_files_are_named(tmp_path):
    tokenizer = Tokenizer(EMBEDDED)
    with pytest.raises(ValueError, match="rose rose"):
        tokenizer("rose " * 100, context_length=32)
    cut = tokenizer(["rose " * 100, "rose"], context_length=32, cut=True)
    assert cut[0].tolist() == [tokenizer.start, *tokenizer.encode("rose " * 100)[:30], tokenizer.end]
    assert torch.equal(cut[1], tokenizer("rose", 32)[0])
    (tmp_path / "no.txt").write_text("just text\n")
    with pytest.raises(ValueError, match="no.txt is no merges file"):
        Tokenizer(tmp_path / "no.txt")
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "none.gz")
