"""What a memory gains and harms, beside fine-tuning on the same reference tokens."""
