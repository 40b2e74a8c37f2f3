"""What is compared: a model, methods, tasks and settings."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from knnmoe_hf.errors import shown
from knnmoe_hf.lab import LAB_MODELS

FROZEN = "frozen"
"""The method that every other one is compared with."""


@dataclass(frozen=True)
class MethodPlan:
    """
    A method with its options.

    Attributes:
        method: a name of `knnmoe_hf.baselines.METHODS`.
        label: unique; the method's name where it is there once.
        options: fields of the method's class that are not its defaults.
    """

    method: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_memory(self) -> bool:
        """Whether this is kNN-MoE, with which, beside the frozen model, all others are compared."""
        return self.method.startswith("knn_moe")


@dataclass(frozen=True)
class TaskPlan:
    """
    A task whose references the methods are fitted on, and whose test items they answer.

    Attributes:
        name: of the harness, or one of ours (`lab_topics`).
        off_tasks: names of tasks of other text, for the harm that the fitted methods do there.
        note: which splits the references and the test items come from.
        generation_kwargs: of the harness, in place of the task's own.
    """

    name: str
    off_tasks: tuple[str, ...] = ()
    note: str = ""
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """
    What holds for all methods and tasks of a comparison.

    Attributes:
        limit: test items of each task of the harness at most; None takes all.
        off_limit: the same for tasks that are off-domain tasks alone; None takes `limit`.
        num_fewshot: examples in each prompt; None leaves it to the task.
        batch_size: items that are scored at once; the results do not depend on it.
        seed: of the choice of references, of every fit, and of texts that a task has drawn at random.
        references: number of reference items of each task, the same for all methods; None takes all.
        apply_chat_template: whether prompts are messages of the tokenizer's chat template.
    """

    limit: int | None = None
    off_limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    seed: int = 0
    references: int | None = 1000
    apply_chat_template: bool = False


@dataclass(frozen=True)
class Published:
    """
    A figure of a publication, which the report shows beside the measured ones.

    Attributes:
        task, method, metric: as the source names them.
        model: as the source names it, which need not be the model of the comparison.
        base: the frozen model's figure there, if it is given.
        value, source: the method's figure, and where it is from.
    """

    task: str
    method: str
    model: str
    metric: str
    value: float
    source: str
    base: float | None = None


@dataclass(frozen=True)
class ComparisonPlan:
    """
    What is compared.

    Attributes:
        name: of the configuration.
        model: folder or repository, or `lab:TYPE` for a lab model.
        methods, tasks: what is compared, the frozen model first, and the tasks on which.
        settings: the same for all.
        published: figures to compare with.
        dtype: of the model's weights; None chooses one that is fast on this machine.
    """

    name: str
    model: str
    methods: tuple[MethodPlan, ...]
    tasks: tuple[TaskPlan, ...]
    settings: Settings = Settings()
    published: tuple[Published, ...] = ()
    dtype: str | None = None

    @property
    def model_place(self) -> str:
        """The model as `from_pretrained` takes it."""
        kind = self.model.removeprefix("lab:")
        return str(LAB_MODELS[kind]) if self.model.startswith("lab:") else self.model

    def identity(self) -> dict[str, Any]:
        """What results depend on: all but names, notes, the batch size and published figures."""
        content = asdict(self)
        del content["name"], content["published"], content["settings"]["batch_size"]
        for task in content["tasks"]:
            del task["note"]
        return json.loads(json.dumps(content))  # as it is read back from a file

    def with_settings(self, **given: Any) -> "ComparisonPlan":
        """The plan with other settings, where they are not None."""
        return replace(self, settings=replace(self.settings, **{k: v for k, v in given.items() if v is not None}))

    def only(self, methods: Sequence[str] | None, tasks: Sequence[str] | None) -> "ComparisonPlan":
        """
        The plan with only these of its methods, by label, and of its tasks; None keeps all. The frozen model stays.

        Raises:
            ValueError: for one that is not there.
        """
        labels, names = [one.label for one in self.methods], [one.name for one in self.tasks]
        for what, wanted, known in (("methods", methods, labels), ("tasks", tasks, names)):
            if missing := [one for one in wanted or () if one not in known]:
                raise ValueError(f"{what}: there is no {shown(missing[0])} here: choose among {', '.join(known)}.")
        kept = tuple(one for one in self.methods if methods is None or one.label in methods or one.method == FROZEN)
        chosen = tuple(one for one in self.tasks if tasks is None or one.name in tasks)
        return replace(self, methods=kept, tasks=chosen)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that differ where one of these values, which JSON can hold, differs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
