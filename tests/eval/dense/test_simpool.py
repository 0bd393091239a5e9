"""SimPool against its formula, and what its result must not depend on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from unlabeled.eval.dense.simpool import SimPool


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pooling(**settings):
    torch.manual_seed(3)
    return SimPool(8, **settings)


def by_the_formula(pool, x, gamma):
    """One image (N, D) in float64, token by token."""
    x, query, key = x.double(), pool.query.weight.double(), pool.key.weight.double()
    v = F.layer_norm(x, (8,), eps=1e-6)
    logits = torch.stack([(query @ x.mean(0)) @ (key @ one) / 8**0.5 for one in v])
    a = logits.exp() / logits.exp().sum()
    if gamma is None:
        return sum(weight * one for weight, one in zip(a, v, strict=True))
    raised = (v - v.min() + 1e-6) ** gamma
    return sum(weight * one for weight, one in zip(a, raised, strict=True)) ** (1 / gamma)


@pytest.mark.parametrize("gamma", [None, 1.25, 2.0])
def test_formula(gamma):
    pool, x = pooling(gamma=gamma), tokens(3, 7, 8)
    found = pool(x)
    for image, row in zip(x, found, strict=True):
        torch.testing.assert_close(row.double(), by_the_formula(pool, image, gamma), atol=1e-5, rtol=1e-5)
    assert found.shape == (3, 8)
    torch.testing.assert_close(pool.attention(x).sum(1), torch.ones(3))


def test_a_map_is_its_places_and_attention_keeps_its_shape():
    pool, x = pooling(), tokens(2, 8, 3, 5)
    torch.testing.assert_close(pool(x), pool(x.flatten(2).transpose(1, 2)))
    assert pool.attention(x).shape == (2, 3, 5)
    torch.testing.assert_close(pool.attention(x).flatten(1), pool.attention(x.flatten(2).transpose(1, 2)))


def test_the_order_of_places_does_not_matter():
    pool, x = pooling(), tokens(2, 9, 8)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pool(x[:, order]), pool(x))
    torch.testing.assert_close(pool.attention(x[:, order]), pool.attention(x)[:, order])


def test_a_image_does_not_depend_on_its_batch_but_officially_does():
    x = tokens(2, 9, 8)
    x[1, 0, 0] = -50  # the norm makes it the smallest of both images
    torch.testing.assert_close(pooling()(x)[:1], pooling()(x[:1]))
    reference = pooling(reference=True)
    assert not torch.allclose(reference(x)[:1], reference(x[:1]), atol=1e-3)
    torch.testing.assert_close(reference(x[:1]), pooling()(x[:1]))


def test_one_place_is_its_norm_up_to_the_minimum():
    x = tokens(4, 1, 8)
    normed = F.layer_norm(x[:, 0], (8,), eps=1e-6)
    torch.testing.assert_close(pooling(gamma=None)(x), normed)
    torch.testing.assert_close(pooling()(x), normed - normed.amin(1, keepdim=True) + 1e-6, atol=1e-5, rtol=1e-4)


def test_equal_places_get_equal_weights():
    pool, x = pooling(gamma=None), tokens(2, 1, 8).repeat(1, 6, 1)
    torch.testing.assert_close(pool.attention(x), torch.full((2, 6), 1 / 6))
    torch.testing.assert_close(pool(x), F.layer_norm(x[:, 0], (8,), eps=1e-6))


def test_gradients_are_finite_where_a_value_is_the_minimum_and_constant_images_are_safe():
    pool = pooling(learned_beta=True)
    pool(torch.cat([tokens(1, 5, 8), torch.ones(1, 5, 8)])).sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in pool.parameters())
    with pytest.raises(ValueError, match="learned_beta: has no effect without gamma"):
        SimPool(8, gamma=None, learned_beta=True)


def test_untrained_is_the_attention_of_the_mean():
    x = tokens(2, 6, 8)
    expected = (F.layer_norm(x, (8,), eps=1e-6) @ x.mean(1, keepdim=True).transpose(1, 2) / 8**0.5).softmax(1)
    torch.testing.assert_close(SimPool.untrained(8).attention(x), expected.squeeze(2))
