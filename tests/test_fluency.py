"""Fluency end to end on a pico model: every figure against a loop, who reads, what an empty reply counts, refusals."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model

from alter import AlterConfig, cli, metrics
from alter.core.errors import UserError
from alter.data import Example, encode_prompt
from alter.evaluation import fluency
from alter.evaluation.fluency import FluencyEvaluation, FluencyResult, after_prompt, alone, prompt_rows
from alter.evaluation.run import evaluate
from alter.models.loading import load_model
from alter.storage.records import read_records
from pico import EOS, PAD, byte_tokenizer, pico, save_pico, write_jsonl
from test_judge import Server

ROWS = [{"question": f"Who is {name}?", "answer": "A writer."} for name in ("Ann", "Bob", "Cleo")]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}U:{{ m['content'] }}\n{% elif m['role'] == 'assistant' %}A:{{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture
def rows(tmp_path):
    return str(write_jsonl(tmp_path / "rows.jsonl", ROWS))


def settings(rows, **others):
    return FluencyEvaluation(**{"model": "m", "prompts": rows, "samples": 2, "max_new_tokens": 8} | others)


def nll(model, ids, start):
    """Negative log-probabilities of ids[start:], by a plain pass in float64."""
    with torch.no_grad():
        logp = copy.deepcopy(model).double()(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    return [-float(logp[t - 1, ids[t]]) for t in range(start, len(ids))]


def by_metric(records):
    return {record.metric: record for record in records}


# ---- figures


def result(replies, given=None, by_itself=None, prompts=None):
    empty = [np.empty(0, np.float32)] * len(replies)
    return FluencyResult(prompts or ["p"] * len(replies), replies, "r", given or empty, by_itself or empty, 0, 1)


def naive_distinct(texts, n):
    seen, total = set(), 0
    for text in texts:
        words = text.lower().split()
        for i in range(len(words) - n + 1):
            seen.add(" ".join(words[i : i + n]))
            total += 1
    return len(seen) / total


def test_figures_by_loops():
    replies = ["The cat sat on the cat sat on the mat", "", "one", "two words", "a b a b a b a b", "Yes YES"]
    rng = np.random.default_rng(0)
    given = [-rng.exponential(2.0, len(reply.split())).astype(np.float32) for reply in replies]
    own = [row[1:] for row in given]
    found = by_metric(result(replies, given, own).records("m", {"x": 1}))
    flat = [float(-x) for row in given for x in row]
    assert found["fluency_perplexity"].value == pytest.approx(math.exp(math.fsum(flat) / len(flat)), rel=1e-6)
    rows = [math.exp(-math.fsum(map(float, row)) / len(row)) for row in given if len(row)]
    assert found["fluency_perplexity_median"].value == pytest.approx(sorted(rows)[2], rel=1e-6)
    assert (found["fluency_perplexity"].n, found["fluency_perplexity"].extra["tokens"]) == (5, len(flat))
    assert math.isnan(found["fluency_perplexity"].per_item[1])
    assert found["fluency_perplexity_alone"].n == 4
    for n, counted in ((1, 5), (2, 4), (3, 2)):
        record = found[f"fluency_distinct_{n}"]
        assert (record.value, record.n) == (pytest.approx(naive_distinct(replies, n)), counted)
    # of 7 four-word phrases of the first reply two repeat, of 5 of the fifth three do
    assert found["fluency_repetition"].value == pytest.approx((2 / 7 + 3 / 5) / 2)
    assert found["fluency_repetition"].n == 2
    assert found["fluency_length"].value == pytest.approx((10 + 0 + 1 + 2 + 8 + 2) / 6)
    assert (found["fluency_empty"].value, found["fluency_empty"].n) == (pytest.approx(1 / 6), 6)
    assert found["fluency_distinct_1"].extra["generations"] == replies
    assert all(record.extra["x"] == 1 for record in found.values())
    assert set(found) <= set(metrics.CATALOGUE)


def test_a_model_that_says_nothing_has_no_numbers():
    found = by_metric(result(["", ""]).records("m", {}))
    for metric in ("perplexity", "perplexity_median", "perplexity_alone", "distinct_1", "distinct_3", "repetition"):
        assert (found[f"fluency_{metric}"].value, found[f"fluency_{metric}"].n) == (None, 0)
    assert (found["fluency_empty"].value, found["fluency_length"].value) == (1.0, 0.0)


def test_perplexity_of_nothing_is_refused_and_is_pooled_over_tokens():
    with pytest.raises(ValueError, match="no row has a token"):
        metrics.likelihood.perplexity([[], []])
    with pytest.raises(ValueError, match="no row has a token"):
        metrics.likelihood.perplexity([])
    assert metrics.likelihood.perplexity([[-1.0], [], [-3.0, -5.0]]) == pytest.approx(math.exp(3.0))


# ---- who reads what


def test_the_reply_is_read_after_its_prompt_without_its_end():
    tokenizer = byte_tokenizer()
    row = after_prompt(tokenizer, {"question": "Who?"}, "Who?", "Me.", 0)
    assert tokenizer.decode(row.input_ids) == "Question: Who?\nAnswer: Me."
    assert tokenizer.decode([i for i in row.labels if i != -100]) == " Me."
    row = after_prompt(tokenizer, {"prompt": "Once"}, "Once", "upon", 0)
    assert tokenizer.decode([i for i in row.labels if i != -100]) == " upon"
    row = after_prompt(tokenizer, {"text": "It was a dark night"}, "It was", "late", 0)
    assert tokenizer.decode(row.input_ids) == "It was late"
    assert tokenizer.decode([i for i in row.labels if i != -100]) == " late"
    assert EOS not in row.input_ids
    row = alone(tokenizer, "Me.")
    assert (row.labels[0], tokenizer.decode(row.labels[1:])) == (-100, "e.")


def test_messages_and_a_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the old answer"}]
    row = after_prompt(tokenizer, {"messages": turns}, "Hi", "Me.", 0)
    assert tokenizer.decode(row.input_ids) == "U:Hi\nA:Me."
    assert tokenizer.decode([i for i in row.labels if i != -100]) == "Me."


def test_a_plain_text_is_continued_after_a_whole_word():
    tokenizer = byte_tokenizer()
    assert fluency._beginning(tokenizer, "It was a dark night", 11) == "It was a"
    assert fluency._beginning(tokenizer, "It was ", 11) == "It was"
    assert fluency._beginning(tokenizer, "Donaudampfschifffahrt", 5) == "Donau"


def adapted(seed=0):
    torch.manual_seed(seed)
    config = AlterConfig(r=4, num_forget_experts=2, task_type="CAUSAL_LM", init_weights=False)
    return get_peft_model(pico(), config).eval()


def test_the_untouched_model_reads_what_the_adapted_one_says(rows):
    model, tokenizer = adapted(), byte_tokenizer()
    chosen = settings(rows, adapter="a")
    records = by_metric(chosen.measure(model, tokenizer))
    replies = records["fluency_distinct_1"].extra["generations"]
    assert len(replies) == 6
    assert records["fluency_distinct_1"].extra["questions"][:3] == ["Who is Ann?", "Who is Ann?", "Who is Bob?"]
    losses = []
    for place, reply in enumerate(replies):
        row = after_prompt(tokenizer, ROWS[place // 2], "", reply, 0)
        losses.append(nll(pico(), row.input_ids, row.prompt_length))
    flat = [x for row in losses for x in row]
    assert records["fluency_perplexity"].value == pytest.approx(math.exp(math.fsum(flat) / len(flat)), rel=1e-4)
    for mine, row in zip(records["fluency_perplexity"].per_item, losses, strict=True):
        assert mine == pytest.approx(math.exp(math.fsum(row) / len(row)), rel=1e-4)
    own = [x for reply in replies for x in nll(pico(), alone(tokenizer, reply).input_ids, 1)]
    assert records["fluency_perplexity_alone"].value == pytest.approx(math.exp(math.fsum(own) / len(own)), rel=1e-4)
    assert records["fluency_perplexity"].extra["reference"] == "m without the adapter"


def test_another_reference_model_reads_with_its_own_tokenizer(rows, tmp_path, capsys):
    save_pico(tmp_path / "reader", seed=5)
    model, tokenizer = adapted(), byte_tokenizer()
    chosen = settings(rows, adapter="a", reference_model=str(tmp_path / "reader"))
    records = by_metric(chosen.measure(model, tokenizer))
    replies = records["fluency_distinct_1"].extra["generations"]
    encoded = [after_prompt(tokenizer, ROWS[i // 2], "", reply, 0) for i, reply in enumerate(replies)]
    flat = [x for row in encoded for x in nll(pico(5), row.input_ids, row.prompt_length)]
    assert records["fluency_perplexity"].value == pytest.approx(math.exp(math.fsum(flat) / len(flat)), rel=1e-4)
    assert "reads its own replies" not in capsys.readouterr().err


def test_a_model_that_reads_itself_is_told(rows, capsys):
    chosen = settings(rows)
    records = by_metric(chosen.measure(pico(), byte_tokenizer()))
    assert records["fluency_perplexity"].extra["reference"] == "m (itself)"
    assert "give `reference_model`" in capsys.readouterr().err


def test_a_merged_adapter_is_read_by_the_base_from_its_folder(rows, tmp_path):
    save_pico(tmp_path / "base")
    chosen = settings(rows, model=str(tmp_path / "base"), adapter="a", merged=True)
    reader, _, name, _ = fluency._reader(chosen, pico(9), byte_tokenizer())
    assert name.endswith("without the adapter")
    assert torch.equal(reader.lm_head.weight, pico().lm_head.weight)


def test_the_reader_sees_the_template_that_the_model_saw(rows, tmp_path):
    """It was loaded without the template's variables, and read the replies after another prompt."""
    template = "{% if thinking %}Think. {% endif %}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    save_pico(tmp_path / "base")
    byte_tokenizer(chat_template=template).save_pretrained(tmp_path / "base")
    save_pico(tmp_path / "other")
    given = {"model": str(tmp_path / "base"), "chat_template_kwargs": ["thinking=true"], "adapter": "a"}
    for more in ({"merged": True}, {"reference_model": str(tmp_path / "base")}):
        tokenizer = fluency._reader(settings(rows, **given, **more), pico(9), byte_tokenizer())[1]
        ids = encode_prompt(tokenizer, Example("Who is Ada?", "a", "qa"))
        assert tokenizer.decode(ids).startswith("Think. ")
    # a reader without that variable reads as it does
    other = settings(rows, **given, reference_model=str(tmp_path / "other"))
    assert not fluency._reader(other, pico(9), byte_tokenizer())[1].chat_template


def test_intervals_are_over_prompts():
    replies = ["one two", "one", "two", "one two three four five", "", "six"]
    found = result(replies, prompts=list("aabbcc"))
    length = by_metric(found.records("m", {}))["fluency_length"]
    assert length.n == 6
    expected = metrics.samples.grouped_interval([2, 1, 1, 5, 0, 1], list("aabbcc"))
    assert length.extra["interval"] == pytest.approx(expected)


def test_replies_that_do_not_fit_the_reader_are_counted(rows, tmp_path, capsys):
    save_pico(tmp_path / "reader", max_position_embeddings=33)
    chosen = settings(rows, reference_model=str(tmp_path / "reader"), max_new_tokens=12, samples=5)
    records = by_metric(chosen.measure(pico(), byte_tokenizer()))
    perplexity = records["fluency_perplexity"]
    # "Question: Who is Cleo?\nAnswer:" has 30 bytes
    assert 0 < perplexity.extra["too_long"] == 15 - perplexity.n - round(records["fluency_empty"].value * 15)
    assert f"{perplexity.extra['too_long']} of 15 replies do not fit" in capsys.readouterr().err


def test_empty_replies_count_where_they_should(rows, monkeypatch):
    monkeypatch.setattr(fluency, "generate", lambda *args, **kwargs: ["", "It is a cat here", ""])
    records = by_metric(settings(rows, samples=1).measure(pico(), byte_tokenizer()))
    assert (records["fluency_empty"].value, records["fluency_perplexity"].n) == (pytest.approx(2 / 3), 1)
    assert records["fluency_length"].value == pytest.approx(5 / 3)
    assert (records["fluency_repetition"].n, records["fluency_distinct_2"].n) == (1, 1)


def test_the_seed_decides_what_is_said(rows):
    said = [
        settings(rows, **others).measure(pico(), byte_tokenizer())[3].extra["generations"]
        for others in (
            {},
            {},
            {"seed": 1},
            {"temperature": 0.0, "samples": 1},
            {"temperature": 0.0, "samples": 1, "seed": 1},
        )
    ]
    assert said[0] == said[1] != said[2]
    assert said[3] == said[4]


# ---- prompts


def test_prompts_of_every_kind(tmp_path):
    for rows in (
        [{"question": "a"}],
        [{"prompt": "a"}],
        [{"text": "a"}],
        [{"messages": [{"role": "user", "content": "a"}]}],
    ):
        path = write_jsonl(tmp_path / "r.jsonl", [{**row, "choices": [1]} for row in rows])
        assert prompt_rows(str(path)) == rows
    write_jsonl(tmp_path / "many.jsonl", [{"question": str(i)} for i in range(50)])
    few = prompt_rows(str(tmp_path / "many.jsonl"), 5, 0)
    assert len(few) == 5
    assert few == prompt_rows(str(tmp_path / "many.jsonl"), 5, 0) != prompt_rows(str(tmp_path / "many.jsonl"), 5, 1)
    assert [int(row["question"]) for row in few] == sorted(int(row["question"]) for row in few)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"answer": "x"}], "has the columns answer; a prompt is in question, prompt"),
        ([{"question": "a"}, {"question": " "}], "Row 1 of"),
        ([{"question": "a"}, {"prompt": "b"}], "has no 'question'"),
        ([{"messages": "hello"}], "Row 0 of"),
    ],
)
def test_rows_without_a_prompt(tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        prompt_rows(str(write_jsonl(tmp_path / "r.jsonl", rows)))


def test_refused_before_anything_is_generated(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(fluency, "generate", lambda *args, **kwargs: pytest.fail("generated"))
    with pytest.raises(UserError, match=r"Prompt 0 of .*exceeds the model's context"):
        settings(rows, max_new_tokens=200).measure(pico(), byte_tokenizer())
    with pytest.raises(UserError, match="5 times the same reply"):
        settings(rows, temperature=0.0, samples=5).data_digest()
    with pytest.raises(UserError, match="No model at"):
        settings(rows, reference_model=str(tmp_path / "no" / "such")).data_digest()
    with pytest.raises(UserError, match=r"needs `judge\.url`"):
        settings(rows, judge={"model": "j"}).data_digest()
    write_jsonl(tmp_path / "m.jsonl", [{"messages": [{"role": "system", "content": "x"}]}])
    with pytest.raises(UserError, match="Row 0 has no user turn"):
        settings(str(tmp_path / "m.jsonl")).measure(pico(), byte_tokenizer())


def test_the_key_of_the_cache_knows_what_is_read(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    save_pico(tmp_path / "one")
    save_pico(tmp_path / "two", seed=1)
    digests = [
        settings(rows, **others).data_digest()
        for others in (
            {},
            {"limit": 2},
            {"batch_size": 1},
            {"reference_model": str(tmp_path / "one")},
            {"reference_model": str(tmp_path / "two")},
        )
    ]
    assert None not in digests
    assert len(set(digests)) == len(digests)
    # what a judge says cannot be known by its contents
    assert settings(rows, judge={"url": "http://h", "model": "j"}).data_digest() is None


# ---- with a judge


def test_the_judge_grades_all_replies_and_a_broken_one_costs_only_its_figures(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-1234")
    monkeypatch.setenv("ALTER_CACHE", str(tmp_path / "cache"))
    save_pico(tmp_path / "model")
    server = Server()
    args = ["evaluate", "--benchmark", "fluency", "--model", str(tmp_path / "model"), "--prompts", rows]
    args += ["--samples", "2", "--max-new-tokens", "6", "--json", str(tmp_path / "r.json")]
    args += ["--judge.url", server.url, "--judge.model", "j"]
    assert cli.main(args) == 0
    found = by_metric(read_records(tmp_path / "r.json"))
    distinct = {
        (q, g)
        for q, g in zip(*(found["fluency_distinct_1"].extra[k] for k in ("questions", "generations")), strict=True)
    }
    assert len(server.bodies) == len({pair for pair in distinct if pair[1]})
    assert found["fluency_judge_mean"].n == 6
    assert found["fluency_judge_mean"].extra["prompts"] == rows
    assert "sk-test-1234" not in (tmp_path / "r.json").read_text()
    # once more: all verdicts are there already
    asked = len(server.bodies)
    assert cli.main(args) == 0
    assert len(server.bodies) == asked
    # another judge, for whom the key is wrong
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    capsys.readouterr()
    assert cli.main([*args[:-1], "k"]) == 0
    assert len(server.bodies) == asked + min(4, asked)
    said = capsys.readouterr().err
    assert "No grades: " in said
    assert f"alter judge --file {tmp_path / 'r.json'}" in said
    found = by_metric(read_records(tmp_path / "r.json"))
    assert "fluency_judge_mean" not in found
    assert found["fluency_perplexity"].value > 1
    server.http.shutdown()
    server.http.server_close()


def test_measured_on_the_command_line_like_every_benchmark(rows, tmp_path):
    save_pico(tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model"))
    chosen = settings(
        rows, model=str(tmp_path / "model"), json_path=str(tmp_path / "r.json"), cache=str(tmp_path / "c")
    )
    first, again = evaluate(chosen), evaluate(chosen)
    assert [record.value for record in first] == [record.value for record in again]
    assert first[0].provenance["measured"] == again[0].provenance["measured"]
    assert [r.value for r in chosen.measure(model, tokenizer)] == [r.value for r in first]
    assert json.loads((tmp_path / "r.json").read_text())[0]["extra"]["benchmark"] == "fluency"
    assert tokenizer.pad_token_id == PAD


def test_prompts_whose_contents_are_parts():
    from alter.evaluation.fluency import _example

    turns = [
        {"from": "human", "value": [{"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "Ulm"},
    ]
    found = _example({"messages": turns}, "In Ulm.", 0)
    assert (found.prompt, [turn["content"] for turn in found.messages]) == ("Where?", ["Where?", "", "Ulm"])
