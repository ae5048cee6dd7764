"""Learning a tokenizer's merges: byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909)."""
import gzip
from collections import Counter
from itertools import pairwise
from pathlib import Path

from ..tokenizer import WORD, clean, join, spell

Pair = tuple[str, str]


def most_frequent_pair(words: dict[str, list[str]], counts: Counter[str]) -> Pair | None:
    """The pair of neighbouring symbols that occurs most often; None where every word is one symbol.

    words: word -> its symbols so far; counts: word -> how often it occurs. Of pairs that occur
    equally often the alphabetically last one is taken, so that the result is always the same."""
    pairs: Counter[Pair] = Counter()
    for word, symbols in words.items():
        for pair in pairwise(symbols):
            pairs[pair] += counts[word]
    return max(pairs, key=lambda pair: (pairs[pair], pair), default=None)


def learn_merges(texts: list[str], n: int) -> list[Pair]:
    """Up to n merges, best first: algorithm 1 of Sennrich et al. on the words of the texts."""
    counts = Counter(word for text in texts for word in WORD.findall(clean(text)))
    words = {word: spell(word) for word in counts}
    merges: list[Pair] = []
    while len(merges) < n:
        pair = most_frequent_pair(words, counts)
        if pair is None:
            break
        merges.append(pair)
        words = {word: join(symbols, pair) for word, symbols in words.items()}
    return merges


def write_merges(merges: list[Pair], path: Path) -> None:
    """Write the gzipped file that `Tokenizer` reads: the same bytes for the same merges."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["#version: learned by tinyanl", *map(" ".join, merges), ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
