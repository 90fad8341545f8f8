"""The target's side: builds requests, runs the frozen target, hands its hidden states over. Never imports jax."""
