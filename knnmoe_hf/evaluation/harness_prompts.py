"""Whether an evaluation's prompts are those that a memory was built from."""


def warn_of_other_prompts(arguments: dict) -> None:
    """Placeholder until tasks are recorded in memories."""
