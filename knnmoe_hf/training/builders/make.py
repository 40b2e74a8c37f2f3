"""Creates the builder that the arguments of a build name."""

from torch import nn

from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.builders.base import Builder
from knnmoe_hf.training.builders.descent import Descent
from knnmoe_hf.training.builders.random_search import RandomSearch


def make_builder(model: nn.Module, gates: list[Gate], args: KNNMoETrainingArguments) -> Builder:
    """The builder `args.builder`; its overrides stay attached to `model` until `close` is called."""
    if args.builder == "search":
        return RandomSearch(model, gates, steps=args.builder_steps, seed=args.seed)
    return Descent(
        model,
        gates,
        steps=args.builder_steps,
        candidates=args.num_candidates,
        candidate_steps=candidate_steps(args),
        learning_rate=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def candidate_steps(args: KNNMoETrainingArguments) -> int:
    """Number of steps with more experts per token than the model's own top-k."""
    if args.builder != "candidates":
        return 0
    if args.candidate_steps is not None:
        return args.candidate_steps
    return args.builder_steps // 2
