"""Every family: its rule, its bits where a memory does nothing, a build, a folder, generation, padding, caches."""

import pickle

import pytest
import torch

from knnmoe_hf import RoutingMemory, attach_memory, detach_memory, disable_memory
from knnmoe_hf.models.gates import find_gates, gate_logits
from knnmoe_hf.models.probe import probe_model
from tests.support.attaching import attached, hooks_of
from tests.support.families import FAMILIES, family_model
from tests.support.models import random_memory
from tests.support.training import examples, trainer_for

CALM = dict(confidence="context", gamma=0.3, context_threshold=0.5)


# one of each kind of rule, of attention and of other layers: what is tested of these alone if slow tests are left out
FEW = ("olmoe", "gpt_oss", "cohere2_moe", "deepseek_v2_groups", "deepseek_v3", "ernie4_5_moe", "minimax_m2")
FEW += ("mistral4", "axk2", "longcat_flash", "qwen3_next", "lfm2_moe", "nemotron_h", "qwen3_vl_moe", "deepseek_v4")
assert set(FEW) <= set(FAMILIES)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


every_family = pytest.mark.parametrize("name", FAMILIES)
few_families = pytest.mark.parametrize("name", [name if name in FEW else slow(name) for name in FAMILIES])


def ids_of(*shape, seed=5):
    return torch.randint(1, 90, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def gate_outputs(model, ids) -> dict[int, tuple]:
    """By layer, what each gate got and returned."""
    seen, handles = {}, []
    for gate in find_gates(model):
        handles.append(gate.module.register_forward_hook(lambda _, a, o, i=gate.layer: seen.update({i: (a[0], o)})))
    logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def loaded_in(dtype, model, folder):
    """The model as `from_pretrained` loads it in another precision, in which it keeps some tensors in float32."""
    if dtype == torch.float32:
        return model
    model.save_pretrained(folder / "model")
    return type(model).from_pretrained(folder / "model", dtype=dtype).eval()


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float16)], ids=str)
def test_the_rule_gives_the_gates_own_weights_and_experts_to_the_bit(name, dtype, tmp_path):
    if name == "deepseek_v4" and dtype == torch.float16:
        pytest.skip("the model itself does not run in float16")
    model = loaded_in(dtype, family_model(name), tmp_path)
    outputs, routers = gate_outputs(model, ids_of(2, 40)), probe_model(model).routers
    for gate in find_gates(model):
        x, (logits, weights, ids) = outputs[gate.layer]
        rule = pickle.loads(pickle.dumps(routers[gate.layer].rule))
        own_weights, own_ids = rule.routed(logits, gate.top_k, weights.dtype)
        assert torch.equal(own_weights, weights) and torch.equal(own_ids, ids)
        assert logits.shape[-1] == gate.num_experts and x.shape[-1] == gate.hidden_size
        loss = torch.finfo(dtype).eps * 20 * logits.abs().max().item()
        torch.testing.assert_close(gate_logits(gate, x.flatten(0, -2)), logits.float(), rtol=0, atol=loss)


@every_family
def test_a_memory_that_is_off_or_far_away_changes_no_bit(name):
    model, ids = family_model(name), ids_of(2, 12)
    memory = random_memory(model)
    base = logits_of(model, ids)
    attach_memory(model, memory)
    assert not torch.equal(logits_of(model, ids), base)
    with disable_memory(model):
        assert torch.equal(logits_of(model, ids), base)
    detach_memory(model)
    memory.config.gamma = 1e18
    for width in (None, find_gates(model)[0].max_width):
        memory.config.routing_width = width
        with attached(model, memory):
            assert torch.equal(logits_of(model, ids), base)
    assert torch.equal(logits_of(model, ids), base) and not hooks_of(model)


@every_family
def test_a_memory_can_be_attached_and_turned_off_under_autocast(name):
    """Some gates compute in half precision there, and the probe demands their weights to the bit."""
    model, ids = family_model(name), ids_of(2, 8)
    memory = random_memory(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = logits_of(model, ids)
        with attached(model, memory):
            assert not torch.equal(logits_of(model, ids), base)
            with disable_memory(model):
                assert torch.equal(logits_of(model, ids), base)


OTHER_OPTIONS = [  # that change a rule, or which layers have gates
    ("olmoe", dict(norm_topk_prob=True)),
    ("olmoe", dict(num_experts_per_tok=1)),
    ("qwen3_moe", dict(norm_topk_prob=True, num_experts_per_tok=1)),
    ("qwen3_moe", dict(norm_topk_prob=False, num_experts_per_tok=8)),
    ("qwen3_moe", dict(decoder_sparse_step=2)),
    ("qwen3_next", dict(mlp_only_layers=[0], norm_topk_prob=False)),
    ("gpt_oss", dict(num_experts_per_tok=8)),
    ("deepseek_v2", dict(first_k_dense_replace=0, n_shared_experts=0, routed_scaling_factor=0.5)),
    ("deepseek_v2_groups", dict(n_group=8, topk_group=3, num_experts_per_tok=1)),  # each expert a group of its own
    ("deepseek_v2_groups", dict(n_group=8, topk_group=8)),
    ("deepseek_v2_groups", dict(n_group=1, topk_group=1)),
    ("deepseek_v2_groups", dict(n_group=4, topk_group=1, num_experts_per_tok=4)),  # more than the groups leave
    ("deepseek_v3", dict(n_group=1, topk_group=1)),
    ("deepseek_v3", dict(n_group=4, topk_group=4, norm_topk_prob=False)),
    ("deepseek_v3", dict(n_group=4, topk_group=1, num_experts_per_tok=3)),
    ("deepseek_v3", dict(routed_scaling_factor=0.5, first_k_dense_replace=2, num_nextn_predict_layers=2)),
    ("axk2", dict(n_group=None, topk_group=None, num_experts_per_tok=3)),
    ("axk2", dict(n_group=4, topk_group=1, num_experts_per_tok=3)),
    ("mistral4", dict(n_group=2, topk_group=1, norm_topk_prob=False)),
    ("lfm2_moe", dict(use_expert_bias=False, norm_topk_prob=False)),
    ("lfm2_moe", dict(num_dense_layers=0)),
    ("ernie4_5_moe", dict(moe_norm_min=0.9, moe_layer_start_index=0, moe_layer_interval=2)),
    ("cohere2_moe", dict(expert_selection_fn="softmax")),
    ("cohere2_moe", dict(expert_selection_fn="sigmoid", norm_topk_prob=False)),
    ("kimi_linear", dict(moe_renormalize=False, num_experts_per_token=1)),
    ("laguna", dict(moe_router_logit_softcapping=0.0)),
    ("longcat_flash", dict(zero_expert_num=0, moe_topk=3)),
    ("deepseek_v4", dict(scoring_func="sigmoid")),
    ("nemotron_h", dict(moe_latent_size=8)),
    ("minimax_m2", dict(tie_word_embeddings=True, num_experts_per_tok=7)),
]


@pytest.mark.parametrize("name, options", OTHER_OPTIONS)
def test_other_configurations_of_a_family_are_as_exact(name, options):
    model, ids = family_model(name, **options), ids_of(2, 8)
    memory = random_memory(model, num_neighbors=2)
    base = logits_of(model, ids)
    with attached(model, memory):  # its probe demands the gate's own weights and experts to the bit
        assert not torch.equal(logits_of(model, ids), base)
        with disable_memory(model):
            assert torch.equal(logits_of(model, ids), base)
    memory.config.gamma = 1e18
    for width in (None, find_gates(model)[0].max_width):
        memory.config.routing_width = width
        with attached(model, memory):
            assert torch.equal(logits_of(model, ids), base)


def built(model, folder, **options):
    trainer = trainer_for(
        model, folder, examples(3), {"num_neighbors": 2} | options, {"ordinary_dataset": examples(4, seed=9)}
    )
    return trainer, trainer.train().metrics


@few_families
def test_a_build_helps_is_saved_opened_and_generates_the_same(name, tmp_path):
    model = family_model(name)
    trainer, metrics = built(model, tmp_path)
    assert metrics["nll_after"] < metrics["nll_before"] - 0.01
    assert metrics["experts_changed"] > 0
    trainer.save_model()
    ids = ids_of(2, 6)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    logits = logits_of(model, ids)
    detach_memory(model)
    opened = RoutingMemory.from_pretrained(tmp_path / "out")
    with attached(model, opened):
        assert torch.equal(logits_of(model, ids), logits)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), generated)
    half = loaded_in(torch.bfloat16, model, tmp_path)
    with attached(half, opened):  # the fingerprint recognises the same weights in another precision
        assert logits_of(half, ids).isfinite().all()
    in_half = random_memory(half)
    with attached(model, in_half):
        assert logits_of(model, ids).isfinite().all()


def logits_of_steps(model, ids, prompt=5):
    """As `logits_of`, of a prompt and then token by token with a cache."""
    with torch.no_grad():
        output = model(input_ids=ids[:, :prompt], use_cache=True)
        steps = [output.logits]
        for place in range(prompt, ids.shape[1]):
            one, cache = ids[:, place : place + 1], output.past_key_values
            output = model(input_ids=one, past_key_values=cache, use_cache=True)
            steps.append(output.logits)
    return torch.cat(steps, 1)


@few_families
@pytest.mark.parametrize("confidence", ["context", "calibrated"])
def test_tokens_are_routed_alike_in_any_padding_and_with_a_cache(name, confidence, tmp_path):
    model, ids = family_model(name), ids_of(1, 9)
    base = logits_of(model, ids)
    noise = (logits_of_steps(model, ids) - base).abs().max().item()  # that of the model itself
    if confidence == "calibrated":
        built(model, tmp_path, confidence="calibrated")
    else:
        attach_memory(model, random_memory(model, **CALM))
    alone = logits_of(model, ids)
    assert not torch.equal(alone, base)
    padding = torch.zeros(1, 4, dtype=torch.long)
    for parts in ([padding, ids], [ids, padding]):
        mask = torch.cat([torch.full_like(part, part is ids) for part in parts], 1)
        both = torch.cat([torch.cat(parts, 1), ids_of(1, 13, seed=6)])
        found = logits_of(model, both, attention_mask=torch.cat([mask, torch.ones_like(mask)]))
        torch.testing.assert_close(found[0][mask[0].bool()], alone[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(logits_of_steps(model, ids), alone, rtol=0, atol=2e-4 + 3 * noise)


@pytest.mark.parametrize("builder", ["candidates", "search"])
@pytest.mark.parametrize("name", ["deepseek_v2_groups", "deepseek_v3", "mistral4", "axk2"])
def test_a_build_gives_no_token_an_expert_that_its_groups_close(name, builder, tmp_path):
    model = family_model(name, num_experts_per_tok=3)  # twice as many would be more than the groups leave
    gates = {gate.layer: gate for gate in find_gates(model)}
    assert all(gate.max_width == 4 < gate.num_experts for gate in gates.values())
    widths, wrong = set(), []

    def check(gate, args, output):
        logits, weights, ids = output
        widths.add(ids.shape[1])
        groups = gate.rule.groups
        per_group = (
            torch.zeros(len(ids), gate.num_experts).scatter(1, ids, weights.float()).view(len(ids), -1, groups.size)
        )
        wrong.append(bool(((per_group != 0).any(-1).sum(-1) > groups.open).any()))

    handles = [
        gate.module.register_forward_hook(lambda _, a, o, gate=gate: check(gate, a, o)) for gate in gates.values()
    ]
    trainer = trainer_for(
        model, tmp_path, examples(3), trainer={"ordinary_dataset": examples(4, seed=9)}, builder=builder
    )
    trainer.train()
    assert not any(wrong)
    assert widths == ({3, 4} if builder == "candidates" else {3})
    for handle in handles:
        handle.remove()
    with pytest.raises(ValueError, match="num_candidates=5 is not allowed: .* at most the 4 experts among which"):
        trainer_for(model, tmp_path, examples(3), num_candidates=5)
    with pytest.raises(ValueError, match="routing_width=5 is not allowed: 4 experts"):
        trainer_for(model, tmp_path, examples(3), {"routing_width": 5})
    detach_memory(model)
    memory = random_memory(model)
    memory.config.routing_width = 5
    with pytest.raises(ValueError, match="routing_width=5 is not allowed: in layer"):
        attach_memory(model, memory)
    memory = random_memory(model, value_space="assignment", routing_width="union", num_neighbors=3)
    with attached(model, memory):  # the weights of neighbours may lie in any groups
        assert logits_of(model, ids_of(1, 8)).isfinite().all()


@few_families
@pytest.mark.parametrize("space", ["assignment", "logits", "delta"])
def test_a_wider_memory_runs_in_every_implementation_of_the_experts(name, space):
    """Slots beyond the gate's own, with the mass of the rule's own weights, alike in all kernels."""
    model, ids = family_model(name), ids_of(2, 6)
    width = "union" if space == "assignment" else find_gates(model)[0].max_width
    attach_memory(model, random_memory(model, value_space=space, routing_width=width, num_neighbors=2, **CALM))
    found = {}
    for experts in ("eager", "batched_mm", "grouped_mm"):
        if name == "longcat_flash" and experts != "eager":
            continue  # its experts that do nothing run in eager mode alone
        if name != "step3p7":  # which has one implementation
            model.set_experts_implementation(experts)
        found[experts] = logits_of(model, ids)
    for logits in found.values():
        torch.testing.assert_close(logits, found["eager"], rtol=0, atol=2e-4)


@few_families
def test_router_logits_and_the_auxiliary_loss_are_those_of_the_routing_that_is_used(name):
    model, ids = family_model(name), ids_of(2, 6)
    attach_memory(model, random_memory(model, routing_width=find_gates(model)[0].max_width))
    plain = logits_of(model, ids)
    seen = gate_outputs(model, ids)
    try:
        with torch.no_grad(), disable_memory(model):
            model(input_ids=ids, labels=ids, output_router_logits=True).router_logits[0]
    except (AttributeError, TypeError, IndexError):
        pytest.skip("the model itself returns no router logits")
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert torch.equal(output.logits, plain) and output.loss.isfinite()
    for recorded, (_, (logits, _, _)) in zip(output.router_logits, seen.values(), strict=True):
        assert torch.equal(recorded.view_as(logits), logits)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["logits", "assignment"])
@pytest.mark.parametrize(
    "name",
    [slow("mixtral"), slow("deepseek_v2_groups"), "deepseek_v3", slow("minimax_m2"), slow("ernie4_5_moe"), "lfm2_moe"],
)
def test_one_model_of_each_kind_of_rule_compiles_into_one_graph(name, space):
    model, ids = family_model(name), ids_of(2, 8)
    model.set_experts_implementation("batched_mm")
    attach_memory(model, random_memory(model, value_space=space, **CALM))
    eager = logits_of(model, ids, use_cache=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, ids, use_cache=False), eager, rtol=0, atol=1e-4)
