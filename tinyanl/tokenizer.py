"""CLIP's tokenizer: byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over lower-cased text.

A text is cleaned, cut into words, and each word into bytes, the last one marked "</w>". Then the pair of
neighbours that stands earliest in the merges file is joined, again and again, until none is left that the file
lists. Ids: 256 bytes, the 256 bytes with "</w>", one per merge in order, start, end: the end is the largest id.

Copy this file alone: it needs torch, ftfy and regex, nothing else of tinyanl. Usage:

    from pathlib import Path
    from tokenizer import Tokenizer
    Path("merges.txt").write_text("#version: mine\\nc a\\nca t</w>\\n")       # or bpe_simple_vocab_16e6.txt.gz
    tokenizer = Tokenizer("merges.txt")
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
WORD = regex.compile(  # special tokens, contractions, runs of letters, single digits, runs of anything else
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# One visible character per byte, in the order of the ids: printable bytes first, the others moved to U+0100 and up
BYTES = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTES |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTES)}


def clean(text: str) -> str:
    """Mend mojibake, undo HTML entities (twice, as captions from the web need), squeeze white space, lower the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text.strip()).strip().lower()


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """The pairs of a merges file, gzipped or plain, best first. ValueError if the file is something else."""
    with open(path, "rb") as file:
        head = file.read(40)
    try:
        with (gzip.open if head[:2] == b"\x1f\x8b" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            header = file.readline(100)
            lines = file.read(1 << 23).split("\n")[:MERGES] if "#version" in header else []
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no merges file, or was cut short: {error}; it starts with {head!r}") from error
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        odd = next((" ".join(pair) for pair in pairs if len(pair) != 2), "no pairs")
        raise ValueError(f"{path} is no merges file: a first line with '#version' and then two symbols a line are "
                         f"expected, it starts with {head!r} and holds {odd[:40]!r}")
    return pairs


def join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Wherever the two symbols of the pair stand side by side, from the left, they become one."""
    joined, i = [], 0
    while i < len(symbols):
        step = 2 if tuple(symbols[i:i + 2]) == pair else 1
        joined.append("".join(symbols[i:i + step]))
        i += step
    return joined


def spell(word: str) -> list[str]:
    """A word in symbols, before any merge: one per byte, the last one marked."""
    symbols = [BYTES[b] for b in word.encode()]
    return [*symbols[:-1], symbols[-1] + "</w>"]


class Tokenizer:
    """Text -> ids. `start`, `end`, `vocab_size` follow from the merges: 49406, 49407, 49408 with the released file."""

    def __init__(self, merges_path: str | Path):
        merges = read_merges(merges_path)
        self.vocab = [*BYTES.values(), *(c + "</w>" for c in BYTES.values()), *map("".join, merges), START, END]
        self.vocab_size = len(self.vocab)
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1
        self.ids = {symbol: i for i, symbol in enumerate(self.vocab)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.words = {START: [self.start], END: [self.end]}  # words met so far; these two are never cut

    def _encode_word(self, word: str) -> list[int]:
        symbols = spell(word)
        while best := min((p for p in pairwise(symbols) if p in self.ranks), key=self.ranks.get, default=None):
            symbols = join(symbols, best)
        return [self.ids[s] for s in symbols]

    def encode(self, text: str) -> list[int]:
        """Ids of the cleaned text, without start and end."""
        ids = []
        for word in WORD.findall(clean(text)):
            if word not in self.words:
                self.words[word] = self._encode_word(word)
            ids += self.words[word]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, as cleaned, with a space after every word; reads up to the end token, where there is one."""
        ids = list(ids)
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        text = "".join(self.vocab[i] for i in ids if i != self.start).replace("</w>", " ").strip()
        to_byte = {c: b for b, c in BYTES.items()} | {" ": 32}
        return bytes(to_byte[c] for c in text).decode(errors="replace")

    def __call__(self, texts: str | list[str], context_length: int = 77, cut: bool = False) -> Tensor:
        """(B L) ids: start, text, end, padded with 0. A text that does not fit is cut, or else a ValueError."""
        texts = [texts] if isinstance(texts, str) else texts
        out = torch.zeros(len(texts), context_length, dtype=torch.long)                       # B L
        for row, text in zip(out, texts):
            ids = [self.start, *self.encode(text)[: context_length - 2 if cut else None], self.end]
            if len(ids) > context_length:
                raise ValueError(f"{len(ids)} tokens with start and end, the context holds {context_length}: {text!r}")
            row[:len(ids)] = torch.tensor(ids)
        return out
