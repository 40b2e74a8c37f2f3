"""Benchmarks, each one command run from the root of the repository.

    python -m benchmarks.effect.run          gain and harm of every setting and competitor on the three lab models
    python -m benchmarks.effect.report       the page and the pictures, from what was measured
    python -m benchmarks.effect.families     the page of the routing rules, from what was measured
    python -m benchmarks.effect.generation   what a model writes with a memory: repetition, variety, copying, NLL
    python -m benchmarks.speed.overhead      decode and prefill of a full-size model, base and memories in turns
    python -m benchmarks.speed.engines       search engines alone
    python -m benchmarks.speed.loading       opening memories of up to 10 GB
    python -m benchmarks.speed.build         time of a build, by builder and by number of processes
    python -m benchmarks.sweeps.builders     the builders' constants
    python -m benchmarks.sweeps.next_tokens  ways in which the neighbours' tokens may vote, at equal harm
    python -m benchmarks.sweeps.confidence   the confidences' constants

Each prints a table and writes JSON and a Markdown page into `benchmarks/results/` (`--results` for another folder).
Models are loaded in float32 unless `--dtype bfloat16` is given: many processors multiply bfloat16 some 20 times
slower, and the lab models are so small that float32 costs them nothing.
"""
