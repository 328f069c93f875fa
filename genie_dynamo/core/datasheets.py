"""Hardware as its makers describe it: for planning where nothing can be measured.

Peak rates are not reached by real ops; a fit of observed times, where there is one, says by how much. Matrix rates are
those without sparsity. Elementwise rates count an add where the maker counts a fused multiply-add as two. The overhead
of an op is no maker's number: `_LAUNCH_S` is what it is for all GPUs here, and its reason stands there.
"""
from __future__ import annotations

from genie_dynamo.core.errors import CostError
from genie_dynamo.core.hardware import HardwareFacts

_TERA, _GIGA = 1e12, 1e9

_LAUNCH_S = 5e-6
"""A supposition, not a datasheet's number: the order of an eager launch from the host. Calibration replaces it."""


def _gpu(name: str, source: str, *, tflops: dict[str, float], vector_tflops: float, gb_per_s: float,
         memory_gb: float) -> HardwareFacts:
    """tflops: of matrix units, by dtype.  vector_tflops: float32 outside of them."""
    adds = vector_tflops / 2 * _TERA
    return HardwareFacts(
        name=name, kind="cuda", source=f"{source}; op_overhead_s is supposed",
        matmul_flops_per_s=tuple((dtype, rate * _TERA) for dtype, rate in tflops.items()),
        elementwise_ops_per_s=(("float32", adds), ("float16", adds), ("bfloat16", adds),
                               ("float64", tflops.get("float64", vector_tflops / 32) / 2 * _TERA)),
        memory_bytes_per_s=((1, gb_per_s * _GIGA),), op_overhead_s=_LAUNCH_S, memory_bytes=int(memory_gb * _GIGA))


_GPUS = (
    _gpu("T4", "NVIDIA T4 datasheet (2019): 8.1 TFLOPS FP32, 65 FP16, 16 GB at 320 GB/s",
         tflops={"float32": 8.1, "float16": 65}, vector_tflops=8.1, gb_per_s=320, memory_gb=16),
    _gpu("V100", "NVIDIA V100 datasheet (2020), SXM2 32 GB: 7.8 TFLOPS FP64, 15.7 FP32, 125 tensor, 900 GB/s",
         tflops={"float64": 7.8, "float32": 15.7, "float16": 125}, vector_tflops=15.7, gb_per_s=900, memory_gb=32),
    _gpu("A10", "NVIDIA A10 datasheet (2021): 31.2 TFLOPS FP32, 125 BF16 and FP16, 24 GB at 600 GB/s",
         tflops={"float32": 31.2, "float16": 125, "bfloat16": 125}, vector_tflops=31.2, gb_per_s=600, memory_gb=24),
    _gpu("A100", "NVIDIA A100 datasheet (2021), SXM 80 GB: 19.5 TFLOPS FP64 tensor and FP32, 312 BF16 and FP16, "
         "2039 GB/s; float32 products at torch's default precision, without TF32",
         tflops={"float64": 19.5, "float32": 19.5, "float16": 312, "bfloat16": 312}, vector_tflops=19.5,
         gb_per_s=2039, memory_gb=80),
    _gpu("L4", "NVIDIA L4 datasheet (2023): 30.3 TFLOPS FP32, half of 242 BF16 and FP16 and of 485 FP8 with sparsity, "
         "24 GB at 300 GB/s",
         tflops={"float32": 30.3, "float16": 121, "bfloat16": 121, "float8_e4m3fn": 242.5, "float8_e5m2": 242.5},
         vector_tflops=30.3, gb_per_s=300, memory_gb=24),
    _gpu("L40S", "NVIDIA L40S datasheet (2023): 91.6 TFLOPS FP32, 362 BF16 and FP16, 733 FP8, 48 GB at 864 GB/s",
         tflops={"float32": 91.6, "float16": 362, "bfloat16": 362, "float8_e4m3fn": 733, "float8_e5m2": 733},
         vector_tflops=91.6, gb_per_s=864, memory_gb=48),
    _gpu("RTX 4090", "NVIDIA Ada GPU architecture whitepaper (2022): 82.6 TFLOPS FP32, 165.2 BF16 and FP16 with FP32 "
         "accumulate, 24 GB at 1008 GB/s",
         tflops={"float32": 82.6, "float16": 165.2, "bfloat16": 165.2}, vector_tflops=82.6, gb_per_s=1008,
         memory_gb=24),
    _gpu("H100", "NVIDIA H100 datasheet (2023), SXM: 67 TFLOPS FP64 tensor and FP32, half of 1979 BF16 and FP16 and of "
         "3958 FP8 with sparsity, 80 GB at 3.35 TB/s",
         tflops={"float64": 67, "float32": 67, "float16": 989.5, "bfloat16": 989.5, "float8_e4m3fn": 1979,
                 "float8_e5m2": 1979}, vector_tflops=67, gb_per_s=3350, memory_gb=80),
    _gpu("H200", "NVIDIA H200 datasheet (2024), SXM: as H100, 141 GB at 4.8 TB/s",
         tflops={"float64": 67, "float32": 67, "float16": 989.5, "bfloat16": 989.5, "float8_e4m3fn": 1979,
                 "float8_e5m2": 1979}, vector_tflops=67, gb_per_s=4800, memory_gb=141),
)

_CPU = HardwareFacts(
    name="CPU core", kind="cpu",
    source="derived: one x86-64 core with AVX2 at 3 GHz, two fused multiply-adds of 8 floats per cycle (96 GFLOPS), "
           "one 8-wide add per cycle, 12 GB/s from one channel of DDR4-3200 at half its 25.6 GB/s; op_overhead_s is "
           "supposed",
    matmul_flops_per_s=(("float32", 96e9), ("float64", 48e9), ("bfloat16", 24e9), ("float16", 24e9)),
    elementwise_ops_per_s=(("float32", 24e9), ("float64", 12e9), ("bfloat16", 6e9), ("float16", 6e9)),
    memory_bytes_per_s=((1 << 20, 40e9), (32 << 20, 12e9)), op_overhead_s=1e-6, memory_bytes=None, num_threads=1)

DATASHEETS: dict[str, HardwareFacts] = {facts.name: facts for facts in (_CPU, *_GPUS)}


def datasheet(name: str) -> HardwareFacts:
    """Facts of a device by name.

    Raises: CostError that lists the known ones.
    """
    if name not in DATASHEETS:
        raise CostError(f"there is no datasheet for {name!r}; known are {', '.join(DATASHEETS)}", device=name)
    return DATASHEETS[name]
