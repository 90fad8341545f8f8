"""Files that an exported draft carries with it: plain PyTorch and transformers, nothing of this package."""
