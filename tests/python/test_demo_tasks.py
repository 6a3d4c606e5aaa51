"""The demo model's tasks, tokenizer, training layout and reference decoder."""

from __future__ import annotations

import json
import random
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ASSETS = ROOT / "python" / "optimus" / "assets" / "demo"

from bench.demo_model import tasks  # noqa: E402
from bench.demo_model.layout import (  # noqa: E402
    IGNORE,
    causal_stream,
    diffusion_stream,
    pack,
    visible,
)

BLOCK, MASK_ID, EOS, PAD = 32, 5, 4, 0


def test_tasks_are_a_function_of_the_seed():
    first = list(islice(tasks.train_tasks(3), 200))
    assert first == list(islice(tasks.train_tasks(3), 200))
    assert first != list(islice(tasks.train_tasks(4), 200))


def test_split_is_disjoint_and_balanced():
    held = tasks.heldout_tasks(0, 240)
    assert all(tasks.is_heldout(t.prompt) for t in held)
    assert not any(tasks.is_heldout(t.prompt) for t in islice(tasks.train_tasks(0), 2000))
    assert len({t.prompt for t in held}) == 240
    families = [t.family for t in held]
    assert {families.count(f) for f in tasks.FAMILIES} == {40}


@pytest.mark.parametrize("family", list(tasks.FAMILIES))
def test_arithmetic_in_answers_holds(family):
    """Every `a op b = c` a solution writes is true."""
    import re

    rng = random.Random(1)
    for _ in range(300):
        task = tasks.generate(rng, family)
        for a, op, b, c in re.findall(r"(?<![+\d] )\b(\d+) ([-+*/]) (\d+) = (\d+)", task.answer):
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
            expected = int(a) / int(b) if op == "/" else value[op]
            assert expected == int(c), task


def test_checkers():
    rng = random.Random(0)
    task = tasks.generate(rng, "lists")
    assert tasks.check(task, task.answer + "\n")
    assert tasks.check_final(task, "other work\n" + task.answer.splitlines()[-1])
    assert not tasks.check(task, task.answer[:-1])
    assert not tasks.check_final(task, "")
    record = tasks.generate(rng, "json_extract")
    compact = json.dumps(json.loads(record.answer))
    assert tasks.check_final(record, compact) and not tasks.check(record, compact)
    assert not tasks.check_final(record, "{")


def test_tokenizer_round_trip_and_template():
    tokenizers = pytest.importorskip("tokenizers")
    jinja2 = pytest.importorskip("jinja2")
    from bench.demo_model import tokenizer as tok

    bpe = tokenizers.Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    assert bpe.get_vocab_size() == tok.VOCAB_SIZE
    assert [bpe.token_to_id(t) for t in tok.SPECIAL_TOKENS] == list(range(6))
    texts = ["naïve 漢字 🙂\t\r\n  x\u0000", "12345"]
    texts += [t.answer for t in tasks.heldout_tasks(0, 24)]
    for text in texts:
        assert bpe.decode(bpe.encode(text).ids, skip_special_tokens=False) == text
    assert len(bpe.encode("12345").ids) == 5
    messages = [{"role": "user", "content": "hi"}]
    config = json.loads((ASSETS / "tokenizer_config.json").read_text())
    template = jinja2.Template(config["chat_template"])
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert rendered == tok.render(messages) == "<|user|>hi<|end|><|assistant|>"
    assert bpe.encode(rendered).ids[-2:] == [tok.END, tok.ASSISTANT]


def test_heldout_file_matches_the_generator():
    lines = (ASSETS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) >= 1200
    assert len({r["id"] for r in records}) == len(records)
    for record, task in zip(records, tasks.heldout_tasks(0, 300), strict=False):
        assert (record["task"], record["kind"]) == (task.family, task.kind)
        assert (record["prompt"], record["answer"]) == (task.prompt, task.answer)


def _streams():
    rng = np.random.default_rng(0)
    prompt, answer = list(range(100, 145)), [*range(200, 260), EOS]
    noisy = diffusion_stream(
        prompt, answer, rng, block=BLOCK, mask_id=MASK_ID, eos_id=EOS, copies=2
    )
    return prompt, answer, noisy, causal_stream(prompt, answer, PAD, BLOCK)


def test_diffusion_stream():
    prompt, answer, noisy, _ = _streams()
    total = 128  # 45 + 61 tokens are four blocks
    assert len(noisy) == (total - BLOCK) + 2 * (total - BLOCK)
    clean = noisy.cells == 0
    assert noisy.ids[clean].tolist() == (prompt + answer)[: total - BLOCK]
    assert (noisy.labels[clean] == IGNORE).all()
    masked = noisy.ids == MASK_ID
    assert ((noisy.labels != IGNORE) == masked).all()
    assert (noisy.positions[masked] >= len(prompt)).all()
    truth = np.array(prompt + answer + [EOS] * (total - len(prompt + answer)))
    assert (noisy.labels[masked] == truth[noisy.positions[masked]]).all()
    for cell in set(noisy.cells[~clean].tolist()):
        assert masked[noisy.cells == cell].any()


def test_visibility_against_its_definition():
    _, _, noisy, causal = _streams()
    row = pack([noisy, causal], 512, PAD)
    place = np.arange(512)
    seen = visible(row.docs, row.positions, row.limits, row.cells, place[:, None], place[None])
    blocks = row.positions // BLOCK
    for q in range(len(noisy)):
        for k in range(len(noisy)):
            if row.cells[q] == 0:
                expected = row.cells[k] == 0 and blocks[k] <= blocks[q]
            elif row.cells[k] == 0:
                expected = blocks[k] < blocks[q]
            else:
                expected = row.cells[k] == row.cells[q]
            assert seen[q, k] == expected
    a, b = len(noisy), len(noisy) + len(causal)
    assert (seen[a:b, a:b] == np.tril(np.ones((b - a, b - a), dtype=bool))).all()
    assert not seen[:a, a:].any() and not seen[a:b, :a].any()


def _model():
    torch = pytest.importorskip("torch")
    from bench.demo_model.model import DemoModel, ModelConfig

    torch.manual_seed(0)
    model = DemoModel(
        ModelConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1)
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() < 2 else 0.0, 0.1)
    return model


def test_decoder_computes_what_training_computed():
    """A noisy cell of the training layout equals the decoder's rows over its cache."""
    torch = pytest.importorskip("torch")
    from bench.demo_model.decode import _prefill, forward_rows

    model = _model()
    prompt, answer, noisy, causal = _streams()
    for stream, is_causal in ((noisy, False), (causal, True)):
        row = pack([stream], len(stream), PAD)
        t = {f: torch.from_numpy(getattr(row, f)) for f in
             ("ids", "positions", "limits", "cells", "docs")}  # fmt: skip
        place = torch.arange(len(stream))
        seen = visible(t["docs"], t["positions"], t["limits"], t["cells"], place[:, None], place)

        def attend(_layer, q, k, v, seen=seen):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, enable_gqa=True
            )

        trained = model.hidden(t["ids"][None], t["positions"][None], attend)[0]
        if is_causal:
            at = len(prompt) + 20
            cache, _, _ = _prefill(model, [(prompt + answer)[: at + 1]], 64, BLOCK, True)
            rows = torch.tensor([[at]])
            expected, limits = trained[at : at + 1], rows + 1
        else:
            cell = int(t["cells"].max())
            rows = t["positions"][t["cells"] == cell].long()[None]
            at = int(rows[0, 0])
            cache, _, _ = _prefill(model, [(prompt + answer)[:at]], 64, BLOCK, False)
            expected, limits = trained[t["cells"] == cell], torch.full_like(rows, at + BLOCK)
        place = causal if is_causal else noisy
        ids = t["ids"][rows[0]] if is_causal else t["ids"][t["cells"] == cell]
        found = forward_rows(model, cache, ids.long()[None], rows, limits,
                             torch.ones_like(rows, dtype=torch.bool))  # fmt: skip
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_full_chunk_equals_block_decoding():
    pytest.importorskip("torch")
    from bench.demo_model.decode import decode_blocks

    model = _model()
    prompts = [list(range(10, 10 + n)) for n in (5, 40, 64)]
    block = decode_blocks(model, prompts, 64, threshold=0.02)
    chunk = decode_blocks(model, prompts, 64, threshold=0.02, chunk=BLOCK)
    assert block.outputs == chunk.outputs
    one = decode_blocks(model, prompts, 64, threshold=0.02, chunk=1)
    assert float(one.committed_at[0]) == float(one.seen_at[0])


def test_shipped_checkpoint_is_qwen3(tmp_path):
    """Names and shapes load into the HF architecture, and causal logits agree."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from bench.demo_model.checkpoint import load_weights
    from bench.demo_model.model import DemoModel, ModelConfig

    raw = json.loads((ASSETS / "config.json").read_text())
    ours = DemoModel(ModelConfig())
    ours.load_state_dict({k: v.float() for k, v in load_weights(ASSETS).items()})
    keep = {k: raw[k] for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
        "max_position_embeddings", "tie_word_embeddings")}  # fmt: skip
    config = transformers.Qwen3Config(
        **keep, rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]}
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    ids = torch.randint(6, 2048, (1, 70), generator=torch.Generator().manual_seed(0))

    def attend(_layer, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    with torch.no_grad():
        mine = ours.logits(ours.hidden(ids, torch.arange(70)[None], attend))
        torch.testing.assert_close(mine, theirs(ids).logits, rtol=1e-3, atol=1e-3)
