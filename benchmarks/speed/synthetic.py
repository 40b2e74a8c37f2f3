"""Full-size models of random weights, and memories for them: no download, no build."""

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
from knnmoe_hf.lookup.values import store_values
from knnmoe_hf.memory.manifest import Origin
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import Gate, find_gates, gate_logits

SPREAD = 0.2
"""
Distance of a row from its centre, in standard deviations of the centres, in each dimension.

Chosen so that as many noisy copies of 2048 router inputs of the lab OLMoE lie as far from held-out queries as real
router inputs do: in mean squared distances of two rows, the 16th neighbour is at 0.10, 0.18, 0.25 and 0.31 in the four
layers (median; 0.07, 0.16, 0.24 and 0.30 for real rows). The first neighbour is further off than in real rows (0.06 to
0.24, against 0.02 to 0.13), so neighbours are harder to find than in practice.
"""
_BLOCK = 2**24 + 3  # random numbers, copied into every matrix from a different start
_EMBEDDED = 4.0
"""
Standard deviation of the embeddings, beside which the layers' outputs are noise that grows with the depth.

At OLMoE's sizes the 16th neighbour among 10 k rows is then at 0.06 (first layer) to 0.26 (last), as in the lab. With
0.3 it is at 0.51: held-out queries would be hardly nearer to rows than rows are to each other.
"""
_POOL = 2**16


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """
    A model with random weights, made in seconds even for billions of them.

    One block of random numbers is copied into every matrix, from a different start in each expert; gates and
    embeddings, which decide the routing, have numbers of their own. Norms are 1, biases 0.
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
    """Fills a vector with the block, repeated, from `start`; returns where in the block the next vector begins."""
    done = 0
    while done < len(target):
        part = min(len(block) - start, len(target) - done)
        target[done : done + part] = block[start : start + part]
        done, start = done + part, (start + part) % len(block)
    return start


def random_text(lexicon: Tensor, rows: int, length: int, seed: int) -> Tensor:
    """
    (rows, length) token ids drawn from a lexicon (V,), each id equally often.

    The router inputs of a random model depend on little but the token. With the frequencies of real words, the rows
    would lie in a few dense clusters in which every row is as near as the next.
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
    A layer's rows in clusters around M router inputs of a real forward.

    Keys are noisy copies of the encoded inputs, values noisy copies of their logits, so that a neighbour's routing is
    like the gate's own. (N, d) floats are never in memory; beyond 65536 rows, values are shared between rows.

    Args:
        x: (M, d), gate inputs.
        logits: (M, E), the gate's logits for them.
        rows: N.
        config: how keys and values are stored.
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
    encoder: KeyEncoder, centres: Tensor, which: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """(N, c) codes of keys around centres (M, c); `which` (N,) is the centre of each."""
    codes, spread = torch.empty(len(which), centres.shape[1], dtype=dtype), SPREAD * centres.std(dim=0)
    for part, out in zip(which.split(_POOL), codes.split(_POOL)):
        keys = centres[part] + spread * torch.randn(len(part), centres.shape[1], generator=generator)
        out.copy_(keys if encoder.step is None else (keys / encoder.step).round_().clamp_(-127, 127))
    return codes


def first_rows(rows: LayerRows, count: int, config: KNNMoEConfig) -> LayerRows:
    """The first `count` rows, whose tensors are views of those of `rows`; distances, scale and stats are their own."""
    fewer = rows.select(slice(count)).measured(torch.zeros(count).long(), config)
    options = {name: float(getattr(config, name)) for name in ("gamma", "half_life", "num_neighbors")}
    mostly_open = dict(reference_mean=1.0, background_mean=0.0, weight=1.0, threshold=0.1, width=0.1)
    return replace(fewer, stats=CalibrationStats(**mostly_open, scale=fewer.scale, **options))


def memory_of(
    layers: dict[int, LayerRows], gates: Iterable[Gate], config: KNNMoEConfig, next_tokens: Tensor | None = None
) -> RoutingMemory:
    """A memory of these rows for the model of these gates, with the token (N,) that follows each row or without."""
    origin = Origin({name: getattr(config, name) for name in FIXED_AT_BUILD}, "synthetic", fingerprint(list(gates)))
    return RoutingMemory(config, layers, origin, stored_next_tokens=next_tokens)


def synthetic_layers(model: nn.Module, text: Tensor, rows: int, config: KNNMoEConfig) -> dict[int, LayerRows]:
    """`synthetic_rows` for each layer of a model, around its router inputs on a text."""
    inputs, layers = router_inputs(model, text), {}
    for gate in find_gates(model):
        x = inputs.pop(gate.layer)
        layers[gate.layer] = synthetic_rows(x, gate_logits(gate, x), rows, config, seed=gate.layer)
    return layers
