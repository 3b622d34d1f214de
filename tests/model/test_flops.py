"""FLOPs against torch's own counter, pairs against counting, peaks by name."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.model import flops
from trainer.model.config import ModelConfig
from trainer.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=160, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=96
)


@pytest.mark.parametrize("tied", [False, True])
def test_the_formula_equals_torchs_counter(tied: bool):
    """With attention as plain matrix products torch counts every pair: the "full" convention."""
    config = ModelConfig(**vars(CONFIG) | {"tie_embeddings": tied})
    batch, length = 2, 32
    model = Transformer(config)
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, targets_BT=tokens).backward()
    pairs = flops.attention_pairs(torch.full((batch,), length), None, "full")
    assert counter.get_total_flops() == flops.train_flops(config, batch * length, float(pairs))
    per_token = flops.train_flops_per_token(config, length)
    assert per_token == pytest.approx(counter.get_total_flops() / (batch * length))


@pytest.mark.parametrize("window", [None, 1, 5, 1000])
def test_pairs_equal_counting_them(window: int | None):
    lengths = [1, 7, 30]
    reach = window or 10**9
    full = sum(length * min(length, reach) for length in lengths)
    assert flops.attention_pairs(torch.tensor(lengths), window, "full") == full
    # The convention leaves out half of the diagonal: exactly half a pair per query of the triangle.
    causal = sum(min(query + 1, reach) for length in lengths for query in range(length))
    diagonal = sum(min(length, reach) for length in lengths) / 2
    assert flops.attention_pairs(torch.tensor(lengths), window, "causal") == causal - diagonal


def test_unknown_convention():
    with pytest.raises(ValueError, match="convention='strict'"):
        flops.attention_pairs(torch.tensor([1]), None, "strict")


def test_document_lengths_are_runs_row_by_row():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [2, 2, 2, 2, 2, 2], [1, 2, 1, 2, 1, 2]], dtype=torch.int32)
    assert flops.document_lengths(documents).tolist() == [2, 3, 1, 6, 1, 1, 1, 1, 1, 1]


def test_llama_8b_at_8192():
    """The number that the module's text gives: attention is 22 % under "full"."""
    llama = ModelConfig(128256, 4096, 32, 32, 8, None, 14336)
    full, causal = (flops.train_flops_per_token(llama, 8192, convention) for convention in flops.CONVENTIONS)
    matmul = 6 * flops.matmul_parameters(llama)
    assert matmul == 6 * (8_030_261_248 - 128256 * 4096 - 65 * 4096)
    assert (full - matmul) / full == pytest.approx(0.22, abs=0.005)
    assert full - causal == pytest.approx(causal - matmul)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("Some Future Chip", None),
    ],
)
def test_peaks_by_name(name: str, tera: float | None):
    assert flops.gpu_peak(name) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpus_peak_is_measured_once():
    peak = flops.peak_flops("cpu", torch.float32)
    assert 1e9 < peak < 1e14
    assert flops.peak_flops(torch.device("cpu"), torch.float32) == peak
    assert flops.peak_flops("meta") is None
