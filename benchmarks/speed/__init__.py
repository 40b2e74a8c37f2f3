"""What a memory costs: time, bytes and recall."""
