"""Post-training quantisation: GPTQ for any linear layer, row-wise embeddings, int8, in the format everybody loads."""

from lightning_distill.quantization.gptq import Hessian, QuantizedWeight, gptq_layer
from lightning_distill.quantization.linear import QuantEmbedding, QuantLinear

__all__ = ["Hessian", "QuantEmbedding", "QuantLinear", "QuantizedWeight", "gptq_layer"]
