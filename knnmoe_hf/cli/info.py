"""`knnmoe info`: what a memory holds, checked; or how large one would be."""

import argparse
from pathlib import Path

from knnmoe_hf.cli import options as shared
from knnmoe_hf.errors import MemoryFileError
from knnmoe_hf.files import file_digest
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.folder import read_config, resolve_folder
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.memory.size import plan_memory

EXAMPLE = "knnmoe info my-memory          or: knnmoe info --plan allenai/OLMoE-1B-7B-0924 --tokens 100000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("memory", nargs="?", help="folder or repository of a memory")
    what.add_argument("--plan", metavar="MODEL", help="say how many bytes a memory for this model would take")
    parser.add_argument(
        "--tokens", type=shared.positive, default=100_000, help="reference tokens of the plan; default 100000"
    )
    shared.add_memory(parser)


def run(options: argparse.Namespace) -> None:
    """Prints a memory's contents or a plan."""
    if options.plan is not None:
        _print_plan(options)
    else:
        _print_memory(resolve_folder(options.memory))


def _print_plan(options: argparse.Namespace) -> None:
    plan = plan_memory(options.plan, options.tokens, shared.memory_config(options))
    first = plan.gates[0]
    print(f"{options.plan}: {len(plan.gates)} gates, rule {first.rule.__name__}, top-{first.top_k}")
    print(f"hidden size {first.hidden_size}, {first.num_experts} experts")
    keys, values = sum(plan.key_bytes.values()), sum(plan.value_bytes.values())
    print(f"{plan.tokens:,} reference tokens: {plan.nbytes:,} bytes (keys {keys:,}, values {values:,})")
    print(f"that is {plan.nbytes / max(plan.tokens, 1):,.0f} bytes a token, search index and provenance apart")


def _print_memory(folder: Path) -> None:
    config, manifest = read_config(folder)
    memory = RoutingMemory.from_pretrained(folder)
    for entry in manifest.files:  # from_pretrained trusts a file that it has checked before; here it is checked again
        if file_digest(folder / entry["name"]) != entry["sha256"]:
            raise MemoryFileError(f"{folder / entry['name']} is not usable: its SHA-256 is not the recorded one.")
    print(f"{folder}: {memory}")
    print(f"base model {config.base_model_name_or_path} ({memory.origin.base_model_class})", end="")
    print(f" at revision {config.base_model_revision}" if config.base_model_revision else "")
    for name, value in config.options().items():
        print(f"  {name} = {value}")
    for layer, rows in memory.layers.items():
        shapes = f"keys {list(rows.key_codes.shape)}, values {list(rows.values.codes.shape)}"
        print(f"  layer {layer}: {shapes}, {rows.nbytes:,} bytes, distance scale {rows.scale:.4g}")
    if memory.calibration is not None:
        _print_calibration(memory.calibration)
    if memory.provenance is None:
        print("provenance was left out")
    else:
        source = memory.provenance
        known = bool(source.nll_after.any())  # rows given as tensors, or saved without text, have no NLL
        change = f", reference NLL {source.nll_before.mean():.3f} -> {source.nll_after.mean():.3f} nats per token"
        print(f"{len(source.example_ids.unique())} examples{change if known else ''}")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.library_versions.items()))
    print(f"written by {versions}")
    print(f"checked: {len(manifest.files)} file(s), shapes, dtypes, SHA-256 and finite values are as recorded")


def _print_calibration(record: CalibrationRecord) -> None:
    if record.threshold is None:
        print(
            "not calibrated, so that confidence='calibrated' falls back to 'context'; background text that was read:"
        )
    else:
        gains = f"expected gain {record.gain:.4f} of {record.open_gain:.4f} nats per token"
        print(f"calibrated: threshold {record.threshold:g}, {gains}; background text that was read:")
    for kind, text in sorted(record.background.items()):
        harm = f"costs {record.harm[kind]:.4f} nats per token" if kind in record.harm else "not used"
        use = "left out, as the memory helps on it" if kind in record.excluded else harm
        size = f"{text['examples']:,} examples, {text['tokens']:,} tokens"
        print(f"  {kind} ({text['source']}): {use}; {size}, SHA-256 {text['sha256']}")
        if text["files"]:
            print(f"    from {', '.join(text['files'])}")
