"""Text to token ids and back, and the chat template."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .config import read_json

TOKENIZER_FILE = "tokenizer.json"
Message = Mapping[str, Any]


class Tokenizer:
    """The `tokenizers` library's tokenizer of a checkpoint, with its chat template."""

    def __init__(
        self, backend: Any, chat_template: str | None, special_tokens: dict[str, str]
    ) -> None:
        self._backend = backend
        self.chat_template = chat_template
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, path: Path) -> Tokenizer | None:
        """Reads tokenizer.json and its companions; None if the directory has no tokenizer.json.

        Raises ValueError for a damaged file.
        """
        file = path / TOKENIZER_FILE
        if not file.exists():
            return None
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"[tokenizer] {file} cannot be read: {error}") from None
        config = read_json(path / "tokenizer_config.json") or {}
        special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, str | dict)
        }
        return cls(backend, _find_chat_template(path, config), special)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Text of special tokens becomes their ids, the mask token's included."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of each text, on all cores. Raises ValueError for text with lone surrogates."""
        for index, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"[tokenizer] text {index} is not Unicode: {error}") from None
        encodings = self._backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, through the template in a sandbox.

        messages: [{"role": "user", "content": "..."}, ...].
        Raises ValueError for malformed messages, no template, or a template that fails.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("[tokenizer] this checkpoint has no chat template, pass one")
        _check_messages(messages)

        try:
            return _compiled(template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **variables,
            )  # fmt: skip
        except Exception as error:  # a template computes, and may fail like any program
            raise ValueError(f"[tokenizer] the chat template failed: {error}") from None


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, Mapping | str) or not messages:
        raise ValueError(f"[tokenizer] messages must be a non-empty list, got {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"[tokenizer] a message needs 'role' and 'content', got {message!r}")


def _find_chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's (a string, or the one named "default")."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {e.get("name"): e.get("template") for e in template if isinstance(e, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"[tokenizer] {path / 'tokenizer_config.json'}: chat_template must be a string, got "
            f"{type(template).__name__}"
        )
    return template


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """Compiling takes milliseconds, a hundred times as long as rendering."""
    return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
    """Sandboxed jinja2 with the helpers that published templates use."""
    import jinja2
    import jinja2.sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
