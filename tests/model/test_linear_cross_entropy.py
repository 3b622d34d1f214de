"""The chunked head against plain cross-entropy over the full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.model.loss import IGNORE, linear_cross_entropy, linear_cross_entropy_sum

N, D, V = 53, 16, 211


def inputs(ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets, reduction=reduction, ignore_index=IGNORE)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * expected.detach().abs().max().item())


@pytest.mark.parametrize("chunk", [1, 10, N - 1, N, 1000])
def test_the_sum_and_its_gradients_equal_plain_cross_entropy(chunk: int):
    hidden, weight, targets = inputs()
    scale = torch.tensor(0.37)
    expected = plain(hidden, weight, targets)
    expected_grads = torch.autograd.grad(expected * scale, (hidden, weight))
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk)
    grads = torch.autograd.grad(loss * scale, (hidden, weight))
    close(loss, expected)
    close(grads[0], expected_grads[0])
    close(grads[1], expected_grads[1])


@pytest.mark.parametrize("chunk", [1, 10, N, 1000])
def test_token_losses_and_any_weighting_of_them_equal_plain_cross_entropy(chunk: int):
    hidden, weight, targets = inputs()
    factors = torch.randn(N, generator=torch.Generator().manual_seed(1))
    expected = plain(hidden, weight, targets, "none")
    expected_grads = torch.autograd.grad(expected @ factors, (hidden, weight))
    nll = linear_cross_entropy(hidden, weight, targets, chunk)
    grads = torch.autograd.grad(nll @ factors, (hidden, weight))
    close(nll, expected)
    assert (nll[targets == IGNORE] == 0).all()
    close(grads[0], expected_grads[0])
    close(grads[1], expected_grads[1])


def test_the_token_losses_sum_to_the_sum():
    hidden, weight, targets = inputs()
    close(
        linear_cross_entropy(hidden, weight, targets, 8).sum(),
        linear_cross_entropy_sum(hidden, weight, targets, 8),
    )


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
def test_no_supervised_token_gives_zero_loss_and_zero_gradients(function):
    hidden, weight, targets = inputs()
    targets[:] = IGNORE
    loss = function(hidden, weight, targets, 8).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
@pytest.mark.parametrize("wrong", [-1, V])
def test_a_target_outside_the_vocabulary_is_an_error(function, wrong: int):
    hidden, weight, targets = inputs()
    targets[7] = wrong
    with pytest.raises(RuntimeError, match="out of bounds"):
        function(hidden, weight, targets, 8)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
def test_extreme_logits_stay_finite(function):
    hidden, weight, targets = inputs(ignored=0.0)
    hidden, weight = (1e4 * hidden.detach()).requires_grad_(), weight
    loss = function(hidden, weight, targets, 8).sum()
    loss.backward()
    close(loss, plain(hidden, weight, targets))
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
def test_each_gradient_is_made_only_if_asked_for(function):
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    only_hidden = hidden.detach().requires_grad_()
    function(only_hidden, weight.detach(), targets, 8).sum().backward()
    close(only_hidden.grad, expected[0])
    only_weight = weight.detach().requires_grad_()
    function(hidden.detach(), only_weight, targets, 8).sum().backward()
    close(only_weight.grad, expected[1])
    assert not function(hidden.detach(), weight.detach(), targets, 8).requires_grad


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
def test_bf16_is_close_to_fp32_and_keeps_its_dtype(function):
    hidden, weight, targets = inputs()
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().float().requires_grad_() for x in low]
    loss, expected = function(*low, targets, 8).sum(), plain(*exact, targets)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for mine, reference in zip(low, exact):
        assert mine.grad.dtype == torch.bfloat16
        error = (mine.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-2


class Largest(TorchDispatchMode):
    """Notes every matrix product, and the most elements that any tensor made under it has."""

    def __init__(self):
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
def test_logits_exist_for_one_chunk_only(function):
    hidden, weight, targets = inputs()
    with Largest() as full:
        plain(hidden, weight, targets).backward()
    assert full.elements == N * V
    chunk = 20
    with Largest() as chunked:
        function(hidden, weight, targets, chunk).sum().backward()
    assert chunked.elements == max(chunk * V, V * D)


def test_without_gradients_only_the_logits_are_computed():
    hidden, weight, targets = inputs()
    with Largest() as work, torch.no_grad():
        loss = linear_cross_entropy_sum(hidden, weight, targets, N)
    assert not loss.requires_grad
    assert work.products == 1
    with Largest() as work:
        linear_cross_entropy_sum(hidden, weight, targets, N).backward()
    assert work.products == 3  # logits, dh, dW: nothing is computed twice


def test_the_gradient_of_the_sum_cannot_be_taken_twice():
    """Its buffers are scaled in place; a second backward must not return them scaled again."""
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, targets, 8)
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_head_compiles():
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    compiled = torch.compile(linear_cross_entropy_sum, backend="aot_eager")
    grads = torch.autograd.grad(compiled(hidden, weight, targets, 16), (hidden, weight))
    close(grads[0], expected[0])
    close(grads[1], expected[1])
