"""
How a memory is searched and mixed, as one frozen value: the choices, their defaults, and their validation.

This module imports no other library, so that the command line can show its options and refuse bad ones at once.
"""

from dataclasses import dataclass, fields

from knnmoe_hf.errors import shown
from knnmoe_hf.search.options import SEARCH_BACKENDS, SearchOptions, option

VALUE_SPACES = ("assignment", "logits", "delta")
CONFIDENCES = ("rbf", "context", "calibrated")
RECALLS = ("routing", "next_tokens", "both")
KEY_CODECS = ("raw", "pca", "logits")
KEY_DTYPES = ("float32", "bfloat16", "float16", "int8")
VALUE_DTYPES = ("float32", "float16", "int8")

CHOICES = {
    "value_space": VALUE_SPACES,
    "confidence": CONFIDENCES,
    "recall": RECALLS,
    "key_codec": KEY_CODECS,
    "key_dtype": KEY_DTYPES,
    "value_dtype": VALUE_DTYPES,
    "search_backend": SEARCH_BACKENDS,
}
"""The allowed values of each option that names something."""

FIXED_AT_BUILD = (
    "value_space",
    "key_codec",
    "key_dim",
    "key_whitening",
    "key_dtype",
    "value_dtype",
    "value_experts",
)
"""
Options that describe the stored rows. After the build only `RoutingMemory.recoded` changes them, and nothing changes
`value_space`.
"""


@dataclass(frozen=True)
class RetrievalOptions(SearchOptions):
    """
    A snapshot of the options of one memory; `KNNMoEConfig` documents each of them.

    Raises:
        ValueError: naming the bad value, the allowed ones and, where there is one, the way out.
    """

    value_space: str = option(
        "logits",
        "What the values are: expert weights, routing logits, or what was added to logits.",
    )
    temperature: float | int = option(
        1.0, "Softmax temperature of the neighbours' weights, in units of a layer's distance scale."
    )
    gamma: float | int = option(0.3, "How fast the confidence falls with the distance; 0 trusts every neighbour.")
    routing_width: int | str | None = option(None, "Experts run for each token; the model's own top-k by default.")
    layers: list[int] | None = option(None, "Decoder layers that get a memory; all MoE layers by default.")
    confidence: str = option(
        "calibrated", "How far a token's neighbours are trusted; calibrated is fitted after a build."
    )
    half_life: float | int = option(24.0, "Half-life of the running mean of similarity, in tokens.")
    context_threshold: float | int = option(
        0.88, "Running mean at which the memory opens with confidence context, relative to the references'."
    )
    context_width: float | int = option(0.02, "Width of that threshold, in the same unit.")
    recall: str = option("routing", "What the memory changes: the routing, the next tokens' probabilities, or both.")
    next_token_weight: float | int | None = option(
        None,
        "Share of recalled tokens in the next token's probabilities, where the memory is open; fitted by default.",
    )
    next_token_temperature: float | int | None = option(
        None, "As temperature, for the neighbours' votes on the next token; fitted by default."
    )
    next_token_neighbors: int | None = option(
        None, "Neighbours in the last layer that vote on the next token; the library's choice by default."
    )
    key_codec: str = option(
        "pca", "What distances are computed from: gate inputs, their principal components, or the gate's logits."
    )
    key_dim: int = option(48, "Dimensions of a key with key codec pca.")
    key_whitening: float | int = option(0.5, "Exponent of the whitening of a pca key, from 0 to 1.")
    key_dtype: str = option("int8", "How keys are stored.")
    value_dtype: str = option("int8", "How values are stored.")
    value_experts: int | None = option(
        16, "Experts whose value is stored in each row; the others share one common value."
    )

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={shown(value)} is not allowed: choose one of {', '.join(allowed)}.")
        self._check_numbers()
        self._check_next_tokens()
        self._check_routing_width()
        layers = self.layers
        if layers is not None and not (isinstance(layers, list) and _distinct_indices(layers)):
            raise ValueError(f"layers={shown(layers)} is not allowed: list each layer's index once, or None for all.")

    def _check_numbers(self) -> None:
        for name, (kind, least) in _NUMBERS.items():
            value = getattr(self, name)
            right_type = isinstance(value, (int, kind)) and not isinstance(value, bool)
            below = _BELOW.get(name, _TOO_LARGE)
            if not right_type or not least <= value < below:  # NaN fails this comparison too
                what, most = "an integer" if kind is int else "a finite number", below.bit_length() - 1
                raise ValueError(
                    f"{name}={shown(value)} is not allowed: use {what} of at least {least}, below 2**{most}."
                )
        for name, way_out in _POSITIVE.items():
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 is not allowed: use a positive number, {way_out}.")
        if self.key_whitening > 1:
            raise ValueError(f"key_whitening={self.key_whitening} is not allowed: use a number from 0 to 1.")
        experts = self.value_experts
        if experts is not None and (not isinstance(experts, int) or isinstance(experts, bool) or experts < 1):
            raise ValueError(f"value_experts={shown(experts)} is not allowed: use a positive integer, None for all.")

    def _check_next_tokens(self) -> None:
        allowed = {
            "next_token_weight": (float, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
            "next_token_temperature": (float, lambda value: 0 < value < _TOO_LARGE, "a positive number below 2**63"),
            "next_token_neighbors": (
                int,
                lambda value: 1 <= value < _TOO_LARGE,
                "an integer of at least 1, below 2**63",
            ),
        }
        for name, (kind, fits, what) in allowed.items():
            value = getattr(self, name)
            right_type = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if value is not None and not (right_type and fits(value)):
                raise ValueError(f"{name}={shown(value)} is not allowed: use {what}, or None for the default.")

    def _check_routing_width(self) -> None:
        width = self.routing_width
        if width == "union" and self.value_space != "assignment":
            raise ValueError(
                f"routing_width='union' is not allowed with value_space={self.value_space!r}: logits have no union of "
                "experts, so use an integer, None for the model's own top-k, or value_space='assignment'."
            )
        if width is None or width == "union":
            return
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(
                f"routing_width={shown(width)} is not allowed: use a positive integer, 'union', or None for the "
                "model's own top-k."
            )


OPTION_NAMES = tuple(field.name for field in fields(RetrievalOptions))
_NUMBERS = {  # type, least value
    "num_neighbors": (int, 1),
    "temperature": (float, 0),
    "gamma": (float, 0),
    "half_life": (float, 0),
    "context_threshold": (float, 0),
    "context_width": (float, 0),
    "key_dim": (int, 1),
    "key_whitening": (float, 0),
    "search_max_bytes": (int, 2**16),
    "hnsw_m": (int, 2),
    "hnsw_ef_construction": (int, 1),
    "hnsw_ef_search": (int, 1),
}
_TOO_LARGE = 2**63
_BELOW = {  # with more a graph takes many times the memory, or the time, of an exact search
    "hnsw_m": 2**9,
    "hnsw_ef_construction": 2**16,
    "hnsw_ef_search": 2**16,
}
_POSITIVE = {
    "temperature": "a small one for the nearest alone",
    "half_life": "a small one for the token alone",
    "context_width": "a small one for a sharp threshold",
}


def _distinct_indices(layers: list) -> bool:
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
    return whole and 0 < len(layers) == len(set(layers))
