"""Post-training quantisation: GPTQ for any linear layer, row-wise embeddings, in the format everybody loads; int8.

Here belongs the solver, the layers in few bits and their files, each usable without a Trainer. When a run quantises
belongs into ``callbacks/gptq.py``.
"""

from lightning_distill.quantization.checkpoint import load, save
from lightning_distill.quantization.gptq import QuantizedWeight, gptq_layer
from lightning_distill.quantization.hessian import Hessian
from lightning_distill.quantization.int8 import export_onnx_int8, load_in_4bit, load_in_8bit, quantize_int8
from lightning_distill.quantization.linear import QuantEmbedding, QuantLinear, use_kernels
from lightning_distill.quantization.mixed import most_sensitive, sensitivity
from lightning_distill.quantization.model import quantize
from lightning_distill.quantization.plan import LayerReport

__all__ = [
    "Hessian",
    "LayerReport",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizedWeight",
    "export_onnx_int8",
    "gptq_layer",
    "load",
    "load_in_4bit",
    "load_in_8bit",
    "most_sensitive",
    "quantize",
    "quantize_int8",
    "save",
    "sensitivity",
    "use_kernels",
]
