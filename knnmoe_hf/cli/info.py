"""`knnmoe info`: what a memory does and holds, checked; or how large one would be."""

import argparse
import json
from typing import Any

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.fields import MEMORY_FIELDS, add, option
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe info my-memory          or: knnmoe info --plan allenai/OLMoE-1B-7B-0924 --tokens 100000"
_TOKENS = 100_000


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("memory", nargs="?", type=paths.name, help="Folder or repository of a memory")
    help = "Say how many bytes a memory for this model would take"
    what.add_argument("--plan", type=paths.name, metavar="MODEL", help=help)
    hub.add_source(parser)
    add(parser, "tokens", values.whole(1), None, f"Reference tokens of the plan; default {_TOKENS}.")
    parser.add_argument("--audit", action="store_true", help="Look for hostile or broken rows, in seconds")
    parser.add_argument("--json", action="store_true", help="Print JSON and nothing else on stdout")
    shared.add_memory(parser, "the memory of a plan")
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    if options.plan is not None:
        for name in ("revision", "subfolder"):
            if getattr(options, name) is not None:
                raise ValueError(f"{option(name)} is for a memory: leave it out, or --plan")
        if options.audit:
            raise ValueError("--audit looks at rows, and a plan has none: name a memory instead of --plan")
        return
    given = [name for name in ("tokens", *MEMORY_FIELDS) if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{option(given[0])} is for a plan: name the model with --plan, or leave it out")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    if options.plan is not None:
        paths.check_there(options.plan, "a folder of a model, or a repository of the Hub")
    else:
        paths.check_there(options.memory, "one that a memory was saved to")


def run(options: argparse.Namespace) -> None:
    """Prints a memory's contents or a plan."""
    found = _plan(options) if options.plan is not None else _memory(options)
    if options.json:
        from knnmoe_hf.cli.tables import finite

        print(json.dumps(finite(found), indent=1, allow_nan=False))
    elif options.plan is not None:
        _print_plan(found)
    else:
        from knnmoe_hf.cli.inside import page

        print(page(found, options.memory))
        if options.audit:
            from knnmoe_hf.cli.audit_page import audit_page

            print(audit_page(found["audit"], options.memory))


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from knnmoe_hf.cli.building import memory_config
    from knnmoe_hf.memory.size import plan_memory

    tokens = options.tokens or _TOKENS
    plan = plan_memory(options.plan, tokens, memory_config(options))
    first = plan.gates[0]
    return {
        "model": options.plan,
        "gates": len(plan.gates),
        "rule": first.rule.name,
        "top_k": first.top_k,
        "hidden_size": first.hidden_size,
        "experts": first.num_experts,
        "tokens": plan.tokens,
        "bytes": plan.nbytes,
        "key_bytes": sum(plan.key_bytes.values()),
        "value_bytes": sum(plan.value_bytes.values()),
        "next_token_bytes": plan.next_token_bytes,
    }


def _print_plan(plan: dict[str, Any]) -> None:
    print(f"{plan['model']}: {plan['gates']} gates, rule {plan['rule']}, top-{plan['top_k']}")
    print(f"hidden size {plan['hidden_size']}, {plan['experts']} experts")
    parts = f"keys {plan['key_bytes']:,}, values {plan['value_bytes']:,}"
    print(f"{plan['tokens']:,} reference tokens: {plan['bytes']:,} bytes ({parts})")
    print(f"that is {plan['bytes'] / plan['tokens']:,.0f} bytes a token, search index and provenance apart")
    print(f"next tokens, if they are saved without the text: {plan['next_token_bytes']:,} bytes more")


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    from knnmoe_hf.cli.inside import describe
    from knnmoe_hf.files import file_digest
    from knnmoe_hf.memory import RoutingMemory
    from knnmoe_hf.memory.download import resolve_folder
    from knnmoe_hf.memory.folder import read_config
    from knnmoe_hf.memory.plain_files import unusable

    folder = resolve_folder(options.memory, **hub.source_of(options))
    memory = RoutingMemory.from_pretrained(folder)
    manifest = read_config(folder)[1]
    for entry in manifest.files:  # from_pretrained trusts a file that it has checked before; here it is checked again
        if file_digest(folder / entry["name"]) != entry["sha256"]:
            raise unusable(folder / entry["name"], "its SHA-256 is not the one that config.json says")
    found = describe(memory, manifest, folder)
    if options.audit:
        from knnmoe_hf.memory.audit import audit

        found["audit"] = audit(memory).to_json()
    return found
