"""Post-training quantisation: GPTQ for any linear layer, row-wise embeddings, in the format everybody loads; int8."""

from lightning_distill.quantization.checkpoint import load, save
from lightning_distill.quantization.gptq import Hessian, QuantizedWeight, gptq_layer
from lightning_distill.quantization.linear import QuantEmbedding, QuantLinear
from lightning_distill.quantization.mixed import most_sensitive, sensitivity
from lightning_distill.quantization.model import LayerReport, quantize

__all__ = [
    "Hessian",
    "LayerReport",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizedWeight",
    "gptq_layer",
    "load",
    "most_sensitive",
    "quantize",
    "save",
    "sensitivity",
]
