"""Benchmarks as questions with choices: their items as token ids, and reference sets made from their splits."""
