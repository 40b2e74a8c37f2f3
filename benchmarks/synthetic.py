"""Models of full size without a download, and memories for them without a build."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.lookup.codecs import KeyEncoder, fit_keys
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.options import FIXED_AT_BUILD
from knnmoe_hf.lookup.values import ValueTable, store_values
from knnmoe_hf.memory.manifest import Origin
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import Gate, find_gates, gate_logits

SPREAD = 0.2
"""
Of a row around its centre, in standard deviations of the centres in each dimension.

Of 32 k tokens' router inputs in the lab OLMoE, 2048 were taken as centres: as many noisy copies of these lie as far
from held-out queries as the inputs themselves. In mean squared distances of two rows, the 16th neighbour is at 0.10,
0.18, 0.25 and 0.31 in the four layers (median; 0.07, 0.16, 0.24 and 0.30 for real rows). The first is further off than
among real rows (0.06 to 0.24, not 0.02 to 0.13), so neighbours are harder to tell from others than in practice.
"""
_BLOCK = 2**24 + 3  # of random numbers, whose copies begin elsewhere in each matrix
_EMBEDDED = 4.0
"""
Standard deviation of the embeddings, against which the layers' outputs are noise that grows with the depth.

At OLMoE's sizes the nearest of 10 k rows is then at 0.02 (first layer) to 0.23 (last), the 16th at 0.06 to 0.26, which
is where they are in the lab; with 0.3, at 0.45 and 0.51, held-out queries are hardly nearer to rows than rows to each
other, as no trained model's are.
"""
_POOL = 2**16


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """
    A model of random weights, in seconds for billions of them.

    One block of random numbers is copied into every matrix, from another place in each expert; gates and embeddings,
    which decide the routing, have numbers of their own. Norms are 1, biases 0.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    block = (config.initializer_range * torch.randn(_BLOCK, generator=generator)).to(device, dtype)
    own = {gate.module.weight: config.initializer_range for gate in find_gates(model)}
    own[model.get_input_embeddings().weight] = _EMBEDDED
    filled, start = {}, 0
    for owner in model.modules():
        for name, empty in owner._parameters.items():
            if empty is None:
                continue
            if empty not in filled:
                filled[empty] = torch.empty(empty.shape, dtype=dtype, device=device)
                if empty in own:
                    filled[empty].copy_(own[empty] * torch.randn(empty.shape, generator=generator))
                elif empty.dim() == 1:
                    filled[empty].fill_(float(name == "weight"))
                else:
                    start = _copy_from(block, start, filled[empty].view(-1))
            owner._parameters[name] = nn.Parameter(filled[empty], requires_grad=False)
    return model.to(device).eval()


def _copy_from(block: Tensor, start: int, target: Tensor) -> int:
    """Fills a vector with the block, repeated; where in the block the next one begins."""
    done = 0
    while done < len(target):
        part = min(len(block) - start, len(target) - done)
        target[done : done + part] = block[start : start + part]
        done, start = done + part, (start + part) % len(block)
    return start


def random_text(lexicon: Tensor, rows: int, length: int, seed: int) -> Tensor:
    """
    (rows, length) token ids of a lexicon (V,): each of them as often as any other.

    The router inputs of a random model say little but which token it is. If some were as frequent as words are, rows
    would lie in a few dense balls without any structure, in which a neighbour is no better than the next.
    """
    generator = torch.Generator().manual_seed(seed)
    count = rows * length
    drawn = [torch.randperm(len(lexicon), generator=generator) for _ in range(-(-count // len(lexicon)))]
    return lexicon[torch.cat(drawn)[:count]].view(rows, length)


@torch.no_grad()
def router_inputs(model: nn.Module, text: Tensor) -> dict[int, Tensor]:
    """`{layer: (T, d)}`, every gate's input on this text, T its tokens, row by row."""
    seen: dict[int, list[Tensor]] = {}
    handles = [
        gate.module.register_forward_hook(
            lambda _, args, __, layer=gate.layer: seen.setdefault(layer, []).append(args[0].flatten(0, -2).clone())
        )
        for gate in find_gates(model)
    ]
    try:
        for row in text:
            model.base_model(input_ids=row[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in seen.items()}


def synthetic_rows(x: Tensor, logits: Tensor, rows: int, config: KNNMoEConfig, seed: int) -> LayerRows:
    """
    A layer's rows around real ones: as many clusters as there are of these, at their places.

    Keys are noisy copies of the encoded inputs, values of their logits, so that a neighbour's routing is like the
    gate's own. Never holds (N, d) floats, and values of no more than 65536 rows as floats; more rows share them.

    Args:
        x: (M, d), gate inputs; logits: (M, E), the gate's own; both of a real forward.
        rows: N.
        config: says how keys and values are stored.
        seed: of centres and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, x, logits = getattr(torch, config.key_dtype), x.float().cpu(), logits.float().cpu()
    encoder = fit_keys(x, logits, config.key_codec, config.key_dim, config.key_whitening, dtype)
    pool = torch.arange(min(rows, _POOL)) % len(x)  # the centre of each entry
    noisy = logits[pool] + 0.3 * logits.std() * torch.randn(len(pool), logits.shape[1], generator=generator)
    values = store_values(noisy, config.value_space, getattr(torch, config.value_dtype), config.value_experts)
    entries = torch.randint(len(pool), (rows,), generator=generator)
    codes = _around(encoder, encoder.query(x, logits), pool[entries], dtype, generator)
    return LayerRows(codes, encoder, values.select(entries), torch.zeros(0, 1), 1.0, x.shape[1])


def _around(
    encoder: KeyEncoder, centres: Tensor, chosen: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """(N, c) codes of keys around the chosen of the centres (M, c)."""
    codes, spread = torch.empty(len(chosen), centres.shape[1], dtype=dtype), SPREAD * centres.std(dim=0)
    for part, out in zip(chosen.split(_POOL), codes.split(_POOL)):
        keys = centres[part] + spread * torch.randn(len(part), centres.shape[1], generator=generator)
        out.copy_(keys if encoder.step is None else (keys / encoder.step).round_().clamp_(-127, 127))
    return codes


def first_rows(rows: LayerRows, count: int, config: KNNMoEConfig) -> LayerRows:
    """The first so many, which share their tensors, with distances, scale and stats of their own."""
    per_row = {n: t[:count] for n, t in rows.values.tensors().items() if n in ("codes", "experts", "default_value")}
    table: ValueTable = replace(rows.values, **per_row)
    fewer = replace(rows, key_codes=rows.key_codes[:count], values=table).measured(torch.zeros(count).long(), config)
    options = {name: float(getattr(config, name)) for name in ("gamma", "half_life", "num_neighbors")}
    known = dict(
        reference_mean=1.0, background_mean=0.0, weight=1.0, threshold=0.1, width=0.1, scale=fewer.scale
    )  # mostly open
    return replace(fewer, stats=CalibrationStats(**known, **options))


def memory_of(layers: dict[int, LayerRows], gates: Iterable[Gate], config: KNNMoEConfig) -> RoutingMemory:
    """A memory of these rows for the model of these gates."""
    origin = Origin({name: getattr(config, name) for name in FIXED_AT_BUILD}, "synthetic", fingerprint(list(gates)))
    return RoutingMemory(config, layers, origin)


def synthetic_layers(model: nn.Module, text: Tensor, rows: int, config: KNNMoEConfig) -> dict[int, LayerRows]:
    """`synthetic_rows` for each layer of a model, around its router inputs on a text."""
    inputs, layers = router_inputs(model, text), {}
    for gate in find_gates(model):
        x = inputs.pop(gate.layer)
        layers[gate.layer] = synthetic_rows(x, gate_logits(gate, x), rows, config, seed=gate.layer)
    return layers
