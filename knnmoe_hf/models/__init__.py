"""Everything that touches transformers models: finding gates, hooks, attaching memories, state beside a KV cache."""
