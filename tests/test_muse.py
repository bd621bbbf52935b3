"""MUSE on a stand-in of its layout, made of a book: every figure against a plain loop, prompts, references, curves."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nltk.stem.porter import PorterStemmer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import reference
from alter import metrics
from alter.cli import main
from alter.core.errors import UserError
from alter.data.hub import muse_rows
from alter.data.sources import read_rows
from alter.evaluation import muse
from alter.evaluation.musecurve import MuseCurve, muse_curve
from alter.evaluation.replies import cut_reply
from alter.evaluation.run import evaluate
from alter.storage.records import read_records, write_records
from pico import byte_tokenizer, save_pico
from pico import pico as make_pico
from test_scoring import by_hand

BOOKS = Path(__file__).parent.parent / "data" / "books"
NEW, FEW = 24, 12
PIECE = r" ?\w+|\W"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(muse, "VERBMEM_TOKENS", NEW)
    monkeypatch.setattr(muse, "KNOWMEM_TOKENS", FEW)
    monkeypatch.setenv("ALTER_CACHE", "off")


def passages(book, n, skip=3):
    text = (BOOKS / f"{book}.txt").read_text()
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [part for part in found if len(part) > 300][skip : skip + n]


def questions(book, n, skip):
    rows = []
    for text in passages(book, n, skip):
        words = text.split()
        rows.append({"question": f"What follows {' '.join(words[:4])}?", "answer": " ".join(words[4:10])})
    return rows


def put(folder, split, rows, ending=".json"):
    path = folder / f"{split}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if ending == ".jsonl" else json.dumps(rows))


def stand_in(folder, book="alice"):
    """MUSE's layout: JSON arrays as in MUSE's repository (plain texts for privleak), one split as JSON lines."""
    put(folder, "verbmem/forget", [{"prompt": p[:60], "gt": p[60:300]} for p in passages(book, 4)])
    put(folder, "knowmem/forget_qa", questions(book, 4, 8), ".jsonl")
    put(folder, "knowmem/forget_qa_icl", questions(book, 2, 12))
    put(folder, "knowmem/retain_qa", questions("wizard_of_oz", 3, 3))
    put(folder, "knowmem/retain_qa_icl", questions("wizard_of_oz", 2, 6))
    put(folder, "privleak/forget", [p[:150] for p in passages(book, 5, 14)])
    put(folder, "privleak/holdout", [p[:180] for p in passages("looking_glass", 4)])
    return folder


@pytest.fixture
def data(tmp_path):
    return stand_in(tmp_path / "data")


def word_tokenizer(data, **settings):
    """One token for each word, space and sign of the data; a text begins with <bos>, and decoding is exact."""
    pieces = sorted({p for f in data.rglob("*.json*") for p in re.findall(PIECE, json_text(f))})
    pieces = sorted({*pieces, *(piece.strip() for piece in pieces)} - {"", "\n"})
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<eos>", "<pad>", "<unk>", "\n", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special | settings)


def json_text(path):
    """All words of a file of rows, with those that prompts add."""
    return " ".join(re.findall(r"[^\"\\]+", path.read_text())) + " Question: Answer: "


def wordy(tokenizer, seed=17):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return make_pico(
        seed,
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        initializer_range=1.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def settings(data, **other):
    return muse.MuseEvaluation(**{"model": "pico", "corpus": "books", "data": str(data), "name": "m"} | other)


def by_metric(records):
    return {record.metric: record for record in records}


# ---- every figure against a plain loop


def naive_rouge_f1(truth, said, stem):
    def words(text):
        found = re.findall(r"[a-z0-9]+", text.lower())
        return [PorterStemmer().stem(w) if stem and len(w) > 3 else w for w in found]

    a, b = words(truth), words(said)
    lengths = {}
    for i in range(len(a)):
        for j in range(len(b)):
            same = lengths.get((i - 1, j - 1), 0) + 1 if a[i] == b[j] else 0
            lengths[i, j] = max(same, lengths.get((i - 1, j), 0), lengths.get((i, j - 1), 0))
    common = max(lengths.values(), default=0)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def naive_scores(model, tokenizer, texts, compat):
    """Min-40 % with one forward in float64 per text, the log-probabilities in a loop."""
    out = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model.double()(input_ids=torch.tensor([ids])).logits[0]
        found = [float(logits[t].log_softmax(0)[ids[t + 1]]) for t in range(len(ids) - 1)]
        out.append(reference.naive_min_k(found[:-1] if compat else found, 0.4))
    model.float()
    return out


@pytest.mark.parametrize("mode", ["strict", "compat"])
def test_every_figure_is_that_of_a_plain_loop(data, mode):
    tokenizer, compat = word_tokenizer(data), mode == "compat"
    model = wordy(tokenizer)
    found = by_metric(settings(data, mode=mode, batch_size=3).measure(model, tokenizer))
    assert (
        list(found) == ["verbmem", "knowmem_forget", "mia_min_k", "knowmem_retain"] + ["privleak"] * compat or compat
    )
    values = []
    for row in json.loads((data / "verbmem/forget.json").read_text()):
        reply = tokenizer.decode(
            by_hand(model, tokenizer(row["prompt"])["input_ids"], NEW, {1}), skip_special_tokens=True
        )
        # <bos> counts among MUSE's 128 tokens of truth: with words and signs as tokens the rest are these
        truth = row["gt"] if compat else "".join(re.findall(PIECE, row["gt"])[: NEW - 1])
        values.append(naive_rouge_f1(truth, reply, compat))
    np.testing.assert_allclose(found["verbmem"].per_item, values, atol=1e-12)
    assert found["verbmem"].value == pytest.approx(np.mean(values), abs=1e-12)
    assert min(found[name].value for name in ("verbmem", "knowmem_forget", "knowmem_retain")) > 0
    for metric, name in (("knowmem_forget", "forget_qa"), ("knowmem_retain", "retain_qa")):
        shots = muse_rows(f"knowmem/{name}_icl", str(data))
        values = []
        for row in muse_rows(f"knowmem/{name}", str(data)):
            text = ""
            for shot in shots:
                text += "Question: " + shot["question"] + "\nAnswer: " + shot["answer"] + "\n\n"
            text += "Question: " + row["question"] + "\nAnswer: "
            reply = tokenizer.decode(by_hand(model, tokenizer(text)["input_ids"], FEW, {1}), skip_special_tokens=True)
            for stop in ("\n\n", "\nQuestion", "Question:"):
                reply = reply[: reply.index(stop)] if stop in reply else reply
            values.append(naive_rouge_f1(row["answer"], reply, compat))
        np.testing.assert_allclose(found[metric].per_item, values, atol=1e-12)
        assert found[metric].n == len(values)
    known = naive_scores(model, tokenizer, json.loads((data / "privleak/forget.json").read_text()), compat)
    unseen = naive_scores(model, tokenizer, json.loads((data / "privleak/holdout.json").read_text()), compat)
    scores = found["mia_min_k"].extra["scores"]
    np.testing.assert_allclose(scores["forget"], known, rtol=1e-4)
    np.testing.assert_allclose(scores["holdout"], unseen, rtol=1e-4)
    assert found["mia_min_k"].value == pytest.approx(reference.naive_auc(known, unseen))
    assert found["mia_min_k"].n == 9
    if compat:
        share = 1 - found["mia_min_k"].value
        assert found["privleak"].value == pytest.approx((share - 0.5) / (0.5 + 1e-10) * 100)
        assert found["privleak"].extra["reference_auc"] is None


def test_min_k_is_over_all_tokens():
    rows = [[-1.0], [-3.0, -1.0], [-1.0, -5.0, -2.0, -4.0, -3.0], np.float32([-0.5] * 9 + [-9])]
    expected = [reference.naive_min_k(list(row), 0.4) for row in rows]
    np.testing.assert_allclose(metrics.membership.min_k(rows), expected)
    np.testing.assert_allclose(metrics.membership.min_k(rows), [1, 3, 4.5, (9 + 1.5) / 4])
    with pytest.raises(ValueError, match="row 1"):
        metrics.membership.min_k([[-1.0], []])


@pytest.mark.parametrize(
    ("target", "retrained", "printed"), [(0.0009, 0.4772, -99.8), (0.2291, 0.5393, -57.5)], ids=["news", "books"]
)
def test_privleak_is_that_of_muse(target, retrained, printed):
    """The AUCs are from MUSE's published logs of its target and retrained models, the result from its table 3."""
    assert metrics.membership.privleak(1 - target, 1 - retrained) == pytest.approx(printed, abs=0.05)


# ---- prompts and replies


def test_the_few_shot_prompt_to_the_letter():
    shots = [{"question": "Who fell?", "answer": "Alice"}, {"question": "Where?", "answer": "Down a well."}]
    assert muse.few_shot_prompt("Who ran by?", shots) == (
        "Question: Who fell?\nAnswer: Alice\n\nQuestion: Where?\nAnswer: Down a well.\n\nQuestion: Who ran by?\nAnswer: "
    )
    assert muse.few_shot_prompt("Who?", []) == "Question: Who?\nAnswer: "


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("Alice", "Alice"),
        ("Alice\n\nQuestion: Who", "Alice"),
        ("Alice\nQuestion", "Alice"),
        ("AliceQuestion: x\n\ny", "Alice"),
        ("\n\nAlice", ""),
        (" Alice\nQuestion\n\nBob", " Alice"),
        ("A Question of time\nmore", "A Question of time\nmore"),
    ],
)
def test_where_a_reply_ends(reply, kept):
    assert cut_reply(reply, muse.STOPS) == kept


class Says:
    """Stands for `generate`: decodes a fixed reply for each prompt, through the tokenizer that it is given."""

    def __init__(self, tokenizer, reply):
        self.ids, self.seen = tokenizer(reply, add_special_tokens=False)["input_ids"], []

    def __call__(self, model, tokenizer, prompts, **settings):
        self.seen.append((prompts, settings))
        return [tokenizer.decode(self.ids, skip_special_tokens=True).strip() for _ in prompts]


def test_a_reply_that_begins_with_a_stop_says_nothing(data, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(muse, "generate", Says(tokenizer, "\n\nWhat follows"))
    found = by_metric(
        settings(data, criteria=["knowmem_forget", "verbmem"]).measure(
            make_pico(max_position_embeddings=2048), tokenizer
        )
    )
    assert found["knowmem_forget"].extra["generations"] == [""] * 4
    assert found["knowmem_forget"].value == 0
    assert found["verbmem"].extra["generations"] == ["What follows"] * 4  # only questions have stops
    assert "knowmem_forget: 4 of 4 replies are empty; each scores 0." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("mode", "expected"), [("strict", 0), ("compat", 2 / 3)])
def test_only_compat_takes_words_for_their_stems(data, monkeypatch, mode, expected):
    put(data, "knowmem/retain_qa", [{"question": "How?", "answer": "She walks."}])
    put(data, "knowmem/retain_qa_icl", [{"question": "Why?", "answer": "So."}])
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(muse, "generate", Says(tokenizer, "walking\nQuestion: She"))
    model = make_pico(max_position_embeddings=2048)
    (record,) = settings(data, mode=mode, criteria=["knowmem_retain"]).measure(model, tokenizer)
    assert record.value == pytest.approx(expected)
    assert record.extra["generations"] == ["walking"]


def test_prompts_and_lengths_that_generation_gets(data, monkeypatch):
    tokenizer = byte_tokenizer(bos_token="<unused258>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unused258> $A <eos>", special_tokens=[("<unused258>", 258), ("<eos>", 256)]
    )
    monkeypatch.undo()
    says = Says(tokenizer, "words")
    monkeypatch.setattr(muse, "generate", says)
    settings(data, criteria=["verbmem", "knowmem_retain"]).measure(make_pico(max_position_embeddings=2048), tokenizer)
    (verbatim, first), (asked, second) = says.seen
    assert (first["max_new_tokens"], second["max_new_tokens"]) == (128, 32)
    row = json.loads((data / "verbmem/forget.json").read_text())[0]
    assert tokenizer.decode(verbatim[0]) == "<unused258>" + row["prompt"]  # opened, not closed
    shots = muse_rows("knowmem/retain_qa_icl", str(data))
    question = muse_rows("knowmem/retain_qa", str(data))[0]["question"]
    assert tokenizer.decode(asked[0]) == "<unused258>" + muse.few_shot_prompt(question, shots)


# ---- lengths


def test_texts_are_cut_only_on_request_and_say_so(data, capsys):
    tokenizer = word_tokenizer(data)
    model = wordy(tokenizer)
    whole = by_metric(settings(data, criteria=["privleak"]).measure(model, tokenizer))["mia_min_k"]
    cut = by_metric(settings(data, criteria=["privleak"], max_length=20).measure(model, tokenizer))["mia_min_k"]
    assert (whole.extra["cut"], whole.extra["max_length"]) == (0, None)
    assert (cut.extra["cut"], cut.extra["max_length"]) == (9, 20)
    assert "9 of 9 texts were cut to their first 20 tokens" in " ".join(capsys.readouterr().err.split())
    text = json.loads((data / "privleak/forget.json").read_text())[0]
    first = "".join(re.findall(PIECE, text)[:20])  # <bos> aside
    np.testing.assert_allclose(
        cut.extra["scores"]["forget"][0], naive_scores(model, tokenizer, [first], False)[0], rtol=1e-4
    )


def test_what_exceeds_the_context_is_refused_before_anything_is_generated(data, monkeypatch):
    tokenizer = byte_tokenizer()
    says = Says(tokenizer, "x")
    monkeypatch.setattr(muse, "generate", says)
    with pytest.raises(UserError, match=r"knowmem/forget_qa, row 0.*context of 128"):
        settings(data).measure(make_pico(), tokenizer)
    with pytest.raises(UserError, match=r"privleak/forget.*`max_length` cuts.*150 tokens"):
        settings(data, criteria=["verbmem", "privleak"]).measure(make_pico(), tokenizer)
    assert says.seen == []
    settings(data, criteria=["verbmem", "privleak"], max_length=100).measure(make_pico(), tokenizer)
    put(data, "knowmem/forget_qa", [{"question": "q" * 600, "answer": "a"}], ".jsonl")
    with pytest.raises(UserError, match=r"512.*`mode` strict"):
        settings(data, mode="compat").measure(make_pico(max_position_embeddings=2048), tokenizer)


def test_compat_takes_the_whole_continuation_after_a_space(data, monkeypatch):
    tokenizer = byte_tokenizer()
    row = {"prompt": "Down the", "gt": "rabbit-hole went Alice"}
    assert muse._continuation(tokenizer, row, compat=True) == "rabbit-hole went Alice"
    monkeypatch.setattr(muse, "VERBMEM_TOKENS", 11)
    assert muse._continuation(tokenizer, row, compat=False) == "rabbit-hole"
    monkeypatch.setattr(muse, "COMPAT_TEXT", 7)
    assert muse._continuation(tokenizer, row, compat=True) == "rabbit"
    assert settings(data, mode="compat").text_length == 7
    assert settings(data).text_length is None


# ---- data


def test_layouts(data, tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    rows = muse_rows("privleak/forget", str(data))
    assert set(rows[0]) == {"text"}
    other = tmp_path / "hub" / "privleak"
    other.mkdir(parents=True)
    for i, part in enumerate((rows[:2], rows[2:])):
        parquet.write_table(arrow.Table.from_pylist(part), other / f"forget-0000{i}-of-00002.parquet")
    assert muse_rows("privleak/forget", str(tmp_path / "hub")) == rows
    parquet.write_table(arrow.Table.from_pylist(rows), other / "holdout.parquet")
    assert muse_rows("privleak/holdout", str(tmp_path / "hub")) == rows
    parquet.write_table(arrow.Table.from_pylist(rows), other / "forget.parquet")
    with pytest.raises(UserError, match=r"forget more than once \(forget\.parquet, forget-00000"):
        muse_rows("privleak/forget", str(tmp_path / "hub"))
    (other / "retain.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        muse_rows("privleak/retain", str(tmp_path / "hub"))


def test_the_folds_can_be_trained_on(data):
    put(data, "sust/forget_2", [{"text": "one"}, {"text": "two"}])
    assert read_rows(f"{data}:sust/forget_2") == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(UserError, match=r"Did you mean 'sust/forget_2\.json'"):
        read_rows(f"{data}:sust/forget_3")
    with pytest.raises(UserError, match="No file or folder"):
        read_rows("nowhere/at/all:sust/forget_2")


def test_hub_ids_name_configuration_and_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **settings: asked.append((names, settings)) or [{"text": "t"}]
    )
    assert read_rows("muse-bench/MUSE-News:scal/forget_3") == [{"text": "t"}]
    found = muse.MuseEvaluation(model="m", corpus="news", criteria=["privleak"]).rows()
    assert list(found) == ["privleak/forget", "privleak/holdout"]
    assert asked == [
        (("muse-bench/MUSE-News", "scal"), {"split": "forget_3"}),
        (("muse-bench/MUSE-News", "privleak"), {"split": "forget"}),
        (("muse-bench/MUSE-News", "privleak"), {"split": "holdout"}),
    ]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda d: (d / "verbmem/forget.json").unlink(), r"no verbmem/forget .*it has knowmem"),
        (
            lambda d: put(d, "verbmem/forget", [{"prompt": "a", "text": "b"}]),
            r"Row 0 of verbmem/forget .* no 'gt'; it has",
        ),
        (lambda d: put(d, "knowmem/retain_qa", [{"question": "a", "answer": " "}]), "an empty 'answer'"),
        (lambda d: put(d, "knowmem/retain_qa", [{"question": "a", "answer": ["b"]}]), "a list as 'answer'"),
        (lambda d: (d / "privleak/holdout.json").write_text("[1"), "not valid JSON"),
        (lambda d: put(d, "privleak/holdout", [3]), "row 1 is a int"),
        (lambda d: put(d, "privleak/holdout", []), "holds no rows"),
    ],
)
def test_wrong_data_is_refused_before_a_model_is_loaded(data, damage, match):
    damage(data)
    with pytest.raises(UserError, match=match):
        settings(data).data_digest()


def test_no_such_folder(data):
    with pytest.raises(UserError, match=r"No folder of MUSE's files at .*Did you mean"):
        settings(f"{data}x").data_digest()


def test_a_limit_leaves_the_shots(data):
    found = settings(data, limit=1).rows()
    assert {split: len(rows) for split, rows in found.items()} == {
        "verbmem/forget": 1,
        "knowmem/forget_qa": 1,
        "knowmem/forget_qa_icl": 2,
        "privleak/forget": 1,
        "privleak/holdout": 1,
        "knowmem/retain_qa": 1,
        "knowmem/retain_qa_icl": 2,
    }
    assert settings(data, limit=2, seed=1).rows() != settings(data, limit=2).rows()


def test_the_digest_follows_the_contents(data):
    first = settings(data).data_digest()
    assert settings(data).data_digest() == first
    rows = json.loads((data / "knowmem/forget_qa_icl.json").read_text())
    put(data, "knowmem/forget_qa_icl", rows[::-1])
    assert settings(data).data_digest() != first


# ---- the retrained model


@pytest.fixture
def retrained(tmp_path):
    return save_pico(tmp_path / "retrained", seed=5, max_position_embeddings=512)


def privacy(data, model, **other):
    return evaluate(settings(data, criteria=["privleak"], model=str(model), **other))


def test_privleak_against_a_file_and_against_the_model_itself(data, retrained, tmp_path, capsys):
    target = save_pico(tmp_path / "target", seed=6, max_position_embeddings=512)
    alone = by_metric(privacy(data, target))
    assert list(alone) == ["mia_min_k"]
    said = " ".join(capsys.readouterr().err.split())
    command = f"alter evaluate --model RETRAINED --benchmark muse --corpus books --criteria privleak --data {data}"
    assert f"`{command} --json retrained.json`" in said
    file = tmp_path / "retrained.json"
    own = by_metric(privacy(data, retrained, json_path=str(file)))["mia_min_k"]
    from_file = by_metric(privacy(data, target, retain_records=str(file)))["privleak"]
    from_model = by_metric(privacy(data, target, retain_records=str(retrained)))["privleak"]
    expected = ((1 - alone["mia_min_k"].value) - (1 - own.value)) / (1 - own.value) * 100
    assert from_file.value == pytest.approx(expected)
    assert from_model.value == pytest.approx(expected)
    assert expected != 0
    assert from_file.extra["reference"] == str(file)
    assert by_metric(privacy(data, retrained, retain_records=str(file)))["privleak"].value == pytest.approx(0)
    digests = [settings(data, retain_records=s).data_digest() for s in (None, str(file), str(retrained))]
    assert len(set(digests)) == 3


def test_references_of_something_else_are_refused_by_name(data, retrained, tmp_path):
    file = str(tmp_path / "retrained.json")
    privacy(data, retrained, json_path=file)
    again = r"alter evaluate --model RETRAINED --benchmark muse"
    other = stand_in(tmp_path / "other", "peter_pan")
    with pytest.raises(UserError, match=rf"retrained\.json was measured on other texts.*{again}.*--data {other}"):
        settings(other, retain_records=file).data_digest()
    with pytest.raises(UserError, match=rf"mode strict, this run has mode compat.*{again}.*--mode compat"):
        settings(data, retain_records=file, mode="compat").data_digest()
    with pytest.raises(UserError, match=rf"max_length None, this run has max_length 9.*{again}.*--max-length 9"):
        settings(data, retain_records=file, max_length=9).data_digest()
    with pytest.raises(UserError, match="corpus books, this run has corpus news"):
        settings(data, retain_records=file, corpus="news").data_digest()
    with pytest.raises(UserError, match=r"other texts.*--limit 2 --seed 0"):
        settings(data, retain_records=file, limit=2).data_digest()
    with pytest.raises(UserError, match=r"No result file or model.*Did you mean '.*retrained\.json'"):
        settings(data, retain_records=file + "x").data_digest()
    with pytest.raises(UserError, match='"published" is for the whole texts of muse-bench/MUSE-Books'):
        settings(data, retain_records="published").data_digest()
    records = read_records(file)
    write_records(file, records + records)
    with pytest.raises(UserError, match="holds 2 records of mia_min_k on MUSE; expected one"):
        settings(data, retain_records=file).data_digest()
    # a reference that is not needed is not looked at
    settings(data, retain_records=file, criteria=["verbmem"]).data_digest()


def test_a_reference_that_knows_everything_is_none(data, tmp_path, retrained):
    file = str(tmp_path / "retrained.json")
    record = privacy(data, retrained)[0]
    write_records(file, [replace(record, value=1.0)])
    with pytest.raises(UserError, match="AUC 1"):
        settings(data, retain_records=file).data_digest()


def test_a_reference_model_that_does_not_do_is_refused_before_anything_is_generated(
    data, tmp_path, retrained, monkeypatch
):
    monkeypatch.setattr("alter.evaluation.muse.generate", lambda *_, **__: pytest.fail("replies were generated"))
    own = evaluate(settings(data, criteria=["privleak"], model=str(retrained)))[0].value
    monkeypatch.setattr("alter.metrics.membership.auc", lambda *_: 1.0)
    target = save_pico(tmp_path / "target", seed=6, max_position_embeddings=512)
    with pytest.raises(UserError, match=r"retrained tells every forgotten text .*AUC 1"):
        evaluate(settings(data, model=str(target), retain_records=str(retrained)))
    assert own < 1


# ---- scalability and sustainability


def curve_settings(data, model, *points, **other):
    given = {"model": str(model), "corpus": "books", "data": str(data), "criterion": "sustainability"}
    return MuseCurve(**given | {"points": list(points), "criteria": ["privleak"]} | other)


def test_a_curve_has_the_figures_of_each_model(data, retrained, tmp_path, capsys):
    first = save_pico(tmp_path / "first", seed=7, max_position_embeddings=512)
    second = save_pico(tmp_path / "second", seed=8, max_position_embeddings=512)
    given = curve_settings(
        data, retrained, f"0.5k={first}", f"1.5k={second}", criterion="scalability", json_path=str(tmp_path / "c.json")
    )
    found = muse_curve(given)
    assert [(r.model, r.extra["point"], r.extra["x"]) for r in found] == [
        ("original", "original", 0.0),
        ("0.5k", "0.5k", 500.0),
        ("1.5k", "1.5k", 1500.0),
    ]
    assert [r.value for r in found] == [privacy(data, m)[0].value for m in (retrained, first, second)]
    assert {r.extra["criterion"] for r in found} == {"scalability"}
    assert len({r.provenance["weights"] for r in found}) == 3
    assert read_records(tmp_path / "c.json") == found
    shown = capsys.readouterr().out
    assert all(f"{r.value:.3f}" in shown for r in found)
    assert "0.5k" in shown


def test_points_are_adapters_models_or_both(data, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    given = curve_settings(data, "base", f"1={adapter}", "2=org/model", "3=org/model+org/adapter", "4M=builtin:x/y")
    assert [(p.x, p.model, p.adapter) for p in given.parsed()] == [
        (0.0, "base", None),
        (1.0, "base", str(adapter)),
        (2.0, "org/model", None),
        (3.0, "org/model", "org/adapter"),
        (4e6, "builtin:x/y", None),
    ]
    assert given.at(given.parsed()[1]).label == "1"


@pytest.mark.parametrize(
    ("points", "match"),
    [
        (["runs/a"], "'runs/a' is not of the form NUMBER=PATH"),
        (["x=runs/a"], "NUMBER=PATH"),
        (["1="], "NUMBER=PATH"),
        (["0=a"], "above 0"),
        (["2=a", "1=b"], "'1=b' does not come after '2'"),
        (["1k=a", "1000=b"], "ascending"),
        (["1=+b"], "empty name"),
    ],
)
def test_points_that_make_no_curve(data, points, match):
    with pytest.raises(UserError, match=match):
        curve_settings(data, "m", *points).parsed()


def test_all_folders_are_looked_at_before_the_first_model_is_measured(data, retrained, monkeypatch):
    monkeypatch.setattr(muse.MuseEvaluation, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match="No model at /nowhere"):
        muse_curve(curve_settings(data, retrained, f"1={retrained}", "2=/nowhere/model"))


# ---- as a user


def test_from_the_command_line(data, retrained, tmp_path, capsys):
    common = ["--benchmark", "muse", "--corpus", "books", "--data", str(data), "--model", str(retrained)]
    file = str(tmp_path / "r.json")
    assert main(["evaluate", *common, "--criteria", "privleak", "verbmem", "--json", file]) == 0
    assert {r.metric for r in read_records(file)} == {"verbmem", "mia_min_k"}
    assert "MUSE books" in capsys.readouterr().out
    assert main(["muse-curve", *common[2:], "--criterion", "scalability", "--points", "nonsense"]) == 2
    assert "NUMBER=PATH" in capsys.readouterr().err
