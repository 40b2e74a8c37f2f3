"""Reads a routing memory with NumPy and safetensors alone, and mixes routing as the library does (docs/format.md)."""

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors.numpy import load


def read(folder: str) -> tuple[dict, dict]:
    """The options, and `{layer: its entry and tensors}`, of formats 5 and 6; all codecs, all dtypes but bfloat16."""
    config, tensors = json.loads(Path(folder, "config.json").read_text()), {}
    for file in config["memory"]["files"]:
        content = Path(folder, Path(file["name"]).name).read_bytes()
        assert sha256(content).hexdigest() == file["sha256"], f"{file['name']} is not what was saved"
        tensors |= load(content)
    own = [(f"layers.{entry['layer']}.", entry) for entry in config["memory"]["layers"]]
    return config, {e["layer"]: e | {k[len(p) :]: t for k, t in tensors.items() if k.startswith(p)} for p, e in own}


def values(of: dict) -> np.ndarray:
    """What the stored values of a layer stand for, (N, E)."""
    codes = of["values.codes"] * of.get("values.step", np.float32(1)) + of.get("values.offset", np.float32(0))
    if "values.experts" not in of:
        return codes
    table = np.zeros((len(codes), of["num_experts"]), np.float32)
    np.put_along_axis(table, of["values.experts"].astype(np.int64), codes, axis=1)
    return table + of.get("values.rest", np.zeros(len(codes))).astype(np.float32)[:, None]


def mixed(config: dict, of: dict, x: np.ndarray, logits: np.ndarray, own: np.ndarray, before=(0, 0, 0)) -> tuple:
    """`own` of one sequence (logits, or weights of all experts), mixed (T, E); and `before` for the next layer."""
    query = logits if config["key_codec"] == "logits" else x
    query = (query @ of["encoder.weight"].T if "encoder.weight" in of else query) + of.get("encoder.bias", 0)
    keys, k = of["keys"] * of.get("encoder.step", np.float32(1)), config["num_neighbors"]
    distances = np.stack([np.square(keys - one).sum(axis=1) for one in query])
    rows, distances = (sort(distances, axis=1, kind="stable")[:, :k] for sort in (np.argsort, np.sort))
    weights = np.exp((distances[:, :1] - distances) / (config["temperature"] * of["scale"]))
    recalled = np.einsum("tk,tke->te", weights / weights.sum(axis=1, keepdims=True), values(of)[rows])
    mean = np.exp(-config["gamma"] * of["distances"] / of["scale"]).mean() if of["distances"].size else 1
    names = "background_mean reference_drift background_drift min_warmup open_shift background_open_shift"
    s = dict.fromkeys(names.split(), 0) | {"reference_mean": max(mean, 1e-6), "scale": of["scale"], "weight": 1}
    s |= {"threshold": config["context_threshold"], "width": config["context_width"]}
    s |= (of["stats"] if config["confidence"] == "calibrated" else None) or {}
    lam, age = np.exp(-config["gamma"] * distances / s["scale"]).mean(axis=1), np.arange(len(x))
    decay = np.tril(0.5 ** (np.subtract.outer(age, age) / config["half_life"]))
    (evidence, weight, opening), warmup = before, np.maximum(0.5 ** ((age + 1) / config["half_life"]), s["min_warmup"])
    shift = (s["open_shift"] - s["background_open_shift"]) * np.clip(evidence / max(weight, 1e-30), 0, 1)
    mean = decay @ (lam + opening * (s["background_open_shift"] + shift)) / decay.sum(axis=1)
    low, high = (s[f"{text}_mean"] + s[f"{text}_drift"] * warmup for text in ("background", "reference"))
    evidence, weight = evidence + s["weight"] * (mean - low) / (high - low), weight + s["weight"]
    opening = 1 / (1 + np.exp((s["threshold"] - evidence / weight) / s["width"]))
    lam = lam if config["confidence"] == "rbf" else np.where(lam * opening > 1e-3, lam * opening, 0)
    return own + lam[:, None] * (recalled - own * (config["value_space"] != "delta")), (evidence, weight, opening)


if __name__ == "__main__":
    print({layer: values(of).shape for layer, of in read(sys.argv[1])[1].items()})
