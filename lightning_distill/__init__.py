"""Knowledge distillation, quantisation and early exit for PyTorch Lightning."""

__version__ = "0.1.0"
