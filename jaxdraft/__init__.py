"""Train DFlash drafts in JAX. Never imports torch or SGLang; the target lives in `feature_bridge`."""
