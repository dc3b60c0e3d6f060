"""The per-user Adam: every user its own steps, the same objective as Newton's, the best values on validation rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plora_ray.adapters.adam import AdamSteps, UserRows, fit_adam
from plora_ray.adapters.fit import Linearisation, UserPrior, linearise, solve_users
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.objective import task_losses
from plora_ray.adapters.packing import Pack, cut_by_length, pack_shares
from tests.adapters.tiny import plm

DIM = 5
ROWS = 40


class ModelPasses:
    """Passes of a tiny model over random texts of 2 to 9 tokens; counts what each pass held."""

    def __init__(self, kind: str = "plora", max_tokens: int = 64, max_rows: int = 12) -> None:
        spec = AdapterSpec(model="tiny", task="classification", outputs=3, rank=2, alpha=4.0, user_dim=DIM, kind=kind)  # type: ignore[arg-type]
        self.model = PersonalizedModel(plm("bert"), spec).eval()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.model.shared_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        self.lengths = torch.randint(2, 10, (ROWS,), generator=generator)
        self.ids = torch.randint(3, 100, (ROWS, 9), generator=generator)
        self.labels = torch.randint(3, (ROWS,), generator=generator)
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self.sizes: list[tuple[int, int]] = []

    def inputs(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        longest = int(self.lengths[rows].max())
        mask = (torch.arange(longest) < self.lengths[rows, None]).long()
        return self.ids[rows, :longest] * mask, mask

    def logits(self, rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        ids, mask = self.inputs(rows)
        self.sizes.append((len(rows), ids.numel()))
        return self.model(ids, mask, vectors)

    def in_step(self, packs: list[Pack]) -> Iterable[Pack | None]:
        return packs

    def rows(self, chosen: torch.Tensor, users: torch.Tensor) -> UserRows:
        return UserRows(chosen, users, self.labels[chosen], self.lengths[chosen])


def nobody(passes: ModelPasses) -> UserRows:
    return passes.rows(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["plora", "lora"])
def test_a_user_fitted_among_others_gets_what_it_gets_alone_and_others_rows_change_nothing(kind: str) -> None:
    passes = ModelPasses(kind)
    owner = torch.tensor([0] * 3 + [1] * 17 + [2] * 1 + [3] * 9).long()
    chosen, held_out = torch.arange(30), torch.tensor([30, 31, 32, 33])
    seeds = [11, 22, 33, 44]
    steps = AdamSteps(epochs=4, learning_rate=0.01, rows_per_step=4, patience=2)
    start = passes.model.population_vector()
    validation = passes.rows(held_out, torch.tensor([1, 1, 3, 3]))
    together = fit_adam(passes, passes.rows(chosen, owner), validation, start, 0.1, seeds, steps, "classification").vectors
    assert all(rows <= 12 and tokens <= 64 for rows, tokens in passes.sizes)
    for user in range(4):
        mine, seen = owner == user, held_out[torch.tensor([1, 1, 3, 3]) == user]
        alone = fit_adam(
            passes, passes.rows(chosen[mine], torch.zeros(int(mine.sum())).long()), passes.rows(seen, torch.zeros(len(seen)).long()),
            start, 0.1, seeds[user : user + 1], steps, "classification",
        ).vectors  # fmt: skip
        assert torch.allclose(together[user], alone[0], atol=1e-5)
        assert user in (1, 3) or (together[user] - start).abs().max() > 1e-3, "who has no validation rows must have moved"
    passes.labels = torch.where(torch.arange(ROWS) < 3, (passes.labels + 1) % 3, passes.labels)
    after = fit_adam(passes, passes.rows(chosen, owner), validation, start, 0.1, seeds, steps, "classification").vectors
    assert torch.equal(after[1:], together[1:]) and not torch.equal(after[0], together[0])


def test_a_step_is_torchs_adam_on_the_users_mean_loss_and_pull() -> None:
    passes = ModelPasses("lora")
    start = passes.model.population_vector()
    rows = torch.arange(5)
    fitted = fit_adam(
        passes, passes.rows(rows, torch.zeros(5).long()), nobody(passes), start, 0.3, [1], AdamSteps(epochs=3, learning_rate=0.01),
        "classification",
    ).vectors[0]  # fmt: skip
    value = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([value], lr=0.01)
    for step in range(3):
        adam.param_groups[0]["lr"] = 0.01 * (1 - 0.9 * step / 3)
        loss = task_losses(passes.model(*passes.inputs(rows), value.expand(5, -1)), passes.labels[rows], "classification").mean()
        adam.zero_grad()
        (loss + 0.3 / (2 * 5) * (value - start).square().sum()).backward(inputs=[value])
        adam.step()
    assert torch.allclose(fitted, value.detach(), atol=1e-5)


def test_with_the_prior_adam_reaches_the_objective_that_newton_reaches() -> None:
    passes = ModelPasses()
    with torch.no_grad():
        for parameter in passes.model.shared_parameters().values():
            parameter.mul_(3)
    owner, rows = torch.arange(30) // 10, torch.arange(30)
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    prior = UserPrior(torch.randn(DIM, generator=generator, dtype=torch.float64) * 0.1, root @ root.T + 0.2 * torch.eye(DIM).double())
    linear = Linearisation(prior.mean.float(), *linearise(passes.model, *passes.inputs(rows), prior.mean, "classification"))
    newton = solve_users(linear, rows, passes.labels[rows], owner, 3, prior, "classification").vectors
    adam = fit_adam(
        passes, passes.rows(rows, owner), nobody(passes), prior.mean.float(), prior.precision, [1, 2, 3],
        AdamSteps(epochs=400, learning_rate=0.02), "classification",
    ).vectors  # fmt: skip

    def objective(vectors: torch.Tensor) -> torch.Tensor:
        away = vectors.double() - prior.mean
        with torch.no_grad():
            losses = task_losses(passes.model(*passes.inputs(rows), vectors), passes.labels[rows], "classification").double()
        return losses.view(3, 10).sum(1) + 0.5 * torch.einsum("ud,de,ue->u", away, prior.precision, away)

    begun = objective(prior.mean.float().expand(3, -1))
    assert (objective(adam) <= objective(newton) + 1e-3 * (begun - objective(newton))).all()
    assert (begun - objective(newton)).min() > 0.05


def test_a_user_keeps_the_epoch_that_is_best_on_its_validation_rows_and_stops_after_its_patience() -> None:
    passes = ModelPasses("lora")
    start = passes.model.population_vector()
    rows = torch.arange(8)
    train = passes.rows(rows, torch.tensor([0] * 4 + [1] * 4))
    contrary = UserRows(rows[:4], torch.zeros(4).long(), (train.labels[:4] + 1) % 3, train.lengths[:4])
    steps = AdamSteps(epochs=40, learning_rate=0.02, patience=2)
    fitted = fit_adam(passes, train, contrary, start, 0.0, [1, 2], steps, "classification")
    free = fit_adam(passes, train, nobody(passes), start, 0.0, [1, 2], steps, "classification")
    assert fitted.converged.tolist() == [True, False], "only the first user has rows that tell it to stop"
    assert torch.allclose(fitted.vectors[1], free.vectors[1], atol=1e-5)

    def contrary_loss(vector: torch.Tensor) -> float:
        with torch.no_grad():
            return task_losses(passes.model(*passes.inputs(rows[:4]), vector[None]), contrary.labels, "classification").mean().item()

    path = [fit_adam(passes, train, nobody(passes), start, 0.0, [1, 2], steps, "classification").vectors[0]]
    assert contrary_loss(fitted.vectors[0]) <= contrary_loss(start) < contrary_loss(path[0])


def test_a_user_without_rows_keeps_its_own_start() -> None:
    passes = ModelPasses()
    starts = torch.randn(2, DIM, generator=torch.Generator().manual_seed(2))
    fitted = fit_adam(
        passes, passes.rows(torch.arange(3), torch.ones(3).long()), nobody(passes), starts, 1.0, [1, 2], AdamSteps(epochs=1),
        "classification",
    )  # fmt: skip
    assert torch.equal(fitted.vectors[0], starts[0]) and not torch.equal(fitted.vectors[1], starts[1])


@settings(max_examples=60, deadline=None)
@given(
    users=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=9), max_size=30),
    max_tokens=st.integers(12, 200),
    max_rows=st.integers(1, 30),
)
def test_packing_holds_every_row_once_within_the_bounds_and_with_its_users_mean(
    users: list[list[int]], max_tokens: int, max_rows: int
) -> None:
    lengths = torch.tensor([length for rows in users for length in rows])
    places = torch.arange(len(lengths)).split([len(rows) for rows in users]) if users else []
    shares = [share for user, mine in enumerate(places) for share in cut_by_length(user, mine, lengths[mine])]
    met, total = [], torch.zeros(len(users))
    for pack in pack_shares(shares, max_tokens, max_rows):
        real = pack.mean_weights > 0
        longest = int(lengths[pack.places].max())
        assert len(pack.users) == 1 or (pack.places.numel() <= max_rows and pack.places.numel() * longest <= max_tokens)
        assert real.float().mean() > 0.7
        total.index_add_(0, pack.users, pack.mean_weights.sum(1))
        met += pack.places[real].tolist()
    assert sorted(met) == list(range(len(lengths))) and torch.allclose(total, torch.ones(len(users)))


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_no_row_of_a_block_is_shorter_than_one_of_a_later_block(lengths: list[int]) -> None:
    shares = cut_by_length(0, torch.arange(len(lengths)), torch.tensor(lengths))
    blocks = [[lengths[place] for place in share.places] for share in shares]
    assert all(min(before) >= max(after) for before, after in itertools.pairwise(blocks))
    assert [share.longest for share in shares] == [max(block) for block in blocks] and {share.of for share in shares} == {len(lengths)}
