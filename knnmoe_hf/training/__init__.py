"""Building memories: from the examples of a dataset to optimised routing logits, stored as rows of a memory."""
