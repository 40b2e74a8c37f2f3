"""How long a build takes: by builder, against passes of the frozen model; or by number of processes.

    python -m benchmarks.speed.build --models knnmoe_hf/lab/olmoe model_cards/lab-qwen3-moe
    python -m benchmarks.speed.build --processes 2 --references 60

By builder: in turns in one process, some passes of the frozen model, a build, and the passes again, in CPU seconds of
one thread. A build is what `KNNMoETrainer.train` does until the last row is stored; encoding and saving, done once,
are not in it. A backward pass takes the gradient of the frozen model's loss down to its input embeddings.
`candidates` runs more experts in some steps, which the frozen model's passes do not.

By processes: builds with the library's defaults (calibration and saving included), in turns by one process and by
several, one thread each, every build a command of its own; and whether all of them wrote the same bytes.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.builds import training_arguments
from benchmarks.pages import DTYPES, RESULTS, add_dtype, parser, provenance, shown_provenance, table, write
from benchmarks.speed.measuring import median, spread
from benchmarks.texts import LabTexts
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments, detach_memory
from knnmoe_hf.data.batches import collate
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.training.options import BUILDERS

MODULE = "benchmarks.speed.build"
_ROWS = 8  # windows in a batch
QUICK = KNNMoEConfig(confidence="rbf")  # nothing is calibrated after a build


class BuildClock(TrainerCallback):
    """CPU seconds from the first batch of a build to its last stored row."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Starts."""
        self.started = time.process_time()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Stops."""
        self.seconds = time.process_time() - self.started


def pass_seconds(model, batch: dict) -> dict[str, float]:
    """CPU seconds of a forward pass of the frozen model, and of a forward and a backward pass."""
    others = {name: tensor for name, tensor in batch.items() if name not in ("input_ids", "example_id")}
    started = time.process_time()
    with torch.no_grad():
        model(input_ids=batch["input_ids"], **others, use_cache=False)
    halfway = time.process_time()
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    torch.autograd.grad(model(inputs_embeds=embedded, **others, use_cache=False).loss, embedded)
    return {"forward": halfway - started, "both": time.process_time() - halfway}


def counts(args: KNNMoETrainingArguments) -> dict[str, int]:
    """How many passes of each kind of `pass_seconds` the build of one batch has."""
    if args.builder == "search":
        return {"forward": 1 + args.builder_steps, "both": 0}
    return {"forward": 2, "both": args.builder_steps}


def measure_builders(name: str, options) -> list[dict]:
    """One record for each builder on a model."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[options.dtype]).eval().requires_grad_(False)
    rows = LabTexts(AutoTokenizer.from_pretrained(name)).references(options.kind, 0, _ROWS * options.batches)
    batch = collate(rows[:_ROWS])
    pass_seconds(model, batch)  # warms up
    records = {
        builder: {"model": model.config.model_type, "builder": builder, "seconds_per_token": [], "times_passes": []}
        for builder in BUILDERS
    }
    for _ in range(options.repeats):
        for builder, record in records.items():
            with tempfile.TemporaryDirectory() as folder:
                asked = dict(builder=builder, builder_steps=options.steps, per_device_train_batch_size=_ROWS)
                args, timer = training_arguments(asked, folder), BuildClock()
                trainer = KNNMoETrainer(model, args, train_dataset=rows, config=QUICK, callbacks=[timer])
                around = [pass_seconds(model, batch)]
                trainer.train()
                detach_memory(model)
                around.append(pass_seconds(model, batch))
            record["passes"], seconds = counts(args), timer.seconds / options.batches
            own = sum(count * mean(one[kind] for one in around) for kind, count in record["passes"].items())
            record["seconds_per_token"].append(seconds / batch["input_ids"].numel())
            record["times_passes"].append(seconds / own)
    return list(records.values())


def report_builders(content: dict) -> str:
    """The page of the builders."""
    records, lines = content["records"], []
    text = (
        f"Batches of {_ROWS} x 256 tokens, CPU seconds of one thread; median and range of "
        f"{len(records[0]['times_passes'])} builds, each against passes measured before and after it."
    )
    for row in records:
        seconds, passes = median(row["seconds_per_token"]), row["passes"]
        cells = [row["model"], row["builder"], f"{passes['forward'] + passes['both']}, {passes['both']}"]
        lines.append([*cells, f"{1000 * seconds:.2f}", f"{1 / seconds:.0f}", spread(row["times_passes"], 3)])
    header = ["model", "builder", "forward, backward passes a batch", "ms per token", "tokens per second"]
    header.append("times the frozen model's passes")
    return "\n\n".join([shown_provenance(content["made"]), text, table(header, lines)])


def build_in_this_process(name: str, options, folder: Path) -> None:
    """One process's share of a build; each writes its seconds into the folder, and the first one the memory."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[options.dtype])
    tokenizer = AutoTokenizer.from_pretrained(name)
    args = training_arguments({}, str(folder / "out"))
    rows = LabTexts(tokenizer).references(options.kind, 0, options.references)
    trainer = KNNMoETrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.accelerator.wait_for_everyone()
    began, used = time.perf_counter(), time.process_time()
    optimising = trainer.train().metrics["train_runtime"]
    trainer.save_model(folder / "memory")
    seconds = {"build": time.perf_counter() - began, "cpu": time.process_time() - used, "optimising": optimising}
    seconds["rows"] = len(trainer.memory)
    (folder / f"seconds-{args.process_index}.json").write_text(json.dumps(seconds))


def timed_build(processes: int, options, argv: list[str]) -> dict:
    """A build by so many processes, each command of its own: the slowest's seconds, and a digest of the memory."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), MODULE, *argv]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--build", folder], cwd=RESULTS.parents[1], env=environment, check=True)
        shares = [json.loads(path.read_text()) for path in Path(folder).glob("seconds-*.json")]
        digest = hashlib.sha256()
        for path in sorted((Path(folder) / "memory").iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    slowest = {name: max(share[name] for share in shares) for name in shares[0]}
    return slowest | {"processes": processes, "digest": digest.hexdigest()}


def same_bytes(runs: list[dict]) -> bool:
    """Whether all builds wrote the same memory."""
    return len({run["digest"] for run in runs}) == 1


def report_processes(content: dict) -> str:
    """The page of the processes."""
    runs, lines = content["runs"], []
    alone, together = ([run for run in runs if (run["processes"] > 1) is many] for many in (False, True))
    for some in (alone, together):
        rest = [run["build"] - run["optimising"] for run in some]
        series = [[run[key] for run in some] for key in ("build", "optimising", "cpu")]
        cells = [spread(values, 1) for values in (*series[:2], rest, series[2])]
        lines.append([str(some[0]["processes"]), *cells])
    ratios = (spread([two[key] / one[key] for one, two in zip(alone, together)], 3) for key in ("build", "cpu"))
    return "\n\n".join(
        [
            shown_provenance(content["made"]),
            f"{len(alone)} builds of {runs[0]['rows']} rows each, in turns, one thread a process; median and range of "
            "the seconds of `train` and `save_model`, of the slowest process.",
            table(["processes", "train and save", "of it, optimising", "the rest", "processor"], lines),
            "Ratio of the times {}, of the processors' {}; all builds wrote {}.".format(
                *ratios, "the same bytes" if same_bytes(runs) else "OTHER BYTES THAN THE FIRST"
            ),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--models", nargs="+", default=[str(LAB_MODELS["olmoe"])], help="folders or names on the Hub")
    add("--kind", default="topics", help="of reference text; default topics")
    add("--batches", type=int, default=2, help="by builder: batches of 8 x 256 tokens in a build; default 2")
    add("--steps", type=int, help="by builder: steps of every builder; default: each builder's own")
    add("--processes", type=int, help="compare so many processes with one, on the first of --models")
    add("--references", type=int, default=60, help="by processes: windows of 256 tokens; default 60")
    add("--repeats", type=int, default=5, help="builds of each; default 5")
    add("--build", type=Path, help="internal")  # of the processes that this one starts
    add_dtype(options)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = options.parse_args(arguments)
    if options.build is not None:
        build_in_this_process(options.models[0], options, options.build)
        return
    torch.set_num_threads(options.threads or 1)
    content = {"made": provenance(MODULE, argv)}
    if options.processes is None:
        content["records"] = [record for name in options.models for record in measure_builders(name, options)]
        page, name = report_builders(content), "build_time"
    else:
        build = partial(timed_build, options=options, argv=arguments)
        content["runs"] = [build(count) for _ in range(options.repeats) for count in (1, options.processes)]
        page, name = report_processes(content), "build_processes"
    write(options.results, name, content, page)
    print(page)
    if "runs" in content and not same_bytes(content["runs"]):
        sys.exit("some builds wrote other bytes than the first")


if __name__ == "__main__":
    main()
