"""Plans of comparisons, from a YAML file or from the command line, checked as they are read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from knnmoe_hf.comparison.plan import FROZEN, ComparisonPlan, MethodPlan, Published, Settings, TaskPlan
from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.lab import LAB_MODELS

CONFIGS = Path(__file__).parent / "configs"
"""The configurations of this library, one YAML file each."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
_OFF = {name: ("lab_python",) for name in ("lab_topics", "lab_headers", "lab_notices")} | {
    "lab_python": ("lab_topics",)
}
"""Off-domain tasks of a task, where a plan names none: other text, on which its references should change nothing."""


def make_plan(
    model: str,
    methods: Sequence[str | Mapping[str, Any]],
    tasks: Sequence[str | Mapping[str, Any]],
    settings: Settings | None = None,
    name: str = "comparison",
    published: Sequence[Mapping[str, Any]] = (),
    dtype: str | None = None,
) -> ComparisonPlan:
    """
    A plan, checked as far as that needs neither the model nor the data.

    Args:
        model: as in `ComparisonPlan`.
        methods: names, or mappings with `method`, perhaps `label`, and options.
        tasks: names, or mappings of the fields of `TaskPlan`.
        settings, name, dtype: as in `ComparisonPlan`; None for the default settings.
        published: mappings of the fields of `Published`.

    Raises:
        ValueError: saying what is wrong and what is allowed.
    """
    if not methods or not tasks:
        raise ValueError(f"{'methods' if not methods else 'tasks'}=[] is not allowed: name at least one.")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={shown(dtype)} is not allowed: use one of {', '.join(DTYPES)}.")
    kind = model.removeprefix("lab:")
    if model.startswith("lab:") and kind not in LAB_MODELS:
        raise ValueError(f"model={shown(model)} is not a lab model: choose among {', '.join(LAB_MODELS)}.")
    found = [_method(one) for one in methods]
    if all(one.method != FROZEN for one in found):
        found.insert(0, MethodPlan(FROZEN, FROZEN))
    found.sort(key=_turn)  # all others are compared with the frozen model and with kNN-MoE as soon as they are done
    _check_unique("method", [one.label for one in found], "give one of them another label")
    planned = [_task(one) for one in tasks]
    _check_unique("task", [one.name for one in planned], "name it once")
    figures = tuple(_of_fields(Published, one, "published") for one in published)
    return ComparisonPlan(name, model, tuple(found), tuple(planned), _checked(settings or Settings()), figures, dtype)


def read_plan(name_or_file: str) -> ComparisonPlan:
    """
    The plan of a configuration of this library, by its name, or of a YAML file.

    Raises:
        ValueError: if there is neither, or if something in it is wrong.
    """
    import yaml

    path = Path(name_or_file).expanduser()
    if not path.is_file():
        path = CONFIGS / f"{name_or_file}.yaml"
    if not path.is_file() or "/" in path.name:
        known = ", ".join(config_names())
        raise ValueError(f"config={shown(name_or_file)} is neither a file nor a comparison: choose among {known}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={shown(name_or_file)} is no YAML ({in_one_line(error)}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={shown(name_or_file)} is not a mapping: write lines such as 'model: lab:olmoe'.")
    allowed = ("model", "methods", "tasks", "settings", "published", "dtype")
    if unknown := sorted(str(key) for key in set(content) - set(allowed)):
        raise ValueError(f"config={shown(name_or_file)}: there is no {shown(unknown[0])}: use {', '.join(allowed)}.")
    if missing := [key for key in allowed[:3] if not content.get(key)]:
        raise ValueError(f"config={shown(name_or_file)} names no {missing[0]}: add a line '{missing[0]}: ...'.")
    if not isinstance(content["model"], str):
        raise ValueError(f"model={shown(content['model'])} is not a name: write a folder, a repository or lab:olmoe.")
    settings = _of_fields(Settings, content.get("settings") or {}, "settings")
    lists = {key: _as_list(content.get(key) or [], key) for key in ("methods", "tasks", "published")}
    return make_plan(content["model"], settings=settings, name=path.stem, dtype=content.get("dtype"), **lists)


def config_names() -> list[str]:
    """Names of the configurations of this library."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _turn(planned: MethodPlan) -> int:
    return 0 if planned.method == FROZEN else 1 if planned.is_memory else 2


def _method(given: str | Mapping[str, Any]) -> MethodPlan:
    content = {"method": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    method = content.pop("method", None)
    if not isinstance(method, str):
        raise ValueError(f"{shown(given)} names no method: write its name, or 'method: NAME' with its options.")
    label = str(content.pop("label", method))
    if not re.fullmatch(r"\w[\w.+-]*", label):
        raise ValueError(f"label={shown(label)} is not allowed: use letters, digits and . + - _ only.")
    if method == FROZEN and (label != FROZEN or content):
        raise ValueError(f"{shown(given)} is not allowed: write frozen alone, which has no label and no options.")
    if label == FROZEN != method:
        raise ValueError(f"label=frozen is the frozen model's: give the method {shown(method)} another label.")
    return MethodPlan(method, label, content)


def _task(given: str | Mapping[str, Any]) -> TaskPlan:
    content = {"name": given} if isinstance(given, str) else given
    task = _of_fields(TaskPlan, content, "tasks")
    off = _as_list(task.off_tasks, "off_tasks") if "off_tasks" in content else _OFF.get(str(task.name), ())
    if wrong := [name for name in (task.name, *off) if not isinstance(name, str)]:
        raise ValueError(f"tasks: {shown(wrong[0])} is not a name of a task: write one such as mmlu.")
    _check_unique("task", [task.name, *off], "name as off_tasks other tasks than it, each once")
    return replace(task, off_tasks=tuple(off))


def _of_fields(kind: type, given: Any, where: str) -> Any:
    """A dataclass from a mapping of its fields."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: {shown(given)} is not a mapping: write 'name: value' lines.")
    names = [one.name for one in fields(kind)]
    if unknown := [key for key in given if key not in names]:
        raise ValueError(f"{where}: there is no {shown(unknown[0])}: choose among {', '.join(names)}.")
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{where}: {shown(dict(given))} is incomplete: give its {missing[0]} too.")
    return kind(**given)


def _as_list(given: Any, where: str) -> list:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{where}: {shown(given)} is not a list: write [a, b], or lines that begin with a dash.")
    return list(given)


def _check_unique(what: str, names: list[str], way_out: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{what} {shown(twice[0])} is there twice: {way_out}.")


def _checked(settings: Settings) -> Settings:
    for name, smallest in dict(limit=1, off_limit=1, num_fewshot=0, batch_size=1, seed=0, references=1).items():
        value = getattr(settings, name)
        left_open = value is None and name not in ("batch_size", "seed")
        if not left_open and (type(value) is not int or value < smallest):
            raise ValueError(f"{name}={shown(value)} is not allowed: use an integer of at least {smallest}.")
    if type(chat := settings.apply_chat_template) is not bool:
        raise ValueError(f"apply_chat_template={shown(chat)} is not allowed: use true or false.")
    return settings
