"""Cross-entropy of a linear head that never holds the full logits.

Shapes: N tokens (batch and time flattened), C tokens of one chunk, D hidden width, V vocabulary.

At vocabulary 128k one sequence of 8,192 tokens has 4 GB of fp32 logits, and plain cross-entropy keeps three
such tensors. Here logits exist for one chunk of tokens at a time:
- `linear_cross_entropy_sum` computes the gradient already in the forward pass (Liger Kernel, Hsu et al.
  2024): one matmul for the logits, two for the gradients, nothing recomputed, and only dh and dW kept for the
  backward.
- `linear_cross_entropy` returns each token's loss; what the backward multiplies it with is not known yet, so
  it computes each chunk's logits again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100


def _chunk_logprobs(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """fp32 log-probabilities of one chunk, in memory of their own (callers overwrite them in place).

    One fused kernel, which also does the cast: logsumexp, subtract and exp apart took 10-20 % longer on CPU.
    """
    return F.log_softmax(F.linear(hidden_CD, weight_VD), dim=-1, dtype=torch.float32)


def _accumulate(total: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
    """total_VD += dlogits^T @ hidden, summed in fp32 over chunks."""
    if total.dtype == dlogits_CV.dtype:
        torch.addmm(total, dlogits_CV.t(), hidden_CD, out=total)  # torch's FLOP counter misses `addmm_`
    else:
        total.add_(dlogits_CV.t() @ hidden_CD)


class _SummedLoss(torch.autograd.Function):
    """sum of -log softmax(h W^T)[target]; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, grad: bool
    ) -> Tensor:
        need_h, need_w = (grad and need for need in ctx.needs_input_grad[:2])
        dh_ND = torch.empty_like(hidden_ND) if need_h else None
        dw_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_w else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for begin in range(0, len(targets_N), chunk):
            h_CD, targets_C = hidden_ND[begin : begin + chunk], targets_N[begin : begin + chunk, None]
            ignored_C = targets_C == IGNORE
            index_C = targets_C.masked_fill(ignored_C, 0)
            logprobs_CV = _chunk_logprobs(h_CD, weight_VD)
            loss -= logprobs_CV.gather(1, index_C).masked_fill_(ignored_C, 0.0).sum()
            if not (need_h or need_w):
                continue
            dlogits_CV = logprobs_CV.exp_()
            dlogits_CV.scatter_add_(1, index_C, index_C.new_full(index_C.shape, -1, dtype=torch.float32))
            dlogits_CV = dlogits_CV.masked_fill_(ignored_C, 0.0).to(h_CD.dtype)
            if dh_ND is not None:
                torch.mm(dlogits_CV, weight_VD, out=dh_ND[begin : begin + chunk])
            if dw_VD is not None:
                _accumulate(dw_VD, dlogits_CV, h_CD)
        ctx.save_for_backward(dh_ND, dw_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        dh_ND, dw_VD = ctx.saved_tensors
        # In place, for they are large; autograd's version check refuses a second backward.
        dh_ND = None if dh_ND is None else dh_ND.mul_(grad_loss)
        dw_VD = None if dw_VD is None else dw_VD.mul_(grad_loss).to(ctx.weight_dtype)
        return dh_ND, dw_VD, None, None, None


class _TokenLoss(torch.autograd.Function):
    """-log softmax(h W^T)[target] of each token; the backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        nll_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
        for begin in range(0, len(targets_N), chunk):
            part = slice(begin, begin + chunk)
            targets_C = targets_N[part]
            logprobs_CV = _chunk_logprobs(hidden_ND[part], weight_VD)
            ignored_C = targets_C == IGNORE
            chosen_C = logprobs_CV.gather(1, targets_C.masked_fill(ignored_C, 0)[:, None]).squeeze(1)
            nll_N[part] = chosen_C.neg_().masked_fill_(ignored_C, 0.0)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.chunk = chunk
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        need_h, need_w = ctx.needs_input_grad[:2]
        dh_ND = torch.empty_like(hidden_ND) if need_h else None
        dw_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_w else None
        ignored_N = targets_N == IGNORE
        scale_N, index_N = grad_N.masked_fill(ignored_N, 0.0), targets_N.masked_fill(ignored_N, 0)
        for begin in range(0, len(targets_N), ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            scale_C = scale_N[part, None]
            dlogits_CV = _chunk_logprobs(hidden_ND[part], weight_VD).exp_().mul_(scale_C)
            dlogits_CV.scatter_add_(1, index_N[part, None], -scale_C)
            dlogits_CV = dlogits_CV.to(hidden_ND.dtype)
            if dh_ND is not None:
                torch.mm(dlogits_CV, weight_VD, out=dh_ND[part])
            if dw_VD is not None:
                _accumulate(dw_VD, dlogits_CV, hidden_ND[part])
        return dh_ND, None if dw_VD is None else dw_VD.to(weight_VD.dtype), None, None


def linear_cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    """Scalar fp32 sum of -log p(target) over the targets that are not IGNORE; exactly 0 if there is none.

    Gradients flow to `hidden_ND` and `weight_VD`, each only if it asks. One backward per forward
    (retain_graph will not do); no second derivative. Equal to F.cross_entropy(h W^T, reduction="sum").
    """
    return _SummedLoss.apply(hidden_ND, weight_VD, targets_N, chunk, torch.is_grad_enabled())


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    """nll_N in fp32: -log p(target) of each token, 0 where the target is IGNORE. Differentiable once."""
    return _TokenLoss.apply(hidden_ND, weight_VD, targets_N, chunk)
