"""Post-training quantisation: GPTQ for any linear layer, row-wise embeddings, int8, in the format everybody loads."""

from lightning_distill.quantization.gptq import Hessian, QuantizedWeight, gptq_layer

__all__ = ["Hessian", "QuantizedWeight", "gptq_layer"]
