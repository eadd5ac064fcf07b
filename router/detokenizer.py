"""Text from tokens as they come: no broken character, no stop string, and nothing that a later token would change.

For one request the concatenated text equals ``tokenizer.decode`` of all its token ids, whatever their chunks.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel


class TokenText(Protocol):
    """Text of one sequence of tokens; each piece is final when it is returned."""

    def add(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Vocabulary:
    """Bytes of each token of a byte-level vocabulary (Llama 3, Qwen, DeepSeek, gpt-oss ...); shared by all requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.is_byte_level = isinstance(tokenizer.decoder, ByteLevel)
        self.special_ids = frozenset(
            token_id for token_id, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )
        self._bytes_of: dict[int, bytes] = {}
        self._text_of: dict[int, str | None] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; empty for an id that the tokenizer does not know (a padded vocabulary)."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = _byte_level_bytes(self.tokenizer.id_to_token(token_id) or "")
            self._bytes_of[token_id] = known
        return known

    def text_of(self, token_id: int) -> str | None:
        """The token's text, where its bytes are whole characters."""
        try:
            return self._text_of[token_id]
        except KeyError:
            data = self.bytes_of(token_id)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = None
        self._text_of[token_id] = text
        return text

    def shown_bytes(self, token_id: int) -> bytes:
        """What a token stands for by itself, as lists of log probabilities show it."""
        if self.is_byte_level:
            return self.bytes_of(token_id)
        token = self.tokenizer.id_to_token(token_id) or ""
        if _is_byte(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def token_text(self, *, skip_special_tokens: bool) -> TokenText:
        if self.is_byte_level:
            return ByteLevelText(self, skip_special_tokens=skip_special_tokens)
        return WindowText(self.tokenizer, skip_special_tokens=skip_special_tokens)


class ByteLevelText:
    """Byte-level vocabularies: a token is bytes, so an incremental UTF-8 decoder is all it takes.

    A token of whole characters behind whole characters does not even take that.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped_ids: frozenset[int] = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._holds_bytes = False

    def add(self, token_id: int) -> str:
        if token_id in self._skipped_ids:
            return ""
        whole = None if self._holds_bytes else self._vocabulary.text_of(token_id)
        if whole is not None:
            return whole
        text = self._decoder.decode(self._vocabulary.bytes_of(token_id))
        self._holds_bytes = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowText:
    """Any other decoder (SentencePiece with byte fallback: Mixtral): decode a window that starts one shown piece back.

    The window gives the decoder the context it needs for a leading space. A run of byte-fallback tokens is held until
    it ends, since one invalid byte changes how the whole run decodes.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {token_id for token_id, token in added.items() if token.special}
        self._context_ids: list[int] = []  # shown already
        self._held_ids: list[int] = []  # not shown yet

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:  # not even the end of a run of bytes: decoding drops it first
            return ""
        self._held_ids.append(token_id)
        token = self._tokenizer.id_to_token(token_id) or ""
        text = self._held_text()
        if _is_byte(token) or text.endswith("\ufffd") or not text:
            return ""
        if self._decode(self._held_ids):
            self._context_ids, self._held_ids = self._held_ids, []
        else:  # a lone leading space: too little context for the next window
            self._context_ids, self._held_ids = self._context_ids + self._held_ids, []
        return text

    def flush(self) -> str:
        text = self._held_text()
        self._held_ids = []
        return text

    def _held_text(self) -> str:
        context = self._decode(self._context_ids)
        return self._decode(self._context_ids + self._held_ids)[len(context) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a chunk of tokens adds.

    ``num_tokens``: how many of the chunk's tokens belong to the output; fewer than given when a stop string ended it.
    """

    text: str
    num_tokens: int
    matched_stop: str | None = None


class Detokenizer:
    """Tokens of one request to text, with its stop strings.

    Args:
        stop: stop strings; the output ends with the token that completes one.
        include_stop: whether the stop string is part of the text.
        min_tokens: a stop string completed before this many tokens does not end the output.
    """

    def __init__(
        self, text: TokenText, *, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._text = text
        self._stop = tuple(stop)
        self._longest = max((len(string) for string in stop), default=0)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # decoded, and may yet turn out to begin a stop string

    def add(self, token_ids: Sequence[int]) -> Piece:
        """Text that these tokens make final. After a piece with ``matched_stop`` nothing more may be added."""
        pieces: list[str] = []
        for index, token_id in enumerate(token_ids):
            text, stop = self.add_token(token_id)
            pieces.append(text)
            if stop is not None:
                return Piece("".join(pieces), index + 1, stop)
        return Piece("".join(pieces), len(token_ids))

    def add_token(self, token_id: int) -> tuple[str, str | None]:
        """As ``add``: text, and the stop string that the token completes."""
        self._num_tokens += 1
        text = self._text.add(token_id)
        if not self._stop or not text:
            return text, None
        return self._match(text) or (self._release(text), None)

    def flush(self) -> str:
        """The rest, when the output ended otherwise than by a stop string."""
        rest = self._held + self._text.flush()
        self._held = ""
        return rest

    def _match(self, text: str) -> tuple[str, str] | None:
        """The text to show and the stop string that ``text`` completes; the earliest start wins, then the longest."""
        if self._num_tokens < self._min_tokens:
            return None
        whole = self._held + text
        searched_from = len(self._held)
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = whole.find(stop, max(0, searched_from - len(stop) + 1))
            if start >= 0 and (best is None or (start, -len(stop)) < best[:2]):
                best = (start, -len(stop), stop)
        if best is None:
            return None
        start, _, stop = best
        return whole[: start + (len(stop) if self._include_stop else 0)], stop

    def _release(self, text: str) -> str:
        """Add ``text`` and return what can no longer be part of a stop string."""
        whole = self._held + text
        for start in range(max(0, len(whole) - self._longest + 1), len(whole)):
            tail = whole[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                self._held = tail
                return whole[:start]
        self._held = ""
        return whole


def _is_byte(token: str) -> bool:
    """Of byte fallback: ``<0xE4>``."""
    return len(token) == 6 and token.startswith("<0x")


def _byte_level_bytes(token: str) -> bytes:
    """As the byte-level decoder of `tokenizers`: a token with a character outside its alphabet stands for itself."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the rest for 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
