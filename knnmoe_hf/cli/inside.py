"""What a person should know of a memory: whether it helps, what is inside its folder, what to type next."""

import argparse
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.folder import write_folder
from knnmoe_hf.memory.levels import at_level, tells_text
from knnmoe_hf.memory.manifest import Manifest


def level_of(memory: RoutingMemory) -> str:
    """What a memory has of its references: `"text"`, `"ids"` or `"none"`."""
    if memory.provenance is None:
        return "none"
    return "text" if memory.provenance.has_text else "ids"


def verdict(memory: RoutingMemory) -> list[str]:
    """The sentences on whether a memory helps, or why there are none."""
    if memory.verdict is None:
        return ["Whether this memory helps was not measured: knnmoe evaluate compares it with its base model."]
    said = memory.verdict.sentences()
    if not memory.verdict.holds_for(memory.config):
        said.append("This was measured with other options than the memory has now: knnmoe evaluate measures anew.")
    return said


def contents(memory: RoutingMemory) -> list[str]:
    """What a memory's folder tells of its references."""
    level, told = level_of(memory), tells_text(memory)
    rows = f"{len(memory):,} reference token" + ("s" if len(memory) != 1 else "")
    count = example_count(memory)
    of = f"{count:,} reference" + ("s" if count != 1 else "")
    keys = f"Keys of {rows} are inside: hidden states of the model, which depend on the text"
    if level == "text":
        return [f"The text of {of} is inside, as token ids.", f"{keys}."]
    text = "The tokens that follow the rows are inside, which in their order are the text of the references"
    if level == "ids":
        said = text if told else "The text of the references is not inside"
        return [f"{said}; ids of {of} and hashes of some of the text are{' too' if told else ''}.", f"{keys}."]
    if told:
        return [f"{text}; which reference a row came from is not.", f"{keys}."]
    return ["The text of the references is not inside, nor which reference a row came from.", f"{keys}."]


def next_tokens(memory: RoutingMemory) -> str:
    """Where the tokens that follow the rows are, and what recall is possible with them."""
    if memory.next_tokens is None:
        return "The tokens that follow the rows are not inside, so that recall next_tokens and both are not possible."
    possible = "Recall next_tokens and both are possible: the tokens that follow the rows"
    if memory.stored_next_tokens is None:
        return f"{possible} are in the text of the references."
    return f"{possible} take {memory.stored_next_tokens.nbytes:,} bytes."


def _task(memory: RoutingMemory) -> list[str]:
    """The benchmark that a memory was built from."""
    return [] if memory.task_record is None else [f"It was {memory.task_record.sentence()}."]


def example_count(memory: RoutingMemory) -> int:
    """References that have rows; 0 where they are not known."""
    return 0 if memory.provenance is None else len(memory.provenance.example_ids.unique())


def ending(memory: RoutingMemory, folder: str) -> str:
    """What is printed after a memory was saved to a folder."""
    lines = [f"{memory!r} saved to {folder}", *verdict(memory), *contents(memory)]
    if level_of(memory) == "text":
        lines.append("To leave the text out, use --save-provenance ids or none with the same command.")
    elif tells_text(memory):
        lines.append("To leave the next tokens out, use --no-save-next-tokens with the same command.")
    return "\n".join([*lines, _next(folder)])


def received(memory: RoutingMemory, name: str, snapshot: Path, folder: str) -> str:
    """
    What is printed after a memory was downloaded.

    Args:
        memory: that was downloaded.
        name: of its repository.
        snapshot: where it lies in the cache of the Hub, in a folder that is named by its commit.
        folder: where it was copied to.
    """
    lines = [
        f"{memory!r} of {name} at commit {commit_of(snapshot)} saved to {folder}",
        *verdict(memory),
        *contents(memory),
    ]
    return "\n".join([*lines, _next(folder)])


def commit_of(folder: Path) -> str | None:
    """The commit of a memory's folder in the cache of the Hub; None for any other folder."""
    parts = folder.parts
    place = next((i for i in range(2, len(parts)) if parts[i - 1] == "snapshots" and "--" in parts[i - 2]), None)
    return None if place is None else parts[place]


def _next(folder: str) -> str:
    return f"Next: knnmoe evaluate {shlex.quote(folder)} --dataset HELD-OUT-TEXT --off-dataset OTHER-TEXT"


def save(memory: RoutingMemory, options: argparse.Namespace) -> str:
    """Saves a memory as the options say; returns what is to be printed then, which says what is inside."""
    try:
        kept = at_level(memory, options.save_provenance, options.save_next_tokens)
    except ValueError as error:  # which names the arguments of `save_pretrained`
        said = re.sub(r"\bprovenance='(\w+)'", r"--save-provenance \1", str(error))
        raise ValueError(said.replace("next_tokens=True", "--save-next-tokens")) from error
    unfinished = any(Path(options.output).glob("checkpoint-*/knnmoe_checkpoint.json"))  # of the build that ends here
    again = f"and give the same command again{' with --resume' if unfinished else ''}"
    write_folder(kept, Path(options.output), overwrite=options.overwrite, if_full=again)
    return ending(kept, options.output)


def describe(memory: RoutingMemory, manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What a memory is and holds, as plain values."""
    source, level = memory.provenance, level_of(memory)
    known = level == "text" and bool(source.nll_before.any())  # rows that were given as tensors have no NLL
    found, record = memory.verdict, memory.calibration
    own = {"before": source.nll_before.mean().item(), "after": source.nll_after.mean().item()} if known else None
    return {
        "folder": str(folder),
        "commit": commit_of(folder),
        "sentences": verdict(memory),
        "verdict": None if found is None else {"outcome": found.outcome} | asdict(found),
        "inside": {
            "provenance": level,
            "examples": example_count(memory),
            "next_tokens": memory.next_tokens is not None,
            "next_token_bytes": 0 if memory.stored_next_tokens is None else memory.stored_next_tokens.nbytes,
            "sentences": [*contents(memory), next_tokens(memory), *_task(memory)],
        },
        "base_model": {
            "name": memory.config.base_model_name_or_path,
            "revision": memory.config.base_model_revision,
            "class": memory.origin.base_model_class,
        },
        "card": memory.card_data.to_json(),
        "rows": len(memory),
        "bytes": memory.nbytes,
        "options": memory.config.options(),
        "layers": {
            str(layer): {
                "keys": list(rows.key_codes.shape),
                "values": list(rows.values.codes.shape),
                "bytes": rows.nbytes,
                "distance_scale": rows.scale,
            }
            for layer, rows in memory.layers.items()
        },
        "calibration": None if record is None else asdict(record),
        "history": memory.card_data.history,
        "task": None if memory.task_record is None else asdict(memory.task_record),
        "references_own_nll": own,
        "written_by": dict(sorted(manifest.library_versions.items())),
        "files": [entry["name"] for entry in manifest.files],
    }


def page(found: dict[str, Any], name: str) -> str:
    """`describe` in words, of the memory that was given as `name`: whether it helps and what is inside come first."""
    base, rows = found["base_model"], found["rows"]
    title = found["folder"] if found["commit"] is None else f"{name} at commit {found['commit']}: {found['folder']}"
    lines = [title, *found["sentences"], *found["inside"]["sentences"], ""]
    recall = found["options"]["recall"]
    lines.append(f"{rows:,} rows in {len(found['layers'])} layers, {found['bytes']:,} bytes; recall {recall}")
    revision = f" at revision {base['revision']}" if base["revision"] else ""
    lines.append(f"base model {base['name']} ({base['class']}){revision}")
    said = found["card"]
    names, licence = ", ".join(said["dataset"]) or "not named", said["license"] or "not stated"
    lines.append(f"reference data {names}; its licence: {licence}")
    lines += [f"  {name} = {value}" for name, value in found["options"].items()]
    for layer, of in found["layers"].items():
        shapes = f"keys {of['keys']}, values {of['values']}"
        lines.append(f"  layer {layer}: {shapes}, {of['bytes']:,} bytes, distance scale {of['distance_scale']:.4g}")
    if found["history"]:
        lines += ["since it was built:", *(f"  {line}" for line in found["history"])]
    if found["calibration"] is not None:
        lines += _calibration(found["calibration"])
    if (own := found["references_own_nll"]) is not None:
        change = f"{own['before']:.3f} -> {own['after']:.3f} nats per token"
        lines.append(f"references under their own optimised routing, which says nothing of other text: NLL {change}")
    versions = ", ".join(f"{name} {version}" for name, version in found["written_by"].items())
    files = len(found["files"])
    lines.append(f"written by {versions}")
    lines.append(f"checked: {files} file(s), shapes, dtypes, SHA-256 and finite values are as recorded")
    return "\n".join(lines)


def _calibration(record: dict[str, Any]) -> list[str]:
    if record["threshold"] is None:
        fallback = "not calibrated, so that confidence='calibrated' falls back to 'context'"
        lines = [f"{fallback}; background text that was read:"]
    else:
        of = f"{record['open_gain']:.4f} nats per token"
        known = record["gain"] is not None
        gains = f"expected gain {record['gain']:.4f} of {of}" if known else f"gain not known, wide open {of}"
        lines = [f"calibrated: threshold {record['threshold']:g}, {gains}; background text that was read:"]
    for kind, text in sorted(record["background"].items()):
        unused = "not used" if record["gain"] is not None or record["threshold"] is None else "cost not known"
        harm = f"costs {record['harm'][kind]:.4f} nats per token" if kind in record["harm"] else unused
        use = "left out, as the memory helps on it" if kind in record["excluded"] else harm
        size = f"{text['examples']:,} examples, {text['tokens']:,} tokens"
        source = text["source"].replace("this machine", "its maker's machine")  # which need not be the reader's
        lines.append(f"  {kind} ({source}): {use}; {size}, SHA-256 {text['sha256']}")
        if text["files"]:
            lines.append(f"    from {', '.join(text['files'])}")
    return lines + [_fit(recall, fit) for recall, fit in sorted(record["fits"].items())]


def _fit(recall: str, fit: dict[str, Any]) -> str:
    worst = max(sorted(fit["harm"]), key=fit["harm"].get, default=None)
    costs = "" if worst is None else f", costs {fit['harm'][worst]:.4f} at worst ({worst})"
    votes = f"{fit['next_token_neighbors']} neighbours, temperature {fit['next_token_temperature']:g}"
    routing = "" if fit["routing_threshold"] is None else f", routing from threshold {fit['routing_threshold']:g}"
    how = f"weight {fit['next_token_weight']:g}, threshold {fit['threshold']:g}{routing}, {votes}"
    gain = "gain not known" if fit["gain"] is None else f"expected gain {fit['gain']:.4f} nats per token"
    return f"  fitted for recall {recall}: {how}; {gain}{costs}"
