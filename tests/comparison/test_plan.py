"""Plans of comparisons: what is read, and what is said about mistakes."""

import pytest

from knnmoe_hf.baselines.registry import METHODS, method_class
from knnmoe_hf.comparison.plan import Settings
from knnmoe_hf.comparison.planning import config_names, make_plan, read_plan
from knnmoe_hf.memory.size import PUBLISHED


def written(tmp_path, text: str) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return str(path)


def test_a_plan_puts_the_frozen_model_and_then_knn_moe_first():
    plan = make_plan(
        "base", ["dsmoe", {"method": "knn_moe", "label": "wide", "num_neighbors": 8}, "knn_moe"], ["mmlu"]
    )
    assert [(one.label, one.method) for one in plan.methods] == [
        ("frozen", "frozen"),
        ("wide", "knn_moe"),
        ("knn_moe", "knn_moe"),
        ("dsmoe", "dsmoe"),
    ]
    assert plan.methods[1].options == {"num_neighbors": 8}


def test_lab_tasks_have_other_text_to_do_harm_on():
    tasks = ["lab_topics", "lab_python", "mmlu", {"name": "lab_headers", "off_tasks": []}]
    plan = make_plan("base", ["frozen"], tasks)
    assert [task.off_tasks for task in plan.tasks] == [("lab_python",), ("lab_topics",), (), ()]


def test_a_file_is_read(tmp_path):
    text = "model: base\nmethods: [frozen, {method: dsmoe, label: few, experts: 5}]\ntasks: [mmlu]\n"
    text += "settings: {limit: 7}\npublished: [{task: t, method: m, model: M, metric: acc, value: 1.5, source: s}]"
    plan = read_plan(written(tmp_path, text))
    assert (plan.name, plan.settings, plan.published[0].base) == ("own", Settings(limit=7), None)
    assert plan.with_settings(limit=None, seed=3).settings == Settings(limit=7, seed=3)


@pytest.mark.parametrize("name", config_names())
def test_configurations_that_come_along_name_methods_that_there_are(name):
    plan = read_plan(name)
    for one in plan.methods:
        assert one.method in METHODS
    assert plan.model.startswith("lab:") or plan.model in PUBLISHED
    for figure in plan.published:
        assert figure.source and figure.model
        assert figure.base is None or figure.base != figure.value


def test_the_papers_figure_keeps_the_name_of_its_model():
    (figure,) = [one for one in read_plan("gpt-oss-20b").published if one.method == "kNN-MoE"]
    assert (figure.base, figure.value, figure.model) == (26.2, 27.9, "GPT-OSS-0.7B")


def test_some_methods_and_tasks_of_a_configuration_can_be_chosen():
    plan = read_plan("olmoe-1b-7b").only(["dsmoe"], ["mmlu"])
    assert [one.label for one in plan.methods] == ["frozen", "dsmoe"]
    assert [one.name for one in plan.tasks] == ["mmlu"]
    with pytest.raises(ValueError, match="tasks: there is no 'arc' here: choose among mmlu, gpqa_"):
        plan = read_plan("olmoe-1b-7b").only(None, ["arc"])


def test_what_results_hang_on_is_told_apart_and_names_notes_and_the_batch_size_are_not():
    plan = make_plan("base", ["dsmoe"], ["mmlu"])
    renamed = make_plan("base", ["dsmoe"], [{"name": "mmlu", "note": "later"}], name="moved")
    assert renamed.identity() == plan.identity()
    assert plan.with_settings(batch_size=1).identity() == plan.identity()
    for other in (
        dict(limit=3),
        dict(seed=1),
        dict(references=5),
        dict(num_fewshot=5),
        dict(apply_chat_template=True),
    ):
        assert plan.with_settings(**other).identity() != plan.identity()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "is not a mapping: write lines"),
        ("model: [", "is no YAML"),
        ("model: base\ntasks: [a]", "names no methods: add a line 'methods"),
        ("model: base\nmethods: [frozen]\ntasks: [a]\nbatch: 3", "there is no 'batch': use model, methods, tasks"),
        ("model: base\nmethods: frozen\ntasks: [a]", "methods: 'frozen' is not a list"),
        ("model: base\nmethods: [{label: x}]\ntasks: [a]", "names no method"),
        ("model: base\nmethods: [dsmoe, {method: dsmoe, experts: 3}]\ntasks: [a]", "method 'dsmoe' is there twice"),
        ("model: base\nmethods: [{method: dsmoe, label: ../x}]\ntasks: [a]", "label='../x' is not allowed"),
        ("model: base\nmethods: [frozen]\ntasks: [a, a]", "task 'a' is there twice"),
        ("model: base\nmethods: [frozen]\ntasks: [{name: a, of: b}]", "tasks: there is no 'of': choose among name"),
        ("model: base\nmethods: [frozen]\ntasks: [{off_tasks: [b]}]", "tasks: .* is incomplete"),
        ("model: base\nmethods: [frozen]\ntasks: [a]\nsettings: {limit: 0}", "limit=0 is not allowed: use an integer"),
        ("model: base\nmethods: [frozen]\ntasks: [a]\nsettings: {seed: x}", "seed='x' is not allowed"),
        ("model: [1]\nmethods: [dsmoe]\ntasks: [a]", r"model=\[1\] is not a name"),
        ("model: base\nmethods: [{method: frozen, label: b}]\ntasks: [a]", "write frozen alone"),
        ("model: base\nmethods: [{method: dsmoe, label: frozen}]\ntasks: [a]", "label=frozen is the frozen model's"),
        ("model: base\nmethods: [dsmoe]\ntasks: [{name: [a]}]", "is not a name of a task"),
        ("model: base\nmethods: [dsmoe]\ntasks: [{name: a, off_tasks: [b, a]}]", "task 'a' is there twice"),
        ("model: base\nmethods: [dsmoe]\ntasks: [a]\npublished: [{task: a}]", "is incomplete: give its method too"),
        ("model: lab:no\nmethods: [frozen]\ntasks: [a]", "model='lab:no' is not a lab model: choose among olmoe"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, text, says):
    with pytest.raises(ValueError, match=says) as error:
        read_plan(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match="'labs' is neither a file nor a comparison: choose among gpt-oss-20b, lab"):
        read_plan("labs")


def test_options_of_configurations_are_fields_of_their_methods():
    for name in config_names():
        for one in read_plan(name).methods:
            if one.options:
                made = method_class(one.method)(**one.options)
                assert {option: getattr(made, option) for option in one.options} == dict(one.options)
