"""WMDP, MMLU and other tasks through lm-evaluation-harness: its own numbers, ours in batches, local files, bad input."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats

from alter import AlterConfig, metrics
from alter.cli import main
from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.evaluation.harness import files as local
from alter.evaluation.harness.benchmarks import HAZARDS, LmEvalEvaluation, MmluEvaluation, WmdpEvaluation
from alter.evaluation.harness.files import local_task
from alter.evaluation.harness.model import harness_model
from alter.evaluation.harness.results import _interval
from alter.inference.scoring import score
from pico import byte_tokenizer, pico, save_pico

pytest.importorskip("lm_eval")
CONTEXT = 600


def rows(n, seed=0, **changed):
    rng = np.random.default_rng(seed)
    words = ["rain", "stone", "a longer thing", "x", "seven", "river bed"]
    return [
        {
            "question": f" Which one is {words[int(rng.integers(6))]} number {i}?"[: int(rng.integers(12, 40))],
            "choices": [f"{words[int(rng.integers(6))]} {k}" for k in range(4)],
            "answer": int(rng.integers(4)),
            **changed,
        }
        for i in range(n)
    ]


def write(path, content):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            writer.writerows([row["question"], *row["choices"], row["answer"]] for row in content)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write(folder / "high_school_stones_test.csv", rows(13, 1))
    write(folder / "high_school_stones_dev.csv", rows(3, 2))
    write(folder / "mmlu_weather.parquet", rows(6, 3))
    write(folder / "weather_dev.jsonl", rows(3, 4))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def plain():
    return pico(max_position_embeddings=CONTEXT)


def adapted(seed=1, **settings):
    """An ALTER adapter whose experts all matter and whose router opens different ones."""
    settings = {"r": 4, "alter_alpha": 8, "num_forget_experts": 2, "entropy_threshold": 1.5} | settings
    base = pico(max_position_embeddings=CONTEXT)
    model = get_peft_model(base, AlterConfig(**settings, task_type="CAUSAL_LM")).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "alter_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def evaluation(cls=MmluEvaluation, **settings):
    return cls(model="pico", **settings)


def by_metric(records):
    assert len({record.metric for record in records}) == len(records)
    return {record.metric: record for record in records}


def prompts(content, about):
    """The prompts of the questions, by the specification's words."""
    first = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    texts = []
    for row in content:
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
        texts.append(f"{first}{row['question'].strip()}{options}\nAnswer:")
    return texts


def naive_letters(model, tokenizer, texts):
    """Log-probability of " A" to " D" after each text, one plain forward per letter, float64 softmax."""
    out = []
    for text in texts:
        line = []
        for letter in "ABCD":
            context, whole = tokenizer.encode(text), tokenizer.encode(f"{text} {letter}")
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
            line.append(sum(float(logits[t - 1, whole[t]]) for t in range(len(context), len(whole))))
        out.append(line)
    return np.array(out)


def lm_evals_own(monkeypatch, model, tokenizer, task, shots):
    """The harness by itself: its entry point, its model class, its defaults; only the report on the machine is left out."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    # without an index of its own tasks
    known = TaskManager(include_defaults=False)
    return simple_evaluate(model=lm, tasks=[task], num_fewshot=shots, log_samples=True, task_manager=known)


# ---- numbers


def test_prompts_and_tasks_are_those_that_the_harness_ships():
    import lm_eval.tasks
    import yaml

    shipped = Path(lm_eval.tasks.__file__).parent
    for name in ("wmdp/_default_template_yaml", "mmlu/default/_default_template_yaml"):
        template = yaml.safe_load((shipped / name).read_text())
        assert {key: template[key] for key in local.HARNESS_TEMPLATE} == local.HARNESS_TEMPLATE
    for subject, about in HAZARDS.items():
        own = yaml.safe_load((shipped / f"wmdp/wmdp_{subject}.yaml").read_text())
        assert own["description"] == local.DESCRIPTION.format(about)
    subjects = sorted((shipped / "mmlu/default").glob("mmlu_*.yaml"))
    assert len(subjects) == 57
    for path in subjects:
        subject = path.stem.removeprefix("mmlu_").replace("_", " ")
        assert f"about {subject}." in " ".join(path.read_text().replace("\\\n  \\", "").split())


@pytest.mark.parametrize("shots", [0, 2])
def test_numbers_are_those_of_the_harness_itself(monkeypatch, plain, tokenizer, folder, shots):
    records = by_metric(
        evaluation(data=str(folder), subjects=["high_school_stones"], num_fewshot=shots).measure(plain, tokenizer)
    )
    files = {split: folder / f"high_school_stones_{split}.csv" for split in ("test", "dev")}
    task = local_task("mmlu_high_school_stones", "high school stones", files, shots)
    own = lm_evals_own(monkeypatch, plain, tokenizer, task, shots)
    result, samples = own["results"]["mmlu_high_school_stones"], own["samples"]["mmlu_high_school_stones"]
    record = records["mmlu_high_school_stones_acc"]
    assert record.value == result["acc,none"]
    assert record.extra["stderr"] == pytest.approx(result["acc_stderr,none"])
    right = int(sum(record.per_item))
    assert record.extra["interval"] == pytest.approx(stats.binomtest(right, 13).proportion_ci(method="wilson"))
    assert record.per_item == [sample["acc"] for sample in samples]
    assert (record.n, record.extra["num_fewshot"]) == (13, shots)
    theirs = np.array([[answer[0][0] for answer in sample["resps"]] for sample in samples])
    np.testing.assert_allclose(records["mmlu_choice_mass"].per_item, np.exp(theirs).sum(1), rtol=1e-5)
    assert records["mmlu_answer_entropy"].per_item == theirs.argmax(1).tolist()
    if not shots:
        texts = prompts(local.questions(files["test"]), "high school stones")
        assert [sample["arguments"][0][0] for sample in samples] == texts
        np.testing.assert_allclose(theirs, naive_letters(plain, tokenizer, texts), atol=1e-4)


def test_the_total_weighs_questions_and_not_subjects(plain, tokenizer, folder):
    records = by_metric(evaluation(data=str(folder)).measure(plain, tokenizer))
    first, second = records["mmlu_high_school_stones_acc"], records["mmlu_weather_acc"]
    assert (first.n, second.n, records["mmlu_acc"].n) == (13, 6, 19)
    assert records["mmlu_acc"].value == pytest.approx((13 * first.value + 6 * second.value) / 19)
    whole = records["mmlu_acc"]
    assert whole.extra["stderr"] > 0
    ends = [whole.value - 1.96 * whole.extra["stderr"], whole.value + 1.96 * whole.extra["stderr"]]
    assert whole.extra["interval"] == pytest.approx(np.clip(ends, 0, 1))
    assert sum(records["mmlu_answer_entropy"].extra["predicted"].values()) == 19
    assert records["mmlu_acc"].higher_is_better
    parts = [records[f"mmlu_{subject}_answer_entropy"] for subject in ("high_school_stones", "weather")]
    for key, total in (("ties", "mmlu_answer_ties"), ("mass", "mmlu_choice_mass")):
        assert sum(part.n * part.extra[key] for part in parts) / 19 == pytest.approx(records[total].value)
    assert [part.extra["top_share"] for part in parts] == [max(p.extra["predicted"].values()) / p.n for p in parts]


@pytest.mark.parametrize(
    ("value", "items", "stderr", "expected"),
    [
        (0.95, None, 0.05, [0.852, 1.0]),
        (3.0, None, 0.5, [2.02, 3.98]),
        # a figure that is no mean of its items
        (0.5, [1.0, 1.0, 0.0], 0.1, [0.304, 0.696]),
        (0.5, [0.4, 0.6] * 10, None, [0.45, 0.55]),
        (0.5, None, None, None),
    ],
)
def test_each_figure_has_an_interval(value, items, stderr, expected):
    found = _interval(value, items, stderr)
    assert found == (None if expected is None else pytest.approx(expected))


def ask(model, tokenizer, texts, **settings):
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, (text, f" {x}"), k) for text in texts for k, x in enumerate("ABCD")]
    answers = harness_model(model, tokenizer, **settings).loglikelihood(requests)
    return np.array([logprob for logprob, _ in answers]).reshape(-1, 4)


@pytest.mark.parametrize("router", ["learned", "entropy"])
def test_routing_is_active_in_any_batch_and_equal_to_our_own_scores(tokenizer, router):
    model, texts = adapted(router=router), prompts(rows(9, 5), "stones")
    batched = ask(model, tokenizer, texts, batch_tokens=5000)
    np.testing.assert_allclose(batched, ask(model, tokenizer, texts, batch_tokens=1), atol=1e-4)
    np.testing.assert_allclose(batched, naive_letters(model, tokenizer, texts), atol=1e-4)
    encoded = []
    for text in texts:
        context, whole = tokenizer.encode(text), tokenizer.encode(text + " A")
        encoded.append(Encoded(whole, [-100] * len(context) + whole[len(context) :], len(context)))
    own = score(model, encoded, pad_token_id=tokenizer.pad_token_id, progress=False).logprob
    np.testing.assert_allclose(batched[:, 0], [row.sum() for row in own], atol=1e-4)
    with model.disable_adapter():
        assert np.abs(batched - ask(model, tokenizer, texts)).max() > 0.1
    trace = model.base_model.trace(torch.tensor([tokenizer.encode(texts[0])]))
    gates = model.base_model.route(trace.entropy, trace.features)
    assert len(gates[0].unique(dim=0)) > 2


def test_merged_adapters_give_the_numbers_of_the_unmerged(tokenizer, folder):
    torch.manual_seed(3)
    lora = get_peft_model(
        pico(max_position_embeddings=CONTEXT), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    texts = prompts(rows(4, 6), "stones")
    for model in (lora.eval(), adapted(router="static")):
        before = ask(model, tokenizer, texts)
        with model.disable_adapter():
            assert np.abs(before - ask(model, tokenizer, texts)).max() > 0.1
        np.testing.assert_allclose(before, ask(model.merge_and_unload(), tokenizer, texts), atol=1e-3)


def test_bf16_is_compared_in_fp32(plain, tokenizer):
    texts = prompts(rows(12, 7), "stones")
    model = pico(max_position_embeddings=CONTEXT).bfloat16()
    logits = np.stack([
        model(input_ids=torch.tensor([tokenizer.encode(text + " ")])).logits[0, -1, tokenizer.encode("ABCD")]
        .float().detach().numpy()
        for text in texts
    ])  # fmt: skip
    found = ask(model, tokenizer, texts, batch_tokens=1)
    # the differences between letters are those of the logits, not rounded again by a softmax in bf16
    np.testing.assert_allclose(found - found[:, :1], logits - logits[:, :1], atol=1e-5)


# ---- how the answers are spread


def test_the_spread_of_answers_against_a_loop():
    rng = np.random.default_rng(0)
    for n, k in ((1, 2), (7, 4), (50, 3)):
        logprob = np.log(rng.dirichlet(np.ones(k + 2), size=n))[:, :k]
        found = metrics.choices.multiple_choice(logprob)
        counts = {}
        for line in logprob.tolist():
            best = max(range(k), key=lambda i: (line[i], -i))
            counts[best] = counts.get(best, 0) + 1
        entropy = -sum(c / n * math.log(c / n) for c in counts.values())
        assert found.entropy == pytest.approx(entropy, abs=1e-12)
        assert found.evenness == pytest.approx(entropy / math.log(k), abs=1e-12)
        assert found.top_share == max(counts.values()) / n
        assert found.counts.tolist() == [counts.get(i, 0) for i in range(k)]
        np.testing.assert_allclose(found.mass, [sum(math.exp(x) for x in line) for line in logprob])
        assert not found.ties.any()


def test_ties_extremes_and_refusals_of_the_spread():
    found = metrics.choices.multiple_choice([[-1, -1, -2], [-3, -2, -1], [-2, -1, -1], [-5, -5, -4]])
    assert found.predicted.tolist() == [0, 2, 1, 2]
    assert found.ties.tolist() == [True, False, True, False]
    one = metrics.choices.multiple_choice([[-0.1, -9.0, -math.inf]] * 5)
    assert (one.entropy, one.evenness, one.top_share) == (0.0, 0.0, 1.0)
    even = metrics.choices.multiple_choice(-1.0 + np.eye(4))
    assert (even.entropy, even.evenness) == (pytest.approx(math.log(4)), pytest.approx(1))
    for bad in ([], [[-1.0]], [[-1.0, math.nan]], [-1.0, -2.0]):
        with pytest.raises(ValueError, match="multiple choice"):
            metrics.choices.multiple_choice(bad)


def test_a_model_that_always_says_a_is_seen(tokenizer, folder, capsys):
    model = pico(max_position_embeddings=CONTEXT)
    head = torch.nn.Linear(32, 300)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    # after "Answer:" comes a space and then a letter, each a byte
    head.bias.data[tokenizer.encode(" A")] = 30.0
    model.lm_head = head
    records = by_metric(evaluation(data=str(folder)).measure(model, tokenizer))
    right = [row["answer"] for seed, n in ((1, 13), (3, 6)) for row in rows(n, seed)]
    assert records["mmlu_acc"].value == pytest.approx(right.count(0) / 19)
    assert records["mmlu_answer_entropy"].value == 0
    assert records["mmlu_top_answer"].value == 1
    assert records["mmlu_top_answer"].extra["answer"] == "A"
    assert records["mmlu_top_answer"].extra["predicted"] == {"A": 19, "B": 0, "C": 0, "D": 0}
    assert records["mmlu_answer_ties"].value == 0
    said = capsys.readouterr().err
    assert "100 % of the predicted answers are 'A'" in said
    assert "the choices together have a probability of 0.25" in said
    torch.nn.init.zeros_(head.bias)
    blank = by_metric(evaluation(data=str(folder)).measure(model, tokenizer))
    assert (blank["mmlu_answer_ties"].value, blank["mmlu_answer_entropy"].value) == (1, 0)
    assert blank["mmlu_choice_mass"].value == pytest.approx(4 / 300**2, rel=1e-4)


# ---- other tasks, limits, digests


def test_any_task_of_the_harness_by_yaml_file(plain, tokenizer, tmp_path):
    lines = [{"text": f"row {i} of rain", "target": " and stone"} for i in range(4)]
    write(tmp_path / "rows.jsonl", lines)
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n  cache_dir: {tmp_path}/c\n"
    common += "test_split: test\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{target}}'\n"
    (tmp_path / "say.yaml").write_text(
        f"task: say\noutput_type: generate_until\n{common}generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 6\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "read.yaml").write_text(
        f"task: read\noutput_type: loglikelihood_rolling\n{common}"
        "metric_list:\n  - metric: byte_perplexity\n    aggregation: weighted_perplexity\n    higher_is_better: false\n"
    )
    settings = evaluation(LmEvalEvaluation, tasks=[str(tmp_path / "say.yaml"), str(tmp_path / "read.yaml")])
    found = by_metric(settings.measure(plain, tokenizer))
    assert sorted(found) == ["read_byte_perplexity", "say_exact_match"]
    assert found["say_exact_match"].value == 0
    assert found["say_exact_match"].per_item == [0.0] * 4
    total = 0.0
    for line in lines:
        ids = tokenizer.encode(line["target"])
        whole = [tokenizer.eos_token_id, *ids]
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        total += sum(float(logits[t, token]) for t, token in enumerate(ids))
    expected = math.exp(-total / sum(len(line["target"].encode()) for line in lines))
    assert found["read_byte_perplexity"].value == pytest.approx(expected, rel=1e-4)
    assert found["read_byte_perplexity"].higher_is_better is False
    long = evaluation(LmEvalEvaluation, tasks=[str(tmp_path / "say.yaml")])
    with pytest.raises(UserError, match="with 6 new ones it exceeds the model's context of 12"):
        long.measure(pico(max_position_embeddings=12), tokenizer)


def test_a_limit_draws_by_seed_and_the_digest_follows_the_questions(plain, tokenizer, tmp_path):
    path = write(tmp_path / "wmdp_bio.json", rows(30, 8))
    whole = evaluation(WmdpEvaluation, data=str(tmp_path))
    assert whole.data_digest() == evaluation(WmdpEvaluation, data=str(path)).data_digest()
    some = [evaluation(WmdpEvaluation, data=str(tmp_path), limit=5, seed=seed) for seed in (0, 0, 1)]
    digests = [settings.data_digest() for settings in some]
    assert digests[0] == digests[1]
    assert len({*digests, whole.data_digest()}) == 3
    records = [by_metric(settings.measure(plain, tokenizer)) for settings in some[1:]]
    assert [r["wmdp_bio_acc"].n for r in records] == [5, 5]
    chosen = sorted(np.random.default_rng(0).choice(30, size=5, replace=False).tolist())
    everything = by_metric(whole.measure(plain, tokenizer))["wmdp_bio_acc"]
    assert records[0]["wmdp_bio_acc"].per_item == [everything.per_item[i] for i in chosen]
    assert everything.higher_is_better is False
    changed = rows(30, 8)
    changed[29]["answer"] = (changed[29]["answer"] + 1) % 4
    write(path, changed)
    assert evaluation(WmdpEvaluation, data=str(path)).data_digest() != whole.data_digest()


def test_every_file_form_gives_the_same_questions(tmp_path):
    content = rows(3, 9)
    expected = [{**row} for row in content]
    names = ("a.csv", "b.json", "c.jsonl", "d.parquet")
    assert all(local.questions(write(tmp_path / name, content)) == expected for name in names)
    (tmp_path / "e.csv").write_text('question,choices,answer\nq,"[""1"", ""2"", ""3"", ""4""]",3\n')
    assert local.questions(tmp_path / "e.csv") == [{"question": "q", "choices": ["1", "2", "3", "4"], "answer": 3}]


def test_names_of_files_give_subjects(tmp_path):
    (tmp_path / "wmdp-cyber").mkdir()
    names = (
        "wmdp_bio.json", "us_law_test.csv", "us_law_dev.csv", "wmdp-cyber/test-00000-of-00001.parquet", "only_dev.csv",
        "us_law_val.csv", "README.md",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("")
    found = local.local_files(str(tmp_path))
    assert {subject: sorted(files) for subject, files in found.items()} == {
        "bio": ["test"],
        "us_law": ["dev", "test", "val"],
        "cyber": ["test"],
    }
    one = local.local_files(str(tmp_path / "us_law_test.csv"))
    assert {subject: sorted(files) for subject, files in one.items()} == {"us_law": ["dev", "test"]}
    (tmp_path / "bio.csv").write_text("")
    with pytest.raises(UserError, match="Two files hold the test questions of 'bio'"):
        local.local_files(str(tmp_path))


# ---- bad input


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "q", "answer": 1}, "Row 1 of .* has no choice0, choice1, choice2, choice3; it has the columns"),
        ({"question": "q", "choices": ["a", "b", "c", "d"]}, "has no answer; it has the columns question, choices"),
        ({"question": "q", "choices": ["a", "b", "c"], "answer": 1}, "has 3 choices; expected a list of four"),
        ({"question": "q", "choices": "a b c d", "answer": 1}, "has choices 'a b c d'; expected a list of four"),
        ({"question": "q", "choices": ["a", "b", " ", "d"], "answer": 1}, "has an empty choice 2"),
        ({"question": "", "choices": ["a", "b", "c", "d"], "answer": 1}, "has an empty question"),
        *(
            ({"question": "q", "choices": ["a", "b", "c", "d"], "answer": answer}, f"has the answer {answer!r}")
            for answer in (4, -1, "A", True, 1.5, "")
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, says):
    path = write(tmp_path / "q.jsonl", [*rows(1), row])
    with pytest.raises(UserError, match=says):
        local.questions(path)


def test_bad_files_and_names(tmp_path, folder):
    for name, content, says in (
        ("a.csv", "question,choice0,choice1,choice2,choice3,answer\nq,a,b,c,d,e,2\n", "more values than the header"),
        ("b.csv", "question,choice0,choice1,choice2,choice3,answer\nq,a,b,c\n", "Row 0 of .* has no answer, choice3"),
        ("c.csv", "question,choice0,choice1,choice2,choice3,answer\n", "holds no questions"),
        ("d.parquet", "no", "not a parquet file"),
        ("e.csv", b"\xff\xfe\xfa,\n", "not a CSV file in UTF-8"),
    ):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=says):
            local.questions(path)
    with pytest.raises(UserError, match=r"No file or folder at hup.* Did you mean 'hub'"):
        evaluation(data="hup").data_digest()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No questions in"):
        evaluation(data=str(tmp_path / "empty")).data_digest()
    with pytest.raises(UserError, match=r"No subject 'wether' in .* Did you mean 'weather'"):
        evaluation(data=str(folder), subjects=["wether"]).data_digest()
    with pytest.raises(UserError, match="has 3 examples; `num_fewshot` asks for 4"):
        evaluation(data=str(folder), num_fewshot=4).data_digest()
    write(tmp_path / "bio.json", rows(2))
    with pytest.raises(UserError, match=r"No examples for 'bio': `num_fewshot` needs a file like bio_dev.json"):
        evaluation(data=str(tmp_path / "bio.json"), num_fewshot=1).data_digest()
    with pytest.raises(UserError, match=r"WMDP has no subject 'boi'.* Did you mean 'bio'"):
        evaluation(WmdpEvaluation, subjects=["boi"]).data_digest()


def test_prompts_too_long_and_nan_are_refused(tokenizer, folder):
    settings = evaluation(data=str(folder))
    with pytest.raises(UserError, match=r"A prompt has \d+ tokens, the model's context is 128: it ends with"):
        settings.measure(pico(), tokenizer)
    texts = prompts(rows(3, 1), "stones")
    longest = max(len(tokenizer.encode(text + " A")) for text in texts)
    # the last letter is predicted, not read
    ask(pico(max_position_embeddings=longest - 1), tokenizer, texts)
    with pytest.raises(UserError, match="the model's context is"):
        ask(pico(max_position_embeddings=longest - 2), tokenizer, texts)
    broken = pico(max_position_embeddings=CONTEXT)
    broken.lm_head.weight.data[5] = math.nan
    with pytest.raises(UserError, match="The model's logits are NaN"):
        settings.measure(broken, tokenizer)


@pytest.mark.slow
def test_names_of_the_harness_and_a_hub_that_cannot_be_reached(monkeypatch):
    with pytest.raises(UserError, match=r"no task 'arc_esy'.* Did you mean 'arc_easy'"):
        evaluation(LmEvalEvaluation, tasks=["arc_esy"]).data_digest()
    with pytest.raises(UserError, match="No tasks"):
        evaluation(LmEvalEvaluation, tasks=[]).data_digest()
    with pytest.raises(UserError, match=r"MMLU has no subject 'managment'.* Did you mean 'management'"):
        evaluation(subjects=["managment"]).data_digest()

    def unreachable(**_):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    for settings in (evaluation(WmdpEvaluation), evaluation(), evaluation(LmEvalEvaluation, tasks=["arc_easy"])):
        with pytest.raises(UserError, match=r"Cannot load the data of .* from the hub: Couldn't reach the Hub"):
            settings.data_digest()


@pytest.mark.slow
def test_hub_tasks_are_the_harness_own(monkeypatch, plain, tokenizer):
    import datasets

    asked = []

    def load(path, name=None, **_):
        asked.append((path, name))
        part = datasets.Dataset.from_list(rows(4, len(asked)))
        return datasets.DatasetDict({"test": part, "dev": part})

    monkeypatch.setattr("datasets.load_dataset", load)
    wmdp = by_metric(evaluation(WmdpEvaluation).measure(plain, tokenizer))
    assert asked == [("cais/wmdp", "wmdp-bio"), ("cais/wmdp", "wmdp-cyber")]
    assert wmdp["wmdp_bio_acc"].n == wmdp["wmdp_cyber_acc"].n == 4
    assert {"wmdp_bio_answer_entropy", "wmdp_bio_top_answer", "wmdp_cyber_choice_mass"} <= set(wmdp)
    with pytest.raises(UserError, match="'wmdp_bio' is defined without examples"):
        evaluation(LmEvalEvaluation, tasks=["wmdp_bio"], num_fewshot=2).data_digest()
    asked.clear()
    mmlu = by_metric(evaluation().measure(plain, tokenizer))
    assert len(asked) == 57
    assert mmlu["mmlu_acc"].n == 228
    assert mmlu["mmlu_stem_acc"].n == 19 * 4
    assert "mmlu_stem_top_answer" not in mmlu
    few = by_metric(evaluation(subjects=["management", "anatomy"], num_fewshot=1).measure(plain, tokenizer))
    assert few["mmlu_acc"].n == 8


def test_without_the_harness_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r'pip install "alter-unlearning\[eval\]"'):
        evaluation(data=str(folder)).data_digest()


def test_from_the_command_line(tmp_path, folder, capsys):
    save_pico(tmp_path / "model", max_position_embeddings=CONTEXT)
    static = adapted(router="static")
    static.save_pretrained(tmp_path / "static")
    adapted().save_pretrained(tmp_path / "routed")
    common = ["evaluate", "--benchmark", "mmlu", "--model", str(tmp_path / "model"), "--data", str(folder)]
    common += ["--cache", "off", "--adapter"]
    values = []
    for number, extra in enumerate(([], ["--merged"])):
        out = tmp_path / f"{number}.json"
        assert main([*common, str(tmp_path / "static"), "--json", str(out), *extra]) == 0
        values.append([(r["metric"], r["per_item"]) for r in json.loads(out.read_text()) if "_acc" in r["metric"]])
    assert values[0] == values[1]
    assert "mmlu_acc" in capsys.readouterr().out
    assert main([*common, str(tmp_path / "routed"), "--json", str(tmp_path / "r.json")]) == 0
    assert main([*common, str(tmp_path / "routed"), "--subjects", "nothing"]) == 2
    assert "No subject 'nothing'" in capsys.readouterr().err
