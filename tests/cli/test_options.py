"""The options of the command line against the classes of options: none is forgotten, names and defaults agree."""

import argparse
import dataclasses
import importlib
import re

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SaveStrategy

from knnmoe_hf import KNNMoEConfig, KNNMoETrainingArguments
from knnmoe_hf.cli import command
from knnmoe_hf.cli.inherited import INHERITED, LEFT_OUT, REASONS, REPORTERS
from knnmoe_hf.cli.parser import Parser
from knnmoe_hf.lookup.options import FIXED_AT_BUILD, OPTION_NAMES, RetrievalOptions
from knnmoe_hf.training.options import BuildOptions

# lm-eval has the options of the harness
MODULES = {name: importlib.import_module(f"knnmoe_hf.cli.{name}") for name in command.COMMANDS if name != "lm-eval"}
ELSEWHERE = {"allow_overlap": ("evaluate", "quickstart")}
"""Options of a build that have no sense in `knnmoe build`, and the commands that have them."""
OTHER_DEFAULTS = {"max_length": 256}
"""Defaults that differ from the class on purpose: texts become windows, so a short one loses nothing."""
OTHER_HELP = {"max_length"}
OTHER_NAMES = {"base_model_name_or_path": "model", "base_model_revision": "base_model_revision"}
NOT_OPTIONS = {"memory"}  # of KNNMoEConfig: the manifest, which is written by a save


def parser_of(name: str) -> Parser:
    parser = Parser(prog=f"knnmoe {name}")
    MODULES[name].add_arguments(parser)
    return parser


def actions_of(name: str) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser_of(name).options().values()}


BUILD_FIELDS = {field.name: field for field in dataclasses.fields(BuildOptions)}
MEMORY_FIELDS = {field.name: field for field in dataclasses.fields(RetrievalOptions)}
INHERITED_FIELDS = {
    field.name: field for field in dataclasses.fields(KNNMoETrainingArguments) if field.name not in BUILD_FIELDS
}


def test_every_field_of_the_arguments_is_an_option_or_left_out_with_a_reason():
    options = set(actions_of("build"))
    assert set(BUILD_FIELDS) - set(ELSEWHERE) <= options
    for name, commands in ELSEWHERE.items():
        assert name not in options and all(name in actions_of(other) for other in commands)
    assert set(INHERITED) | set(REASONS) >= set(INHERITED_FIELDS)
    assert not set(INHERITED) & set(REASONS)
    assert set(INHERITED) <= options and set(REASONS) & options <= {"push_to_hub"}  # which names the repository here


def test_what_is_left_out_is_there_to_be_left_out():
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(REASONS) <= known and set(INHERITED) <= known
    assert len(REASONS) == sum(len(names.split()) for names in LEFT_OUT.values()), "a name is in two groups"


def test_every_field_of_the_config_is_an_option():
    names = set(OPTION_NAMES)
    own = set(KNNMoEConfig.__annotations__) - {"model_type"}
    options = set(actions_of("build"))
    assert names <= options and names == own - set(OTHER_NAMES) - NOT_OPTIONS
    assert set(OTHER_NAMES.values()) <= options


@pytest.mark.parametrize("name", [*BUILD_FIELDS, *MEMORY_FIELDS])
def test_names_defaults_and_help_are_those_of_the_class(name):
    field = (BUILD_FIELDS | MEMORY_FIELDS)[name]
    where = ELSEWHERE.get(name, ("build",))[0]
    action = actions_of(where)[name]
    assert action.option_strings[0] == f"--{name.replace('_', '-')}"
    default = OTHER_DEFAULTS.get(name, field.default)
    if name in BUILD_FIELDS:
        assert action.default == default
    else:
        assert action.default is None  # KNNMoEConfig gives it
    if name not in OTHER_HELP:
        sentence = re.sub(r"\b\w+_\w+\b", lambda found: f"--{found[0].replace('_', '-')}", field.metadata["help"])
        assert action.help.startswith(sentence.removesuffix("."))
    if default not in (None, False):
        assert f"default {default}" in action.help or "by default" in action.help


@pytest.mark.parametrize("name", INHERITED)
def test_defaults_of_inherited_arguments_are_those_of_the_class(name):
    field, action = INHERITED_FIELDS[name], actions_of("build")[name]
    assert INHERITED[name].default == field.default
    assert action.option_strings[0] == f"--{name.replace('_', '-')}"
    assert action.default == (None if INHERITED[name].many else field.default)
    assert action.help[:1].isupper()
    assert (action.nargs == 0) == (bool in (field.type, *getattr(field.type, "__args__", ())))


def test_a_command_line_without_options_asks_for_the_defaults_of_the_classes(tmp_path):
    from knnmoe_hf.cli.building import memory_config, training_arguments

    words = ["--model", "m", "--dataset", "d", "--output", str(tmp_path / "o")]
    options = parser_of("build").parse_args(words)
    options.quiet = False
    found, wanted = training_arguments(options), KNNMoETrainingArguments(output_dir=str(tmp_path / "o"))
    differing = {
        name for name in {**BUILD_FIELDS, **INHERITED_FIELDS} if getattr(found, name) != getattr(wanted, name)
    }
    of_data = {"dataset_name", "dataset_tags"}  # which the command knows, and a trainer only where its data set does
    assert differing <= {"max_length", "dataloader_pin_memory", "run_name", "use_cpu", "save_total_limit"} | of_data
    assert found.use_cpu != torch.accelerator.is_available()  # so that torchrun is heard of without one
    assert memory_config(options).options() == KNNMoEConfig().options()


WORDS = {
    "builder": ["search"],
    "save_provenance": ["ids"],
    "value_space": ["delta"],
    "confidence": ["rbf"],
    "recall": ["next_tokens"],
    "next_token_weight": ["0.25"],
    "key_codec": ["raw"],
    "key_dtype": ["float16"],
    "value_dtype": ["float32"],
    "search_backend": ["torch"],
    "report_to": ["tensorboard", "wandb"],
    "ignore_columns": ["a", "b"],
    "layers": ["0", "1"],
    "language": ["en", "de"],
    "dataset_tags": ["me/texts"],
    "key_whitening": ["0.25"],
    "search_max_bytes": ["65537"],
    "base_model_revision": ["abc"],
    "save_strategy": ["epoch"],
}
VALUES = {
    "report_to": ["tensorboard", "wandb"],
    "ignore_columns": ["a", "b"],
    "layers": [0, 1],
    "language": ["en", "de"],
    "dataset_tags": ["me/texts"],
    "save_strategy": SaveStrategy.EPOCH,
}
LIGHT = sorted({*BUILD_FIELDS, *MEMORY_FIELDS, *INHERITED} - {*ELSEWHERE, "bf16", "tf32"})


@pytest.mark.parametrize("name", LIGHT)
def test_what_is_given_reaches_the_classes(name, tmp_path):
    from knnmoe_hf.cli.building import memory_config, training_arguments

    words = ["--model", "m", "--dataset", "d", "--output", str(tmp_path / "o"), "--push-to-hub", "me/m"]
    action = actions_of("build")[name]
    given = [] if action.nargs == 0 else WORDS.get(name, ["3"])
    if name in ("candidate_steps", "num_candidates"):
        words += ["--builder", "candidates"]
    if name in ("adam_beta1", "adam_beta2"):
        given = ["0.5"]
    if name == "recall":
        words += ["--push-next-tokens"]
    options = parser_of("build").parse_args([*words, action.option_strings[0], *given])
    options.quiet = False
    if name.startswith("hub_"):
        found = getattr(options, name)
    elif name in MEMORY_FIELDS:
        found = getattr(memory_config(options), name)
    else:
        found = getattr(training_arguments(options), name)
    wanted = True if action.nargs == 0 else VALUES.get(name, given[0] if given else None)
    assert str(found) == str(wanted) or float(found) == float(wanted)


def test_evaluate_has_what_can_be_changed_after_a_build_and_calibrate_too():
    for name in ("evaluate", "calibrate"):
        options = set(actions_of(name))
        assert set(OPTION_NAMES) - set(FIXED_AT_BUILD) <= options and not set(FIXED_AT_BUILD) & options


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_command_that_reads_a_memory_reads_it_from_any_place_of_a_repository(name):
    reads = any(not a.option_strings and a.dest == "memory" for a in parser_of(name)._actions) and name != "push"
    assert ({"revision", "subfolder"} <= set(actions_of(name))) == (reads or name == "pull")


def test_words_for_all_and_union():
    from knnmoe_hf.cli.building import memory_config

    words = ["--model", "m", "--dataset", "d", "--output", "o", "--value-experts", "all"]
    options = parser_of("build").parse_args([*words, "--routing-width", "union", "--value-space", "assignment"])
    config = memory_config(options)
    assert (config.value_experts, config.routing_width) == (None, "union")


def test_where_figures_can_be_reported_to_is_what_transformers_has():
    assert set(REPORTERS) == {"none", "all", *INTEGRATION_TO_CALLBACK}
