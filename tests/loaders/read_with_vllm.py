"""Runs in a venv with vLLM: loads checkpoints with vLLM on the CPU and writes the logits after the last token,
and how it goes on.

usage: read_with_vllm.py JOBS.json, a list of
{"model": folder, "ids": token ids, "out": safetensors file, "dtype": "float32", "tokens": how many are generated}

vLLM's int4 kernel for CPUs needs AVX-512 and knows no float32. Where it cannot serve, its place is taken by one that
decodes the parameters as vLLM has loaded and fused them, with vLLM's own unpacking, and multiplies. Its int8 kernel for
AMX knows no float32 either: there its other one (oneDNN) multiplies.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

for key, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}.items():
    os.environ.setdefault(key, value)

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def use_plain_kernel_where_needed() -> None:
    from vllm.model_executor.kernels.linear.mixed_precision import cpu
    from vllm.model_executor.kernels.linear.scaled_mm import cpu as int8
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    kernel = cpu.CPUWNA16LinearKernel
    own_prepare, own_multiply = kernel._process_gptq_weights_w4a16, kernel.apply_weights
    present = hasattr(torch.ops._C, "cpu_gemm_wna16")

    def prepare(self, layer: torch.nn.Module) -> None:
        if present and self.config.act_type != torch.float32:
            return own_prepare(self, layer)
        kind = self.config.weight_type
        layer.use_w4a8, layer.isa_hint = False, "vec"
        packed = getattr(layer, self.w_q_name).data  # [K words, N]
        scales = getattr(layer, self.w_s_name).data  # [G, N]
        codes = unpack_quantized_values_into_int32(packed, kind, 0)
        zeros = torch.full_like(scales, kind.bias if kind.has_bias() else 0)
        if self.config.zero_points:
            zeros = unpack_quantized_values_into_int32(getattr(layer, self.w_zp_name).data, kind, 1)
        each = codes.shape[0] // scales.shape[0]
        scales, zeros = (part.float().repeat_interleave(each, 0) for part in (scales, zeros))
        layer.plain_weight = ((codes.float() - zeros) * scales).T.contiguous()
        return None

    def multiply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not hasattr(layer, "plain_weight"):
            return own_multiply(self, layer, x, bias)
        bias = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), layer.plain_weight, bias).to(x.dtype)

    kernel._process_gptq_weights_w4a16, kernel.apply_weights = prepare, multiply
    for_amx = int8.check_cpu_sgl_kernel
    int8.check_cpu_sgl_kernel = lambda n, k, dtype: torch.get_default_dtype() != torch.float32 and for_amx(n, k, dtype)


def main(jobs: list[dict]) -> None:
    import vllm._custom_ops  # noqa: F401 - registers the operators
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    use_plain_kernel_where_needed()
    for job in jobs:
        model = LLM(job["model"], dtype=job["dtype"], max_model_len=64, enforce_eager=True, max_logprobs=-1,
                    disable_log_stats=True, logprobs_mode="raw_logits", enable_prefix_caching=False)
        sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
        answer = model.generate({"prompt_token_ids": job["ids"]}, sampling, use_tqdm=False)
        found = answer[0].outputs[0].logprobs[0]
        logits = torch.tensor([found[token].logprob for token in range(len(found))])
        greedy = SamplingParams(max_tokens=job.get("tokens", 1), temperature=0, ignore_eos=True)
        answer = model.generate({"prompt_token_ids": job["ids"]}, greedy, use_tqdm=False)
        save_file({"logits": logits, "tokens": torch.tensor(answer[0].outputs[0].token_ids)}, job["out"])
        del model, answer  # its finalizer takes down process-wide state: now, not under the next model
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
