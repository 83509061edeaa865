"""What KServe's V2 protocol calls the tensors of a network with exits: shared by the HTTP endpoint and the Triton Inference Server."""

import numpy as np

DATATYPES = {
    "FP32": np.float32, "FP64": np.float64, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32, "INT16": np.int16, "INT8": np.int8,
    "UINT8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(v): k for k, v in DATATYPES.items()}
OUTPUTS = {"label": "INT64", "confidence": "FP32", "exit": "INT64", "forced": "BOOL", "logits": "FP32"}
