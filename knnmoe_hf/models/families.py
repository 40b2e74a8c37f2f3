"""The supported model families; `knnmoe_hf.models.refused` lists those that are refused.

To add a family, add a row to `FAMILIES`: its router class, what `knnmoe_hf.lookup.rules.RoutingRule` says of its way
from logits to experts, and where its weight and its correction bias are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knnmoe_hf.lookup.rules import ExpertGroups, RoutingRule, softmax_topk, softmax_topk_renormalized, topk_softmax
from knnmoe_hf.models.offload import whole


@dataclass(frozen=True)
class Family:
    """
    One row of the table of supported families.

    Attributes:
        name: for error messages.
        router_class: name of the router's class in transformers.
        rule: its rule, all but the correction bias; from a router to its rule where that depends on the model.
        weight: path of the weight (E, d) in the router.
        bias: path of the correction bias in the router; None if there is none.
        bias_of_caller: whether that path is in the module that calls the router, and hands it the bias.
        adjusted: from a router and `x W^T + b` to its logits, where these are not the same.
    """

    name: str
    router_class: str
    rule: RoutingRule | Callable[[nn.Module], RoutingRule]
    weight: str = "weight"
    bias: str | None = None
    bias_of_caller: bool = False
    adjusted: Callable[[nn.Module, Tensor], Tensor] | None = None

    def rule_of(self, router: nn.Module, caller: nn.Module) -> RoutingRule:
        """
        The rule of a router as its tensors are now.

        Args:
            router: of this family.
            caller: the module that calls it.

        Raises:
            AttributeError: if one of them lacks what the row names.
        """
        rule = self.rule if isinstance(self.rule, RoutingRule) else self.rule(router)
        if self.bias is None or (self.bias_of_caller and not getattr(router, "use_expert_bias", True)):
            return rule
        bias = attrgetter(self.bias)(caller if self.bias_of_caller else router)
        # a copy: FSDP frees a parameter that it gathered as soon as the gate has run
        return replace(rule, bias=whole(bias.detach()).flatten().clone())

    def weight_of(self, router: nn.Module) -> Tensor:
        """The weight of a router's logits."""
        return attrgetter(self.weight)(router)

    def sizes(self, router: nn.Module) -> tuple[int, int]:
        """E and d of a router."""
        holder = attrgetter(self.weight.rpartition(".")[0])(router) if "." in self.weight else router
        if isinstance(holder, nn.Linear):  # the weight of a quantised one may have another shape
            return holder.out_features, holder.in_features
        return tuple(self.weight_of(router).shape)

    def logits(self, router: nn.Module, x: Tensor) -> Tensor:
        """The router's logits (N, E) float32 for inputs x (N, d) float32, on the device of x."""
        bias = getattr(router, "bias", None)
        tensors = [self.weight_of(router), *([] if bias is None else [bias])]
        logits = F.linear(x, *(whole(tensor.detach()).to(x.device, torch.float32) for tensor in tensors))
        return logits if self.adjusted is None else self.adjusted(router, logits)


def _by_norm_topk_prob(router: nn.Module) -> RoutingRule:
    return softmax_topk_renormalized if router.norm_topk_prob else softmax_topk


def _deepseek_v2(router: nn.Module) -> RoutingRule:
    limited = router.topk_method == "group_limited_greedy"
    groups = _groups(router, judged_by=1, closed_score=0.0, closes_weights=True) if limited else None
    return RoutingRule(in_order=False, factor=router.routed_scaling_factor, groups=groups)


def _mistral4(router: nn.Module, renormalized: bool | None = None) -> RoutingRule:
    return RoutingRule(
        float32=False,
        in_order=False,
        renormalized=router.norm_topk_prob if renormalized is None else renormalized,
        added_to_sum=1e-20,
        factor=router.routed_scaling_factor,
        groups=_groups(router, closed_score=0.0),
    )


def _deepseek_v3(
    router: nn.Module, in_order: bool = False, scaled: bool = True, closed_score: float = float("-inf")
) -> RoutingRule:
    return RoutingRule(
        "sigmoid",
        float32=False,
        in_order=in_order,
        renormalized=router.norm_topk_prob,
        added_to_sum=1e-20,
        factor=router.routed_scaling_factor if scaled else 1.0,
        groups=_groups(router, closed_score=closed_score),
    )


def _cohere2(router: nn.Module) -> RoutingRule:
    if router.expert_selection_fn == "softmax":
        return RoutingRule(of_chosen=True)
    return RoutingRule("sigmoid", of_chosen=True, float32=False, renormalized=router.norm_topk_prob)


def _groups(router: nn.Module, **how) -> ExpertGroups | None:
    """None where every group is open."""
    if router.num_group is None or router.topk_group >= router.num_group:
        return None
    return ExpertGroups(router.num_experts // router.num_group, router.topk_group, **how)


def _lfm2(router: nn.Module) -> RoutingRule:
    return RoutingRule(
        "sigmoid",
        float32=False,
        renormalized=router.norm_topk_prob,
        added_to_sum=1e-6,
        factor=router.routed_scaling_factor,
    )


def _scaled_sigmoid(router: nn.Module, factor: str, float32: bool = True, in_order: bool = False) -> RoutingRule:
    factor = getattr(router, factor)
    return replace(_SIGMOID_RENORMALIZED, factor=factor, added_to_sum=1e-20, float32=float32, in_order=in_order)


def _ernie(router: nn.Module) -> RoutingRule:
    return RoutingRule(renormalized=True, least_sum=router.norm_min)


def _longcat(router: nn.Module) -> RoutingRule:
    return RoutingRule(float32=False, in_order=False, factor=router.routed_scaling_factor)


def _flint(router: nn.Module) -> RoutingRule:
    return RoutingRule("sigmoid", renormalized=router.norm_topk_prob)


def _kolibri(router: nn.Module) -> RoutingRule:
    return RoutingRule("sigmoid", of_chosen=True, renormalized=router.norm_topk_prob)


def _soft_capped(router: nn.Module, logits: Tensor) -> Tensor:
    cap = router.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0 else logits


def _deepseek_v4(router: nn.Module) -> RoutingRule:
    names = {"Sigmoid": "sigmoid", "SqrtSoftplusActivation": "sqrtsoftplus"}
    return RoutingRule(
        names.get(type(router.score_fn).__name__, type(router.score_fn).__name__),
        float32=False,
        in_order=False,
        renormalized=True,
        added_to_sum=1e-20,
        factor=router.routed_scaling_factor,
    )


def _muse_spark(router: nn.Module) -> RoutingRule:
    return RoutingRule(
        "sigmoid",
        float32=False,
        in_order=False,
        renormalized=True,
        added_to_sum=router.norm_topk_prob_eps,
        factor=router.routed_scaling_factor,
    )


def _multiplied(router: nn.Module, logits: Tensor) -> Tensor:
    return logits * router.output_multiplier


_TOPK_SOFTMAX_FLOAT32 = RoutingRule(of_chosen=True)
_SIGMOID_RENORMALIZED = RoutingRule("sigmoid", in_order=False, renormalized=True)
_BIAS = "e_score_correction_bias"
_V3 = dict(rule=_deepseek_v3, bias=_BIAS)

FAMILIES = (
    Family("OLMoE", "OlmoeTopKRouter", _by_norm_topk_prob),
    Family("Qwen3-MoE", "Qwen3MoeTopKRouter", _by_norm_topk_prob),
    Family("GPT-OSS", "GptOssTopKRouter", topk_softmax),
    Family("Qwen2-MoE", "Qwen2MoeTopKRouter", _by_norm_topk_prob),
    Family("Qwen3-Next", "Qwen3NextTopKRouter", _by_norm_topk_prob),
    Family("FlexOLMo", "FlexOlmoTopKRouter", _by_norm_topk_prob),
    Family("Mellum", "MellumTopKRouter", _by_norm_topk_prob),
    Family("Qwen3.5-MoE", "Qwen3_5MoeTopKRouter", softmax_topk_renormalized),
    Family("Qwen3-VL-MoE", "Qwen3VLMoeTextTopKRouter", softmax_topk_renormalized),
    Family("HunYuan-V1", "HunYuanMoEV1Gate", softmax_topk_renormalized, weight="wg.weight"),
    Family("Jamba", "JambaTopKRouter", softmax_topk),
    Family("Mixtral", "MixtralTopKRouter", softmax_topk_renormalized),
    Family("MiniMax", "MiniMaxTopKRouter", softmax_topk_renormalized),
    Family("Aria", "AriaTextTopKRouter", topk_softmax),
    Family("Granite-MoE", "GraniteMoeTopKRouter", _TOPK_SOFTMAX_FLOAT32),
    Family("Granite-MoE-Shared", "GraniteMoeSharedTopKRouter", _TOPK_SOFTMAX_FLOAT32),
    Family("Granite-MoE-Hybrid", "GraniteMoeHybridTopKRouter", _TOPK_SOFTMAX_FLOAT32),
    Family("Granite-MoE-SWA", "GraniteMoeSWATopKRouter", _TOPK_SOFTMAX_FLOAT32),
    Family("Cohere2-MoE", "Cohere2MoeTopKRouter", _cohere2),
    Family("DeepSeek-V2", "DeepseekV2TopkRouter", _deepseek_v2),
    Family("DeepSeek-V3", "DeepseekV3TopkRouter", **_V3),
    Family("DeepSeek-V3.2", "DeepseekV32TopkRouter", **_V3),
    Family("GLM4-MoE", "Glm4MoeTopkRouter", **_V3),
    Family("GLM4-MoE-Lite", "Glm4MoeLiteTopkRouter", **_V3),
    Family("dots1", "Dots1TopkRouter", **_V3),
    Family("Solar-Open", "SolarOpenTopkRouter", **_V3),
    Family("EXAONE-MoE", "ExaoneMoeTopkRouter", **_V3),
    Family("Kimi-Linear", "KimiLinearTopkRouter", **_V3),
    Family("Nemotron-H", "NemotronHTopkRouter", **_V3),
    Family("MiMo-V2-Flash", "MiMoV2FlashTopkRouter", **_V3),
    Family("MiniMax-M2", "MiniMaxM2TopKRouter", _SIGMOID_RENORMALIZED, bias=_BIAS, bias_of_caller=True),
    Family("LFM2-MoE", "Lfm2MoeTopKRouter", _lfm2, bias="expert_bias", bias_of_caller=True),
    Family("ERNIE-4.5-MoE", "Ernie4_5_MoeTopKRouter", _ernie, bias="moe_statics.e_score_correction_bias"),
    Family("Qwen4-Exp", "Qwen4ExpTextTopKRouter", _by_norm_topk_prob),
    Family("Mistral4", "Mistral4TopkRouter", _mistral4),
    Family("Mistral-Large4", "MistralLarge4TextTopkRouter", partial(_mistral4, renormalized=True)),
    Family("DeepSeek-OCR2", "DeepseekOcr2TextTopkRouter", _deepseek_v2),
    Family("Unlimited-OCR", "UnlimitedOcrTextTopkRouter", _deepseek_v2),
    Family("GLM-DSA", "GlmMoeDsaTopkRouter", **_V3),
    Family("GLM4V-MoE", "Glm4vMoeTextTopkRouter", **_V3),
    Family("GLM5-Next", "Glm5NextTextTopkRouter", **_V3),
    Family("Dots3-Note", "Dots3NoteTextTopkRouter", **_V3),
    Family("Bailing-Hybrid", "BailingHybridTopkRouter", **_V3),
    Family("HY-V4", "HYV4TopkRouter", **_V3),
    Family("AXK1", "AXK1TopkRouter", **_V3),
    Family("AXK2", "AXK2TopkRouter", partial(_deepseek_v3, closed_score=0.0), bias=_BIAS),
    Family("Beam", "BeamTopKRouter", partial(_deepseek_v3, in_order=True, scaled=False), bias=_BIAS),
    Family(
        "HY-V3",
        "HYV3TopKRouter",
        partial(_scaled_sigmoid, factor="router_scaling_factor", float32=False),
        bias=_BIAS,
        bias_of_caller=True,
    ),
    Family(
        "AFMoE",
        "AfmoeTokenChoiceRouter",
        partial(_scaled_sigmoid, factor="route_scale", in_order=True),
        weight="gate.weight",
        bias="expert_bias",
        bias_of_caller=True,
    ),
    Family("MiniMax-M3-VL", "MiniMaxM3VLTopKRouter", _SIGMOID_RENORMALIZED, bias=_BIAS),
    Family("Step3.7", "Step3p7TopKRouter", _SIGMOID_RENORMALIZED, bias=_BIAS),
    Family("Muse-Spark", "MuseSparkTopkRouter", _muse_spark, bias=_BIAS, adjusted=_multiplied),
    Family("Inkling2", "Inkling2TopKRouter", _deepseek_v4, bias=_BIAS),
    Family(
        "Laguna",
        "LagunaTopKRouter",
        RoutingRule("sigmoid", renormalized=True),
        bias=_BIAS,
        adjusted=_soft_capped,
    ),
    Family("DeepSeek-V4", "DeepseekV4TopKRouter", _deepseek_v4, bias=_BIAS),
    Family("Kolibri1", "Kolibri1TopKRouter", _kolibri, bias=_BIAS),
    Family("Flint", "FlintTopKRouter", _flint),
    Family("LongCat-Flash", "LongcatFlashTopkRouter", _longcat, weight="classifier.weight", bias=_BIAS),
)
