"""The model type `knnmoe` of lm-evaluation-harness, on a tiny model and invented items."""

import random
from dataclasses import replace

import datasets
import pytest
import torch
from lm_eval import simple_evaluate
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from knnmoe_hf import RoutingMemory, attach_memory, disable_memory, get_memory
from knnmoe_hf.evaluation.harness import KNNMoELM
from knnmoe_hf.memory.task_record import SubtaskRecord, TaskRecord, template_digest
from tests.conftest import random_memory
from tests.evaluation.harness import answers, samples, save_models, save_tasks


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Of the base model and of the memory."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def base(folders) -> str:
    return folders[0]


@pytest.fixture(scope="module")
def memory(folders) -> str:
    return folders[1]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return save_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def without(tasks, base) -> dict:
    return samples(tasks, "hf", {"pretrained": base})


@pytest.fixture(scope="module")
def with_memory(tasks, base, memory) -> dict:
    return samples(tasks, "knnmoe", {"pretrained": base, "memory": memory})


@pytest.mark.parametrize("off", [{}, {"memory": "none"}, {"memory": None}])
def test_without_a_memory_it_is_the_model_type_hf(tasks, base, without, off):
    assert answers(samples(tasks, "knnmoe", {"pretrained": base} | off)) == answers(without)


def test_the_memory_of_a_base_model_and_the_memory_as_a_model_answer_alike(tasks, memory, without, with_memory):
    assert answers(samples(tasks, "hf", {"pretrained": memory})) == answers(with_memory)
    assert answers(samples(tasks, "knnmoe", {"pretrained": memory})) == answers(with_memory)
    changed = [key for key in without if without[key]["filtered_resps"] != with_memory[key]["filtered_resps"]]
    assert len(changed) == 12  # the memory is in force
    assert {key: one["prompt_hash"] for key, one in without.items()} == {
        key: one["prompt_hash"] for key, one in with_memory.items()
    }


def test_the_harness_makes_the_model_from_words(tasks, base, memory, with_memory):
    words = f"pretrained={base},memory={memory},memory_revision=None"
    found = simple_evaluate(
        "knnmoe", words, tasks=["which_thing"], task_manager=tasks, bootstrap_iters=0, device="cpu"
    )
    assert answers({sample["doc_hash"]: sample for sample in found["samples"]["which_thing"]}) == answers(with_memory)
    assert found["config"]["model"] == "knnmoe" and found["config"]["model_sha"] == ""


@pytest.mark.parametrize("which", [{}, {"memory": True}])
def test_batches_do_not_change_the_answers(tasks, base, memory, without, with_memory, which):
    known = with_memory if which else without
    found = samples(tasks, "knnmoe", {"pretrained": base} | ({"memory": memory} if which else {}), batch_size=7)
    assert found.keys() == known.keys()
    for key, sample in found.items():
        now, then = ([float(one) for one, _ in of["filtered_resps"]] for of in (sample, known[key]))
        assert now == pytest.approx(then, abs=1e-4)
        assert (sample["acc"], sample["acc_norm"]) == (known[key]["acc"], known[key]["acc_norm"])


def test_the_order_of_the_requests_does_not_change_the_answers(tasks, base, memory):
    (task,) = tasks.load(["which_thing"])["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(rank=0, world_size=1)
    model = KNNMoELM(base, memory=memory, device="cpu", batch_size=3)
    shuffled = random.Random(1).sample(range(len(task.instances)), len(task.instances))
    first = [score for score, _ in model.loglikelihood(task.instances)]
    second = [score for score, _ in model.loglikelihood([task.instances[i] for i in shuffled])]
    assert [first[i] for i in shuffled] == pytest.approx(second, abs=1e-4)


def test_text_is_generated_with_the_memory(tasks, base, memory):
    off = samples(tasks, "knnmoe", {"pretrained": base}, "go_on", limit=4)
    on = samples(tasks, "knnmoe", {"pretrained": base, "memory": memory}, "go_on", limit=4)
    assert answers(on) != answers(off)
    assert answers(samples(tasks, "hf", {"pretrained": base}, "go_on", limit=4)) == answers(off)
    assert answers(samples(tasks, "hf", {"pretrained": memory}, "go_on", limit=4, batch_size=3)) == answers(on)


def test_options_of_the_configuration_replace_those_of_the_memory(base, memory):
    model = KNNMoELM(base, memory=memory, device="cpu", num_neighbors=2, temperature=0.5, layers=[1])
    config = get_memory(model.model).config
    assert (config.num_neighbors, config.temperature, config.layers) == (2, 0.5, [1])
    assert get_memory(KNNMoELM(memory, device="cpu", num_neighbors=3).model).config.num_neighbors == 3


def test_a_peft_adapter_is_loaded_before_the_memory_is_attached(base, memory, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    found = KNNMoELM(base, memory=memory, peft=str(tmp_path), device="cpu")
    attach_memory(adapted, RoutingMemory.from_pretrained(memory))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(found._model_call(ids), adapted.eval()(ids).logits)
        with disable_memory(adapted):
            assert not torch.equal(found._model_call(ids), adapted(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"memory": "MEMORY", "num_neighbours": 2}, "'num_neighbours' is not an option of the model type knnmoe:"),
        ({"num_neighbors": 2}, "num_neighbors=2 needs a memory: give memory=DIR_OR_REPOSITORY, or leave it out"),
        ({"memory": "none", "recall": "both"}, "recall='both' needs a memory"),
        ({"memory": "MEMORY", "num_neighbors": 0}, "num_neighbors=0 is not allowed"),
        ({"memory": "/no/such/memory"}, "/no/such/memory"),
        ({"pretrained": "MEMORY", "memory": "none"}, "is itself a memory: name its base model there, or leave out"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(folders, arguments, reason):
    base, memory = folders
    arguments = {"pretrained": base} | {key: memory if one == "MEMORY" else one for key, one in arguments.items()}
    with pytest.raises((ValueError, OSError), match=reason) as error:
        KNNMoELM(device="cpu", **arguments)
    assert "\n" not in str(error.value)


def test_a_loaded_model_is_refused_as_its_memory_would_be_ignored(base, memory):
    with pytest.raises(ValueError, match="attach the memory to a loaded model with attach_memory"):
        KNNMoELM(AutoModelForCausalLM.from_pretrained(base), memory=memory)


def test_a_memory_that_is_not_consulted_is_an_error(base, memory):
    model = KNNMoELM(base, memory=memory, device="cpu")
    ids = torch.arange(3, 20)[None]
    with disable_memory(model.model), pytest.raises(RuntimeError, match="was not looked up once"):
        model._model_call(ids)
    model._model_call(ids)
    with disable_memory(model.model):  # once it was seen, it costs nothing any more
        model._model_call(ids)


def test_a_memory_without_rows_is_an_error(base, tmp_path):
    random_memory(AutoModelForCausalLM.from_pretrained(base)).remove_examples(range(40)).save_pretrained(tmp_path)
    model = KNNMoELM(base, memory=str(tmp_path), device="cpu")
    with pytest.raises(RuntimeError, match="give a memory that has rows"):
        model._model_call(torch.arange(3, 20)[None])


def recorded(tasks, memory: str, folder, **changes) -> dict:
    """Arguments of a memory that says that it was built from `which_thing`, with the prompts of `samples`."""
    (task,) = tasks.load(["which_thing"])["tasks"].values()
    one = SubtaskRecord("json", ["validation"], 0, template_digest(task), 3)
    known = dict(task="which_thing", harness="0.4.13", subtasks={"which_thing": one}, references=3, equal=0, near=0)
    known |= dict(apply_chat_template=False, system_instruction=None, fewshot_as_multiturn=True, digest="")
    record = TaskRecord(**known | changes)
    replace(RoutingMemory.from_pretrained(memory), task_record=record).save_pretrained(folder)
    return {"pretrained": str(folder)}


def warnings_of(caplog) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "knnmoe_hf.evaluation.harness_prompts"]


@pytest.mark.parametrize("kind", ["hf", "knnmoe"])
def test_prompts_other_than_those_of_the_memory_are_named_in_one_warning(tasks, base, memory, tmp_path, caplog, kind):
    arguments = recorded(tasks, memory, tmp_path)
    if kind == "knnmoe":
        arguments = {"pretrained": base, "memory": str(tmp_path)}
    settings = dict(limit=1, apply_chat_template=True, system_instruction="Be brief.", fewshot_as_multiturn=True)
    samples(tasks, kind, arguments, limit=1)
    assert warnings_of(caplog) == []
    samples(tasks, kind, arguments, num_fewshot=2, **settings)
    (said,) = warnings_of(caplog)
    assert "prompts of the task which_thing that differ from those of which_thing: num_fewshot is 2, not 0; " in said
    assert "apply_chat_template is True, not False; system_instruction is 'Be brief.', not None" in said


def test_another_benchmark_and_another_template_are_named(tasks, memory, tmp_path, caplog):
    samples(tasks, "hf", recorded(tasks, memory, tmp_path / "one"), "go_on", limit=1)
    assert "differ from those of go_on: it is another benchmark; build one" in warnings_of(caplog)[0]
    other = SubtaskRecord("json", ["validation"], 0, "0" * 64, 3)
    samples(tasks, "hf", recorded(tasks, memory, tmp_path / "two", subtasks={"which_thing": other}), limit=1)
    assert "those of which_thing: the templates of the prompts differ" in warnings_of(caplog)[1]


def test_nothing_is_said_of_a_memory_that_is_not_of_a_benchmark(tasks, base, memory, caplog):
    samples(tasks, "knnmoe", {"pretrained": base, "memory": memory}, num_fewshot=2, limit=1)
    samples(tasks, "hf", {"pretrained": base}, limit=1)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", ["hf", "knnmoe"])
def test_answers_of_the_base_model_in_a_cache_are_not_taken_for_those_of_the_memory_silently(
    tasks, base, memory, tmp_path, caplog, kind
):
    arguments = {"pretrained": memory} if kind == "hf" else {"pretrained": base, "memory": memory}
    how = dict(tasks=["which_thing"], task_manager=tasks, bootstrap_iters=0, device="cpu", limit=1)
    simple_evaluate("hf", {"pretrained": base}, use_cache=str(tmp_path / "one"), **how)
    simple_evaluate(kind, arguments, use_cache=str(tmp_path / "other"), **how)  # a new file
    assert warnings_of(caplog) == []
    simple_evaluate(kind, arguments, use_cache=str(tmp_path / "one"), **how)
    (said,) = warnings_of(caplog)
    assert "one_rank0.db holds answers that are taken in place of the memory's, whichever model gave them" in said
