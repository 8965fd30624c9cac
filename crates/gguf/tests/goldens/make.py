"""Writes the small files that the tests read back, with the reference writers.

    pip install gguf safetensors torch numpy && python make.py
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent

writer = gguf.GGUFWriter(HERE / "reference.gguf", "tiny")
writer.add_uint32("tiny.block_count", 3)
writer.add_float32("tiny.eps", 1e-5)
writer.add_bool("tiny.flag", True)
writer.add_array("tiny.ints", [1, -2, 3])
writer.add_array("tiny.floats", [0.5, -0.25])
writer.add_token_list([b"<s>", "Ġa".encode(), b"\xff\xfe"])
writer.add_tensor("blk.0.w.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
ramp = (2 * np.arange(64, dtype=np.float32) - 31).reshape(2, 32)
packed = gguf.quants.quantize(ramp, gguf.GGMLQuantizationType.Q8_0)
writer.add_tensor("q", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

x = torch.tensor([[-1.5, 0.0, 0.5], [1.0, 2.25, 1024.0]])
tensors = {
    "f32": x,
    "f64": x.double(),
    "f16": x.half(),
    "bf16": x.bfloat16(),
    "f8": x.to(torch.float8_e4m3fn),
    "i64": torch.tensor([-3]),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}
save_file(tensors, HERE / "reference.safetensors")

# id, name, elements and bytes of a block: what this version of the package knows.
sizes = sorted(gguf.GGML_QUANT_SIZES.items())
lines = [f"{ty.value} {ty.name.lower()} {block_len} {block_bytes}\n" for ty, (block_len, block_bytes) in sizes]
(HERE / "types.txt").write_text("".join(lines))
