"""Residual vector quantization against NumPy, its averages against the formula, dead entries, k-means."""

import numpy as np
import pytest
import torch

from stoker.model.residual_quantizer import DEAD, Codebook, ResidualQuantizer, k_means


def quantizer(books: int = 3, entries: int = 8, size: int = 4, decay: float = 0.9) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(books, entries, size, decay)


def latent(B: int = 2, T: int = 5, L: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, T, L), torch.arange(T) < torch.tensor([[T], [3]])[:B]


def test_codes_are_the_nearest_entries_of_what_is_left() -> None:
    model, (x, valid) = quantizer().eval(), latent()
    found = model(x, valid)
    books = [book.entries.numpy() for book in model.books]
    distance = 0.0
    for row, column in np.argwhere(valid.numpy()):
        left = x[row, column].numpy().astype(np.float64)
        for place, entries in enumerate(books):
            squares = ((left - entries) ** 2).sum(1)
            assert int(found.codes[row, column, place]) == squares.argmin()
            distance += squares.min() / 4
            left = left - entries[squares.argmin()]
        assert found.vectors[row, column].numpy() == pytest.approx(x[row, column].numpy() - left, abs=1e-6)
    assert float(found.distance) == pytest.approx(distance, rel=1e-5)
    assert torch.equal(model.vectors(found.codes)[valid], found.vectors.detach()[valid])
    assert torch.allclose(model.vectors(found.codes[..., :1]), model.books[0].entries[found.codes[..., 0]])


def test_gradients_pass_straight_through() -> None:
    model, (x, valid) = quantizer().eval(), latent()
    x.requires_grad_()
    weights = torch.randn_like(x)
    (model(x, valid).vectors * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)


def test_rows_that_use_fewer_books_are_the_sums_of_these() -> None:
    model, (x, valid) = quantizer().train(), latent()
    whole, part = model(x, valid), model(x, valid, torch.tensor([1, 3]))
    assert torch.equal(whole.codes[1], part.codes[1]) and torch.equal(whole.vectors[1], part.vectors[1])
    assert torch.allclose(part.vectors[0], model.books[0].entries[part.codes[0, :, 0]], atol=1e-6)
    for book in model.books:
        book.sums = {}
    model(x, valid, torch.tensor([1, 3]))
    assert [float(book.sums["uses"].sum()) for book in model.books] == [8, 3, 3], "only what uses a book counts for it"


def test_entries_are_moving_averages_of_what_chose_them() -> None:
    model, (x, valid) = quantizer(books=1), latent()
    book = model.books[0]
    uses, totals = book.uses.numpy().copy(), book.totals.numpy().copy()
    for _ in range(3):
        book.sums = {}
        codes = model(x, valid).codes[valid][:, 0].numpy()
        chosen = np.eye(8)[codes]
        uses, totals = 0.9 * uses + 0.1 * chosen.sum(0), 0.9 * totals + 0.1 * chosen.T @ x[valid].numpy()
        book.apply_sums(book.sums, torch.tensor(0.0))
        assert book.uses.numpy() == pytest.approx(uses, rel=1e-5)
        assert book.entries.numpy() == pytest.approx(totals / uses[:, None], abs=1e-5)


def test_two_forward_passes_add_up() -> None:
    model, (x, valid) = quantizer(), latent()
    model(x, valid)
    model(x, valid)
    twice = [{**book.sums} for book in model.books]
    for book in model.books:
        book.sums = {}
    model(torch.cat([x, x]), torch.cat([valid, valid]))
    for book, sums in zip(model.books, twice):
        assert all(torch.allclose(book.sums[name], sums[name], atol=1e-5) for name in sums)


def test_a_dropped_step_changes_nothing() -> None:
    book = Codebook(8, 4, 0.9)
    before = {name: tensor.clone() for name, tensor in book.state_dict().items()}
    sums = {name: torch.full_like(getattr(book, name), torch.nan) for name in ("uses", "totals", "spread")}
    book.apply_sums(sums, torch.tensor(1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in book.state_dict().items())


def test_dead_entries_are_revived_beside_the_most_used() -> None:
    torch.manual_seed(0)
    book = Codebook(16, 2, 0.9)
    cloud = torch.randn(600, 2) + torch.tensor([5.0, 5.0])
    with torch.no_grad():
        book.entries[:] = -100.0
        book.entries[3] = torch.tensor([5.0, 5.0])
        book.totals.copy_(book.entries)
    book.train()
    for _ in range(60):
        book.sums = {}
        book(cloud[None], torch.ones(1, 600, dtype=torch.bool))
        book.apply_sums(book.sums, torch.tensor(0.0))
    share = torch.bincount(book.eval()(cloud[None], torch.ones(1, 600, dtype=torch.bool))[0], minlength=16) / 600
    assert int((share > DEAD / 16).sum()) >= 15, "nearly all entries are used again"
    assert float(book.uses.sum()) == pytest.approx(600, rel=0.02), "no use is lost or made"


def test_without_dead_entries_none_moves() -> None:
    book = Codebook(8, 4, 0.9)
    entries = book.entries.clone()
    book.apply_sums({}, torch.tensor(0.0))
    assert torch.allclose(book.entries, entries)


def test_k_means_finds_clusters() -> None:
    torch.manual_seed(0)
    centres = 20 * torch.eye(5)
    points = centres[torch.arange(500) % 5] + 0.1 * torch.randn(500, 5)
    inertia = min(float(torch.cdist(points, k_means(points, 5)).amin(1).square().sum()) for _ in range(20))
    assert inertia < 60, "about 500 x 5 x 0.01"
    assert float(torch.cdist(points, k_means(points, 500)).amin(1).max()) < 0.05, "as many clusters as points"


def test_the_first_entries_are_those_of_k_means() -> None:
    model = quantizer(books=2, entries=16, size=4)
    x = torch.randn(400, 4)
    before = float((x - model.eval()(x[None], torch.ones(1, 400, dtype=torch.bool)).vectors[0]).square().mean())
    model.initialize(x)
    found = model(x[None], torch.ones(1, 400, dtype=torch.bool))
    assert float((x - found.vectors[0]).square().mean()) < 0.5 * before
    for book in model.books:
        entries = book.entries.clone()
        book.apply_sums({}, torch.tensor(0.0))
        assert torch.allclose(book.entries, entries, atol=0.2), "the averages are those of the entries"
