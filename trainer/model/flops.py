"""How much arithmetic a step is, and how much the device could do: the two halves of MFU.

    flops of training  =  6 * N * tokens  +  12 * layers * heads * head_dim * pairs

N: the parameters that are multiplied with every token (all Linear weights and the head, tied or not; no
embedding look-up, no norms, no biases). 6 = 2 for the forward multiply-add, 4 for the two backward products.
`pairs` counts (query, key) pairs, and there are two conventions for it; both are reported, since they differ
by 22 % for Llama-8B at 8,192 tokens:
- "full": L^2 for a document of L tokens (PaLM appendix B, nanoGPT, torchtitan): pretends causal attention
  does all of it.
- "causal": L^2 / 2 (Megatron): what is needed; always the lower MFU.
With a sliding window of W tokens a query meets at most W keys. Recomputation (activation checkpointing) is
never counted: MFU is about the model's arithmetic, not about the hardware's. Tokens are real ones: padding is
not work.
"""

import functools
import re
import time

import torch
from torch import Tensor

from trainer.model.config import ModelConfig

CONVENTIONS = ("full", "causal")

# Dense bf16 FLOP/s with fp32 accumulation, without sparsity, from the makers' data sheets. First match wins.
PEAK_BF16 = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bGB300\b", 2500e12),
    (r"\bB300\b", 2250e12),
    (r"\bGH200\b", 989.4e12),
    (r"\bH200 NVL\b", 835.5e12),
    (r"\bH200\b", 989.4e12),
    (r"\bH100 NVL\b", 835.5e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b", 989.4e12),
    (r"\bH800\b", 989.4e12),
    (r"\bH20\b", 148e12),
    (r"\bA100\b", 312e12),
    (r"\bA800\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10G\b", 70e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 6000 Ada\b", 364.2e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 5090\b", 209.5e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bMI355X\b", 2516e12),
    (r"\bMI325X\b", 1307.4e12),
    (r"\bMI300X\b", 1307.4e12),
    (r"\bMI250X\b", 191.5e12),  # one of its two dies: torch shows each as a device
    (r"\bMI210\b", 181e12),
)


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    D, H = config.hidden_size, config.head_size
    biases = (config.num_heads + 2 * config.num_kv_heads) * H if config.qkv_bias else 0
    norms = 2 * D + (2 * H if config.qk_norm else 0)
    embedding = 0 if config.tie_embeddings else config.vocab_size * D
    return matmul_parameters(config) + embedding + config.num_layers * (biases + norms) + D


def matmul_parameters(config: ModelConfig) -> int:
    """N of the formula: weights that multiply every token, the head (also a tied one) among them."""
    D, H = config.hidden_size, config.head_size
    attention = 2 * D * H * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * D * config.intermediate_size) + config.vocab_size * D


def attention_pairs(lengths: Tensor, window: int | None, convention: str) -> Tensor:
    """(query, key) pairs summed over documents of these lengths (any shape, int); float64 scalar."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r}: one of {CONVENTIONS}")
    length = lengths.double()
    width = length if window is None else length.clamp(max=window)
    pairs = length * width
    if convention == "causal":  # a window's first `width` queries see a triangle, all later ones `width` keys
        pairs = pairs - width * width / 2
    return pairs.sum()


def document_lengths(documents_BT: Tensor) -> Tensor:
    """int64 [documents]: lengths of the runs of equal ids, row by row, as the attention mask cuts them."""
    first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first_BT.flatten().nonzero().squeeze(1)
    return torch.diff(starts, append=starts.new_tensor([documents_BT.numel()]))


def train_flops(config: ModelConfig, tokens: float, pairs: float) -> float:
    """FLOPs of forward and backward over real `tokens` with attention `pairs`; forward is a third."""
    attention = 12 * config.num_layers * config.num_heads * config.head_size * pairs
    return 6 * matmul_parameters(config) * tokens + attention


def train_flops_per_token(config: ModelConfig, seq_len: int, convention: str = "full") -> float:
    """The same per token, where every document fills the sequence."""
    pairs = attention_pairs(torch.tensor(seq_len), config.sliding_window, convention)
    return train_flops(config, seq_len, float(pairs)) / seq_len


def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """FLOP/s the device could do: the data sheet's bf16 for a GPU, a measured matmul for a CPU (in `dtype`).

    None for a GPU that is not in the table: a guess would be reported as a fact.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_peak(dtype, torch.get_num_threads())
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device))
    return None


def gpu_peak(name: str) -> float | None:
    """Peak dense bf16 FLOP/s by the name that the driver gives, e.g. "NVIDIA H100 80GB HBM3"."""
    if "laptop" in name.lower():
        return None  # same name, other silicon
    return next((peak for pattern, peak in PEAK_BF16 if re.search(pattern, name, re.IGNORECASE)), None)


@functools.cache
def _cpu_peak(dtype: torch.dtype, threads: int) -> float:
    """Best of many short square matmuls within about 0.3 s; `threads` is only the cache's key.

    The best, not the mean, and short ones: other processes can only make one slower, and on a busy machine
    only a short one gets through undisturbed (with long ones a loaded laptop came out at half its speed, and
    MFU above 1).
    """
    size = 512
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    with torch.inference_mode():
        out = a @ b
        best, end = float("inf"), time.perf_counter() + 0.3
        while time.perf_counter() < end:
            begin = time.perf_counter()
            torch.mm(a, b, out=out)
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
