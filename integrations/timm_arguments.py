"""What a train.py that vid-loss 0.1.0 patched still imports."""

raise ImportError(
    "This train.py was patched by vid-loss 0.1.0, whose module this was. Run once: "
    "python -m vid_loss.integrations.timm patch train.py"
)
