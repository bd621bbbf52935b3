"""Questions of WMDP and MMLU from local files, as tasks of lm-evaluation-harness in its own prompt format."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alter.core import UserError, nearest
from alter.data import read_rows

LETTERS = ["A", "B", "C", "D"]
HARNESS_TEMPLATE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": (
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
    ),
    "doc_to_choice": LETTERS,
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
"""The harness's templates of WMDP and MMLU, which are one: what local files are asked with."""
DESCRIPTION = "The following are multiple choice questions (with answers) about {}.\n\n"
ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
FILE_NAME = re.compile(r"(?:(?:wmdp|mmlu)[-_])?(?P<subject>.+?)(?:[-_](?P<split>test|dev|val|validation))?")
SHARD = re.compile(r"(test|dev|val|validation)-\d+-of-\d+")


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            try:
                return list(csv.DictReader(file))
            except (UnicodeDecodeError, csv.Error) as error:
                raise UserError(f"{path} is not a CSV file in UTF-8 ({error}).") from None
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_table(path).to_pylist())
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a parquet file ({error}).") from None
    return read_rows(str(path))


def _choices(row: Mapping[str, Any]) -> Any:
    if "choices" not in row:
        return [row.get(f"choice{k}") for k in range(4)]
    if isinstance(row["choices"], str):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(row["choices"])
    return row["choices"]


def questions(path: Path) -> list[dict[str, Any]]:
    """Return the questions of a file: `question`, `choices` (four texts) and `answer` (0 to 3).

    The file has WMDP's columns (`question`, `choices`, `answer`; in a CSV `choices` is a JSON list), or `choice0` to
    `choice3` instead of `choices`; .csv, .json, .jsonl or .parquet.

    Raises:
        UserError: another form; the row is named, counted from 0, and the columns that it has.
    """
    out = []
    for number, row in enumerate(_read(path)):
        where = f"Row {number} of {path}"
        has = f"it has the columns {', '.join(str(key) for key in row if key is not None)}"
        expected = "expected question, choices (a list of four) or choice0 to choice3, and answer (0 to 3)"
        if None in row:
            raise UserError(f"{where} has more values than the header has columns; quote texts that hold commas.")
        needs = ["question", "answer", *(["choices"] if "choices" in row else [f"choice{k}" for k in range(4)])]
        missing = [key for key in needs if row.get(key) is None]
        if missing:
            raise UserError(f"{where} has no {', '.join(missing)}; {has}; {expected}.")
        choices = _choices(row)
        if not isinstance(choices, list) or len(choices) != 4:
            count = f"{len(choices)} choices" if isinstance(choices, list) else f"choices {choices!r}"
            raise UserError(f"{where} has {count}; expected a list of four.")
        texts = {"question": row["question"], **{f"choice {k}": choice for k, choice in enumerate(choices)}}
        blank = [key for key, text in texts.items() if text is None or not str(text).strip()]
        if blank:
            raise UserError(f"{where} has an empty {blank[0]}.")
        given = row["answer"]
        if not re.fullmatch(r"[0-3](\.0)?", str(given).strip()):
            raise UserError(f"{where} has the answer {given!r}; expected the number of the right choice, 0 to 3.")
        out.append(
            {
                "question": str(row["question"]),
                "choices": [str(choice) for choice in choices],
                "answer": int(float(given)),
            }
        )
    if not out:
        raise UserError(f"{path} holds no questions.")
    return out


def local_files(data: str) -> dict[str, dict[str, Path]]:
    """Return the files of each subject by split ("test", "dev"), sorted by subject.

    A file's name gives its subject: `management_test.csv`, `mmlu_management.jsonl`, `wmdp-bio.parquet`, or a folder of the
    hub's layout, `wmdp-bio/test-00000-of-00001.parquet`. Without a split in its name it is the test split. A `dev` file
    lies beside it if few-shot examples are wanted.

    Raises:
        UserError: nothing there, no file with questions, or two files of one subject and split.
    """
    root = Path(data).expanduser()
    if not root.exists():
        siblings = [str(path) for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(
            f'No file or folder at {data}; expected questions, or "hub".{nearest(data, [*siblings, "hub"])}'
        )
    wanted = [root] if root.is_file() else []
    folder = root.parent if root.is_file() else root
    found: dict[str, dict[str, Path]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix not in ENDINGS or not path.is_file():
            continue
        shard = SHARD.fullmatch(path.stem)
        name = FILE_NAME.fullmatch(f"{path.parent.name}_{shard[1]}" if shard else path.stem)
        assert name is not None
        subject, split = name["subject"], name["split"] or "test"
        if wanted and path not in wanted and split != "dev":
            continue
        if split in found.setdefault(subject, {}):
            raise UserError(
                f"Two files hold the {split} questions of {subject!r}: {found[subject][split]} and {path}; keep one."
            )
        found[subject][split] = path
    found = {subject: files for subject, files in found.items() if "test" in files}
    if not found:
        raise UserError(f"No questions in {data}: expected files such as management_test.csv ({', '.join(ENDINGS)}).")
    return found


def local_task(name: str, about: str, files: Mapping[str, Path], num_fewshot: int) -> Any:
    """Return a task of the harness over local files, with the prompts of its WMDP and MMLU.

    Args:
        name: of the task.
        about: the subject as the prompt's first line names it.
        files: "test", and "dev" for few-shot examples, of which the first are taken in order, as in MMLU.
        num_fewshot: examples before each question.

    Raises:
        UserError: see `questions`; or fewer examples than asked for.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": questions(files["test"])}
    config: dict[str, Any] = {**HARNESS_TEMPLATE, "task": name, "description": DESCRIPTION.format(about)}
    if num_fewshot:
        if "dev" not in files:
            raise UserError(
                f"No examples for {about!r}: `num_fewshot` needs a file like {files['test'].stem.removesuffix('_test')}"
                f"_dev{files['test'].suffix} beside {files['test']}."
            )
        splits["dev"] = questions(files["dev"])
        config |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    rows = datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in splits.items()})
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: rows, "metadata": {"version": 1.0}})


def local_tasks(
    data: str, subjects: Sequence[str], prefix: str, about: Mapping[str, str], num_fewshot: int
) -> list[Any]:
    """Make harness tasks from the local files of the subjects asked for, or of all that are there."""
    files = local_files(data)
    for subject in subjects:
        if subject not in files:
            raise UserError(
                f"No subject {subject!r} in {data}; there are {', '.join(files)}.{nearest(subject, files)}"
            )
    return [
        local_task(f"{prefix}_{s}", about.get(s, s.replace("_", " ")), files[s], num_fewshot)
        for s in (subjects or files)
    ]
