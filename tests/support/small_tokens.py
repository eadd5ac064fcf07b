"""A tokenizer of a few dozen byte-level tokens, so that what a constraint allows can be enumerated."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

EOS = 0
SECOND_EOS = 1
_CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.-\\Ġ'
_MERGES = [("a", "b"), ("b", "c"), ("ab", "c"), ("0", "0"), ("{", '"'), ('"', ":"), (":", "Ġ"), ("c", "a")]
TOKENS = ["<eos>", "<end>", *_CHARACTERS.replace("Ġ", " "), *("".join(pair).replace("Ġ", " ") for pair in _MERGES)]
"""The text of each token id."""


def write_tokenizer(path: Path) -> Path:
    """Writes ``tokenizer.json`` to ``path``."""
    names = ["<eos>", "<end>", *_CHARACTERS, *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(BPE({name: number for number, name in enumerate(names)}, _MERGES))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<eos>", "<end>"])
    tokenizer.save(str(path))
    return path
