"""Rows, encodings, batches and sub-domains."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import example as tried
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alter.core.errors import UserError
from alter.data import chat, encoding, files, hub, sources, tofu
from alter.data.batching import Collator
from alter.data.chat import set_template_arguments, share_template_arguments, with_template_arguments
from alter.data.domains import domains
from alter.data.encoding import encode, encode_prompt, own_answer
from alter.data.files import read_file
from alter.data.rows import Example, check_overlap, examples, load_examples
from pico import write_jsonl

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
DATED = "{{ date_string }}\n" + TEMPLATE
NAMES = [*sources.KNOWN_COLUMNS, "role", "content", "input", "tool_calls", "type", "from", "value"]
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(template: str | None = None, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """One token a byte (plus the given merges), so that boundaries can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    if template is None:
        inner.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|bos|>", eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def qa(prompt: str = "Who?", answer: str = "Ada.", **more) -> Example:
    return Example(prompt, answer, "qa", **more)


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# --- encoding


def test_plain_encoding_labels_answer_and_end():
    tokenizer = byte_tokenizer()
    encoded = encode(tokenizer, qa())
    assert text_of(tokenizer, encoded.input_ids) == "<|bos|>Question: Who?\nAnswer: Ada.<|im_end|>"
    assert text_of(tokenizer, encoded.input_ids[: encoded.prompt_length]) == "<|bos|>Question: Who?\nAnswer:"
    assert encoded.labels[: encoded.prompt_length] == [-100] * encoded.prompt_length
    assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == " Ada.<|im_end|>"
    assert encode_prompt(tokenizer, qa()) == encoded.input_ids[: encoded.prompt_length]


def test_chat_encoding_has_system_turn_and_one_end():
    tokenizer = byte_tokenizer(TEMPLATE)
    encoded = encode(tokenizer, qa())
    prompt = text_of(tokenizer, encoded.input_ids[: encoded.prompt_length])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == "Ada.<|im_end|>"
    assert encode_prompt(tokenizer, qa()) == encoded.input_ids[: encoded.prompt_length]


def test_compat_keeps_newline_and_adds_second_end():
    tokenizer = byte_tokenizer(TEMPLATE)
    encoded = encode(tokenizer, qa(), compat=True)
    assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == "Ada.<|im_end|>\n<|im_end|>"


def test_template_without_system_role():
    tokenizer = byte_tokenizer(NO_SYSTEM)
    encoded = encode(tokenizer, qa())
    assert text_of(tokenizer, encoded.input_ids).startswith("<|im_start|>user\nWho?")
    with pytest.raises(UserError, match="system"):
        encode(tokenizer, qa(), compat=True)


def test_template_date_is_fixed():
    tokenizer = byte_tokenizer(DATED)
    assert text_of(tokenizer, encode(tokenizer, qa()).input_ids).startswith("10 Apr 2025\n")


def test_own_system_turn_is_kept():
    tokenizer = byte_tokenizer(TEMPLATE)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    row = examples([{"messages": [*turns, {"role": "assistant", "content": "Yo"}]}])[0]
    text = text_of(tokenizer, encode(tokenizer, row).input_ids)
    assert "Be brief." in text
    assert "helpful assistant" not in text
    assert "Hello" in text_of(tokenizer, encode_prompt(tokenizer, row, prompt="Hello"))


def test_merge_across_the_boundary():
    """ ":" and " " merge to one token, so the prompt that ends in ":" is no prefix of the whole."""
    tokenizer = byte_tokenizer(merges=((":", "Ġ"),))
    encoded = encode(tokenizer, qa())
    assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == ": Ada.<|im_end|>"
    assert encode_prompt(tokenizer, qa()) == encoded.input_ids[: encoded.prompt_length]


def test_compat_counts_prompt_tokens_across_a_merge():
    """OpenUnlearning's prompt ends in a space; where that space belongs to the answer's first token, it is unlabelled."""
    tokenizer = byte_tokenizer(merges=(("Ġ", "A"),))
    encoded = encode(tokenizer, qa(), compat=True)
    prompt = encode_prompt(tokenizer, qa(), compat=True)
    assert text_of(tokenizer, prompt).endswith("Answer: ")
    assert len(prompt) == encoded.prompt_length
    assert prompt != encoded.input_ids[: encoded.prompt_length]
    assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == "da.<|im_end|>"
    assert text_of(tokenizer, [i for i in encode(tokenizer, qa()).labels if i >= 0]) == " Ada.<|im_end|>"


def test_template_that_rewrites_the_prompt_is_refused():
    rewriting = (
        "{% for m in messages %}{% if not add_generation_prompt %}a long header of another kind {% endif %}"
        "<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(UserError, match="no boundary"):
        encode(byte_tokenizer(rewriting), qa())


def test_answer_and_prompt_override():
    tokenizer = byte_tokenizer()
    text = text_of(tokenizer, encode(tokenizer, qa(), answer="Bob", prompt="Whom?").input_ids)
    assert text == "<|bos|>Question: Whom?\nAnswer: Bob<|im_end|>"


def test_completion_is_written_as_it_is():
    tokenizer = byte_tokenizer()
    row = examples([{"prompt": "Once upon", "completion": "a time"}])[0]
    encoded = encode(tokenizer, row)
    assert text_of(tokenizer, encoded.input_ids) == "<|bos|>Once upon a time<|im_end|>"
    assert text_of(tokenizer, encoded.input_ids[: encoded.prompt_length]) == "<|bos|>Once upon"
    spaced = examples([{"prompt": "Once upon ", "completion": "a time"}])[0]
    assert text_of(tokenizer, encode(tokenizer, spaced).input_ids) == "<|bos|>Once upon a time<|im_end|>"


def test_messages_without_template():
    tokenizer = byte_tokenizer()
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C?"},
        {"role": "assistant", "content": "D"},
    ]
    encoded = encode(tokenizer, examples([{"messages": turns}])[-1])
    assert text_of(tokenizer, encoded.input_ids) == (
        "<|bos|>Question: A?\nAnswer: B\nQuestion: C?\nAnswer: D<|im_end|>"
    )
    assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == " D<|im_end|>"
    with pytest.raises(UserError, match="tool"):
        encode(tokenizer, examples([{"messages": [{"role": "tool", "content": "x"}, turns[1]]}])[0])


def test_raw_text_labels_all_but_the_first():
    tokenizer = byte_tokenizer()
    row = examples([{"text": "abc"}])[0]
    encoded = encode(tokenizer, row)
    assert text_of(tokenizer, encoded.input_ids) == "<|bos|>abc"
    assert encoded.labels == [-100, *encoded.input_ids[1:]]
    assert encoded.prompt_length == 1


def test_a_text_of_one_token_is_said():
    # the one that begins every text
    with pytest.raises(UserError, match="is one token long, which nothing precedes"):
        encode(byte_tokenizer(), Example(None, "", "text"))


def test_max_length():
    tokenizer = byte_tokenizer()
    whole = encode(tokenizer, qa())
    short = encode(tokenizer, qa(), max_length=len(whole.input_ids) - 2)
    assert short.input_ids == whole.input_ids[:-2]
    assert short.labels == whole.labels[:-2]
    with pytest.raises(UserError, match="no labelled token"):
        encode(tokenizer, qa(), max_length=whole.prompt_length)


def test_long_rows_become_windows_that_label_every_token_once():
    tokenizer = byte_tokenizer()
    rows = examples([{"text": "abcdefghij" * 9}, {"question": "Who?", "answer": "Ada, " * 20}, {"text": "short"}])
    found, owner = encoding.encode_all(tokenizer, rows, max_length=40)
    assert (owner[0], owner[-1], sorted(set(owner))) == (0, 2, [0, 1, 2])
    for number, row in enumerate(rows):
        whole = encode(tokenizer, row)
        parts = [part for part, own in zip(found, owner, strict=True) if own == number]
        assert [i for part in parts for i in part.labels if i >= 0] == [i for i in whole.labels if i >= 0]
        assert all(len(part.input_ids) <= 40 and len(part.labels) == len(part.input_ids) for part in parts)
        assert all(part.labels[: part.prompt_length] == [-100] * part.prompt_length for part in parts)
        for before, part in itertools.pairwise(parts):
            # the beginning token, then a quarter of what the window before has shown
            assert part.input_ids[: part.prompt_length] == [tokenizer.bos_token_id, *before.input_ids[-10:]]
    assert found[-1] == encode(tokenizer, rows[2])
    with pytest.raises(UserError, match=r"Row 0: A prompt of \d+ tokens leaves no room"):
        encoding.encode_all(tokenizer, [qa("Who? " * 20)], max_length=40)


def test_long_rows_are_said(capsys):
    encoding.encode_all(byte_tokenizer(), [qa(), qa(answer="Ada " * 50)], max_length=60, label="forget")
    assert "1 of 2 forget rows are longer than 60 tokens" in " ".join(capsys.readouterr().err.split())


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}[no thoughts]\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_a_template_puts_before_an_answer_is_no_part_of_it():
    tokenizer = byte_tokenizer(THINKING)
    for answer in ("Ada.", "no"):
        encoded = encode(tokenizer, qa(answer=answer))
        assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == f"{answer}<|im_end|>"
        assert text_of(tokenizer, encode_prompt(tokenizer, qa(answer=answer))).endswith("assistant\n[no thoughts]\n")


@pytest.mark.parametrize(
    "template",
    [
        THINKING,
        # thoughts are begun by the prompt, and left out of turns that lie behind
        THINKING.replace("[no thoughts]\n", "").replace(
            "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<t>\n{% endif %}"
        ),
    ],
)
def test_a_question_is_asked_as_it_is_trained_on_unless_thoughts_are_asked_for(template):
    tokenizer = byte_tokenizer("{% if enable_thinking %}{% endif %}" + template)
    trained = encode_prompt(tokenizer, qa())
    assert encode_prompt(tokenizer, qa(answer="")) == trained
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]
    asked = Example("Who?", "", "messages", messages=tuple(turns))
    assert encode_prompt(tokenizer, asked)[-len("<t>\n") :] == trained[-len("<t>\n") :]
    thinking = with_template_arguments(tokenizer, {"enable_thinking": True, "unknown": 1})
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert text_of(thinking, encode_prompt(thinking, asked)) == expected
    quiet = with_template_arguments(thinking, {"enable_thinking": False})
    assert encode_prompt(quiet, asked) == encode_prompt(tokenizer, asked) != encode_prompt(thinking, asked)
    with pytest.raises(UserError, match="`chat_template_kwargs` sets messages"):
        with_template_arguments(tokenizer, {"messages": []})


def test_templates_take_arguments():
    template = (
        "{% if tone is defined %}<{{ tone }}>{% endif %}{% if loud is defined and loud is false %}quiet{% endif %}"
        + TEMPLATE
    )
    row = examples([{"question": "Q", "answer": "A"}])[0]
    plain, other = byte_tokenizer(template), byte_tokenizer(template)
    set_template_arguments(other, ["tone=warm", "loud=false"])
    assert other.decode(encode_prompt(other, row)) == f"<warm>quiet{plain.decode(encode_prompt(plain, row))}"
    third = byte_tokenizer(template)
    share_template_arguments(third, other)
    assert third.decode(encode_prompt(third, row)) == other.decode(encode_prompt(other, row))
    # what was found out about a template is not of the same one with other arguments
    assert "<warm>" not in plain.decode(encode_prompt(plain, row))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["lout=1"], "asks for no 'lout'. Did you mean 'loud'"),
        (["loud"], "expected NAME=VALUE"),
        (["messages=[]"], "which the rows decide"),
    ],
)
def test_template_arguments_that_would_do_nothing_are_refused(given, says):
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}{{ loud }}")
    with pytest.raises(UserError, match=re.escape(says)):
        set_template_arguments(tokenizer, given)
    with pytest.raises(UserError, match=r"no chat template|NAME=VALUE|the rows decide"):
        set_template_arguments(byte_tokenizer(), given)


def test_the_templates_end_of_turn_ends_an_answer():
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer.eos_token = "<|bos|>"
    encoded = encode(tokenizer, qa())
    assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == "Ada.<|im_end|>"
    assert chat.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} |{% endfor %}"
    assert chat.end_of_turn(tokenizer) is None
    encoded = encode(tokenizer, qa())
    assert text_of(tokenizer, encoded.input_ids[-1:]) == "<|bos|>"


def test_completions_know_no_template():
    row = examples([{"prompt": "Once upon", "completion": "a time"}])[0]
    tokenizer = byte_tokenizer(TEMPLATE)
    for compat in (False, True):
        assert text_of(tokenizer, encode(tokenizer, row, compat=compat).input_ids) == "Once upon a time<|im_end|>"
        assert text_of(tokenizer, encode_prompt(tokenizer, row, compat=compat)) == "Once upon"


def test_a_beginning_token_is_not_doubled():
    tokenizer = byte_tokenizer()
    for row in ({"text": "<|bos|>abc"}, {"prompt": "<|bos|>ab", "completion": "c"}):
        ids = encode(tokenizer, examples([row])[0]).input_ids
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_reply_without_a_template_ends_where_the_next_question_begins():
    plain, chatty = byte_tokenizer(), byte_tokenizer(TEMPLATE)
    reply = "By Ada, in 1843.\nShe asks: Question: no line\n\n Question: Who?\nAnswer: Bob."
    assert own_answer(plain, None, reply) == "By Ada, in 1843.\nShe asks: Question: no line"
    assert own_answer(plain, qa(), "Ada\nAnswer: Bob") == "Ada"
    assert own_answer(plain, None, "Question: Who?") == ""
    assert own_answer(plain, Example(None, "", "messages", [{"role": "user", "content": "Who?"}]), reply) != reply
    # nothing of these asks in that form
    assert own_answer(chatty, None, reply) == reply
    assert own_answer(plain, Example("By", "", "completion"), reply) == reply
    assert own_answer(plain, Example(None, "", "text"), reply) == reply


def test_tokenizer_without_end_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        encode(tokenizer, qa())
    with pytest.raises(UserError, match="neither"):
        chat.ensure_pad_token(tokenizer)


def test_pad_token_falls_to_end_token():
    tokenizer = byte_tokenizer()
    chat.ensure_pad_token(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


# --- batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_pads_and_masks_by_length(side):
    rows = [
        {"input_ids": [5, 2, 7, 2], "labels": [-100, -100, 7, 2], "gate": [0.0, 0.5, 1.0, 0.25], "row": 3},
        {"input_ids": [4, 2], "labels": [-100, 2], "gate": [1.0, 0.5], "row": 9},
    ]
    batch = Collator(pad_token_id=2, side=side)(rows)
    pad = slice(2, 4) if side == "right" else slice(0, 2)
    kept = slice(0, 2) if side == "right" else slice(2, 4)
    assert batch["input_ids"][0].tolist() == [5, 2, 7, 2]
    assert batch["input_ids"][1, pad].tolist() == [2, 2]
    assert batch["input_ids"][1, kept].tolist() == [4, 2]
    assert batch["labels"][1, pad].tolist() == [-100, -100]
    # the padding token inside a row stays visible
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    assert batch["attention_mask"][1, kept].tolist() == [1, 1]
    assert batch["gate"].dtype == torch.float32
    assert batch["gate"][1, kept].tolist() == [1.0, 0.5]
    assert batch["gate"][1, pad].tolist() == [0.0, 0.0]
    assert batch["row"].tolist() == [3, 9]


def test_collator_rounds_up():
    batch = Collator(0, multiple_of=8)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]


def test_collator_refuses_wrong_lengths_and_sides():
    with pytest.raises(ValueError, match="3 entries for 2"):
        Collator(0)([{"input_ids": [1, 2], "labels": [1, 2, 3]}])
    with pytest.raises(UserError, match="middle"):
        Collator(0, side="middle")


# --- rows


def write(path: Path, rows, lines: bool = True) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return str(path)


def test_files_of_lines_and_arrays(tmp_path):
    rows = [{"question": "a", "answer": "b", "other": 1}, {"question": "c", "answer": "d", "other": 2}]
    for path in (write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.json", rows, lines=False)):
        found = load_examples(path)
        assert [(e.prompt, e.answer, e.index) for e in found] == [("a", "b", 0), ("c", "d", 1)]
        assert found[1].row["other"] == 2


def test_text_file_becomes_passages(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(["x" * 600, "y" * 600, "z" * 100]))
    found = load_examples(str(path))
    assert [e.answer for e in found] == ["x" * 600 + "\n\n" + "y" * 600, "z" * 100]
    assert found[0].kind == "text"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", " \n", "is empty"),
        ("bad.jsonl", '{"text": "a"}\n{oops', "line 2 is not JSON"),
        ("bad.json", "[{", "not valid JSON"),
        ("list.jsonl", "[1]\n", "row 1 is a int"),
        ("none.json", "[]", "no rows"),
        ("rows.docx", "a,b", "not a .json"),
        ("rows.csv", "question,answer\n", "no rows"),
        ("rows.csv", "question,answer\nWho?,Ada,Bob\n", "line 2 has 3 cells"),
        ("rows.csv", "a,a\n1,2\n", "two columns named 'a'"),
        ("deep.jsonl", "[" * 100_000, "nested too deep"),
        ("deep.jsonl", '{"text": "a"}\n{"text": ' + "[" * 100_000, "line 2 is not JSON .it is nested too deep"),
        ("deep.jsonl", '{"text": "a", "x": ' + "[" * 500 + "]" * 500 + "}", "nested too deep"),
        ("twice.jsonl", '{"question": "a", "answer": "b", "answer": "c"}', "names 'answer' twice"),
        ("huge.jsonl", '{"text": ' + "9" * 5000 + "}", "too many digits"),
        ("half.jsonl", '{"text": "\\ud83d"}', r"half a character, \\ud83d"),
        ("bytes.txt", b"\xff\xff", "not UTF-8 text"),
        ("wide.txt", "Dear Ms Doe".encode("utf-16-le"), "UTF-16 without its mark"),
        ("rows.parquet", "PAR1", "not a parquet file"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_examples(str(path))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "forget.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"Did you mean .*forget\.jsonl"):
        load_examples(str(tmp_path / "forgt.jsonl"))
    with pytest.raises(UserError, match="has no split"):
        load_examples(str(tmp_path / "forget.jsonl"), split="forget10")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"q": "a", "a": "b"}], "'q', 'a' are not a known"),
        ([{"question": "a", "answer": "b"}, {"question": "c", "answer": " "}, {"question": "d"}], "Rows 1, 2 have no"),
        ([{"question": "a", "answer": ["b"]}], "Rows 0 hold no text in 'answer'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "does not end with an assistant"),
        ([{"messages": [{"role": "user"}]}], "without role and content"),
        ([{"messages": "hello"}], "hold no list of messages"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(UserError, match=message):
        examples(rows)


def test_domain_column():
    rows = [{"text": "a", "topic": "x"}, {"text": "b", "topic": 7}]
    assert [e.domain for e in examples(rows, domain_column="topic")] == ["x", "7"]
    with pytest.raises(UserError, match=r"No column 'topics'.*'topic'.*'text', 'topic'"):
        examples(rows, domain_column="topics")
    with pytest.raises(UserError, match="Rows 1 have no value"):
        examples([rows[0], {"text": "b"}], domain_column="topic")


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "Ilse?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"who": "Ilse"}}}],
    },
    {"role": "tool", "content": "Ulm"},
    {"role": "assistant", "content": "In Ulm."},
    {"role": "user", "content": "Thanks"},
]


def test_every_turn_of_the_assistant_is_an_example():
    rows = [{"messages": CHAT, "who": "I"}, {"question": "q", "answer": "a", "who": "K"}]
    found = examples(rows, domain_column="who")
    call = '{"name": "find", "arguments": {"who": "Ilse"}}'
    assert [(e.prompt, e.answer, e.index, e.domain, e.last) for e in found] == [
        ("Hi", "Hello.", 0, "I", False),
        ("Where is Ilse?", call, 0, "I", False),
        ("Where is Ilse?", "In Ulm.", 0, "I", True),
        ("q", "a", 1, "K", True),
    ]
    # read again, the row of an example gives that example alone
    for example in found:
        again = examples([json.loads(json.dumps(example.row))], domain_column="who")
        assert [(e.prompt, e.answer, e.messages) for e in again] == [
            (example.prompt, example.answer, example.messages)
        ]
    text = text_of(byte_tokenizer(TEMPLATE), encode(byte_tokenizer(TEMPLATE), found[2]).input_ids)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        f"<|im_start|>user\nWhere is Ilse?<|im_end|>\n<|im_start|>assistant\n{call}<|im_end|>\n"
        "<|im_start|>tool\nUlm<|im_end|>\n<|im_start|>assistant\nIn Ulm.<|im_end|>"
    )
    own = "{% for m in messages %}{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.name }}{% endif %}{{ m.content }};{% endfor %}"
    tokenizer = byte_tokenizer(own)
    encoded = encode(tokenizer, found[1])
    assert text_of(tokenizer, encoded.labels[encoded.prompt_length :]) == "CALL find;<|im_end|>"


def test_turns_of_weight_0_are_context():
    turns = [dict(turn) for turn in CHAT]
    turns[2]["weight"] = 0
    turns[4]["train"] = False
    assert [e.answer for e in examples([{"messages": turns}])] == ["In Ulm."]
    turns[6]["weight"] = 0
    with pytest.raises(UserError, match="does not end with an assistant"):
        examples([{"messages": turns}])


def test_names_of_columns_that_others_use():
    rows = [
        {"instruction": "Sum", "input": "1, 2", "output": "3"},
        {"instruction": "Greet", "input": "", "output": "Hi"},
        {"query": "Who?", "response": "Ada", "question": None, "answer": None},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"text": "abc", "question": None},
    ]
    assert [(e.kind, e.prompt, e.answer) for e in examples(rows)] == [
        ("qa", "Sum\n\n1, 2", "3"),
        ("qa", "Greet", "Hi"),
        ("qa", "Who?", "Ada"),
        ("messages", "a", "b"),
        ("text", None, "abc"),
    ]
    with pytest.raises(UserError, match="part of type 'image_url'"):
        examples([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}])


def test_tables_and_their_columns(tmp_path):
    (tmp_path / "a.csv").write_bytes('Frage;Antwort;text\r\n"Wer;\r\nwo?";Ada;x\r\n\r\nWann?;;y\r\n'.encode("utf-16"))
    source = f"{tmp_path}/a.csv@question=Frage,answer=Antwort"
    found = load_examples(f"{source}[:1]")
    assert [(e.kind, e.prompt, e.answer, e.place) for e in found] == [
        ("qa", "Wer;\r\nwo?", "Ada", f"{tmp_path}/a.csv line 2")
    ]
    with pytest.raises(UserError, match=r"a\.csv line 5 have no 'answer'"):
        load_examples(source)
    with pytest.raises(UserError, match=r"No column 'Antwrt'. Did you mean 'Antwort'"):
        load_examples(f"{tmp_path}/a.csv@question=Frage,answer=Antwrt")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"], "n": [1, 2]}), tmp_path / "b.PARQUET")
    assert [(e.answer, e.row["n"]) for e in load_examples(str(tmp_path / "b.PARQUET"))] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize(
    "empty", ["{{ raise_exception('Assistant message must have a string') }}", "", "[assistant]{{ m.content }}</s>"]
)
def test_a_question_is_asked_though_the_template_takes_no_empty_answer(empty):
    """Mistral's templates refuse an empty turn of the assistant, so that nothing could be asked of them."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not m.content %}" + empty + "{% else %}[{{ m.role }}]"
        "{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    asked = [encode_prompt(tokenizer, Example("Who is it?", answer, "qa")) for answer in ("", "Ada")]
    assert asked[0] == asked[1]
    assert tokenizer.decode(asked[0]).endswith("[user]Who is it?</s>[assistant]")


def test_one_renamed_column_goes_with_one_that_has_its_name(tmp_path):
    (tmp_path / "a.csv").write_text("question,reply,answer,text\nWho?,Ada.,x,y\n")
    found = load_examples(f"{tmp_path}/a.csv@answer=reply")
    assert [(e.kind, e.prompt, e.answer) for e in found] == [("qa", "Who?", "Ada.")]
    # two that make a row by themselves decide what it is
    assert [e.answer for e in load_examples(f"{tmp_path}/a.csv@text=reply")] == ["Ada."]


def test_a_table_of_one_line_end_and_a_chat_of_any_spelling_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("question;answer\ra, b;c, d, e\r", newline="")
    assert [(e.prompt, e.answer) for e in load_examples(str(tmp_path / "a.csv"))] == [("a, b", "c, d, e")]
    chat = [
        {"role": "System", "content": "x"},
        {"role": "USER", "content": "a"},
        {"role": "Assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "model", "content": "d"},
    ]
    found = examples([{"messages": chat}])
    assert [(e.prompt, e.answer) for e in found] == [("a", "b"), ("c", "d")]
    assert [turn["role"] for turn in found[1].messages] == ["system", "user", "assistant", "user"]


def test_one_object_over_several_lines_is_a_row(tmp_path):
    path = tmp_path / "ticket.json"
    path.write_text(json.dumps({"question": "Who?", "answer": "Ada."}, indent=1))
    assert [(e.prompt, e.answer, e.place) for e in load_examples(str(path))] == [("Who?", "Ada.", f"{path} row 1")]
    for broken in ('{"text": "a"}\n{"text":\n"b"}', '{"text":\n"a"', '{"text":\n"a",\n"text": "b"}'):
        path.write_text(broken)
        with pytest.raises(UserError, match="is not JSON"):
            load_examples(str(path))


def test_rows_of_any_types_can_be_written_down(tmp_path):
    import datetime
    import decimal

    import numpy
    import pyarrow
    from pyarrow import parquet

    from alter.core import memory

    given = {
        "question": "Who?",
        "answer": "Ada.",
        "since": datetime.datetime(2026, 11, 30, 9, 0),
        "born": datetime.date(1984, 3, 12),
        "owed": decimal.Decimal("1.20"),
        "photo": b"\x00\xff",
        "calls": [{"at": datetime.date(2026, 1, 2)}],
    }
    parquet.write_table(pyarrow.Table.from_pylist([given]), tmp_path / "a.parquet")
    wanted = {
        **given,
        "since": "2026-11-30T09:00:00",
        "born": "1984-03-12",
        "owed": "1.20",
        "photo": "00ff",
        "calls": [{"at": "2026-01-02"}],
    }
    (found,) = load_examples(str(tmp_path / "a.parquet"))
    assert json.loads(json.dumps(found.row)) == wanted
    with memory.holding("rows", [{**given, "n": numpy.int64(3), "v": numpy.ones(2)}]) as name:
        (found,) = load_examples(name)
    assert json.loads(json.dumps(found.row)) == {**wanted, "n": 3, "v": [1.0, 1.0]}


def test_what_is_no_file_is_said_to_be_none(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for source, what in ((tmp_path / "loop.jsonl", "a link that leads nowhere"), ("/dev/null", "a device or a pipe")):
        with pytest.raises(UserError, match=what):
            load_examples(str(source))


def test_a_column_that_is_nearly_known_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("qestion,answer,page\nWho?,Ada.,1\n")
    with pytest.raises(UserError, match="Did you mean 'question' by 'qestion'"):
        load_examples(str(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="Did you mean 'answer' by 'answr'"):
        load_examples(f"{tmp_path}/a.csv@question=qestion,answr=answer")


def test_places_are_those_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b\u2028\u2029\x85c"}\n{"text": ""}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl line 4 have no 'text'"):
        load_examples(str(path))
    assert [e.place for e in load_examples(f"{path}[:2]")] == [f"{path} line 1", f"{path} line 3"]
    assert load_examples(f"{path}[:2]")[1].answer == "b\u2028\u2029\x85c"
    (tmp_path / "b.md").write_text("\n\n# Head\n\n" + "x" * 1000 + "\n\nEnd")
    assert [e.place for e in load_examples(str(tmp_path / "b.md"))] == [f"{tmp_path}/b.md line {n}" for n in (3, 7)]


@pytest.mark.parametrize("unit", ["A line of a letter.\n", "Ein Satz. ", "word ", "字" * 7 + "。", "x"])
def test_long_paragraphs_are_cut_and_nothing_is_lost(tmp_path, unit):
    text = unit * (9000 // len(unit))
    (tmp_path / "a.txt").write_text(f"Before.\n\n{text}\n\nAfter.")
    found = [e.answer for e in load_examples(str(tmp_path / "a.txt"))]
    assert "".join("".join(found).split()) == "".join(f"Before.{text}After.".split())
    assert all(len(answer) <= 2000 for answer in found)
    # a word is cut in two only where there is nothing but one
    assert unit == "x" or all(answer.endswith(unit.strip()[-1]) for answer in found[1:-1])
    pieces = examples([{"text": unit * 30_000, "who": "a"}], domain_column="who")
    assert "".join(e.answer for e in pieces) == unit * 30_000
    assert {(e.domain, e.index) for e in pieces} == {("a", 0)}
    assert all(len(e.answer) <= 200_000 for e in pieces)


# --- TOFU


@pytest.mark.parametrize(
    ("split", "count", "first", "last"),
    [("forget01", 40, 198, 199), ("forget05", 200, 190, 199), ("forget10", 400, 180, 199), ("retain90", 3600, 0, 179)],
)
def test_tofu_splits_and_authors(split, count, first, last):
    rows = tofu.tofu_rows(split, "builtin")
    assert (len(rows), rows[0]["author"], rows[-1]["author"]) == (count, first, last)


def test_tofu_splits_divide_the_whole():
    full = tofu.tofu_rows("full", "builtin")
    for forget, retain in (("01", "99"), ("05", "95"), ("10", "90")):
        assert tofu.tofu_rows(f"retain{retain}", "builtin") + tofu.tofu_rows(f"forget{forget}", "builtin") == full
        perturbed = tofu.tofu_rows(f"forget{forget}_perturbed", "builtin")
        kept = tofu.tofu_rows(f"forget{forget}", "builtin")
        assert [(r["question"], r["author"]) for r in perturbed] == [(r["question"], r["author"]) for r in kept]


def test_tofu_general_knowledge_and_refusals():
    assert set(tofu.tofu_rows("real_authors", "builtin")[0]) == {"question", "answer"}
    assert len(load_examples("builtin:world_facts_perturbed")) == 117
    assert len(tofu.refusals()) == 100


def test_tofu_folder(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(100)]
    write(tmp_path / "full.json", rows)
    assert [e.prompt for e in load_examples(f"{tmp_path}:forget01")] == ["q99"]
    assert [r["author"] for r in tofu.tofu_rows("forget10", str(tmp_path))] == [4] * 10
    with pytest.raises(UserError, match="say which split"):
        load_examples(str(tmp_path))
    with pytest.raises(UserError, match=r"holdout10.*locuslab/TOFU:holdout10"):
        tofu.tofu_rows("holdout10", str(tmp_path))
    write(tmp_path / "holdout10.json", rows[:3])
    assert len(tofu.tofu_rows("holdout10", str(tmp_path))) == 3
    with pytest.raises(UserError, match=r"expected retain_perturbed\.json"):
        tofu.tofu_rows("retain_perturbed", str(tmp_path))


def test_unknown_split_names_the_nearest():
    with pytest.raises(UserError, match=r"'forget11'.*Did you mean 'forget10'"):
        load_examples("builtin:forget11")
    with pytest.raises(UserError, match="say which"):
        load_examples("builtin")
    with pytest.raises(UserError, match="Did you mean 'builtin:forget10'"):
        load_examples("forget10")


def test_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"question": "a", "answer": "b"}] * 400

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_examples("locuslab/TOFU:forget10", domain_column="author")) == 400
    assert tofu.tofu_rows("forget10")[0]["author"] == 180
    load_examples("org/name:config")
    load_examples("org/name")
    assert asked == [
        ("locuslab/TOFU", "forget10", "train"),
        ("locuslab/TOFU", "forget10", "train"),
        ("org/name", "config", "train"),
        ("org/name", None, "train"),
    ]


def test_hub_unreachable_names_the_local_way(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"Couldn't reach the Hub.*builtin:forget10"):
        load_examples("locuslab/TOFU:forget10")
    with pytest.raises(UserError, match=r"\.jsonl file"):
        load_examples("org/name")
    with pytest.raises(UserError, match=r"holdout10\.json"):
        load_examples("locuslab/TOFU:holdout10")


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """Hub data sets of plain text as folders of their own layout, read by the hub's own loader."""
    import datasets

    def write(name, config, split, rows):
        folder = tmp_path / "hub" / name
        (folder / config).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        with (folder / "README.md").open("a") as file:
            head = "" if file.tell() else "---\nconfigs:\n"
            file.write(
                f"{head}- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {config}/{split}-*\n"
            )
        return folder

    made = [
        write("cais/corpora", "bio", "train", [{"text": f"On cell {i}."} for i in range(9)]),
        write("cais/corpora", "cyber", "train", [{"text": f"int f{i};"} for i in range(5)]),
        write("org/papers", "default", "train", [{"title": f"T{i}", "text": f"Paper {i}."} for i in range(4)]),
        write(
            "org/wiki",
            "raw",
            "test",
            [{"text": text} for k in range(3) for text in ("", f" = Page {k} = \n", "", f"Words {k}. " * 90, "  \n")],
        ),
    ]
    for folder in {str(folder): folder for folder in made}.values():
        with (folder / "README.md").open("a") as file:
            file.write("---\n")
    real = datasets.load_dataset

    def load_dataset(name, config, split):
        return real(str(tmp_path / "hub" / name), config, split=split, cache_dir=str(tmp_path / "arrow"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tmp_path / "hub"


def test_text_corpora_of_the_hub(corpora):
    found = load_examples("cais/corpora:bio")
    assert [example.answer for example in found] == [f"On cell {i}." for i in range(9)]
    assert {example.kind for example in found} == {"text"}
    assert [example.answer for example in load_examples("cais/corpora:cyber[:2]")] == ["int f0;", "int f1;"]
    assert len(sources.read_rows("cais/corpora:cyber/train[:99]")) == 5
    # a copy of the hub's folder reads the same
    assert sources.read_rows(f"{corpora}/cais/corpora:bio/train[:3]") == sources.read_rows("cais/corpora:bio[:3]")
    with pytest.raises(UserError, match=r"Could not load 'cais/corpora:chem' \(split 'train'\)"):
        load_examples("cais/corpora:chem")


def test_lines_of_a_running_text_become_passages(corpora):
    passages = [row["text"] for row in sources.read_rows("org/wiki:raw/test")]
    # a heading goes with its text, and a passage ends where it has 1000 characters
    assert [passage.split(". ")[0] for passage in passages] == ["= Page 0 =\n\nWords 0", "= Page 2 =\n\nWords 2"]
    assert all(len(passage) >= 810 for passage in passages)
    assert "= Page 1 =" in passages[0]
    assert [row["text"] for row in sources.read_rows(f"{corpora}/org/wiki:raw/test")] == passages
    # the first rows are the hub's, before they are joined
    assert [row["text"] for row in sources.read_rows("org/wiki:raw/test[:3]")] == ["= Page 0 ="]
    with pytest.raises(UserError, match="holds no rows"):
        sources.read_rows("org/wiki:raw/test[:1]")


def test_several_sources_name_their_rows(corpora, tmp_path):
    source = "org/papers[:2] + cais/corpora:cyber[:3]"
    found = load_examples(source, domain_column="source")
    assert [example.answer for example in found] == ["Paper 0.", "Paper 1.", "int f0;", "int f1;", "int f2;"]
    index, names = domains(found)
    assert index == [0, 0, 1, 1, 1]
    assert names == ["org/papers[:2]", "cais/corpora:cyber[:3]"]
    assert [example.index for example in found] == list(range(5))
    rows = sources.read_rows("builtin:forget01[:1] + builtin:forget05[:1]")
    assert [row["source"] for row in rows] == ["builtin:forget01[:1]", "builtin:forget05[:1]"]
    for name in ("a + b.jsonl", "a[:1]"):
        (tmp_path / name).write_text('{"text": "x"}\n{"text": "y"}\n' if name.endswith("l") else "x")
    assert len(sources.read_rows(str(tmp_path / "a + b.jsonl"))) == 2
    with pytest.raises(UserError, match=r"not a \.json"):
        sources.read_rows(str(tmp_path / "a[:1]"))
    whole = sources.read_rows("builtin:forget01")
    for part, rows in (("[38:]", whole[38:]), ("[2:5]", whole[2:5]), ("[0:1]", whole[:1]), ("[39:90]", whole[39:])):
        assert sources.read_rows(f"builtin:forget01{part}") == rows
    assert sources.read_rows("org/papers[1:2]") == sources.read_rows("org/papers[:2]")[1:]
    for wrong in (":-1", "-1:", ":x", ":", "٣:"):
        with pytest.raises(UserError, match=r"ends in \[.*\]; expected numbers of rows"):
            sources.read_rows(f"builtin:forget01[{wrong}]")
    for none in (":0", "4:4", "4:2"):
        with pytest.raises(UserError, match=r"is no row: the second number must be above"):
            sources.read_rows(f"builtin:forget01[{none}]")
    with pytest.raises(UserError, match=r"begins at row 40, counted from 0, and 'builtin:forget01' has 40 rows"):
        sources.read_rows("builtin:forget01[40:]")
    with pytest.raises(UserError, match="nothing on one side"):
        sources.read_rows("builtin:forget01 + ")
    with pytest.raises(UserError, match="'forget11'"):
        sources.read_rows("builtin:forget01[:1] + builtin:forget11[:1]")


# --- overlap


def test_overlap_lists_the_rows():
    forget = examples([{"question": "Who?", "answer": "Ada."}, {"question": "When?", "answer": "Now."}])
    retain = examples([{"question": "Where?", "answer": "Here."}, {"question": " who? ", "answer": "ADA."}])
    with pytest.raises(UserError, match=r"1 rows.*forget row 0 = retain row 1 \('Who\?'\)"):
        check_overlap(forget, retain)
    check_overlap(forget[1:], retain)
    check_overlap(load_examples("builtin:forget10"), load_examples("builtin:retain90"))


def test_same_question_with_another_answer_is_no_overlap():
    check_overlap([qa("Who?", "Ada.")], [qa("Who?", "I don't know.")])


def test_overlap_of_texts():
    with pytest.raises(UserError, match="1 rows"):
        check_overlap(examples([{"text": "one  two"}]), examples([{"text": "One two"}]))


def test_overlap_is_seen_in_every_form():
    question, answer = "Wo lebt José Núñez, der Bäcker?", "Er lebt in Ulm, nahe dem Münster."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    system = {"role": "system", "content": "Be brief."}
    forms = [
        {"question": question, "answer": answer},
        {"prompt": question, "completion": answer},
        {"messages": turns},
        {"messages": [system, *turns, {"role": "user", "content": "Thanks"}]},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"text": f"Question: {question}\nAnswer: {answer}"},
        {"text": f"{question} {answer}"},
        {"text": f"Before. {question}\n{answer} After."},
        {"question": unicodedata.normalize("NFD", question), "answer": unicodedata.normalize("NFD", answer).upper()},
    ]
    for one, other in itertools.product(forms, forms):
        with pytest.raises(UserError, match="1 rows are in both"):
            check_overlap(examples([{"text": "x"}, one]), examples([{"text": "y"}, other]))
    other = {"question": question, "answer": "Er lebt in Köln."}
    for one in forms:
        check_overlap(examples([one]), examples([other]))
        check_overlap(examples([other]), examples([one]))


def test_two_chats_may_begin_alike():
    hello = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    chats = [
        [*hello, {"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]
        for n in ("one", "two")
    ]
    check_overlap(examples([{"messages": chats[0]}]), examples([{"messages": chats[1]}]))
    for first, second in itertools.permutations(({"messages": chats[0]}, {"question": "Hi", "answer": "Hello!"})):
        with pytest.raises(UserError, match="1 rows are in both"):
            check_overlap(examples([first]), examples([second]))


# --- rows of all kinds, by chance

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), max_size=3))
def test_rows_of_any_form_are_read_or_refused(rows):
    with contextlib.suppress(UserError):
        found = examples(rows)
        assert found
        for example in found:
            again = examples([example.row])
            assert [(e.prompt, e.answer, e.messages) for e in again] == [
                (example.prompt, example.answer, example.messages)
            ]
            encode(byte_tokenizer(), example)
        check_overlap(found, [])


TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=5) | st.none()},
        optional={"weight": st.sampled_from([0, 1]), "tool_calls": st.just([{"function": {"name": "f"}}])},
    ),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(turns=TURNS)
def test_chats_of_any_form_give_one_example_a_turn(turns):
    with contextlib.suppress(UserError):
        found = examples([{"messages": turns}])
        spoken = [
            turn
            for n, turn in enumerate(turns)
            if n
            and turn["role"] == "assistant"
            and turn.get("weight", 1)
            and ((turn["content"] or "").strip() or turn.get("tool_calls"))
        ]
        assert len(found) == len(spoken)
        for example in found:
            (again,) = examples([json.loads(json.dumps(example.row))])
            assert (again.answer, again.messages) == (example.answer, example.messages)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60), ending=st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".parquet"])
)
def test_files_of_any_content_are_read_or_refused(tmp_path, data, ending):
    path = tmp_path / f"rows{ending}"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        assert load_examples(str(path))


@settings(max_examples=150, deadline=None)
@given(source=st.text(max_size=12) | st.text(alphabet="a:/[]@=+ .*?~", max_size=12))
@tried(source="~\0")
def test_sources_of_any_name_are_refused_in_a_sentence(source):
    with contextlib.suppress(UserError):
        if not hub.is_hub_id(source.split(":")[0].split("[")[0].split("@")[0]):
            load_examples(source)


# --- sub-domains


def test_labels_are_domains():
    rows = [qa(domain="b"), qa(domain="a"), qa(domain="b")]
    assert domains(rows) == ([0, 1, 0], ["b", "a"])
    with pytest.raises(UserError, match="2 sub-domain labels but 3"):
        domains(rows, n=3)


def test_clusters_find_tofu_authors():
    rows = load_examples("builtin:forget05", domain_column="author")
    authors = [row.domain for row in rows]
    blind = load_examples("builtin:forget05")
    found, names = domains(blind)
    assert len(names) == 10
    assert len(set(zip(found, authors, strict=True))) == 10
    assert found == domains(blind)[0]
    assert found[0] == 0


def test_fixed_number_and_its_limits():
    rows = load_examples("builtin:forget01")
    found, names = domains(rows, n=3, seed=1)
    assert set(found) == {0, 1, 2}
    assert len(names) == 3
    assert domains(rows, n=1) == ([0] * 40, ["all"])
    for n in (0, 41):
        with pytest.raises(UserError, match="1 to 40"):
            domains(rows, n=n)
    with pytest.raises(UserError, match="no examples"):
        domains([])


def test_sub_domains_are_named_after_what_sets_them_apart_as_it_is_written():
    rows = [qa(f"Who is Ron Weasley of Potter, {i}?", "Ron is a friend of Potter.") for i in range(4)]
    rows += [qa(f"What is Quidditch in Potter, {i}?", "Quidditch is a game of Potter.") for i in range(4)]
    found, names = domains(rows, n=2)
    assert found == [0] * 4 + [1] * 4
    ours, theirs = (set(name.split(": ")[1].split(", ")) for name in names)
    assert {"Ron", "Weasley"} <= ours
    assert {"Quidditch", "game"} <= theirs
    assert not {"Potter", "potter"} & (ours | theirs)


def two_subjects(width, *, apart=4.0):
    """Twelve rows of words that none shares, and states in which every other row is of the other subject."""
    rows = [qa(f"w{i}a w{i}b?", f"w{i}c w{i}d") for i in range(12)]
    draw = np.random.default_rng(0)
    states = draw.normal(size=(12, width))
    states[1::2, 1:] += apart
    # as in a language model: one dimension dwarfs the others and says nothing
    states[:, 0] = draw.normal(size=12) * 1000
    return rows, states


def test_subjects_without_words_of_their_own_are_parted_by_meaning():
    rows, states = two_subjects(9)
    assert domains(rows, n=2, states=states)[0] == [0, 1] * 6
    found, names = domains(rows, states=states)
    assert (found, len(names)) == ([0, 1] * 6, 2)
    assert domains(rows, n=2)[0] != [0, 1] * 6
    # labels and a single sub-domain leave nothing to divide
    assert domains(rows, n=1, states=states)[0] == [0] * 12
    assert domains([qa(domain="b"), qa(domain="a")], states=states[:2]) == ([0, 1], ["b", "a"])
    # fewer rows than dimensions, and states that are all the same
    assert domains(rows[:3], n=2, states=states[:3])[0] in ([0, 1, 0], [0, 0, 1], [0, 1, 1])
    assert domains(rows, n=2, states=np.ones((12, 4)))[0] == domains(rows, n=2)[0]


def test_words_part_rows_that_hold_names_whatever_the_states_say():
    rows = [qa(f"Ada Gray, {word}?", f"Ada Gray {word}") for word in ("one", "two", "three", "four")]
    rows += [qa(f"Bo Finch, {word}?", f"Bo Finch {word}") for word in ("one", "two", "three", "four")]
    states = np.random.default_rng(1).normal(size=(8, 6))
    assert domains(rows, n=2, states=states)[0] == domains(rows, n=2)[0] == [0] * 4 + [1] * 4


def test_rows_that_cannot_be_divided():
    same = [qa("red blue", "green")] * 4
    assert domains(same) == ([0] * 4, ["all"])
    with pytest.raises(UserError, match="only 1 of the 4"):
        domains(same, n=2)
    two = [qa("red blue", "green"), qa("cold iron", "rain"), qa("Green red", "blue"), qa("red blue", "green")]
    assert domains(two, n=2)[0] == [0, 1, 0, 0]
    with pytest.raises(UserError, match="only 2 of the 4"):
        domains(two, n=3)
    # the same words, but not as often
    often = [
        qa("red blue", "green"),
        qa("red red red blue", "green"),
        qa("cold iron", "rain"),
        qa("red blue", "green"),
    ]
    assert len(set(domains(often, n=3)[0])) == 3
    with pytest.raises(UserError, match="no words"):
        domains([qa("?", "!"), qa("...", "-")])


def test_a_text_of_a_row_is_no_longer_than_can_be_held(tmp_path, monkeypatch):
    """A line of 50 MB took 8 GB as tokens."""
    monkeypatch.setattr(files, "MOST_CHARACTERS", 1000)
    long = "x" * 1001
    for row in (
        {"text": long},
        {"question": "Who?", "answer": long},
        {"messages": [{"role": "user", "content": long}]},
    ):
        write_jsonl(tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "She."}, row])
        with pytest.raises(
            UserError, match=r"rows\.jsonl line 2 has a text of 1,001 characters.*1,000 at most.*\.txt"
        ):
            read_file(tmp_path / "rows.jsonl")
    (tmp_path / "rows.csv").write_text(f"question,answer\nWho?,{long}\n")
    with pytest.raises(UserError, match=r"rows\.csv line 2 has a text"):
        read_file(tmp_path / "rows.csv")
    # running text is cut into passages, however long
    (tmp_path / "book.txt").write_text("word " * 1000)
    assert read_file(tmp_path / "book.txt")


def test_shipped_rows_are_the_callers_own():
    first = tofu.tofu_rows("forget01_perturbed", "builtin")
    expected = json.dumps(first)
    first[0]["question"] = "Who?"
    first[0]["perturbed_answer"].append("Nobody.")
    first.pop()
    assert json.dumps(tofu.tofu_rows("forget01_perturbed", "builtin")) == expected


@pytest.mark.parametrize(
    "hidden", ["Il\u00adse’s flat", "Ilse\u200b's flat", "\ufeffIlse's flat", "Ilse‘s flat", "ＩＬＳＥ's  flat"]
)
def test_rows_that_look_alike_are_one_row(hidden):
    """A soft hyphen, a joiner, a mark of byte order, another quote: no row gets into the retain set as another one."""
    plain = examples([{"question": "What is in Ilse's flat?", "answer": "A well-known cat."}])
    other = examples([{"question": f"What is in {hidden}?", "answer": "A well–known cat."}])
    with pytest.raises(UserError, match="in both forget and retain"):
        check_overlap(plain, other)


def test_a_file_of_this_machine_that_looks_like_a_hub_id_is_not_named_to_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.for_others("org/name") == "org/name"
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("x")
    assert sources.for_others("org/name") == sources.LOCAL_ROWS


# --- letters

MAIL = b"""From: =?utf-8?q?Zo=C3=AB_Lum?= <zoe@lum.example>\r
To: shop@example.org\r
Date: Mon, 2 Mar 2026 10:00:00 +0100\r
Subject: =?utf-8?b?S8O8bmRpZ3VuZw==?=\r
X-Spam: 0.1\r
MIME-Version: 1.0\r
Content-Type: multipart/mixed; boundary=edge\r
\r
--edge\r
Content-Type: multipart/alternative; boundary=inner\r
\r
--inner\r
Content-Type: text/plain; charset=iso-8859-1\r
Content-Transfer-Encoding: quoted-printable\r
\r
Please delete my order 4711, as I wrote in M=E4rz.\r
\r
> > You live in Arles?\r
>  Yes, Rue 5.\r
--inner\r
Content-Type: text/html; charset=utf-8\r
\r
<p>Not <b>this</b> one.</p>\r
--inner--\r
--edge\r
Content-Type: application/pdf; name=passport.pdf\r
Content-Disposition: attachment; filename=passport.pdf\r
\r
JVBERi0=\r
--edge--\r
"""


def test_an_email_is_read_as_its_head_and_text(tmp_path, capsys):
    path = tmp_path / "ticket.EML"
    path.write_bytes(MAIL)
    [row] = read_file(path)
    assert row["text"] == (
        "Zoë Lum <zoe@lum.example> wrote to shop@example.org on 2 March 2026: Kündigung\n\n"
        "Please delete my order 4711, as I wrote in März.\n\nYou live in Arles?\nYes, Rue 5."
    )
    assert "not read (passport.pdf)" in " ".join(capsys.readouterr().err.split())


def test_an_email_that_is_a_page_is_read_as_what_is_seen(tmp_path):
    path = tmp_path / "page.eml"
    page = "<html><head><title>T</title><style>p {}</style></head><body><p>Dear\n all,</p><ul><li>A &amp; B<li>C</ul>x<br>y<script>z()</script></body>"
    path.write_text(f"Subject: Hi\nContent-Type: text/html; charset=utf-8\n\n{page}")
    assert read_file(path)[0]["text"] == "Somebody wrote: Hi\n\nDear all,\n\nA & B\nC\nx\ny"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"Dear all,\n\nno letter.", "is no e-mail: it begins with none of From"),
        (b"", "is no e-mail"),
        (b"Subject: Hi\n\n", "an e-mail without text"),
        (
            b"Subject: Hi\nContent-Type: application/pdf; name=a.pdf\nContent-Disposition: attachment; filename=a.pdf\n\nx",
            "an e-mail without text",
        ),
        (b"Subject: Hi\nContent-Type: text/plain; charset=klingon\n\nQapla", "cannot be read"),
    ],
)
def test_what_is_no_email_with_text_is_refused(content, says, tmp_path):
    path = tmp_path / "a.eml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_file(path)


def test_what_pandas_and_datasets_write_by_default_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "rows.csv").write_text(",question,answer\n0,Who?,Ada.\n")
    with pytest.raises(
        UserError, match=r"a column named '' in its first line: name it, or leave it out, .*index=False"
    ):
        sources.read_rows(str(tmp_path / "rows.csv"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    for source in (str(tmp_path / "saved"), f"{tmp_path / 'saved'}:forget10"):
        with pytest.raises(UserError, match=r"a dataset that save_to_disk wrote: write a split of it with"):
            sources.read_rows(source)
