"""What an audit found, in words: figures of each layer, findings, and the command that takes suspicious rows out."""

import shlex
from typing import Any

_NAMED = 20  # examples that are named with their number of rows
_IN_COMMAND = 20  # ids of examples in a command line; of more the command finds out itself


def audit_page(found: dict[str, Any], memory: str) -> str:
    """
    The lines that `knnmoe info --audit` adds.

    Args:
        found: `knnmoe_hf.memory.audit.Audit.to_json`.
        memory: the folder or repository, as it was named.
    """
    lines = ["", "audit, without the base model:"]
    if not found["layers"]:
        return "\n".join([*lines, f"  {found['rows']:,} rows are too few to tell anything from"])
    lines += [_layer(layer, of) for layer, of in found["layers"].items()]
    if found["next_tokens"]:
        named = [f"{t['token']} ({t['share']:.1%}, {t['lift']:.1f} times near its rows)" for t in found["next_tokens"]]
        lines.append(f"  most frequent next tokens: {', '.join(named)}")
    if not found["findings"]:
        return "\n".join([*lines, f"nothing suspicious in {found['rows']:,} rows"])
    of = f"{found['suspicious_rows']:,} of {found['rows']:,} rows"
    lines.append(f"SUSPICIOUS: {of}. An honest build does not leave this:")
    for finding in found["findings"]:
        place = "" if finding["layer"] is None else f"layer {finding['layer']}: "
        lines.append(f"  {place}{finding['sentence']} ({finding['check']})")
    return "\n".join(lines + _way_out(found, memory))


def _layer(layer: str, of: dict[str, Any]) -> str:
    parts = [
        f"a row attracts {of['most_attracting']:.1%} of queries at most (fair share {of['fair_share']:.2%})",
        f"{of['crowded']:.0%} of queries find a crowd",
        f"keys up to {of['largest_norm']:.1f} times as far out as the median",
        f"the most frequent row {of['repeated']} times",
        f"values up to {of['largest_residual']:.1f} times as far from a gate's as the median",
        f"for one expert {of['sharpest']:.1f} times as high as usual",
        f"{of['contrary']:.1%} contrary",
        f"expert {of['most_pushed']} pushed in {of['most_pushed_share']:.1%}",
        f"expert {of['top_expert']} first in {of['top_expert_share']:.0%}, {of['experts_in_use']:.1f} in use",
        f"weight of the first {of['top_weight']:.2f}",
        f"confidence far away {of['confidence_far_away']:.2f}",
    ]
    return f"  layer {layer}: {'; '.join(parts)}"


def _way_out(found: dict[str, Any], memory: str) -> list[str]:
    """What to do: take out the examples of the rows, or leave the memory alone."""
    examples = found["examples"]
    if any(finding["rows"] == 0 for finding in found["findings"]):
        return ["This is not in single rows, so that removing some does not mend it: do not attach this memory."]
    if not examples:
        return ["Which examples the rows came from was left out, so that they cannot be removed: do not attach it."]
    named = ", ".join(f"{id} ({count})" for id, count in list(examples.items())[:_NAMED])
    more = f" and {len(examples) - _NAMED:,} more (--json names all)" if len(examples) > _NAMED else ""
    lines = [f"examples with suspicious rows (how many): {named}{more}"]
    place, output = shlex.quote(memory), shlex.quote(f"{memory.rstrip('/').split('/')[-1]}-cleaned")
    which = f"--example-ids {' '.join(examples)}" if len(examples) <= _IN_COMMAND else "--suspicious"
    return [*lines, f"take them out: knnmoe remove {place} {which} --output {output}"]
