"""The content of a `results.json` as `knnmoe compare` writes it, with random figures: input of the report's tests."""

import random

METHODS = {
    "frozen": ("none", True),
    "knn_moe": ("arXiv 2601.02144", True),
    "knn_moe_both": ("arXiv 2601.02144", True),
    "knn_lm": ("arXiv 1911.00172", True),
    "constant_bias": ("a control", True),
    "dsmoe": ("arXiv 2604.05267", True),
    "steermoe": ("arXiv 2509.09660", True),
    "laser": ("arXiv 2510.03293", True),
    "in_context_fixed": ("arXiv 2005.14165", True),
    "in_context_retrieved": ("arXiv 2101.06804", True),
    "c3po_mode_finding": ("arXiv 2504.07964", True),
    "c3po_kernel_regression": ("arXiv 2504.07964", True),
    "c3po_gradient_descent": ("arXiv 2504.07964", True),
    "c3po_released": ("tianyi-lab/C3PO", True),
    "rewiring": ("arXiv 2510.14853", True),
    "router_only": ("arXiv 2511.07419", False),
    "roma": ("arXiv 2511.07419", False),
    "lora": ("arXiv 2106.09685", False),
    "full_fine_tuning": ("", False),
}
BROKEN, FAILED, PENDING = "steermoe", "laser", "full_fine_tuning"
SUBJECTS = [f"{field}_{number}" for field in ("college", "high_school", "professional") for number in range(19)]


def interval(drawn: random.Random, mean: float, half: float) -> dict:
    return {"mean": mean, "low": mean - half * drawn.uniform(0.8, 1.2), "high": mean + half * drawn.uniform(0.8, 1.2)}


def done(drawn: random.Random, label: str, fitted_on: str, task: str, off: bool, groups: bool) -> dict:
    gain = 0.0 if label == "frozen" else drawn.gauss(-0.02 if off else 0.05, 0.03)
    backward = 30.0 if label == "c3po_gradient_descent" else 0.0
    changes = {
        other: {
            "acc": interval(drawn, gain - (0.04 if other == "knn_moe" else 0), 0.03),
            "acc_norm": interval(drawn, gain / 2, 0.03),
            "loglikelihood": interval(drawn, 4 * gain, 0.2),
        }
        for other in ("frozen", "knn_moe")
    }
    seconds = 0.041 * drawn.uniform(0.98, 1.3) * (1 + backward)
    return {
        "fitted_on": fitted_on,
        "task": task,
        "off": off,
        "method": label,
        "status": "done",
        "reason": None,
        "items": 203,
        "metric": "acc",
        "metrics": {"acc": 0.57 + gain, "acc_norm": 0.55 + gain / 2, "loglikelihood": -12.34 + 4 * gain},
        "changes": changes,
        "groups": {
            name: {
                "items": drawn.randrange(3, 40),
                "acc": drawn.random(),
                "change": (one := interval(drawn, drawn.gauss(gain, 0.06), 0.08))["mean"],
                "low": one["low"] if number % 9 else None,
                "high": one["high"] if number % 9 else None,
            }
            for number, name in enumerate(SUBJECTS if groups else SUBJECTS[:1])
        },
        "cost": {
            "forward": 4.0 + backward + (1.0 if label.startswith("c3po") else 0.0),
            "backward": backward,
            "tokens": 812.25,
            "seconds": seconds,
            "times_frozen": seconds / 0.041,
            "timed_items": 16,
            "prompt_tokens": 640.0 if label.startswith("in_context") else 0.0,
            "bytes": 0 if label in ("frozen", "rewiring") else drawn.randrange(2_000, 90_000_000),
            "fit_seconds": drawn.uniform(0, 90),
            "fit_forward": drawn.randrange(4000),
            "fit_backward": drawn.randrange(4000),
        },
        "effect": {
            "on": "routing",
            "items_checked": 8,
            "items_changed": 8,
            "tokens": 900,
            "tokens_changed": 400,
            "share": 4 / 9,
        },
    }


def without(label: str, fitted_on: str, task: str, off: bool, status: str) -> dict:
    nothing = {
        "items": 203,
        "metric": None,
        "metrics": None,
        "changes": {},
        "groups": {},
        "cost": None,
        "effect": None,
    }
    reasons = {"broken": "it changed no route on any of 8 items", "failed": "the load needs at least 2 experts."}
    row = {"fitted_on": fitted_on, "task": task, "off": off, "method": label, "status": status}
    effect = {
        "on": "routing",
        "items_checked": 8,
        "items_changed": 0,
        "tokens": 900,
        "tokens_changed": 0,
        "share": 0.0,
    }
    return row | nothing | {"reason": reasons.get(status)} | ({"effect": effect} if status == "broken" else {})


def content(seed: int = 0, groups: bool = True, complete: bool = True) -> dict:
    """Two tasks, one of one subject and one of 57, with an off-domain task each, for all methods."""
    drawn = random.Random(seed)
    results = []
    for fitted_on, off in (("lab_topics", "lab_python"), ("mmlu", "lab_python")):
        for label in METHODS:
            for task in (fitted_on, off):
                named = (label, fitted_on, task, task == off)
                status = {BROKEN: "broken", FAILED: "failed", PENDING: "pending"}.get(label)
                many = groups and fitted_on == "mmlu"
                results.append(without(*named, status) if status else done(drawn, *named, many))
    return {
        "written_by": "knnmoe compare 0.1.0",
        "complete": complete,
        "name": "lab",
        "model": {"name": "lab:olmoe", "dtype": "float32", "layers": 4, "experts": 16, "top_k": 4},
        "settings": {"limit": None, "num_fewshot": None, "batch_size": 8, "seed": 0, "references": 100},
        "machine": {"device": "cpu", "threads": 2, "torch": "2.13.0", "transformers": "5.23.0"},
        "methods": [
            {
                "label": label,
                "method": label,
                "options": {"steps": 10, "rate": 0.05, "neighbors": 3},
                "ours": ["rate"],
                "source": source,
                "acts_on": "routing",
                "keeps_weights": keeps,
                "per_item": label.startswith("c3po"),
            }
            for label, (source, keeps) in METHODS.items()
        ],
        "tasks": [
            {
                "name": name,
                "off": ["lab_python"],
                "note": None,
                "items": 203,
                "references": {"count": 100, "tokens": 12345, "removed": 3, "digest": "0a1b2c"},
            }
            for name in ("lab_topics", "mmlu")
        ],
        "results": results,
        "published": [
            {
                "task": "gpqa_diamond_zeroshot",
                "method": "kNN-MoE",
                "model": "GPT-OSS-0.7B",
                "metric": "accuracy, %",
                "base": 26.2,
                "value": 27.9,
                "source": "arXiv 2601.02144, as listed by a third party",
            }
        ],
    }
