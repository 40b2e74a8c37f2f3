"""`knnmoe explain`: a page that shows, for each token of a text, what a memory recalled and what that changed."""

import argparse
from pathlib import Path

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.fields import add
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe explain my-memory --prompt 'The patient was given' --generate 40 --output explanation.html"
_MODEL = "The base model, if it is not where it was when the memory was built"
_OUTPUT, _TOKENS = "explanation.html", 4096


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    hub.add_source(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=values.text, help="Text to explain")
    text.add_argument("--file", type=paths.name, help="File of plain text to explain, in UTF-8")
    text.add_argument("--prompt", type=values.text, help="Text that the model continues; needs --generate")
    add(parser, "generate", values.whole(1), None, "Tokens that are generated after --prompt, always the likeliest.")
    help = f"Page to write; default {_OUTPUT}"
    parser.add_argument("--output", type=paths.name, default=_OUTPUT, metavar="FILE", help=help)
    add(parser, "overwrite", None, False, "Write over a file of --output that is not a page of this library.")
    add(parser, "max_tokens", values.whole(1), _TOKENS, f"Tokens that are shown, the first ones; default {_TOKENS}.")
    shared.add_model(parser, _MODEL)
    shared.add_query_options(parser)
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    if (options.prompt is None) != (options.generate is None):
        raise ValueError("--prompt and --generate belong together: give both, or --text or --file instead")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_there(options.memory, "one that a memory was saved to")
    if options.model is not None:
        paths.check_there(options.model, "a folder of the base model, or its repository on the Hub")
    if options.file is not None and not Path(options.file).is_file():
        raise FileNotFoundError(f"--file {options.file} is not a file: name one of plain text.")
    paths.check_page(options.output, options.overwrite)


def run(options: argparse.Namespace) -> None:
    """Runs the model on the text, writes the page and says where it is."""
    import torch

    from knnmoe_hf.cli.loading import load_with_memory, tokenizer_of
    from knnmoe_hf.explain.page import lead, to_html
    from knnmoe_hf.explain.trace import trace_routing
    from knnmoe_hf.files import replacing
    from knnmoe_hf.memory import RoutingMemory
    from knnmoe_hf.models.offload import input_device

    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options), **shared.memory_options(options))
    tokenizer = tokenizer_of(memory, options)
    text = _text(options)
    model = load_with_memory(memory, options)
    ids = tokenizer(text, return_tensors="pt").input_ids
    if not ids.shape[1]:
        raise ValueError("there is no token in the text: give at least one.")
    ids = _shortened(ids, model, options).to(input_device(model))
    if options.generate is not None:
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.generate, do_sample=False
        )
    with torch.no_grad(), trace_routing(model, options.max_tokens) as trace:
        model(input_ids=ids, use_cache=False)
    with replacing(Path(options.output)) as temporary:
        temporary.write_text(to_html(trace, f"What {_name(options)} recalled", tokenizer), encoding="utf-8")
    print(lead(trace))
    print(f"The page is {options.output}: open it in a browser.")


def _text(options: argparse.Namespace) -> str:
    if options.file is None:
        return options.text if options.text is not None else options.prompt
    try:
        return Path(options.file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {options.file} is not UTF-8: convert it first.") from error


def _shortened(ids, model, options: argparse.Namespace):
    """At most as many tokens as are shown, and as the model has positions for; a notice says if some are left out."""
    from knnmoe_hf.cli.messages import notice

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = min(options.max_tokens, positions or options.max_tokens)
    room = max(room - (options.generate or 0), 1)
    if ids.shape[1] > room:
        notice(options, f"the first {room:,} of {ids.shape[1]:,} tokens are explained")
    return ids[:, :room]


def _name(options: argparse.Namespace) -> str:
    return Path(options.memory).name or "the memory"
