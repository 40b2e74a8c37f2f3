"""How long a build takes, against as many forward and backward passes of the frozen model.

    OMP_NUM_THREADS=1 python benchmarks/build_time.py --models knnmoe_hf/lab/olmoe model_cards/lab-qwen3-moe

For each builder, in turns in one process: some passes of the frozen model, a build, and the passes again. A build is
all that `KNNMoETrainer.train` does until the last row is in; what follows (scale, files, attaching) is done once. A
backward pass takes the gradient of the frozen model's own loss down to its input embeddings. `candidates` opens more
experts in some steps, so it is also compared with passes of those widths. With `--steps 5 10 20` each builder runs
with each count of steps, and a fit says how its time grows with the passes; `growth` in the
records is [factor, exponent, R2]. Writes `benchmarks/results/build_time.*`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measuring import Growth, growth, hardware, shown_growth, shown_hardware, write
from benchmarks.results import FOLDER
from knnmoe_hf import KNNMoETrainer, KNNMoETrainingArguments
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.training.arguments import BUILDERS
from knnmoe_hf.training.builders.make import candidate_steps
from knnmoe_hf.training.data import collate, prepare_dataset

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class TimedTrainer(KNNMoETrainer):
    """Stops the clock when the last row is in."""

    def timed(self, clock: Callable[[], float]) -> float:
        """Seconds of a build."""
        self._clock = clock
        started = clock()
        self.train()
        return self._stopped - started

    def _finish(self, ordinary):
        self._stopped = self._clock()
        return None


class Passes:
    """Passes of the frozen model over one batch."""

    def __init__(self, model, rows: list[dict]):
        self.model, self.gates = model.requires_grad_(False), find_gates(model)
        self.batch = collate(rows)
        self.batch.pop("example_id")

    def forward(self) -> None:
        """Logits and loss, no graph."""
        with torch.no_grad():
            self.model(**self.batch, use_cache=False)

    def forward_and_backward(self) -> None:
        """The loss and its gradient down to the embeddings."""
        others = {name: tensor for name, tensor in self.batch.items() if name != "input_ids"}
        embedded = self.model.get_input_embeddings()(self.batch["input_ids"]).requires_grad_()
        torch.autograd.grad(self.model(inputs_embeds=embedded, **others, use_cache=False).loss, embedded)

    @contextmanager
    def width(self, times: int):
        """So many times the experts per token inside."""
        own = [gate.module.top_k for gate in self.gates]
        try:
            for gate in self.gates:
                gate.module.top_k *= times
            yield
        finally:
            for gate, top_k in zip(self.gates, own):
                gate.module.top_k = top_k

    def seconds(self, clock: Callable[[], float]) -> dict[str, float]:
        """Of a forward pass; of a forward and a backward; of those with twice the experts."""

        def timed(run: Callable[[], None]) -> float:
            started = clock()
            run()
            return clock() - started

        found = {"forward": timed(self.forward), "both": timed(self.forward_and_backward)}
        with self.width(2):
            return found | {"wide": timed(self.forward_and_backward)}


def counts(args: KNNMoETrainingArguments) -> dict[str, int]:
    """How often each kind of pass of `Passes.seconds` is in the build of one batch."""
    if args.builder == "search":
        return {"forward": 1 + args.builder_steps, "both": 0, "wide": 0}
    wide = candidate_steps(args)
    return {"forward": 2, "both": args.builder_steps - wide, "wide": wide}


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    """One record for each builder, on this model."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    cut = windows(documents("topics", "reference"), tokenizer, limit=8 * options.batches)
    rows = prepare_dataset([{"input_ids": ids, "labels": ids} for ids in cut], None, None)
    passes, clock = Passes(model, rows[:8]), CLOCKS[options.clock]
    passes.seconds(clock)  # warm
    trials = [(builder, steps) for builder, own in BUILDERS.items() for steps in options.steps or [own]]
    found: dict[tuple[str, int], list[dict]] = {trial: [] for trial in trials}
    for _ in range(options.repeats):
        for (builder, steps), builds in found.items():
            with tempfile.TemporaryDirectory() as folder:
                args = KNNMoETrainingArguments(
                    output_dir=folder,
                    builder=builder,
                    builder_steps=steps,
                    report_to="none",
                    logging_strategy="no",
                    disable_tqdm=True,
                )
                trainer = TimedTrainer(model=model, args=args, train_dataset=rows)
                around = [passes.seconds(clock)]
                build = trainer.timed(clock) / options.batches
                around.append(passes.seconds(clock))
            mean = {name: statistics.mean(one[name] for one in around) for name in around[0]}
            builds.append(_ratios(build, passes.batch["input_ids"].numel(), mean, counts(args)))
    return [
        {"model": model.config.model_type, "builder": builder, "steps": steps, "passes": builds[0]["passes"]}
        | {name: [build[name] for build in builds] for name in ("seconds_per_token", "frozen", "same_widths")}
        for (builder, steps), builds in found.items()
    ]


def growths(records: list[dict]) -> dict[str, Growth | None]:
    """How a build's seconds grow with its passes, forward and backward counted alike, `{"model, builder": growth}`."""
    found = {}
    for name in dict.fromkeys(f"{row['model']}, {row['builder']}" for row in records):
        own = [row for row in records if f"{row['model']}, {row['builder']}" == name]
        seconds = [statistics.median(row["seconds_per_token"]) for row in own]
        found[name] = growth([sum(row["passes"]) for row in own], seconds)
    return found


def _ratios(build: float, tokens: int, seconds: dict[str, float], count: dict[str, int]) -> dict:
    backward = count["both"] + count["wide"]
    own = count["forward"] * seconds["forward"] + backward * seconds["both"]
    return {
        "passes": [count["forward"] + backward, backward],
        "seconds_per_token": build / tokens,
        "frozen": build / own,
        "same_widths": build / (own + count["wide"] * (seconds["wide"] - seconds["both"])),
    }


def report(content: dict, clock: str) -> str:
    """The records as a Markdown table."""
    records = content["records"]

    def spread(ratios: list[float]) -> str:
        return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"

    lines = [
        f"Written by `benchmarks/build_time.py`: batches of 8 x 256 tokens, one thread, {clock} time,",
        f"median and range of {len(records[0]['frozen'])} builds. {shown_hardware(content['hardware'])}.",
        "",
        "| model | builder | forward, backward passes a batch | build, ms per token | rows per second "
        "| times the frozen model's passes | times passes of the same widths |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in records:
        forward, backward = row["passes"]
        seconds = statistics.median(row["seconds_per_token"])
        cells = [row["model"], row["builder"], f"{forward}, {backward}", f"{1000 * seconds:.2f}", f"{1 / seconds:.0f}"]
        lines.append(f"| {' | '.join([*cells, spread(row['frozen']), spread(row['same_widths'])])} |")
    fits = {name: fit for name, fit in growths(records).items() if fit is not None}
    if fits:
        lines += ["", "Seconds grow with the passes as passes ^ a:", ""]
        lines += [f"- {name}: {shown_growth(fit)}" for name, fit in fits.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[str(LAB_MODELS["olmoe"])], help="folders or names on the Hub")
    parser.add_argument("--batches", type=int, default=2, help="of 8 x 256 tokens in each build; default 2")
    parser.add_argument("--steps", type=int, nargs="+", help="of each builder; its own default if not given")
    parser.add_argument("--repeats", type=int, default=5, help="builds of each builder; default 5")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that is shared; default wall"
    )
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of build_time.json and build_time.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    records = [record for name in options.models for record in measure(name, options)]
    fits = growths(records)
    records = [row | {"growth": fits[f"{row['model']}, {row['builder']}"]} for row in records]
    content = {"hardware": hardware(torch.device("cpu")), "records": records}
    write(options.results, "build_time", content, report(content, options.clock))
    print(report(content, options.clock))


if __name__ == "__main__":
    main()
