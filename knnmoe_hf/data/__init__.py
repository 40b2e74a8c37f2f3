"""Your data in: files and rows become token ids, labels and batches."""
