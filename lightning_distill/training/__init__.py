"""What a run needs beside its step: checkpoints, stops, trial steps, parts of a model on several devices.

Here belongs what the Trainer's strategies, checkpoints and processes ask for. What a person adds to a Trainer belongs
into ``callbacks/``; what a command line adds into ``cli/``.
"""

from lightning_distill.training.checkpoint import AtomicCheckpointIO, newest_checkpoint

__all__ = ["AtomicCheckpointIO", "newest_checkpoint"]
