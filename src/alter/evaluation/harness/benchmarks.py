"""`alter evaluate --benchmark wmdp`, `mmlu` and `lm-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from alter.core import UserError, nearest
from alter.evaluation.harness.files import local_tasks
from alter.evaluation.harness.library import manager_of_tasks, tasks_from_hub
from alter.evaluation.harness.results import HarnessEvaluation
from alter.settings import Count

HAZARDS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
"""WMDP's subjects, and what its prompts call them."""


class WmdpEvaluation(HarnessEvaluation):
    """Measure a model on WMDP (hazardous knowledge: 0.25 is chance) through lm-evaluation-harness, zero-shot."""

    benchmark: Literal["wmdp"] = "wmdp"
    """What to measure on."""
    data: str = "hub"
    """WMDP's questions: "hub" (cais/wmdp), or a file or folder with the columns question, choices, answer."""
    subjects: list[str] = Field(default_factory=list)
    """bio, cyber, chem, or the names of local files; by default bio and cyber from the hub, or all local files."""

    def title(self) -> str:
        """Return the heading of the table."""
        return "WMDP"

    def shots(self) -> int | None:
        """Return None: WMDP has no examples."""
        return None

    def specs(self) -> Any:
        """Return one task for each subject."""
        from lm_eval.tasks import TaskManager

        if self.data != "hub":
            tasks = local_tasks(self.data, self.subjects, "wmdp", HAZARDS, 0)
            return TaskManager(include_defaults=False).load(tasks)
        for subject in self.subjects:
            if subject not in HAZARDS:
                raise UserError(
                    f"WMDP has no subject {subject!r}; expected {', '.join(HAZARDS)}.{nearest(subject, HAZARDS)}"
                )
        return tasks_from_hub(manager_of_tasks(), [f"wmdp_{subject}" for subject in self.subjects or ("bio", "cyber")])


class MmluEvaluation(HarnessEvaluation):
    """Measure a model on MMLU (general knowledge: 0.25 is chance) through lm-evaluation-harness."""

    benchmark: Literal["mmlu"] = "mmlu"
    """What to measure on."""
    data: str = "hub"
    """MMLU's questions: "hub" (cais/mmlu), or a folder with files such as management_test.csv."""
    subjects: list[str] = Field(default_factory=list)
    """Subjects, for example management world_religions; by default all. The total weighs each question the same."""
    num_fewshot: Count = Field(0, ge=0)
    """Examples before each question, the first of the subject's dev split."""

    def title(self) -> str:
        """Return the heading of the table."""
        return f"MMLU {self.num_fewshot}-shot" if self.num_fewshot else "MMLU zero-shot"

    def shots(self) -> int | None:
        """Return the number asked for; zero by default."""
        return self.num_fewshot

    def specs(self) -> Any:
        """Return the subjects as the group "mmlu", whose accuracy weighs them by size."""
        from lm_eval.api.group import AggMetricConfig, Group
        from lm_eval.tasks import TaskManager

        if self.data != "hub":
            tasks = local_tasks(self.data, self.subjects, "mmlu", {}, self.num_fewshot)
        else:
            manager = manager_of_tasks()
            if not self.subjects:
                return tasks_from_hub(manager, ["mmlu"])
            areas = ("stem", "other", "social_sciences", "humanities")
            known = [
                task.removeprefix("mmlu_")
                for area in areas
                for task in sorted(manager.task_index[f"mmlu_{area}_tasks"].tags)
            ]
            for subject in self.subjects:
                if subject not in known:
                    raise UserError(
                        f"MMLU has no subject {subject!r}; expected one of {', '.join(sorted(known))}."
                        f"{nearest(subject, known)}"
                    )
            tasks = list(tasks_from_hub(manager, [f"mmlu_{subject}" for subject in self.subjects])["tasks"].values())
        group = Group("mmlu", aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=True)])
        for task in tasks:
            group.add(task)
        return TaskManager(include_defaults=False).load([group])


class LmEvalEvaluation(HarnessEvaluation):
    """Measure a model on any tasks of lm-evaluation-harness."""

    benchmark: Literal["lm-eval"] = "lm-eval"
    """What to measure on."""
    tasks: list[str]
    """Names of tasks or groups of the harness, or paths of its YAML files."""
    num_fewshot: Count | None = Field(None, ge=0)
    """Examples before each question; by default as each task says."""

    def title(self) -> str:
        """Return the heading of the table."""
        return ", ".join(self.tasks)

    def shots(self) -> int | None:
        """Return the number asked for; None, each task's own, by default."""
        return self.num_fewshot

    def specs(self) -> Any:
        """Return the tasks asked for."""
        if not self.tasks:
            raise UserError("No tasks: name some, for example `tasks` arc_easy hellaswag.")
        manager = manager_of_tasks()
        for name in self.tasks:
            if name not in manager.task_index and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
                raise UserError(
                    f"lm-evaluation-harness has no task {name!r}.{nearest(name, manager.all_tasks)} "
                    "`lm-eval ls tasks` lists them all."
                )
        return tasks_from_hub(manager, self.tasks)
