"""How much sooner two processes of one thread build than one such process, and whether they write the same bytes.

    python benchmarks/build_processes.py

Builds of the lab's OLMoE with the library's defaults (calibration included), in turns by one process and by several,
each a command of its own. The seconds are those of `KNNMoETrainer.train` and `save_model`, of the slowest process: by
the clock, and of its processor alone, for a machine that is shared; what one process waits for another is not in the
latter. What comes before (imports, model, tokens) each process does alike. Writes
`benchmarks/results/build_processes.*`.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, it knows only its own folder


def build(name: str, references: int, kind: str, folder: Path) -> None:
    """One process's share of a build; each writes its seconds into the folder, and the first one the memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.texts import LabTexts
    from knnmoe_hf import KNNMoETrainer, KNNMoETrainingArguments

    torch.set_num_threads(1)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        AutoTokenizer.from_pretrained(name),
    )
    args = KNNMoETrainingArguments(
        output_dir=str(folder / "out"), use_cpu=True, report_to="none", logging_strategy="no", disable_tqdm=True
    )
    rows = LabTexts(tokenizer).references(kind, 0, references)
    trainer = KNNMoETrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.accelerator.wait_for_everyone()
    began, used = time.perf_counter(), time.process_time()
    solved = trainer.train().metrics["train_runtime"]
    trainer.save_model(folder / "memory")
    seconds = {"build": time.perf_counter() - began, "cpu": time.process_time() - used, "solving": solved}
    seconds["rows"] = len(trainer.memory)
    (folder / f"seconds-{args.process_index}.json").write_text(json.dumps(seconds))


def timed(processes: int, options: argparse.Namespace) -> dict:
    """A build by so many processes: seconds, rows and a digest of every byte that was written."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *(["-m", *launcher] if processes > 1 else []), __file__]
    with tempfile.TemporaryDirectory() as folder:
        words += ["--references", str(options.references), "--kind", options.kind, "--model", options.model]
        subprocess.run([*words, "--build", folder], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        shares = [json.loads(path.read_text()) for path in Path(folder).glob("seconds-*.json")]
        digest = hashlib.sha256()
        for path in sorted((Path(folder) / "memory").iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    return {name: max(share[name] for share in shares) for name in shares[0]} | {
        "processes": processes,
        "digest": digest.hexdigest(),
    }


def alike(runs: list[dict]) -> bool:
    """Whether all wrote the same bytes."""
    return len({run["digest"] for run in runs}) == 1


def report(content: dict, many: int) -> str:
    """The runs as a Markdown table, and the ratio of each pair of neighbours."""
    from benchmarks.measuring import shown_hardware

    runs = content["runs"]
    alone, together = ([run for run in runs if run["processes"] == count] for count in (1, many))
    ratios, of_cpu = ([two[name] / one[name] for one, two in zip(alone, together)] for name in ("build", "cpu"))

    def spread(values: list[float], digits: int) -> str:
        low, high = min(values), max(values)
        return f"{statistics.median(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    lines = [
        f"Written by `benchmarks/build_processes.py`: {len(alone)} builds of {runs[0]['rows']} rows each, in turns, "
        f"one thread a process, median and range of the seconds. {shown_hardware(content['hardware'])}.",
        "",
        "| processes | train and save | of it, solving | the rest | processor |",
        "|---|---|---|---|---|",
    ]
    for count, some in ((1, alone), (many, together)):
        rest = [run["build"] - run["solving"] for run in some]
        cells = [[run["build"] for run in some], [run["solving"] for run in some], rest]
        cells.append([run["cpu"] for run in some])
        lines.append(f"| {count} | {' | '.join(spread(values, 1) for values in cells)} |")
    lines += ["", f"Ratio of the times {spread(ratios, 3)}, of the processors' {spread(of_cpu, 3)};"]
    lines.append(f"all builds wrote {'the same bytes' if alike(runs) else 'OTHER BYTES THAN THE FIRST'}.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    import torch

    from benchmarks.results import FOLDER
    from knnmoe_hf.lab import LAB_MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(LAB_MODELS["olmoe"]), help="folder or name on the Hub")
    parser.add_argument("--kind", default="topics", help="of reference text, see benchmarks/texts.py")
    parser.add_argument("--references", type=int, default=60, help="windows of 256 tokens; default 60")
    parser.add_argument("--processes", type=int, default=2, help="to compare with one; default 2")
    parser.add_argument("--repeats", type=int, default=5, help="builds of each; default 5")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of build_processes.json and .md")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.build is not None:
        build(options.model, options.references, options.kind, options.build)
        return
    runs = []
    for _ in range(options.repeats):
        for processes in (1, options.processes):
            runs.append(timed(processes, options))
            print(json.dumps(runs[-1]), flush=True)
    from benchmarks.measuring import hardware, write

    content = {"hardware": hardware(torch.device("cpu")), "runs": runs}
    write(options.results, "build_processes", content, report(content, options.processes))
    print(report(content, options.processes))
    if not alike(runs):
        sys.exit("some builds wrote other bytes than the first")


if __name__ == "__main__":
    main()
