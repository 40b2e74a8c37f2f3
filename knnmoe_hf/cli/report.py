"""The table that `evaluate` and `quickstart` print."""

from knnmoe_hf.evaluation import Comparison


def table(comparisons: dict[str, Comparison], memory_bytes: dict[int, int]) -> str:
    """
    Base against memory in plain text.

    Args:
        comparisons: by the name of the text.
        memory_bytes: `{layer: bytes}` of keys and values.
    """
    header = ["", *comparisons]
    lines = [
        ["windows", *(str(c.change().windows) for c in comparisons.values())],
        ["tokens", *(f"{c.base.tokens.sum():.0f}" for c in comparisons.values())],
        ["NLL base", *(f"{c.base.mean_nll:.4f}" for c in comparisons.values())],
        ["NLL memory", *(f"{c.memory.mean_nll:.4f}" for c in comparisons.values())],
        ["  change [95 %]", *(_interval(c, "nll", 1, 4) for c in comparisons.values())],
        ["perplexity base", *(f"{c.base.perplexity:.2f}" for c in comparisons.values())],
        ["perplexity memory", *(f"{c.memory.perplexity:.2f}" for c in comparisons.values())],
        ["accuracy base, %", *(f"{100 * c.base.accuracy:.2f}" for c in comparisons.values())],
        ["accuracy memory, %", *(f"{100 * c.memory.accuracy:.2f}" for c in comparisons.values())],
        ["  change [95 %]", *(_interval(c, "hits", 100, 2) for c in comparisons.values())],
    ]
    for layer in next(iter(comparisons.values())).confidence:
        shares = (f"{c.confidence[layer]:.3f}" for c in comparisons.values())
        lines.append([f"confidence, layer {layer}", *shares])
    lines += [
        ["time base, s", *(f"{c.base_seconds:.2f}" for c in comparisons.values())],
        ["time memory, s", *(f"{c.memory_seconds:.2f}" for c in comparisons.values())],
    ]
    total = f"memory: {sum(memory_bytes.values()):,} bytes in {len(memory_bytes)} layers"
    return "\n".join([_aligned([header, *lines]), total])


def _interval(comparison: Comparison, metric: str, unit: float, digits: int) -> str:
    return comparison.change(metric).text(unit, digits)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    )
