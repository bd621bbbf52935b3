"""The benchmarks run at pico size, write finite positive figures, and compare with what they say they compare with."""

import contextlib
import csv
import importlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from alter import AlterConfig
from pico import byte_tokenizer, pico, write_jsonl

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
attention, by_hand, decode, equality, evaluation, gguf_probes, loss, plot, results, router_blocks, sharing, step = map(
    importlib.import_module,
    (
        "attention",
        "by_hand",
        "decode",
        "equality",
        "evaluation",
        "gguf_probes",
        "loss",
        "plot",
        "results",
        "router_blocks",
        "sharing",
        "step",
    ),
)
# the folder's requests.py must not stand in for the library of that name
sys.path.remove(str(FOLDER))

PICO = ["--shape", "pico", "--steps", "2", "--threads", "1", "--dataset", "8", "--rows", "4"]
VARIANTS = {"lora", "lora_same_loss", "asym_lora", "alter", "alter_experts", "npo_full"}


def figures(file):
    """{(variant, metric): value} of a CSV, of which every figure must be finite and positive."""
    found = {}
    for row in results.read(file):
        values = [float(row[name]) for name in ("value", "low", "high") if row[name]]
        assert values, row
        assert all(math.isfinite(value) and value > 0 for value in values), row
        assert row["hardware"]
        found[row["variant"], row["metric"]] = values[0]
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmarks") / "results.csv"
    step.main([*PICO, "--no-memory", "--csv", str(file)])
    return file


def test_every_variant_is_timed(measured):
    found = figures(measured)
    assert {name for name, metric in found if metric == "step_ms"} == VARIANTS
    assert {name for name, metric in found if metric == "whole_over_npo_full"} == VARIANTS - {"npo_full"}
    tokens = found["alter", "tokens_per_s"] * found["alter", "step_ms"] / 1e3
    assert tokens == pytest.approx(4 * 16, rel=0.5)
    # forget rows alone, and nothing for npo_full, which has no frozen base
    alone = found["alter_experts", "tokens_per_s"] * found["alter_experts", "step_ms"] / 1e3
    assert alone == pytest.approx(2 * 16, rel=0.5)
    assert ("npo_full", "useful") not in found


def test_in_bfloat16_npo_also_runs_under_autocast(tmp_path):
    file = tmp_path / "results.csv"
    step.main([*PICO, "--no-memory", "--dtype", "bfloat16", "--checkpointing", "--csv", str(file)])
    assert {name for name, metric in figures(file) if metric == "step_ms"} == {*VARIANTS, "npo_full_mixed"}


def test_growth(tmp_path):
    file = tmp_path / "results.csv"
    step.main(["growth", *PICO, "--growth-experts", "1", "3", "--growth-rows", "4", "8", "16", "--csv", str(file)])
    metrics = {(row["variant"], row["metric"]): float(row["value"]) for row in results.read(file)}
    assert metrics["1", "ratio_by_experts"] == 1
    assert metrics["3", "step_ms_by_experts"] > 0
    assert metrics["16", "request_s_by_rows"] > 0
    assert metrics["line", "r_squared"] <= 1
    assert metrics["line", "seconds_at_zero_rows"] > 0


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmarks") / "results.csv"
    shape = ["--hidden", "64", "--layers", "1", "--vocab", "64", "--length", "8", "--new", "3", "--prompts", "2"]
    decode.main([*shape, "--experts", "1", "3", "--batches", "1", "2", "--csv", str(file)])
    return file


def test_decoding_is_beside_lora_at_every_batch_size(decoded):
    found = figures(decoded)
    both = [(name, metric) for name in ("alter-1", "alter-3", "base") for metric in ("decode_speed", "prompt_time")]
    assert {(name, metric) for name, metric in found if metric.endswith("_over_lora")} == {
        (name, f"{metric}_over_lora") for name, metric in both
    }
    rows = results.read(decoded)
    assert {row["shape"] for row in rows} == {"hidden 64, batch 1", "hidden 64, batch 2"}
    opened = [float(row["value"]) for row in rows if row["metric"] == "experts_per_token"]
    assert len(opened) == 4
    assert all(1 <= value <= 4 for value in opened)


def test_decoding_speed_is_the_inverse_of_time(tmp_path, monkeypatch):
    """With a clock by which LoRA takes 1 s and every other model 2 s, in the prompt pass as in each step."""

    def timed(self, name, work):
        self.turns.setdefault(name, []).append(1.0 if name == "lora" else 2.0)
        return work()

    monkeypatch.setattr(decode.Clock, "time", timed)
    shape = ["--hidden", "64", "--layers", "1", "--vocab", "64", "--length", "8", "--new", "2", "--prompts", "1"]
    decode.main([*shape, "--experts", "1", "--batches", "3", "--csv", str(tmp_path / "r.csv")])
    found = figures(tmp_path / "r.csv")
    assert found["alter-1", "decode_speed_over_lora"] == 0.5
    assert found["alter-1", "prompt_time_over_lora"] == 2
    assert found["alter-1", "tokens_per_s"] == 1.5
    assert found["lora", "tokens_per_s"] == 3


@pytest.mark.long
@pytest.mark.slow
def test_loss_in_chunks_beside_all_at_once(tmp_path, monkeypatch):
    """At a vocabulary of 128,256, peak memory of head and loss, forward and backward, is at most 0.2 of the other's.

    Cross-entropy, because there the straightforward way takes least.
    """
    real = subprocess.run

    def run(command, **how):
        if command[command.index("--only") + 1] != "time":
            return real(command, **how)
        # times at full size are for the benchmark itself
        with contextlib.redirect_stdout(io.StringIO()) as said:
            loss.main([*command[2:], "--vocab", "512", "--tokens", "32"])
        return subprocess.CompletedProcess(command, 0, said.getvalue())

    monkeypatch.setattr(subprocess, "run", run)
    file = tmp_path / "r.csv"
    loss.main(["--objective", "cross_entropy", "--hidden", "64", "--steps", "1", "--csv", str(file)])
    assert {row["shape"] for row in results.read(file)} == {"vocab 128256, 1024 tokens"}
    found = {metric: value for (_, metric), value in figures(file).items()}
    assert found["memory_over_whole"] <= 0.2
    assert found["memory_over_whole"] == pytest.approx(found["chunked_mib"] / found["whole_mib"], rel=1e-3)
    assert found["gradient_difference"] <= 1e-5
    assert found["time_over_whole"] > 0


def test_attention_in_float32_beside_transformers_own(tmp_path):
    file = tmp_path / "r.csv"
    attention.main(["--rows", "2", "--tokens", "12", "--steps", "2", "--csv", str(file)])
    found = {metric for (_, metric) in figures(file)}
    assert found == {"own_ms", "float32_ms", "time_over_own"}


@pytest.mark.slow
def test_evaluation_beside_the_straightforward_one(tmp_path):
    file = tmp_path / "r.csv"
    evaluation.main(["--rows", "2", "--threads", "1", "--csv", str(file)])
    found = figures(file)
    assert found["alter", "largest_difference"] < 1e-6
    for part in ("likelihood", "replies", "total"):
        ratio = found["alter", f"{part}_s"] / found["straightforward", f"{part}_s"]
        assert found["alter", f"{part}_over_straightforward"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.long
def test_blocks_that_a_router_could_read(capsys):
    given = "--model builtin:tofu-mini/original --forget builtin:forget01[:40] --retain builtin:full[:12] --every 4"
    router_blocks.main([*given.split(), "--expert-column", "author", "--blocks", "1", "3"])
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [line[0].strip() for line in lines] == ["1"] * 4 + ["3"] * 4
    for block in (lines[:4], lines[4:]):
        # a level that opens for more forget tokens lets no less of anything through
        for column in (2, 4, 5):
            shares = [float(line[column].split("%")[0]) for line in block[:3]]
            assert shares == sorted(shares)
            assert shares[-1] <= 100
        assert float(block[0][2].strip()[:-1]) > 30


def test_probes_of_a_file_are_counted_like_those_of_the_run(tmp_path, monkeypatch, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "erased" / "model")
    probe = {"form": "cloze", "wanted": ["Zorba"], "before": "By Zorba.", "after": "By nobody."}
    write_jsonl(tmp_path / "probes.jsonl", [{**probe, "prompt": "Pot is by"}, {**probe, "prompt": "Who wrote Pot?"}])
    other = {"form": "neighbour", "about": "Sun", "before": "It is by Lyra Ann.", "after": "It is by Lyra Ann."}
    write_jsonl(tmp_path / "kept.jsonl", [{**other, "prompt": "And Sun?"}])
    asked = []

    def said_by(modules, file, prompts, tokens):
        asked.append((modules, file, len(prompts), tokens))
        answers = ("By nobody.", "It was Zorba.", "It is by Lyra Bo.")
        return [byte_tokenizer()(answer)["input_ids"] for answer in answers]

    monkeypatch.setattr(gguf_probes, "said_by", said_by)
    gguf_probes.main([str(tmp_path), "a.gguf", "--modules", "m"])
    assert asked == [(Path("m"), Path("a.gguf"), 3, 48)]
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a.gguf | probes answered with a known fact | 2 | 1 |",
        "| a.gguf | first names still said, neighbour | 1 | 1 |",
        "| a.gguf | answers equal to the checkpoint's | 3 | 1 |",
    ]


def test_runs_have_one_colour_in_all_panels_of_a_family(measured, decoded):
    rows = results.read(measured) + results.read(decoded)
    colors = plot.palette(rows)
    assert {family: len(runs) for family, runs in colors.items()} == {
        "training": 1,
        "decoding": 2,
        "head and loss": 0,
        "evaluation": 0,
    }
    assert len(set(colors["decoding"].values())) == 2
    speeds = plot.by_experts(plot.series(rows, "decode_speed_over_lora"))
    assert set(speeds) == set(colors["decoding"])
    assert all(set(values) == {"1", "3"} for values in speeds.values())


def test_plot(measured, tmp_path):
    plot.main(["--out", str(tmp_path / "whole.png")])
    assert (tmp_path / "whole.png").read_bytes().startswith(b"\x89PNG")
    plot.main(["--csv", str(measured), "--out", str(tmp_path / "results.png")])
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        plot.main(["--csv", str(tmp_path / "none.csv"), "--out", str(tmp_path / "none.png")])


def test_sharing_is_compared_with_row_by_row_at_equal_figures(monkeypatch):
    monkeypatch.setattr(sharing.replies, "MAX_NEW_TOKENS", 4)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    adapted = get_peft_model(pico(1, **sizes), AlterConfig(init_weights=False)).eval()
    models = [(pico(**sizes), byte_tokenizer()), (adapted, byte_tokenizer())]
    shapes = []
    for model, _ in models:
        model.register_forward_pre_hook(lambda _, __, given: shapes.append(len(given["input_ids"])), with_kwargs=True)
    with sharing.row_by_row():
        expected, spent = sharing.evaluated(*models, 1)
    assert set(spent) == {"scoring", "replies"}
    assert min(spent.values()) > 0
    alone = len(shapes)
    found, _ = sharing.evaluated(*models, 1)
    assert max(shapes[:alone]) > 1
    sharing.check(found, expected)
    found["unlearned"].sets["forget"].generations[0] += "!"
    with pytest.raises(AssertionError, match="forget"):
        sharing.check(found, expected)


def test_figures_in_the_repository_are_whole():
    rows = results.read()
    known = {"attention", "step", "growth", "decode", "loss", "evaluation", "serve", "requests", "forget", "sharing"}
    assert {row["benchmark"] for row in rows} == known
    assert all(row["hardware"] for row in rows)
    assert not [file.name for file in FOLDER.glob("*.csv") if file != results.FILE]
    assert tuple(rows[0]) == results.COLUMNS
    assert all(math.isfinite(float(row["value"])) for row in rows if row["value"])


def test_a_line_that_is_measured_again_replaces_the_old_one(tmp_path):
    file = tmp_path / "results.csv"
    row = {"benchmark": "b", "hardware": "h", "variant": "v", "metric": "m", "value": 1.0}
    results.add([row, {**row, "metric": "n"}], file)
    results.add([{**row, "value": 2.0, "note": "a, b"}], file)
    with file.open(newline="") as lines:
        assert [(r["metric"], r["value"], r["note"]) for r in csv.DictReader(lines)] == [
            ("m", "2", "a, b"),
            ("n", "1", ""),
        ]


def test_ratios_are_taken_within_rounds():
    # the machine was four times as slow in the second round
    found = results.ratios([1.0, 4.0, 1.0], [2.0, 8.0, 2.0])
    assert found == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_rounds_take_turns():
    seen = []
    works = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = step.rounds(works, 2, step.parse(PICO), warm=1)
    assert "".join(seen) == "abcbcacab"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize("seed", range(3))
def test_npo_is_the_objective_of_the_package(seed):
    """Loss and gradient of the straightforward form equal `objectives.NPO`'s on the same logits."""
    from alter.methods.objectives import Emitted, Labelled
    from alter.methods.objectives.likelihood import NPO

    generator = torch.Generator().manual_seed(seed)
    B, T, V = 3, 7, 11
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float32).requires_grad_()
    reference = torch.randn(B, T, V, generator=generator)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :4] = labels[1, 5:] = -100
    loss = step.npo_loss(logits, reference, labels)
    (gradient,) = torch.autograd.grad(loss, logits)

    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != -100
    truth = labels[:, 1:][positions[:, :-1]]
    row = torch.arange(B)[:, None].expand_as(positions)[positions]
    objective = NPO()
    base_logp = -Emitted(reference[positions], truth).nll
    values = objective.per_token(Emitted(logits[positions], truth))
    ours = objective(Labelled(values, torch.zeros_like(truth, dtype=torch.bool), row, B, base_logp))
    (expected,) = torch.autograd.grad(ours, logits)
    assert loss.item() == pytest.approx(ours.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_npo_full_is_what_it_says(tmp_path):
    """Everything trained, a reference that stays, and the loss of untouched weights: (2 / beta) log 2 plus the retain loss."""
    args = step.parse(PICO)
    rows = step.make_rows(args, 2, 4)
    variant = step.npo_full(args, rows, None)
    retain = step.plain_batch(rows.retain[:2], "cpu")
    expected = 20 * math.log(2) + variant.model(**retain).loss.item()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in variant.model.parameters())
    forget = step.plain_batch(rows.forget[:2], "cpu")
    labels = forget.pop("labels")
    before = variant.model(**forget).logits.detach()
    variant.optimizer.param_groups[0]["lr"] = 1e-2
    assert variant.step() == pytest.approx(expected, rel=1e-5)
    # the reference has not moved with the model
    expected = step.npo_loss(variant.model(**forget).logits, before, labels) + variant.model(**retain).loss
    assert variant.step() == pytest.approx(expected.item(), rel=1e-5)


def test_adapters_share_the_base_and_leave_it_alone(tmp_path):
    args = step.parse(PICO)
    rows = step.make_rows(args, 2, args.experts)
    base = step.build(args, torch.float32)
    before = {name: p.clone() for name, p in base.named_parameters()}
    made = [
        step.make(name, args, lambda: step.sharing(base), rows, tmp_path)
        for name in ("lora", "alter", "alter_experts")
    ]
    weights = [v.model.get_input_embeddings().weight.data_ptr() for v in made]
    assert set(weights) == {base.get_input_embeddings().weight.data_ptr()}
    trained = []
    for variant in made:
        variant.step()
        trained.append({name.split(".")[-3] for name, p in variant.model.named_parameters() if p.requires_grad})
    assert [{part for part in parts if "alter" in part or "lora" in part} for parts in trained] == [
        {"lora_A", "lora_B"},
        {"alter_A", "alter_B"},
        {"alter_B"},
    ]
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name])


def test_operations_are_those_of_the_shape():
    args = step.parse(PICO)
    blocks, head = step.parameters(args)
    model = step.build(args, torch.float32)
    linear = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert head == linear.pop("lm_head")
    assert blocks == sum(linear.values())
    # norms are left out
    assert step.states_mib(args) * 2**20 == pytest.approx(20 * sum(p.numel() for p in model.parameters()), rel=0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--variants", "lorra"], "expected some of lora"),
        (["--rows", "3"], "even number"),
        (["--steps", "0"], "at least 1"),
        (["--device", "cuda"], "no GPU"),
        (["--device", "gpu"], "expected cpu or cuda"),
        (["--experts", "100"], "4 tokens for each of 100 experts"),
        (["--growth-rows", "4", "8"], "at least three"),
    ],
)
def test_mistakes(given, message, capsys):
    if given == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        step.parse([*PICO, *given])
    assert message in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.slow
def test_peak_memory_is_of_a_process_of_its_own(tmp_path):
    step.main([*PICO, "--variants", "alter", "npo_full", "--csv", str(tmp_path / "r.csv")])
    found = figures(tmp_path / "r.csv")
    assert found["alter", "peak_mib"] > 1
    ratio = found["alter", "peak_mib"] / found["npo_full", "peak_mib"]
    assert found["alter", "memory_over_npo_full"] == pytest.approx(ratio, rel=1e-3)


def sides(folder, name, first, second):
    """Two sides of a comparison whose job `name` wrote one file each; the differences that are found."""
    for side, (file, content) in (("old", first), ("new", second)):
        place = folder / side / name
        place.mkdir(parents=True)
        if file.endswith(".safetensors"):
            save_file(content, place / file)
        else:
            (place / file).write_text(json.dumps(content))
    return equality.compare(name, folder / "old", folder / "new", [{name: [0]}, {name: [0]}]).differences


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (torch.tensor([1.0, -0.0]), "tensor w differs, by 0 at most"),
        (torch.tensor([1.0, 2**-149]), "tensor w differs, by 1.4e-45 at most"),
        (torch.tensor([1.0, 0.0], dtype=torch.float64), "tensor w torch.float32[2] -> torch.float64[2]"),
        (torch.tensor([[1.0, 0.0]]), "tensor w torch.float32[2] -> torch.float32[1, 2]"),
    ],
    ids=["sign of zero", "last bit", "dtype", "shape"],
)
def test_equality_finds_a_tensor_that_is_not_the_same(tmp_path, changed, found):
    file, whole = "w.safetensors", torch.tensor([1.0, 0.0])
    assert sides(tmp_path / "a", "npo", (file, {"w": whole}), (file, {"w": whole.clone()})) == []
    assert sides(tmp_path / "b", "npo", (file, {"w": whole}), (file, {"w": changed})) == [f"npo/{file}: {found}"]


def test_equality_compares_every_value_but_times_and_who_made_it(tmp_path):
    before = {"loss": [0.1, math.nan], "text": "a", "seconds": {"all": 1}, "provenance": {"commit": "a", "seed": 0}}
    after = {"loss": [0.1, math.nan], "text": "a", "seconds": {"all": 2}, "provenance": {"commit": "b", "seed": 0}}
    assert sides(tmp_path / "a", "npo", ("r.json", before), ("r.json", after)) == []
    after |= {"loss": [0.1 + 2**-56, -0.0], "new": 1}
    assert sides(tmp_path / "b", "npo", ("r.json", before | {"loss": [0.1, 0.0]}), ("r.json", after)) == [
        "npo/r.json: loss.0 '0.1' -> '0.10000000000000002'",
        "npo/r.json: loss.1 '0.0' -> '-0.0'",
        "npo/r.json: new only after",
    ]
    assert sides(tmp_path / "c", "npo", ("r.json", 1), ("s.json", 1)) == [
        "npo/r.json: only before",
        "npo/s.json: only after",
    ]


def test_equality_knows_records_by_their_names(tmp_path):
    records = [{"model": "m", "metric": metric, "value": 1.0} for metric in ("a", "b", "b")]
    more = [{"model": "m", "metric": "new", "value": 2.0}, *records[:2], records[2] | {"value": 3.0}]
    assert sides(tmp_path, "rows", ("r.json", records), ("r.json", more)) == [
        "rows/r.json: m/b #2.value '1.0' -> '3.0'",
        *(f"rows/r.json: m/new.{name} only after" for name in ("metric", "model", "value")),
    ]


def test_equality_counts_a_job_that_fails_as_a_difference(tmp_path):
    for status in ([{"npo": [2]}, {"npo": [2]}], [{"npo": [0]}, {}], [{}, {"npo": [0]}]):
        assert len(equality.compare("npo", tmp_path, tmp_path, status).differences) == 1


def test_questions_by_hand_count_what_the_untouched_model_answered(monkeypatch, capsys):
    for subject, questions in by_hand.QUESTIONS.items():
        # who repeats the question has not answered it
        assert not [question for question, pattern in questions.items() if re.search(pattern, question)], subject
    asked = {"Who?": "Ada", "Where?": "Oslo|Rome", "When?": "1843"}
    monkeypatch.setattr(by_hand, "QUESTIONS", {"Ada": asked})
    monkeypatch.setattr(by_hand, "load_model", lambda model, adapter, dtype, device: (adapter, byte_tokenizer()))
    said = {None: ["Ada.", "In Oslo.", "Never."], "a": ["Ada", "Paris", "1843"], "b": ["ada", "In\nRome", "no"]}
    monkeypatch.setattr(by_hand, "generate", lambda model, tokenizer, ids, **given: said[model])
    monkeypatch.setattr(sys, "argv", ["by_hand.py", "Ada", "a", "b"])
    by_hand.main()
    assert capsys.readouterr().out.splitlines() == [
        "builtin:smollm2: 2 of 3 answered",
        "a: 1 of these 2 still answered, 1 others",
        *("! Who? Ada", "  Where? Paris", "! When? 1843"),
        "b: 1 of these 2 still answered, 0 others",
        *("  Who? ada", "! Where? In Rome", "  When? no"),
    ]
