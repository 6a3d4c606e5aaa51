"""Text to ids and back: encoding, chat templates, incremental decoding, stop strings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from checkpoints import SPECIAL_TOKENS, make_tokenizer
from optimus.detokenizer import IncrementalDetokenizer, TextBuilder
from optimus.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    loaded = Tokenizer.load(path)
    assert loaded is not None
    return loaded


def load_with(path: Path, config: dict[str, object]) -> Tokenizer:
    make_tokenizer(path, chat_template=None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(path)
    assert tokenizer is not None
    return tokenizer


def test_round_trip_and_special_tokens(tokenizer: Tokenizer) -> None:
    text = "then é 你好 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    mask_id = 260 + SPECIAL_TOKENS.index("<|MASK|>")
    ids = tokenizer.encode("a<|MASK|>b")
    assert mask_id in ids and len(ids) == 3
    assert tokenizer.token_id("<|MASK|>") == mask_id
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|MASK|>b"


def test_no_tokenizer_is_none_and_damage_is_an_error(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


@given(st.lists(st.integers(0, 263), max_size=40))
def test_incremental_pieces_add_up(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Over arbitrary bytes, not only over valid text."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in ids] + [detokenizer.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)


@given(st.text(max_size=20))
def test_no_half_character_is_emitted(tokenizer: Tokenizer, text: str) -> None:
    assume(not any(token in text for token in SPECIAL_TOKENS))  # those are left out
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


@given(st.lists(st.text(max_size=20), max_size=5), st.booleans())
def test_a_batch_is_encoded_as_its_texts_are(
    tokenizer: Tokenizer, texts: list[str], special: bool
) -> None:
    ids = tokenizer.encode_batch(texts, add_special_tokens=special)
    assert ids == [tokenizer.encode(text, add_special_tokens=special) for text in texts]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    """Cut at the first stop string to be complete; nothing released is ever taken back."""
    builder = TextBuilder(tokenizer, stops)
    released = ""
    for token_id in tokenizer.encode(text):
        found = builder.push(token_id)
        assert builder.text[: builder.released].startswith(released)
        released = builder.text[: builder.released]
        if found:
            break
    assert builder.finish() == (builder.stop_reason is not None)
    ends = {text.find(s) + len(s): s for s in stops if s in text}
    if not ends:
        assert (builder.text, builder.stop_reason) == (text, None)
    else:
        first = text[: min(ends)]  # tokens here are single characters
        starts = [len(first) - len(s) for s in stops if first.endswith(s)]
        assert builder.text == text[: min(starts)]
        assert builder.stop_reason in stops
    assert builder.released == len(builder.text)


def test_chat_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(USER, add_generation_prompt=False) == (
        "<|im_start|>user\nhi<|im_end|>\n"
    )
    template = "{{ messages[0]['content'] | tojson }}{{ eos_token }}{{ extra }}"
    text = tokenizer.render_chat(USER, chat_template=template, extra="é")
    assert text == '"hi"<|im_end|>é'


@pytest.mark.parametrize(
    "template, match",
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% for %}", "chat template failed"),
        ("{{ messages.append(1) }}", "chat template failed"),
        ("{{ ''.__class__.__mro__ }}", "chat template failed"),
    ],
)
def test_bad_templates_are_errors(tokenizer: Tokenizer, template: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tokenizer.render_chat(USER, chat_template=template)


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user"}, [{"role": "user"}], ["hi"]])
def test_bad_messages_are_errors(tokenizer: Tokenizer, messages: object) -> None:
    with pytest.raises(ValueError, match=r"message"):
        tokenizer.render_chat(messages)  # type: ignore[arg-type]


def test_template_sources(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    tokenizer = load_with(tmp_path, {"chat_template": named, "eos_token": {"content": "<e>"}})
    assert tokenizer.render_chat(USER) == "D"
    assert tokenizer.render_chat(USER, chat_template="{{ eos_token }}") == "<e>"
    (tmp_path / "chat_template.jinja").write_text("J")
    tokenizer = load_with(tmp_path, {"chat_template": "C"})
    assert tokenizer.render_chat(USER) == "J"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_with(tmp_path, {}).render_chat(USER)
