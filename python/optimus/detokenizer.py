"""Text from tokens that arrive one by one, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no (or not yet) UTF-8


class IncrementalDetokenizer:
    """Decodes a growing token sequence; a character is held back until all its bytes are there.

    The pieces returned by `push` and the last `flush` add up to the decoded whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens from the last safe border on
        self._num_context = 0  # leading window tokens whose text is out already
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """Adds one token, returns the text that became final."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._context_text):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Returns what is held back, U+FFFD where characters stayed incomplete."""
        return self._take(self._tokenizer.decode(self._window))

    def _take(self, text: str) -> str:
        delta = text[len(self._context_text) :]
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._context_text = self._tokenizer.decode(self._window)
        return delta


class TextBuilder:
    """The text of one output and its stop strings.

    text: all text so far; cut before the stop string once one was found.
    released: length of the prefix of `text` that no stop string can take back; what a stream may
        show.
    stop_reason: the stop string found, else None.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = tuple(stop)
        self.text = ""
        self.released = 0
        self.stop_reason: str | None = None

    def push(self, token_id: int) -> bool:
        """Adds one token; True if a stop string is now complete (nothing may be added after)."""
        return self._append(self._detokenizer.push(token_id))

    def finish(self) -> bool:
        """Releases everything held back; True if that completes a stop string."""
        found = self.stop_reason is not None or self._append(self._detokenizer.flush())
        self.released = len(self.text)
        return found

    def _append(self, delta: str) -> bool:
        if not delta:
            return False
        start = len(self.text)
        self.text += delta
        hits = []
        for stop in self._stop:
            at = self.text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0:
                hits.append((at, -len(stop), stop))
        if hits:
            at, _, self.stop_reason = min(hits)
            self.text = self.text[:at]
            self.released = at
            return True
        self.released = len(self.text) - self._possible_stop_length()
        return False

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (
                n
                for stop in self._stop
                for n in range(min(len(stop) - 1, len(self.text)), 0, -1)
                if self.text.endswith(stop[:n])
            ),
            default=0,
        )
