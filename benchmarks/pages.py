"""What every benchmark writes: a JSON file, and a Markdown page that says how it was made."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PACKAGES = ("knnmoe_hf", "torch", "transformers", "peft")


def parser(doc: str, results: Path = RESULTS) -> argparse.ArgumentParser:
    """A command line whose help is the module's docstring, with the options that all benchmarks share."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--results", type=Path, default=results, help="folder of the page and the JSON file")
    found.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    return found


def add_dtype(options: argparse.ArgumentParser) -> None:
    """Adds `--dtype`."""
    text = "of the model; bfloat16 is some 20 times slower where the processor has no instructions for it"
    options.add_argument("--dtype", choices=DTYPES, default="float32", help=f"{text}; default float32")


def provenance(module: str, argv: Sequence[str] | None, device: torch.device | None = None) -> dict:
    """
    How a result was made, for its JSON file and its page.

    Args:
        module: of the benchmark, `"benchmarks.speed.overhead"`.
        argv: its arguments; None for those of this process.
        device: where the model ran, if that may be a GPU.
    """
    arguments = sys.argv[1:] if argv is None else argv
    found = {"command": " ".join(["python", "-m", module, *map(str, arguments)]), "commit": commit()}
    found |= {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions()}
    if device is not None and device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def shown_provenance(found: dict) -> str:
    """The same as the first paragraph of a page."""
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    gpu = f"{found['gpu']}; " if "gpu" in found else ""
    where = f"{gpu}{found['cpu']}, {found['cores']} cores, {found['threads']} threads"
    return f"Written by `{found['command']}` at commit {found['commit']}. {where}; {packages}."


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit() -> str:
    """Of the repository, `"1a2b3c4"`, with `-dirty` for uncommitted changes; `"unknown"` without git."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def nats(change) -> str:
    """A `knnmoe_hf.evaluation.Change` of the NLL, in nats per token with its interval."""
    return change.text()


def percent(change) -> str:
    """A `knnmoe_hf.evaluation.Change` of the accuracy, in points with its interval."""
    return change.text(100, 2)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(folder: Path, name: str, content: object, page: str) -> None:
    """Writes `<name>.json` and `<name>.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page.rstrip("\n") + "\n")
