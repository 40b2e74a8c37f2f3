"""`KNNMoEConfig`: options of a routing memory, saved as the `config.json` of its folder."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.lookup.options import OPTION_NAMES, RetrievalOptions


class KNNMoEConfig(PreTrainedConfig):
    r"""
    Configuration of a routing memory: how keys and values are stored, searched and mixed into the routing.

    Args:
        value_space (`str`, defaults to `"logits"`):
            What the stored values are, and so what is mixed: `"assignment"` (expert weights; the paper's first
            version), `"logits"` (routing logits; its second version) or `"delta"` (optimised logits minus the gate's
            own). Fixed when the memory is built.
        num_neighbors (`int`, defaults to 16):
            K: nearest neighbours retrieved for each token in each layer, at least 1.
        temperature (`float`, defaults to 1.0):
            tau of the neighbour weights `softmax(-d / (tau * s))`, above 0, with squared L2 distances `d` and the
            layer's distance scale `s`.
        gamma (`float`, defaults to 0.3):
            gamma of the confidence `mean(exp(-gamma * d / s))`, at least 0. With a larger gamma the confidence falls
            faster with distance, so tokens unlike every reference keep the gate's own routing.
        routing_width (`int`, `"union"` or `None`, defaults to `None`):
            Experts run per token. `None` is the model's own top-k, so compute per token is unchanged; `"union"`
            (only for `value_space="assignment"`) runs every expert that the gate or a neighbour selects.
        layers (`list[int]`, *optional*):
            Decoder layers that get a memory; all MoE layers if `None`.
        confidence (`str`, defaults to `"calibrated"`):
            How far a token's neighbours are trusted: `"rbf"` (the paper's: the mean similarity to them), `"context"`
            (rbf times a sigmoid of its running mean over the sequence, which is near 1 only where that mean is as high
            as among the references) or `"calibrated"` (the same with constants fitted for each layer after the build,
            so that the harm on background text stays below a bound).
        half_life (`float`, defaults to 24.0):
            Half-life of that running mean, in tokens, above 0.
        context_threshold, context_width (`float`, default to 0.88 and 0.02):
            Centre and width of the sigmoid by which the running mean opens the memory with `confidence="context"`,
            both in multiples of the mean among the references; the width is above 0.
        recall (`str`, defaults to `"routing"`):
            What the memory changes: `"routing"` (the experts' weights, which is kNN-MoE as published), `"next_tokens"`
            (the distribution of the next token, as kNN-LM does) or `"both"`. The last two mix the tokens that followed
            the neighbours of the last layer into the output, `(1 - m c) p_model + m c p_recalled` with the confidence
            `c` of that layer, and need a memory that holds its rows' next tokens (`RoutingMemory.next_tokens`).
        next_token_weight (`float` or `None`, defaults to `None`):
            m, from 0 to below 1. A number gives the formula above, as published; nothing bounds its harm. With `None`
            the calibration decides, within its bounds of harm: recalled tokens then have a threshold of their own, and
            their share also depends on how near the neighbours are and how far they agree (docs/method.md). Where
            nothing was fitted, `None` is 0.35 in the formula.
        next_token_temperature (`float` or `None`, defaults to `None`):
            tau of the neighbours' votes on the next token, `softmax(-d / (tau * s))`, above 0, with the last layer's
            squared distances `d` and scale `s`. `None`: as fitted by the calibration, or 0.25 where nothing was.
        next_token_neighbors (`int` or `None`, defaults to `None`):
            Neighbours of the last layer that vote on the next token, at least 1; 64 if `None`. The `num_neighbors`
            nearest of them serve the routing and the confidence.
        key_codec (`str`, defaults to `"pca"`):
            What distances are computed from: `"raw"` (the gate's input), `"pca"` (its `key_dim` principal components)
            or `"logits"` (the gate's own logits, centred). Fitted when the memory is built.
        key_dim (`int`, defaults to 48):
            Dimensions of a `"pca"` key; more than the hidden size is cut to the hidden size.
        key_whitening (`float`, defaults to 0.5):
            Exponent of the whitening of a `"pca"` key, from 0 (distances as in the gate's input) to 1 (all
            components have the same variance).
        key_dtype (`str`, defaults to `"int8"`):
            Storage of the keys: `"float32"`, `"bfloat16"`, `"float16"` or `"int8"` (one step size for each dimension).
        value_dtype (`str`, defaults to `"int8"`):
            Storage of the values: `"float32"`, `"float16"` or `"int8"`.
        value_experts (`int` or `None`, defaults to 16):
            Experts whose value is stored in each row; the row's other experts share one default value. All are stored
            if `None`, or if that takes no more bytes.
        search_backend (`str`, defaults to `"auto"`):
            `"torch"` (exact, any device), `"ivf"` (inverted lists, any device), `"hnsw"` (hnswlib, CPU), `"faiss"`
            (faiss with quantised codes, CPU; `pip install knnmoe_hf[faiss]`), or `"auto"`, which chooses by device,
            number of rows and what is installed, and logs why. All but the first are approximate: recall@16 was at
            least 0.98 on held-out text of the lab, and is lower on text that is far from the references.
        search_max_bytes (`int`, defaults to 2**26):
            Largest size of the exact search's score matrix in bytes; more tokens or rows are searched in blocks.
        hnsw_m, hnsw_ef_construction, hnsw_ef_search (`int`, default to 16, 200 and 64):
            hnswlib's graph degree `M` and beam widths `ef_construction` and `ef`.
        base_model_name_or_path, base_model_revision (`str`, *optional*):
            The frozen model that the memory was built for, and the commit of its repository.
        memory (`dict`, *optional*):
            Manifest of the saved memory (layers, sizes, scales, fingerprints, digests), written by
            `RoutingMemory.save_pretrained`; not to be edited by hand.

    Raises:
        ValueError: for an unknown option, or a value that is not allowed.
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
    recall: str = RetrievalOptions.recall
    next_token_weight: float | int | None = RetrievalOptions.next_token_weight
    next_token_temperature: float | int | None = RetrievalOptions.next_token_temperature
    next_token_neighbors: int | None = RetrievalOptions.next_token_neighbors
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
            self._refuse_later_version()
            raise ValueError(
                f"{shown(unknown[0])} is not an option of KNNMoEConfig: choose among {', '.join(OPTION_NAMES)}."
            )
        super().__post_init__(**kwargs)
        self.retrieval_options()
        for name, kind in _OTHER_FIELDS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name}={shown(value)} is not allowed: use a {kind.__name__} or None.")

    def _refuse_later_version(self) -> None:
        """An unknown option may be one of a later version: then the error names the version that is needed."""
        if isinstance(self.memory, dict):
            from knnmoe_hf.memory.versions import check_version

            check_version(self.memory, Path("config.json"))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        # A loader's arguments (attn_implementation, dtype, output_attentions, ...) are meant for the base model. The
        # inherited method would take those whose names PreTrainedConfig has, and the base model would not get them.
        options = {name: kwargs.pop(name) for name in (*OPTION_NAMES, "base_model_name_or_path") if name in kwargs}
        return_unused = kwargs.pop("return_unused_kwargs", False)
        name_or_path = kwargs.pop("name_or_path", None)
        for internal in ("_from_auto", "_from_pipeline"):
            kwargs.pop(internal, None)
        try:
            config = super().from_dict({**config_dict, **options})
        except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:  # of values of other kinds
            raise ValueError(f"this is not a memory's configuration ({in_one_line(error)}): save it again.") from error
        if name_or_path is not None:
            config.name_or_path = name_or_path
        return (config, kwargs) if return_unused else config

    def retrieval_options(self) -> RetrievalOptions:
        """
        The retrieval and mixing options as a frozen, validated copy, which is what an attached memory uses.

        Raises:
            ValueError: naming the bad value, the allowed ones and, where there is one, the way out.
        """
        return RetrievalOptions(**self.options())

    def options(self) -> dict[str, Any]:
        """The retrieval and mixing options, without the rest of the configuration, as `{name: value}`."""
        return {name: getattr(self, name) for name in OPTION_NAMES}

    def saved(self) -> dict[str, Any]:
        """The content of `config.json`: what a memory needs, without the fields inherited from `PreTrainedConfig`."""
        names = (*OPTION_NAMES, "base_model_name_or_path", "base_model_revision", "memory")
        return {"model_type": self.model_type} | {name: getattr(self, name) for name in names}


_OTHER_FIELDS = {"base_model_name_or_path": str, "base_model_revision": str, "memory": dict}
# keyword arguments that PreTrainedConfig accepts although it declares no such field
_INHERITED = {"model_type", "_name_or_path", "name_or_path", "output_attentions"}
