"""All that touches the models of transformers: finding gates, hooks, attaching, the state beside a KV cache."""
