"""A build keeps its rows on disk: it takes no more memory for more of them, and leaves nothing behind."""
