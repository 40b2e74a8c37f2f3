"""The one configuration class: how a memory is searched and mixed, and what it belongs to."""

from typing import Any

from transformers import PreTrainedConfig

from knnmoe_hf.errors import shown

VALUE_SPACES = ("assignment", "logits", "delta")
SEARCH_BACKENDS = ("torch", "hnsw")
KEY_DTYPES = ("float32", "bfloat16", "float16")


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
        gamma (`float`, defaults to 0.9):
            gamma of the confidence `mean(exp(-gamma * d / s))`, at least 0. The larger, the sooner a token that is
            unlike every reference falls back to the gate's own routing.
        routing_width (`int`, `"union"` or `None`, defaults to `None`):
            Experts run per token. `None` is the model's own top-k, so compute per token is unchanged; `"union"`
            (only for `value_space="assignment"`) runs every expert that the gate or a neighbour names.
        layers (`list[int]`, *optional*):
            Decoder layers that get a memory; all MoE layers if `None`.
        key_dtype (`str`, defaults to `"float32"`):
            Storage of the keys: `"float32"`, `"bfloat16"` or `"float16"`.
        search_backend (`str`, defaults to `"torch"`):
            `"torch"` (exact) or `"hnsw"` (approximate, on the CPU).
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
    gamma: float | int = 0.9
    routing_width: int | str | None = None
    layers: list[int] | None = None
    key_dtype: str = "float32"
    search_backend: str = "torch"
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
        self._one_of("value_space", VALUE_SPACES)
        self._one_of("search_backend", SEARCH_BACKENDS)
        self._one_of("key_dtype", KEY_DTYPES)
        for name, (kind, least) in _NUMBERS.items():
            value = getattr(self, name)
            right_type = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not right_type or not least <= value < _TOO_MUCH:  # which NaN is not either
                what = "an integer" if kind is int else "a finite number"
                raise ValueError(f"{name}={shown(value)} is not allowed: use {what} of at least {least}, below 2**63.")
        if self.temperature == 0:
            raise ValueError("temperature=0 is not allowed: use a positive number, a small one for the nearest alone.")
        self._check_routing_width()
        layers = self.layers
        if layers is not None and not (isinstance(layers, list) and _distinct_indices(layers)):
            raise ValueError(f"layers={shown(layers)} is not allowed: list each layer's index once, or None for all.")
        for name, kind in _DESCRIPTIVE.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name}={shown(value)} is not allowed: it is a {kind.__name__} or None.")

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
    "search_max_bytes": (int, 2**16),
    "hnsw_m": (int, 2),
    "hnsw_ef_construction": (int, 1),
    "hnsw_ef_search": (int, 1),
}
_TOO_MUCH = 2**63
_DESCRIPTIVE = {"base_model_name_or_path": str, "base_model_revision": str, "memory": dict}
# what PreTrainedConfig reads or writes beyond its declared fields
_INHERITED = {"model_type", "_name_or_path", "name_or_path", "output_attentions"}
_OPTIONS = (
    "value_space",
    "num_neighbors",
    "temperature",
    "gamma",
    "routing_width",
    "layers",
    "key_dtype",
    "search_backend",
    "search_max_bytes",
    "hnsw_m",
    "hnsw_ef_construction",
    "hnsw_ef_search",
)
