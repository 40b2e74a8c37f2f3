"""How the benchmarks build memories."""

from knnmoe_hf import KNNMoETrainingArguments

RAW = dict(key_codec="raw", key_dtype="float32", value_dtype="float32", value_experts=None)
"""Options of `KNNMoEConfig` that store rows as they were found, without any rounding."""


def training_arguments(build: dict, folder: str = "unused") -> KNNMoETrainingArguments:
    """Arguments of a build on the CPU that logs nothing."""
    quiet = dict(report_to="none", logging_strategy="no", disable_tqdm=True, save_strategy="no")
    quiet |= dict(dataloader_pin_memory=False)
    return KNNMoETrainingArguments(output_dir=folder, use_cpu=True, **quiet, **build)
