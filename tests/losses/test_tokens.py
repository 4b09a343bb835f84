import math

import pytest
import torch

from padd_ds.losses.tokens import cross_entropy_sum, global_mean, token_logprobs
from tests.largest import LargestFloat32

B, T, V = 3, 5, 7


@pytest.fixture
def logits_BTV():
    return 3 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def targets_BT():
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask_BT():
    return torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])


def slow_logprob(logits_V, target, temperature=1.0):
    exponentials = [math.exp(value / temperature) for value in logits_V.tolist()]
    return math.log(exponentials[target] / sum(exponentials))


def test_token_logprobs_of_two_tokens_by_hand():
    logits_BTV = torch.tensor([[[0.0, math.log(3.0)], [2.0, 2.0]]])
    expected = torch.tensor([[math.log(0.75), math.log(0.5)]])
    torch.testing.assert_close(token_logprobs(logits_BTV, torch.tensor([[1, 0]])), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1024])
def test_token_logprobs_match_plain_loops(logits_BTV, targets_BT, temperature, chunk_tokens):
    got_BT = token_logprobs(logits_BTV, targets_BT, temperature, chunk_tokens=chunk_tokens)
    for b in range(B):
        for t in range(T):
            slow = slow_logprob(logits_BTV[b, t], targets_BT[b, t], temperature)
            assert got_BT[b, t].item() == pytest.approx(slow, rel=1e-12)


def test_token_logprobs_of_bfloat16_are_computed_in_float32(logits_BTV, targets_BT):
    half_BTV = logits_BTV.bfloat16()
    got_BT = token_logprobs(half_BTV, targets_BT)
    assert got_BT.dtype == torch.float32
    torch.testing.assert_close(got_BT, token_logprobs(half_BTV.float(), targets_BT), rtol=0, atol=0)


def test_token_logprobs_gradient(logits_BTV, targets_BT):
    def function(x_BTV):
        return token_logprobs(x_BTV, targets_BT, 1.7, chunk_tokens=4)

    assert torch.autograd.gradcheck(function, (logits_BTV.requires_grad_(),))


def test_cross_entropy_sum_matches_plain_loops_over_unmasked_tokens(logits_BTV, targets_BT, mask_BT):
    slow = sum(-slow_logprob(logits_BTV[b, t], targets_BT[b, t]) for b in range(B) for t in range(T) if mask_BT[b, t])
    got = cross_entropy_sum(logits_BTV, targets_BT, mask_BT, chunk_tokens=4)
    assert got.shape == ()
    assert got.item() == pytest.approx(slow, rel=1e-12)


def test_cross_entropy_sum_never_reads_padding(logits_BTV, targets_BT, mask_BT):
    def loss_and_gradient(x_BTV, y_BT):
        x_BTV = x_BTV.clone().requires_grad_()
        loss = cross_entropy_sum(x_BTV, y_BT, mask_BT, chunk_tokens=4)
        return loss.detach(), torch.autograd.grad(loss, x_BTV)[0]

    padded_BT = mask_BT == 0
    garbage_BTV = torch.where(padded_BT[..., None], torch.nan, logits_BTV)
    loss, gradient_BTV = loss_and_gradient(logits_BTV, targets_BT)
    other_loss, other_gradient_BTV = loss_and_gradient(garbage_BTV, targets_BT.masked_fill(padded_BT, -100))
    assert torch.equal(loss, other_loss)
    assert torch.equal(gradient_BTV, other_gradient_BTV)
    assert (gradient_BTV[padded_BT] == 0).all()
    assert (gradient_BTV[~padded_BT] != 0).all()


def test_cross_entropy_sum_of_a_batch_is_the_sum_over_its_rows(logits_BTV, targets_BT, mask_BT):
    rows = [cross_entropy_sum(logits_BTV[b : b + 1], targets_BT[b : b + 1], mask_BT[b : b + 1]) for b in range(B)]
    torch.testing.assert_close(sum(rows), cross_entropy_sum(logits_BTV, targets_BT, mask_BT))


def test_cross_entropy_sum_gradient(logits_BTV, targets_BT, mask_BT):
    def function(x_BTV):
        return cross_entropy_sum(x_BTV, targets_BT, mask_BT, chunk_tokens=4)

    assert torch.autograd.gradcheck(function, (logits_BTV.requires_grad_(),))


def test_an_empty_mask_gives_zero_loss_and_zero_gradient(logits_BTV, targets_BT):
    loss = cross_entropy_sum(logits_BTV.requires_grad_(), targets_BT, torch.zeros(B, T))
    loss.backward()
    assert loss.item() == 0
    assert (logits_BTV.grad == 0).all()


def test_global_mean_by_hand():
    assert global_mean(torch.tensor(6.0), 4, 2).item() == 3.0
    assert global_mean(torch.tensor(6.0), torch.tensor(4), 2).item() == 3.0


def test_global_mean_without_tokens_is_zero():
    assert global_mean(torch.tensor(0.0), 0, 2).item() == 0.0
    assert global_mean(torch.tensor(0.0), torch.tensor(0), 2).item() == 0.0


@pytest.mark.parametrize("world_size", [1, 3])
def test_averaging_global_means_over_ranks_gives_the_mean_over_all_tokens(logits_BTV, targets_BT, mask_BT, world_size):
    count = int(mask_BT.sum())
    expected = cross_entropy_sum(logits_BTV, targets_BT, mask_BT) / count
    shards = [slice(rank * B // world_size, (rank + 1) * B // world_size) for rank in range(world_size)]
    per_rank = [
        global_mean(cross_entropy_sum(logits_BTV[s], targets_BT[s], mask_BT[s]), count, world_size) for s in shards
    ]
    torch.testing.assert_close(torch.stack(per_rank).mean(), expected)


@pytest.mark.parametrize("loss", ["logprobs", "cross_entropy"])
def test_no_float32_tensor_exceeds_a_chunk_forward_or_backward(loss):
    tokens, vocabulary, chunk_tokens = 64, 50, 8
    logits_BTV = torch.randn(2, tokens // 2, vocabulary).bfloat16().requires_grad_()
    targets_BT = torch.zeros(2, tokens // 2, dtype=torch.int64)
    with LargestFloat32() as largest:
        if loss == "logprobs":
            token_logprobs(logits_BTV, targets_BT, chunk_tokens=chunk_tokens).sum().backward()
        else:
            cross_entropy_sum(logits_BTV, targets_BT, targets_BT == 0, chunk_tokens=chunk_tokens).backward()
    assert logits_BTV.grad is not None
    assert chunk_tokens < largest.elements <= chunk_tokens * vocabulary


def test_no_chunk_of_float32_is_kept_for_backward():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    logits_BTV = torch.randn(2, 32, 50).bfloat16().requires_grad_()
    targets_BT = torch.zeros(2, 32, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(logits_BTV, targets_BT, chunk_tokens=8)
    assert all(tensor.shape[-1:] != (50,) or tensor.dtype != torch.float32 for tensor in kept)
