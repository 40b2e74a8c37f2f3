"""How a memory was built and is used, for its card: options of the build, of the memory, and of its calibration."""

from knnmoe_hf.memory.card.words import code, escaped
from knnmoe_hf.memory.data import MemoryData

_SOURCES = {"given": "given by its builder", "this machine": "found on the machine that built it"}
_SAYS = """\
A build optimises the routing logits of each reference token for the likelihood of the true next token, with the
model's weights frozen, and stores them under the gate's input."""


def build(memory: MemoryData) -> str:
    """A table of the options, and what was done since."""
    config, said = memory.config, memory.card_data
    of = {
        "builder": ", ".join(f"{name} {_value(value)}" for name, value in said.build.items()) or "not recorded",
        "base model": _base_model(memory),
        "value space": f"`{config.value_space}`",
        "neighbours": str(config.num_neighbors),
        "temperature, gamma": f"{config.temperature}, {config.gamma}",
        "confidence": config.confidence,
        "recall": f"`{config.recall}`",
        "next tokens": _next_tokens(memory),
        "calibrated against": _calibrated(memory),
        "keys, values": f"{config.key_codec} {config.key_dtype}, {config.value_dtype}",
    }
    table = "\n".join([_SAYS, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in of.items())])
    done = "".join(f"\n{place}. {escaped(line)}" for place, line in enumerate(said.history, start=1))
    return f"{table}\n\nSince it was built:\n{done}" if done else table


def _value(value: object) -> str:
    return code(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _base_model(memory: MemoryData) -> str:
    kind, revision = code(memory.origin.base_model_class or "not recorded"), memory.config.base_model_revision
    return f"{kind}, revision {code(revision)}" if revision else kind


def _next_tokens(memory: MemoryData) -> str:
    """Whether `recall="next_tokens"` and `"both"` work, and what that takes."""
    if memory.next_tokens is None:
        return 'not inside, so `recall="next_tokens"` and `"both"` are not possible'
    if memory.stored_next_tokens is None:
        return 'read from the text of the references, for `recall="next_tokens"` and `"both"`'
    return f'inside, {memory.stored_next_tokens.nbytes / 1e6:.1f} MB, for `recall="next_tokens"` and `"both"`'


def _calibrated(memory: MemoryData) -> str:
    """The kinds of background text that the calibration read, and whether they were given."""
    if memory.calibration is None:
        fitted = any(rows.stats is not None for rows in memory.layers.values())
        return "not recorded" if fitted else "nothing"
    if memory.calibration.threshold is None:
        return "nothing"
    kinds: dict[str, list[str]] = {source: [] for source in _SOURCES}
    for kind, text in sorted(memory.calibration.background.items()):
        kinds[text["source"]].append(code(kind))
    return "; ".join(f"{', '.join(kinds[source])} ({said})" for source, said in _SOURCES.items() if kinds[source])
