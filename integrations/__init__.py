"""Adapters for training engines; each needs its extra, ``pip install "vid-loss[hf]"`` and so on."""
