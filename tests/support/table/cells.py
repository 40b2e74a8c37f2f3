"""The table: each family's state in each way of running a model, and the reasons of those that do not work.

A way that does not work is one in which transformers or PEFT cannot run the family's models even without a memory; its
test is a strict xfail that shows just this.
"""

from tests.support.families import FAMILIES
from tests.support.table.ways import IN_PROCESSES, WAYS

MAIN = ("olmoe", "qwen3_moe", "gpt_oss")
"""The families that must work in every way."""

REGULAR = FAMILIES[: FAMILIES.index("solar_open") + 1]
"""The families whose cells are among the slow tests; those of the others run with `make support-table` alone."""

COMPILED = (
    *MAIN,
    *("mixtral", "granitemoe", "deepseek_v2_groups", "deepseek_v3", "minimax_m2", "ernie4_5_moe", "qwen3_next"),
)
"""The families that are compiled with the slow tests: one of each kind of rule, and a hybrid one."""

_STATEFUL = (
    *("qwen3_next", "qwen3_5_moe", "granitemoehybrid", "jamba", "nemotron_h", "kimi_linear"),
    *("bailing_hybrid", "glm5_next", "qwen4_exp"),
)
_CARRIED_ON = (*_STATEFUL, "lfm2_moe", "minimax", "inkling2")
_UNEQUAL_HEADS = (
    *("deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "glm4_moe_lite", "mimo_v2_flash", "axk1", "mistral4"),
    *("longcat_flash",),
)
_BRANCHING = ("step3p7", "qwen4_exp", "longcat_flash")

REASONS = [  # reason, ways, families
    (
        "transformers has no grouped_mm for these models' experts",
        ("grouped_mm experts",),
        ("longcat_flash", "step3p7"),
    ),
    (
        "transformers carries linear attention, state spaces and convolutions on into the next sequence of a row",
        ("packed rows",),
        _CARRIED_ON,
    ),
    ("transformers takes rotations of images and text for positions here", ("packed rows",), ("glm4v_moe",)),
    (
        "transformers' paged cache knows full and sliding attention alone",
        ("continuous batching",),
        (
            *_CARRIED_ON,
            *("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note"),
            *("mistral_large4", "unlimited_ocr", "deepseek_v4"),
        ),
    ),
    (
        "transformers' paged cache gives keys and values the same width, which they do not have here",
        ("continuous batching",),
        _UNEQUAL_HEADS,
    ),
    (
        "transformers cannot take back tokens that a state has taken in",
        ("assisted generation", "prompt lookup"),
        (*_STATEFUL, "minimax", "deepseek_v4"),
    ),
    (
        "transformers' plan of tensor parallelism does not fit the weights of the vision tower",
        ("tensor parallel",),
        ("qwen3_vl_moe",),
    ),
    (
        "transformers' plan of tensor parallelism does not fit this model: it fails, or computes something else",
        ("tensor parallel",),
        ("muse_spark", "step3p7", "glm5_next"),
    ),
    (
        "accelerate's hooks and this model's attention do not agree: it computes something else when it is offloaded",
        ("device_map", "offloaded, then memory", "memory, then offloaded"),
        ("longcat_flash",),
    ),
    ("transformers does not reorder the state of lightning attention", ("beams",), ("minimax",)),
    (
        "transformers' scan does not go on from a state when several tokens come at once",
        ("dynamic cache",),
        ("jamba",),
    ),
    ("transformers' static cache differs from its dynamic one here", ("static cache",), ("inkling2",)),
    ("transformers has no static cache for compressed attention", ("static cache",), ("deepseek_v4",)),
    ("transformers branches on values of tensors here, which no single graph can do", ("torch.compile",), _BRANCHING),
    ("transformers computes parts of this model in float32 alone", ("float16",), ("deepseek_v4",)),
]


def reason(family: str, way: str) -> str | None:
    """Why a family's models cannot be run this way without a memory either; None if they can."""
    found = [text for text, ways, families in REASONS if way in ways and family in families]
    return found[0] if found else None


CELLS = {(family, way): reason(family, way) for family in FAMILIES for way in (*WAYS, *IN_PROCESSES)}
"""`{(family, way): None, or the reason why it does not work}`."""
