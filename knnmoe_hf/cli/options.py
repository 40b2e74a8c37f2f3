"""
Arguments that several commands share.

This module imports no other library: `--help` and usage errors are answered before torch is loaded.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any

from knnmoe_hf.cli import paths, values
from knnmoe_hf.cli.fields import BUILD_FIELDS, MEMORY_FIELDS, add, add_fields, option, with_default
from knnmoe_hf.cli.hub import add_token
from knnmoe_hf.cli.inherited import INHERITED, REASONS
from knnmoe_hf.cli.parser import Parser
from knnmoe_hf.lookup.options import FIXED_AT_BUILD, RetrievalOptions
from knnmoe_hf.training.options import PROVENANCE, BuildOptions

DATA = (
    "a file, a folder of files, or a pattern in quotes such as 'texts/*.txt' (text, Markdown, JSON, CSV, TSV, "
    "Parquet, Arrow, also compressed); a folder of save_to_disk; a data set of the Hub (owner/name, or "
    "owner/name:configuration); or lab:KIND/SPLIT, text of this machine (lab:topics/reference)"
)
MAX_LENGTH = 256
"""The default of `--max-length`: texts are cut into windows, and not off, so it costs nothing."""
DTYPES = ("auto", "float32", "bfloat16", "float16")

_SHARED = {  # fields of BuildOptions that other commands have too
    "data": ("max_length", "dataset_text_field", "ignore_columns", "skip_bad_rows"),
    "saving": ("save_provenance", "save_next_tokens", "overwrite"),
    "evaluation": ("allow_overlap",),
}
_EFFECTIVE = {  # options that do nothing with other values of another one
    "key_dim": ("key_codec", ("pca",)),
    "key_whitening": ("key_codec", ("pca",)),
    "hnsw_m": ("search_backend", ("auto", "hnsw")),
    "hnsw_ef_construction": ("search_backend", ("auto", "hnsw")),
    "hnsw_ef_search": ("search_backend", ("auto", "hnsw")),
    "half_life": ("confidence", ("context", "calibrated")),
    "context_threshold": ("confidence", ("context", "calibrated")),
    "context_width": ("confidence", ("context", "calibrated")),
    "next_token_weight": ("recall", ("both", "next_tokens")),
    "next_token_temperature": ("recall", ("both", "next_tokens")),
    "next_token_neighbors": ("recall", ("both", "next_tokens")),
}
_DEVICE = r"(auto|balanced|balanced_low_0|sequential|(cpu|cuda|mps|xpu|npu|hpu|mlu|sdaa|musa)(:\d+)?)"


# groups of options


def add_common(parser: Parser) -> None:
    """What every command has."""
    group = parser.add_argument_group("this command")
    if parser.options_from_file:
        help = "Read options from a YAML file; the command line wins"
        group.add_argument("--config", metavar="FILE", help=help)
    group.add_argument("--verbose", action="store_true", help="Say on stderr what is done, and why")
    group.add_argument("--quiet", action="store_true", help="No progress bars and no notices: results and errors only")
    group.add_argument("--debug", action="store_true", help="Show the traceback of an error")
    add_token(group)
    parser.checks.append(_check_common)


def _check_common(options: argparse.Namespace) -> None:
    if options.quiet and options.verbose:
        raise ValueError("--quiet and --verbose exclude each other: leave one of them out")


def add_loading(parser: Parser) -> None:
    """`--dtype` and `--device-map`."""
    group = parser.add_argument_group("loading the model")
    how = "Of the weights; default: as saved, but float32 on a CPU that has no fast instructions for the saved dtype"
    group.add_argument("--dtype", type=values.one_of(DTYPES), metavar=f"{{{','.join(DTYPES)}}}", help=how)
    group.add_argument(
        "--device-map", type=_device_map, metavar="DEVICE", help="Where the model is put: auto, cuda:0, ..."
    )


def _device_map(word: str) -> str:
    if not re.fullmatch(_DEVICE, word):
        raise argparse.ArgumentTypeError(f"{word!r} is not allowed: use auto, balanced, cpu, cuda, cuda:0 or the like")
    return word


def add_model(parser: Parser, help: str = "The frozen model: a folder or a repository of the Hub", **default) -> None:
    """`--model` with its revision, and how it is loaded."""
    parser.add_argument("--model", type=paths.name, help=help, **default)
    help = "Commit, branch or tag of the model's repository"
    parser.add_argument("--base-model-revision", type=values.text, metavar="REVISION", help=help)
    add_loading(parser)


def add_dataset(parser: Parser, what: str, **default: Any) -> None:
    """`--dataset` and `--split`."""
    parser.add_argument("--dataset", type=dataset, help=f"{what}: {DATA}", **default)
    parser.add_argument("--split", type=values.text, help="Split of the data set; default train")
    parser.checks.append(_check_splits)


def dataset(word: str) -> str:
    """The name of a data set; `~` is the home folder."""
    return paths.name(word)


def _check_splits(options: argparse.Namespace) -> None:
    for name, of in (("split", "dataset"), ("test_split", "test_dataset"), ("off_split", "off_dataset")):
        split, given = getattr(options, name, None), getattr(options, of, None)
        given = given or (getattr(options, "task", None) if name == "split" else None)
        given = given if given or name != "test_split" else options.dataset
        if split is None:
            continue
        if not given:
            raise ValueError(f"{option(name)} is not allowed without {option(of)}: leave it out")
        given = [given] if isinstance(given, str) else given
        if any(one.startswith("lab:") for one in given):
            raise ValueError(
                f"{option(name)} is not allowed with lab:KIND/SPLIT, which names its own split: leave it out"
            )


def add_background(parser: Parser) -> None:
    """`--ordinary-dataset`."""
    help = (
        "Text that the model meets beside the domain, on which the memory should do nothing: a calibration compares "
        "the references with it; default: files of this machine (Python sources, C++ headers, notices of packages)."
    )
    add(parser, "ordinary_dataset", dataset, None, help, many=True)


def add_memory(parser: Parser, title: str = "the memory") -> None:
    """Options of `KNNMoEConfig`; those that are not given are None."""
    group = parser.add_argument_group(title)
    _add_memory(group, MEMORY_FIELDS, said=True)
    parser.checks.append(memory_options)


def _add_memory(group, names: Iterable[str], said: bool) -> None:
    add_fields(group, MEMORY_FIELDS, names, said)
    group.set_defaults(**dict.fromkeys(names))


def add_query_options(parser: Parser, without: Sequence[str] = ()) -> None:
    """The options of a memory that can be tried without a build, but some, and the reason why the others cannot."""
    group = parser.add_argument_group("the memory (default: as it was saved)")
    _add_memory(group, [name for name in MEMORY_FIELDS if name not in (*FIXED_AT_BUILD, *without)], said=False)
    parser.refused |= {option(name): "it is fixed when a memory is built" for name in FIXED_AT_BUILD}
    parser.checks.append(memory_options)


def add_build(parser: Parser, max_tokens: int | None = None) -> None:
    """What a build needs beside model, data and memory."""
    group = parser.add_argument_group("the build")
    elsewhere = {name for names in _SHARED.values() for name in names}
    add_fields(group, BUILD_FIELDS, [name for name in BUILD_FIELDS if name not in elsewhere])
    help = f"Reference tokens at most; default {max_tokens or 'all'}."
    add(group, "max_tokens", values.whole(1), max_tokens, help)
    for name, one in INHERITED.items():
        if not name.startswith("hub_"):
            help = with_default(one.help, one.default)
            add(group, name, one.convert, None if one.many else one.default, help, one.alias, one.many)
    parser.refused |= {option(name): reason for name, reason in REASONS.items()}
    for known in parser.options():
        parser.refused.pop(known, None)
    parser.checks.append(check_build)


def add_data(parser: Parser) -> None:
    """How data sets are read."""
    group = parser.add_argument_group("reading data")
    help = f"Tokens of an example; longer texts become several, all else is cut; default {MAX_LENGTH}."
    add(group, "max_length", values.whole(2), MAX_LENGTH, help)
    add_fields(group, BUILD_FIELDS, _SHARED["data"][1:])
    help = "Encoding of text files, such as cp1252; default: UTF-8, or UTF-16 where a file says so."
    add(group, "encoding", values.encoding, None, help)
    parser.checks.append(check_build)


def add_saving(parser: Parser, keep: str | None = None) -> None:
    """How a memory is saved; `keep` is said where the default is not to save all of the text."""
    group = parser.add_argument_group("saving")
    names = _SHARED["saving"]
    if keep is None:  # the command builds
        parser.checks.append(_check_saved)
        return add_fields(group, BUILD_FIELDS, names)
    help = f"{BUILD_FIELDS['save_provenance'].metadata['help'].removesuffix('.')}; default: {keep}."
    add(group, "save_provenance", values.one_of(PROVENANCE), None, help)
    add_fields(group, BUILD_FIELDS, names[1:], said=False, save_next_tokens=None)


def _check_saved(options: argparse.Namespace) -> None:
    BuildOptions(**build_options(options)).check_recall(options.recall or "routing")


def add_output(parser: Parser) -> None:
    """`--output` of a command that makes a memory of another one, and how it is saved."""
    parser.add_argument("--output", type=paths.name, required=True, help="Folder to save the new memory in")
    add_saving(parser, keep="all that the memory has")


def add_overlap(parser: Parser) -> None:
    """`--allow-overlap`."""
    add_fields(parser.add_argument_group("the comparison"), BUILD_FIELDS, _SHARED["evaluation"])


# what the options ask for, in the words of the library


def memory_options(options: argparse.Namespace) -> dict[str, Any]:
    """
    The options of `KNNMoEConfig` that were given, checked.

    Raises:
        ValueError: for a value that is not allowed.
    """
    given = {name: getattr(options, name) for name in MEMORY_FIELDS if getattr(options, name, None) is not None}
    given = {name: None if value == "all" else value for name, value in given.items()}
    # where the stored values are not an option, the memory decides whether union is allowed
    rest = {} if hasattr(options, "value_space") else {"value_space": "assignment"}
    RetrievalOptions(**rest | given)
    for name, (other, allowed) in _EFFECTIVE.items():
        if name in given and given.get(other, allowed[0]) not in allowed:
            raise ValueError(f"{name}={given[name]} does nothing with {other}={given[other]}: leave one of them out")
    return given


def build_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `BuildOptions` that the command has."""
    return {name: getattr(options, name) for name in BUILD_FIELDS if getattr(options, name, None) is not None}


def check_build(options: argparse.Namespace) -> None:
    """
    Checks the options of a build.

    Raises:
        ValueError: for a value that is not allowed.
    """
    BuildOptions(**build_options(options)).check_options()
    output, model = getattr(options, "output", None), getattr(options, "model", None)
    if output and model and paths.same(model, output):
        raise ValueError(f"--output {options.output} is the model's own folder: name another one")
    if getattr(options, "max_steps", -1) == 0:
        raise ValueError("max_steps=0 is not allowed: use an integer of at least 1, or -1 for all batches")
    if getattr(options, "use_cpu", False) and (options.device_map or "cpu") != "cpu":
        raise ValueError(f"--use-cpu is not allowed with --device-map {options.device_map}: leave one of them out")
    reporters = getattr(options, "report_to", None) or ()
    if len(reporters) > 1 and {"none", "all"} & set(reporters):
        raise ValueError("--report-to none or all stands alone: leave the other names out")
