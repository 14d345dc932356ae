"""Projectors: shapes, sizes by formula, scale at the start, and that one layer learns what is linear."""

import pytest
import torch

from distill.encoder import Features
from distill.models.match_head import MatchHead, Projector, match_head_parameters


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("hidden", [0, 32])
def test_both_come_out_in_the_teachers_width_through_their_own_projectors(hidden):
    head = MatchHead(12, 20, hidden)
    token = torch.randn(3, 12)
    out = head(Features(token, token[:, None].expand(3, 5, 12)))
    assert out.cls.shape == (3, 20)
    assert out.patches.shape == (3, 5, 20)
    assert not torch.allclose(out.cls, out.patches[:, 0])
    torch.testing.assert_close(out.patches[:, 0], head.patches(token))
    assert sum(p.numel() for p in head.parameters()) == match_head_parameters(12, 20, hidden)


def test_hidden_zero_is_linear_and_a_hidden_layer_is_not():
    a, b = torch.randn(2, 4, 12)
    for hidden, linear in ((0, True), (32, False)):
        projector = Projector(12, 20, hidden)
        assert torch.allclose(projector(a) + projector(b), projector(a + b), atol=1e-5) is linear


def test_only_what_is_matched_has_parameters_and_all_of_them_get_gradient():
    features = Features(torch.randn(2, 12), torch.randn(2, 4, 12))
    only = MatchHead(12, 20, 16, patches=False)
    out = only(features)
    assert out.patches.shape == (2, 4, 0)
    assert sum(p.numel() for p in only.parameters()) == match_head_parameters(12, 20, 16, parts=1)
    out.cls.square().sum().backward()
    assert all(p.grad is not None for p in only.parameters())
    assert MatchHead(12, 20, 16, cls=False)(features).cls.shape == (2, 0)


@pytest.mark.parametrize("dim", [16, 384])
@pytest.mark.parametrize("hidden", [0, 64, 2048])
def test_the_first_output_is_of_a_standardised_targets_size_at_any_width(dim, hidden):
    out = Projector(dim, 96, hidden)(torch.nn.functional.layer_norm(torch.randn(64, dim), (dim,)))
    assert 0.4 < out.std().item() < 1.6


def test_it_learns_the_map_between_two_widths():
    x = torch.randn(256, 8)
    target = torch.tanh(x @ torch.randn(8, 12))
    projector = Projector(8, 12, 64)
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (projector(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * target.var().item()
