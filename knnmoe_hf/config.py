"""The one configuration class: how a memory is searched and mixed, and what it belongs to."""

from typing import Any

from transformers import PreTrainedConfig

from knnmoe_hf.errors import shown

VALUE_SPACES = ("assignment", "logits", "delta")
SEARCH_BACKENDS = ("auto", "torch", "ivf", "hnsw", "faiss")
CONFIDENCES = ("rbf", "context", "calibrated")
KEY_CODECS = ("raw", "pca", "logits")
KEY_DTYPES = ("float32", "bfloat16", "float16", "int8")
VALUE_DTYPES = ("float32", "float16", "int8")


CHOICES = {
    "value_space": VALUE_SPACES,
    "confidence": CONFIDENCES,
    "key_codec": KEY_CODECS,
    "key_dtype": KEY_DTYPES,
    "value_dtype": VALUE_DTYPES,
    "search_backend": SEARCH_BACKENDS,
}
"""What the options that name something may be."""


class KNNMoEConfig(PreTrainedConfig):
    r"""
    Configuration of a routing memory, and the `config.json` of its folder.

    Args:
        value_space (`str`, defaults to `"logits"`):
            What the stored values are and where they are mixed: `"assignment"` (expert weights; the paper's first
            version), `"logits"` (routing logits; its second version) or `"delta"` (what optimisation added to the
            gate's own logits). Fixed when the memory is built.
        num_neighbors (`int`, defaults to 16):
            Neighbours that each token retrieves in each layer, at least 1.
        temperature (`float`, defaults to 1.0):
            tau of the neighbour weights `softmax(-d / (tau * s))`, above 0; `s` is the layer's own distance scale.
        gamma (`float`, defaults to 0.3):
            gamma of the confidence `mean(exp(-gamma * d / s))`, at least 0. The larger, the sooner a token that is
            unlike every reference falls back to the gate's own routing.
        routing_width (`int`, `"union"` or `None`, defaults to `None`):
            Experts run per token. `None` is the model's own top-k, so compute per token is unchanged; `"union"`
            (only for `value_space="assignment"`) runs every expert that the gate or a neighbour names.
        layers (`list[int]`, *optional*):
            Decoder layers that get a memory; all MoE layers if `None`.
        confidence (`str`, defaults to `"calibrated"`):
            How far a token's neighbours are trusted: `"rbf"` (the paper: mean similarity to them), `"context"` (rbf,
            if the running mean of it over the sequence is about what it is among the references), `"calibrated"` (the
            same, by levels fitted for each layer after the build, which keep the harm on ordinary text below a bound).
        half_life (`float`, defaults to 24.0):
            Of the running mean, in tokens, above 0.
        context_threshold, context_width (`float`, default to 0.88 and 0.02):
            The running mean opens the memory around `context_threshold` times the references' own mean, within some
            `context_width` times it; the width is above 0.
        key_codec (`str`, defaults to `"pca"`):
            What is compared: `"raw"` (the gates' inputs), `"pca"` (their `key_dim` main axes) or `"logits"` (the
            gates' own logits, centred). Fitted when the memory is built.
        key_dim (`int`, defaults to 48):
            Dimensions of a `"pca"` key; no more than the hidden size are kept.
        key_whitening (`float`, defaults to 0.5):
            How far the axes of a `"pca"` key are made alike, between 0 (distances as they were) and 1 (all alike).
        key_dtype (`str`, defaults to `"int8"`):
            Storage of the keys: `"float32"`, `"bfloat16"`, `"float16"` or `"int8"` (a step for each dimension).
        value_dtype (`str`, defaults to `"int8"`):
            Storage of the values: `"float32"`, `"float16"` or `"int8"`.
        value_experts (`int` or `None`, defaults to 16):
            Experts whose value is stored in each row, the others having one number in common, where that takes fewer
            bytes than all; all if `None`.
        search_backend (`str`, defaults to `"auto"`):
            `"torch"` (exact, any device), `"ivf"` (lists of near keys, any device), `"hnsw"` (hnswlib's
            graph, on the CPU), `"faiss"` (lists of short codes, on the CPU; `pip install knnmoe_hf[faiss]`), or
            `"auto"`, which chooses by device, rows and what is installed, and logs why. All but the first are
            approximate: they found 0.98 or more of the 16 neighbours of held-out text of the lab, and find fewer
            of text that is far from the references.
        search_max_bytes (`int`, defaults to 2**26):
            Bound of the exact search's score matrix in bytes, whatever the number of tokens and rows.
        hnsw_m, hnsw_ef_construction, hnsw_ef_search (`int`, default to 16, 200 and 64):
            hnswlib's graph degree and beam widths.
        base_model_name_or_path, base_model_revision (`str`, *optional*):
            The frozen model that the memory was built for, and its commit.
        memory (`dict`, *optional*):
            What the saved memory consists of (layers, sizes, scales, fingerprints, digests); written by
            `RoutingMemory.save_pretrained`, never by hand.

    Raises:
        ValueError: for a value outside of what is allowed.
    """

    model_type = "knn_moe"

    value_space: str = "logits"
    num_neighbors: int = 16
    temperature: float | int = 1.0
    gamma: float | int = 0.3
    routing_width: int | str | None = None
    layers: list[int] | None = None
    confidence: str = "calibrated"
    half_life: float | int = 24.0
    context_threshold: float | int = 0.88
    context_width: float | int = 0.02
    key_codec: str = "pca"
    key_dim: int = 48
    key_whitening: float | int = 0.5
    key_dtype: str = "int8"
    value_dtype: str = "int8"
    value_experts: int | None = 16
    search_backend: str = "auto"
    search_max_bytes: int = 2**26
    hnsw_m: int = 16
    hnsw_ef_construction: int = 200
    hnsw_ef_search: int = 64
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    memory: dict | None = None

    def __post_init__(self, **kwargs: Any):
        unknown = sorted(set(kwargs) - _INHERITED)
        if unknown:
            raise ValueError(f"{shown(unknown[0])} is no option of KNNMoEConfig: choose among {', '.join(_OPTIONS)}.")
        super().__post_init__(**kwargs)
        self.validate_retrieval()

    def validate_retrieval(self) -> None:
        """Checks every constant, also after one was set on a loaded config.

        Raises:
            ValueError: naming the bad value, the allowed ones and, where there is one, the way out.
        """
        for name, allowed in CHOICES.items():
            self._one_of(name, allowed)
        self._check_numbers()
        self._check_routing_width()
        layers = self.layers
        if layers is not None and not (isinstance(layers, list) and _distinct_indices(layers)):
            raise ValueError(f"layers={shown(layers)} is not allowed: list each layer's index once, or None for all.")
        for name, kind in _DESCRIPTIVE.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name}={shown(value)} is not allowed: it is a {kind.__name__} or None.")

    def _check_numbers(self) -> None:
        for name, (kind, least) in _NUMBERS.items():
            value = getattr(self, name)
            right_type = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not right_type or not least <= value < _TOO_MUCH:  # which NaN is not either
                what = "an integer" if kind is int else "a finite number"
                raise ValueError(f"{name}={shown(value)} is not allowed: use {what} of at least {least}, below 2**63.")
        for name, way_out in _POSITIVE.items():
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 is not allowed: use a positive number, {way_out}.")
        if self.key_whitening > 1:
            raise ValueError(f"key_whitening={self.key_whitening} is not allowed: use a number from 0 to 1.")
        experts = self.value_experts
        if experts is not None and (not isinstance(experts, int) or isinstance(experts, bool) or experts < 1):
            raise ValueError(f"value_experts={shown(experts)} is not allowed: use a positive integer, None for all.")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"{name}={shown(value)} is not allowed: choose one of {', '.join(allowed)}.")

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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        # A loader's arguments (attn_implementation, dtype, output_attentions, ...) are meant for the base model;
        # the inherited method would keep them here, and the model would never hear of them.
        own = {name: kwargs.pop(name) for name in (*_OPTIONS, "base_model_name_or_path") if name in kwargs}
        return_unused = kwargs.pop("return_unused_kwargs", False)
        name_or_path = kwargs.pop("name_or_path", None)
        for internal in ("_from_auto", "_from_pipeline"):
            kwargs.pop(internal, None)
        config = super().from_dict({**config_dict, **own})
        if name_or_path is not None:
            config.name_or_path = name_or_path
        return (config, kwargs) if return_unused else config

    def options(self) -> dict[str, Any]:
        """The retrieval and mixing options alone, as `{name: value}`."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def saved(self) -> dict[str, Any]:
        """What `config.json` holds: what a memory needs, without the model options that every config inherits."""
        names = (*_OPTIONS, "base_model_name_or_path", "base_model_revision", "memory")
        return {"model_type": self.model_type} | {name: getattr(self, name) for name in names}


def _distinct_indices(layers: list) -> bool:
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
    return whole and 0 < len(layers) == len(set(layers))


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
_TOO_MUCH = 2**63
_POSITIVE = {
    "temperature": "a small one for the nearest alone",
    "half_life": "a small one for the token alone",
    "context_width": "a small one for a sharp threshold",
}
_DESCRIPTIVE = {"base_model_name_or_path": str, "base_model_revision": str, "memory": dict}
# what PreTrainedConfig reads or writes beyond its declared fields
_INHERITED = {"model_type", "_name_or_path", "name_or_path", "output_attentions"}
_OPTIONS = (
    "value_space",
    "num_neighbors",
    "temperature",
    "gamma",
    "confidence",
    "half_life",
    "context_threshold",
    "context_width",
    "routing_width",
    "layers",
    "key_codec",
    "key_dim",
    "key_whitening",
    "key_dtype",
    "value_dtype",
    "value_experts",
    "search_backend",
    "search_max_bytes",
    "hnsw_m",
    "hnsw_ef_construction",
    "hnsw_ef_search",
)
FIXED_AT_BUILD = (
    "value_space",
    "key_codec",
    "key_dim",
    "key_whitening",
    "key_dtype",
    "value_dtype",
    "value_experts",
)
"""Options that say what the stored rows are, so that they cannot change afterwards but by `RoutingMemory.recoded`."""
