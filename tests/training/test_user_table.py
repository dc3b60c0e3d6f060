"""The row-sparse Adam of user vectors."""

from __future__ import annotations

import torch

from plora_ray.training.user_table import UserTable


def test_a_users_row_moves_as_dense_adamw_would_move_it_alone_at_the_steps_that_met_it() -> None:
    table = UserTable(3, 4, learning_rate=0.05, weight_decay=0.2)
    alone = torch.zeros(4, requires_grad=True)
    adam = torch.optim.AdamW([alone], lr=0.05, weight_decay=0.2)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        gradient = torch.randn(3, 4, generator=generator)
        users = torch.tensor([0, 1, 2]) if step % 3 == 0 else torch.tensor([0, 2])  # user 1 is met every third step only
        table.step(users, gradient[users])
        if step % 3 == 0:
            alone.grad = gradient[1].clone()
            adam.step()
    assert torch.allclose(table.vectors[1], alone.detach(), atol=1e-6)


def test_absent_users_never_move_and_repeated_users_add_their_gradients() -> None:
    table, other = UserTable(4, 2, learning_rate=0.1), UserTable(4, 2, learning_rate=0.1)
    gradient = torch.tensor([[1.0, -2.0], [0.5, 0.5], [3.0, 1.0]])
    table.step(torch.tensor([2, 2, 0]), gradient)
    other.step(torch.tensor([2, 0]), torch.stack([gradient[0] + gradient[1], gradient[2]]))
    assert torch.equal(table.vectors, other.vectors)
    assert not table.vectors[[1, 3]].any() and not table.first[[1, 3]].any()
    before = table.vectors[2].clone()
    table.step(torch.tensor([0]), gradient[:1])
    assert torch.equal(table.vectors[2], before)


def test_a_saved_slice_of_rows_comes_back_at_any_place() -> None:
    table = UserTable(5, 3, learning_rate=0.1)
    table.step(torch.arange(5), torch.randn(5, 3))
    saved = {name: values[1:4].clone() for name, values in table.state().items()}
    fresh = UserTable(9, 3, learning_rate=0.1)
    fresh.load_state(6, saved)
    for name, values in fresh.state().items():
        assert torch.equal(values[6:9], saved[name]) and not values[:6].any()


def test_a_rank_without_users_gets_zeros_for_its_idle_passes() -> None:
    vectors = UserTable(0, 3, learning_rate=0.1).gather(torch.zeros(1, dtype=torch.int64))
    assert vectors.shape == (1, 3) and not vectors.any() and vectors.requires_grad
