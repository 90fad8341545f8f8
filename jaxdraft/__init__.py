"""Train DFlash drafts in JAX. Never imports torch or SGLang; the target lives in `feature_bridge`."""

__version__ = "0.1.0"  # of both packages; pyproject.toml reads it here
