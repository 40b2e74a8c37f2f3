"""The ways in which a model is run: what each gives, beside what plain passes over the same tokens give.

A plain pass is one forward in float32 over one sequence, without a cache, padding or any wrapper.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.distributed import DistributedConfig

from knnmoe_hf import active_memory, detach_memory
from knnmoe_hf.models.gates import decoder_layers, find_gates
from tests.support.caches import LENGTHS, additive, logits_of, packed_calls, padded, uncached

Pairs = Iterator[tuple[Tensor, Tensor]]
"""What a way gives, and what plain passes give in its place."""


@dataclass(frozen=True)
class Way:
    """
    A way of running a model.

    Args:
        run: `run(model, plain, tokens)` yields what the model gives, each with what the plain model gives.
        before: `before(model, folder)` makes of a plain model one that is run this way, before a memory is attached.
        after: the same, after a memory was attached.
        plain: the change that `before` and `after` make in what the model computes, made to the plain model.
        half: whether it computes in half precision, and so differs from plain passes, with and without a memory.
        memories: names in `tests.support.table.check.MEMORIES` of those that it is tried with.
        quick: whether every family is run this way in the default run, and not the main ones alone.
    """

    run: Callable[[nn.Module, nn.Module, Tensor], Pairs]
    before: Callable[[nn.Module, Path], nn.Module] = lambda model, folder: model
    after: Callable[[nn.Module, Path], nn.Module] = lambda model, folder: model
    plain: Callable[[nn.Module], nn.Module] = lambda model: model
    half: bool = False
    memories: tuple[str, ...] = ("routing", "both")
    quick: bool = False


def forward(model, plain, tokens) -> Pairs:
    for ids in (tokens, tokens[:1, :1]):
        yield uncached(model, ids), torch.cat([uncached(plain, row[None]) for row in ids])


def left_padded(model, plain, tokens) -> Pairs:
    for side in ("left", "right"):
        ids, mask = padded(tokens, side)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        found = logits_of(model, ids, mask, position_ids=positions)
        for row, length in enumerate(LENGTHS):
            yield found[row][mask[row] == 1], uncached(plain, tokens[row : row + 1, :length])[0]


def packed(model, plain, tokens) -> Pairs:
    wanted = [uncached(plain, tokens[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS)]
    _, call = next(packed_calls(tokens, boolean=True))
    if plain.config.model_type in ("gpt_oss", "afmoe"):  # they do not look at positions when they make masks
        call["attention_mask"] = {
            "full_attention": block_mask(call["position_ids"], 128),
            "sliding_attention": block_mask(call["position_ids"], plain.config.sliding_window),
        }
    with torch.no_grad():
        yield model(**call, use_cache=False).logits[0], torch.cat(wanted)


def block_mask(positions, window: int) -> Tensor:
    """(1, 1, S, S): a mask for attention within each sequence of a packed row, in the form that is added to scores."""
    number = (positions[0] == 0).cumsum(0)
    distance = positions[0][:, None] - positions[0][None, :]
    return additive(((number[:, None] == number) & (distance >= 0) & (distance < window))[None, None])


def in_chunks(model, plain, tokens) -> Pairs:
    found, cache, start = [], None, 0
    for size in (5, 4, 1, 1, 1):
        with torch.no_grad():
            out = model(input_ids=tokens[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        found.append(out.logits)
    yield torch.cat(found, 1), torch.cat([uncached(plain, row[None]) for row in tokens])


def generated(model, plain, tokens, **options) -> Pairs:
    """Greedy answers of a left-padded batch: the logits of each step."""
    ids, mask = padded(tokens, "left")
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    for row, length in enumerate(LENGTHS):
        text = torch.cat([tokens[row, :length], out.sequences[row, ids.shape[1] :]])
        yield torch.stack(out.logits, 1)[row], uncached(plain, text[None, :-1])[0, length - 1 :]


def beams(model, plain, tokens) -> Pairs:
    """The scores of the best beams: the mean log probability of their tokens."""
    out = model.generate(
        input_ids=tokens, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0, num_return_sequences=2,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    chances = [log_probabilities(plain, text, 5).mean() for text in out.sequences]
    yield out.sequences_scores, torch.stack(chances)


def assisted(model, plain, tokens, **options) -> Pairs:
    """Answers whose tokens another model, or the prompt, has proposed."""
    for row in tokens[:2]:
        prompt = row.repeat(2)[None]  # repeated, so that something can be looked up in it
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        wanted = uncached(plain, out.sequences[:, :-1])[0, prompt.shape[1] - 1 :]
        yield torch.stack(out.logits, 1)[0], wanted


def with_an_assistant(model, plain, tokens) -> Pairs:
    assistant = copy.deepcopy(plain)
    if active_memory(assistant) is not None:
        detach_memory(assistant)
    with torch.no_grad():  # nearly the same model, so that some of its proposals are taken and some are not
        for parameter in assistant.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    yield from assisted(model, plain, tokens, assistant_model=assistant)


def continuous_batching(model, plain, tokens) -> Pairs:
    prompts = [tokens[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    prompts.append(prompts[0] + prompts[2])  # a shared prefix, which the cache stores once
    config = ContinuousBatchingConfig(
        use_cuda_graph=False, return_logprobs=True, page_size=4, max_batch_tokens=16, num_blocks=64
    )
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    answers = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=config)
    if len(answers) != len(prompts) or any(answer.error is not None for answer in answers.values()):
        raise RuntimeError(f"not every request was answered: {[a.error for a in answers.values()]}")
    for answer in sorted(answers.values(), key=lambda answer: answer.prompt_ids):
        text = torch.tensor(answer.prompt_ids + answer.generated_tokens)
        yield torch.tensor(answer.logprobs), log_probabilities(plain, text, len(answer.generated_tokens))


def log_probabilities(plain, text, last: int) -> Tensor:
    """Of the last tokens of a text (S,)."""
    chances = uncached(plain, text[None, :-1])[0].log_softmax(-1)
    return chances.gather(1, text[1:, None])[-last:, 0]


def checkpointed(model, plain, tokens) -> Pairs:
    """The loss and a gradient, with each layer computed again during backward."""
    found, wanted = (gradient_of(one, tokens, again) for one, again in ((model, True), (plain, False)))
    yield from zip(found, wanted)


def gradient_of(model, tokens, again: bool) -> tuple[Tensor, Tensor]:
    if again:
        model.activation_checkpointing_enable({"use_reentrant": False})
    embeddings = model.get_input_embeddings().weight
    model.train()
    try:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, embeddings)
    finally:
        model.eval()
        if again:
            model.activation_checkpointing_disable()
    return loss.detach(), gradient


# before or after a memory is attached


def with_experts(implementation: str, model, folder):
    model.set_experts_implementation(implementation)
    return model


_STATE_SPACE = ("in_proj", "out_proj", "x_proj", "dt_proj")  # read past their modules, or refused, by PEFT


def with_lora(model, folder=None):
    """A model with an adapter on all linear layers but its gates, which a memory belongs to, and state spaces."""
    torch.manual_seed(5)
    gates = tuple(gate.name for gate in find_gates(model))
    linear = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and not path.startswith(gates) and module is not model.get_output_embeddings()
    ]
    targets = [path for path in linear if path.rpartition(".")[2] not in _STATE_SPACE]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config).eval()


def merged(model, folder=None):
    return model.merge_and_unload()


def loaded(model, folder, **options):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **options).eval()


def mapped(model, folder):
    """The embeddings, the head and every other layer stay on the disk until they are needed."""
    return loaded(model, folder / "model", device_map=places_of(model), offload_folder=folder / "offloaded")


def places_of(module, path: str = "") -> dict[str, str]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    places = {path + name: "cpu" for name, _ in own}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            places |= {f"{path}{name}.{i}": "disk" if i % 2 else "cpu" for i in range(len(child))}
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            places |= places_of(child, f"{path}{name}.")
        else:
            places[path + name] = "disk" if list(child.parameters()) else "cpu"
    return places


def on_the_disk(model, folder):
    return disk_offload(model, folder / "offloaded", execution_device=torch.device("cpu"))


def in_main_memory(model, folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def tensor_parallel(model, folder):
    model.save_pretrained(folder)  # transformers does this in the first process alone
    distributed.barrier()
    return type(model).from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()


def fully_sharded(model, folder):
    for module in (*decoder_layers(model, find_gates(model)), model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return model


def compiled(model, folder):
    return torch.compile(model, backend="eager", fullgraph=True)


def copied(model, folder):
    return copy.deepcopy(model)


def pickled(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


BATCHED, GROUPED = partial(with_experts, "batched_mm"), partial(with_experts, "grouped_mm")
ONCE = ("both",)  # what takes seconds is tried with one memory
WAYS = {
    "eager experts": Way(forward, partial(with_experts, "eager"), quick=True),
    "batched_mm experts": Way(forward, BATCHED),
    "grouped_mm experts": Way(forward, GROUPED, quick=True),
    "bfloat16": Way(forward, partial(loaded, dtype=torch.bfloat16), half=True),
    "float16": Way(forward, partial(loaded, dtype=torch.float16), half=True),
    "torch.compile": Way(forward, BATCHED, compiled, memories=ONCE),
    "padding": Way(left_padded, quick=True),
    "packed rows": Way(packed),
    "dynamic cache": Way(in_chunks),
    "generation": Way(generated, quick=True),
    "static cache": Way(partial(generated, cache_implementation="static")),
    "continuous batching": Way(continuous_batching, memories=ONCE),
    "beams": Way(beams),
    "assisted generation": Way(with_an_assistant),
    "prompt lookup": Way(partial(assisted, prompt_lookup_num_tokens=3)),
    "gradient checkpointing": Way(checkpointed),
    "PEFT, then memory": Way(forward, before=with_lora, plain=lambda model: merged(with_lora(model))),
    "memory, then PEFT": Way(forward, after=with_lora, plain=lambda model: merged(with_lora(model))),
    "PEFT, merged": Way(forward, with_lora, merged, plain=lambda model: merged(with_lora(model))),
    "device_map": Way(generated, before=mapped),
    "offloaded, then memory": Way(generated, before=on_the_disk),
    "memory, then offloaded": Way(generated, after=in_main_memory),
    "deepcopy": Way(generated, after=copied),
    "torch.save": Way(generated, after=pickled),
}
"""By name, every way of running a model that is a column of the table."""

IN_PROCESSES = {
    "tensor parallel": Way(forward, before=tensor_parallel),
    "FSDP2": Way(generated, before=fully_sharded),
}
"""The ways that need two processes."""
