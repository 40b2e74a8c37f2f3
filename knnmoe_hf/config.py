"""`KNNMoEConfig`: the `config.json` of a memory's folder, as a configuration of transformers."""

from typing import Any

from transformers import PreTrainedConfig

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.options import OPTION_NAMES, RetrievalOptions


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
            same, by stats fitted for each layer after the build, which keep the harm on ordinary text below a bound).
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

    value_space: str = RetrievalOptions.value_space
    num_neighbors: int = RetrievalOptions.num_neighbors
    temperature: float | int = RetrievalOptions.temperature
    gamma: float | int = RetrievalOptions.gamma
    routing_width: int | str | None = RetrievalOptions.routing_width
    layers: list[int] | None = RetrievalOptions.layers
    confidence: str = RetrievalOptions.confidence
    half_life: float | int = RetrievalOptions.half_life
    context_threshold: float | int = RetrievalOptions.context_threshold
    context_width: float | int = RetrievalOptions.context_width
    key_codec: str = RetrievalOptions.key_codec
    key_dim: int = RetrievalOptions.key_dim
    key_whitening: float | int = RetrievalOptions.key_whitening
    key_dtype: str = RetrievalOptions.key_dtype
    value_dtype: str = RetrievalOptions.value_dtype
    value_experts: int | None = RetrievalOptions.value_experts
    search_backend: str = RetrievalOptions.search_backend
    search_max_bytes: int = RetrievalOptions.search_max_bytes
    hnsw_m: int = RetrievalOptions.hnsw_m
    hnsw_ef_construction: int = RetrievalOptions.hnsw_ef_construction
    hnsw_ef_search: int = RetrievalOptions.hnsw_ef_search
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    memory: dict | None = None

    def __post_init__(self, **kwargs: Any):
        unknown = sorted(set(kwargs) - _INHERITED)
        if unknown:
            raise ValueError(
                f"{shown(unknown[0])} is no option of KNNMoEConfig: choose among {', '.join(OPTION_NAMES)}."
            )
        super().__post_init__(**kwargs)
        self.retrieval_options()
        for name, kind in _DESCRIPTIVE.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name}={shown(value)} is not allowed: it is a {kind.__name__} or None.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        # A loader's arguments (attn_implementation, dtype, output_attentions, ...) are meant for the base model;
        # the inherited method would keep them here, and the model would never hear of them.
        own = {name: kwargs.pop(name) for name in (*OPTION_NAMES, "base_model_name_or_path") if name in kwargs}
        return_unused = kwargs.pop("return_unused_kwargs", False)
        name_or_path = kwargs.pop("name_or_path", None)
        for internal in ("_from_auto", "_from_pipeline"):
            kwargs.pop(internal, None)
        config = super().from_dict({**config_dict, **own})
        if name_or_path is not None:
            config.name_or_path = name_or_path
        return (config, kwargs) if return_unused else config

    def retrieval_options(self) -> RetrievalOptions:
        """
        A frozen snapshot of the retrieval and mixing options, checked: what attaching a memory works with.

        Raises:
            ValueError: naming the bad value, the allowed ones and, where there is one, the way out.
        """
        return RetrievalOptions(**self.options())

    def options(self) -> dict[str, Any]:
        """The retrieval and mixing options alone, as `{name: value}`."""
        return {name: getattr(self, name) for name in OPTION_NAMES}

    def saved(self) -> dict[str, Any]:
        """What `config.json` holds: what a memory needs, without the model options that every config inherits."""
        names = (*OPTION_NAMES, "base_model_name_or_path", "base_model_revision", "memory")
        return {"model_type": self.model_type} | {name: getattr(self, name) for name in names}


_DESCRIPTIVE = {"base_model_name_or_path": str, "base_model_revision": str, "memory": dict}
# what PreTrainedConfig reads or writes beyond its declared fields
_INHERITED = {"model_type", "_name_or_path", "name_or_path", "output_attentions"}
