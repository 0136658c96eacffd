"""The fifth article (two linear models): its errors happen, and their repairs work."""

import copy

import pytest
import torch
from torch import nn, optim


class Model(nn.Module):
    """Both models of the article: it defines the same one twice."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(10, 20)
        self.layer2 = nn.Linear(20, 10)

    def forward(self, x):
        return self.layer2(self.layer1(x))


def moved(model, before):
    return any(not value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def listing():
    """Run the article's program step by step and keep what its second loop began with."""
    torch.manual_seed(0)
    source, target = Model(), Model()
    optimizer, criterion = optim.SGD(source.parameters(), lr=0.01), nn.MSELoss()
    data, labels = torch.randn(100, 10), torch.randn(100, 10)
    for _ in range(100):
        optimizer.zero_grad()
        criterion(source(data), labels).backward()
        optimizer.step()
    target.load_state_dict(source.state_dict())
    start = copy.deepcopy(target.state_dict())
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = criterion(target(data), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"source": source, "target": target, "start": start, "losses": losses,
            "data": data, "labels": labels}  # fmt: skip


def test_the_target_model_never_moves(listing):
    assert not moved(listing["target"], listing["start"])
    assert len(set(listing["losses"])) == 1


def test_nor_does_the_source_model_in_the_second_loop(listing):
    assert not moved(listing["source"], listing["start"])
    assert all(parameter.grad is None for parameter in listing["source"].parameters())


def test_the_gradients_of_the_target_model_pile_up_a_hundredfold(listing):
    target = listing["target"]
    piled = [parameter.grad.clone() for parameter in target.parameters()]
    target.zero_grad()
    nn.MSELoss()(target(listing["data"]), listing["labels"]).backward()
    for parameter, heap in zip(target.parameters(), piled, strict=True):
        assert torch.allclose(heap, 100 * parameter.grad, rtol=1e-3)


def test_random_labels_leave_nothing_to_transfer(listing):
    fresh, labels = torch.randn(2000, 10), torch.randn(2000, 10)
    criterion = nn.MSELoss()
    with torch.no_grad():
        assert criterion(listing["source"](fresh), labels) > criterion(0 * labels, labels)


def test_two_linear_layers_are_one_linear_map():
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(7, 10).double()
    first, second = model.layer1, model.layer2
    weight = second.weight @ first.weight
    bias = second.weight @ first.bias + second.bias
    assert torch.allclose(model(x), x @ weight.T + bias)
    first.register_forward_hook(lambda _, __, hidden: hidden.relu())
    assert not torch.allclose(model(x), x @ weight.T + bias)


def test_the_repaired_listing_moves_the_target_and_helps_it(repaired):
    source, models, errors = repaired("repaired-s4")["main"]()
    first = {name: model[0].weight for name, model in models.items()}
    assert not first["transferred"].equal(source[0].weight)
    assert first["transferred and frozen"].equal(source[0].weight)
    assert errors["transferred"] < errors["from scratch"]
    assert errors["transferred and frozen"] < errors["transferred"] / 2
