"""CLIP's tokenizer: byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) of lower-cased
text.

A text is cleaned, cut into words, and each word into bytes, the last one marked "</w>". Then the
pair of neighbours that stands earliest in the merges file is joined, again and again, until none is
left that the file lists. Ids: 256 bytes, the 256 bytes with "</w>", one per merge in order, start,
end: the end is the largest id.

Copy this file alone: it needs torch, ftfy and regex, nothing else of tinyanl. Usage:

    from pathlib import Path
    from tokenizer import Tokenizer
    Path("merges.txt").write_text("#version: mine\\nc a\\nca t</w>\\n")
    tokenizer = Tokenizer("merges.txt")                # or bpe_simple_vocab_16e6.txt.gz
    print(tokenizer.encode("A cat"), tokenizer(["cat", "a cat"], context_length=8))
"""
import gzip
import html
import zlib
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

MERGES = 48_894  # how many the released vocabulary uses: its file lists 262,145
START, END = "<|startoftext|>", "<|endoftext|>"
# Special tokens, contractions, runs of letters, single digits, runs of anything else.
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>"
    r"|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
# One visible character per byte, in the order of the ids: printable bytes stand for themselves and
# come first, the others are moved to U+0100 and up.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {byte: chr(byte) for byte in PRINTABLE}
BYTES |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}


def clean(text: str) -> str:
    """Mend mojibake, undo HTML entities (twice, as captions from the web need), squeeze white
    space, lower the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text.strip()).strip().lower()


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """The pairs of a merges file, gzipped or plain, best first. ValueError: it is no such file."""
    with open(path, "rb") as file:
        head = file.read(40)
    opener = gzip.open if head.startswith(b"\x1f\x8b") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            header = file.readline(100)
            lines = file.read(1 << 23).split("\n")[:MERGES]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no merges file, or was cut short: {error}; it starts with "
                         f"{head!r}") from error
    if "#version" not in header:
        raise ValueError(f"{path} is no merges file: its first line should hold '#version', it "
                         f"starts with {head!r}")
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    if not pairs:
        raise ValueError(f"{path} is no merges file: no pairs follow its first line")
    for pair in pairs:
        if len(pair) != 2:
            odd = " ".join(pair)
            raise ValueError(f"{path} is no merges file: two symbols a line are expected, one "
                             f"line is {odd[:40]!r}")
    return pairs


def join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Wherever the two symbols of the pair stand side by side, from the left, they become one."""
    joined = []
    i = 0
    while i < len(symbols):
        length = 2 if tuple(symbols[i : i + 2]) == pair else 1
        joined.append("".join(symbols[i : i + length]))
        i += length
    return joined


def spell(word: str) -> list[str]:
    """A word in symbols, before any merge: one per byte, the last one marked."""
    symbols = [BYTES[b] for b in word.encode()]
    return [*symbols[:-1], symbols[-1] + "</w>"]


class Tokenizer:
    """Text -> ids.

    `start`, `end` and `vocab_size` follow from the merges: 49406, 49407, 49408 with the released
    file. ValueError, FileNotFoundError: see read_merges."""

    def __init__(self, merges_path: str | Path):
        merges = read_merges(merges_path)
        characters = list(BYTES.values())
        last_characters = [character + "</w>" for character in characters]
        joined = ["".join(pair) for pair in merges]
        self.vocab = [*characters, *last_characters, *joined, START, END]
        self.vocab_size = len(self.vocab)
        self.start = self.vocab_size - 2
        self.end = self.vocab_size - 1
        self.ids = {symbol: i for i, symbol in enumerate(self.vocab)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        # The words met so far. These two are never cut into bytes.
        self.words = {START: [self.start], END: [self.end]}

    def _encode_word(self, word: str) -> list[int]:
        symbols = spell(word)
        while pairs := [pair for pair in pairwise(symbols) if pair in self.ranks]:
            symbols = join(symbols, min(pairs, key=self.ranks.get))
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text: str) -> list[int]:
        """Ids of the cleaned text, without start and end."""
        ids = []
        for word in WORD.findall(clean(text)):
            if word not in self.words:
                self.words[word] = self._encode_word(word)
            ids += self.words[word]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, as cleaned, with a space after every word. It ends at the end token, where
        there is one."""
        ids = list(ids)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        text = "".join(self.vocab[i] for i in ids if i != self.start).replace("</w>", " ").strip()
        byte_of = {character: byte for byte, character in BYTES.items()}
        byte_of[" "] = ord(" ")
        return bytes(byte_of[character] for character in text).decode(errors="replace")

    def __call__(
        self, texts: str | list[str], context_length: int = 77, cut: bool = False
    ) -> Tensor:
        """(B L) ids: start, text, end, padded with 0.

        A text that does not fit is cut where `cut` says so, or else a ValueError."""
        texts = [texts] if isinstance(texts, str) else texts
        out = torch.zeros(len(texts), context_length, dtype=torch.long)  # B L
        for row, text in zip(out, texts, strict=True):
            words = self.encode(text)
            if cut:
                words = words[: context_length - 2]
            ids = [self.start, *words, self.end]
            if len(ids) > context_length:
                raise ValueError(f"{len(ids)} tokens with start and end, the context holds "
                                 f"{context_length}: {text!r}")
            row[: len(ids)] = torch.tensor(ids)
        return out
