"""The second article (ResNet-18 and two losses): its errors happen, and their repairs work."""

import ast
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

LISTING = """
model = torch.hub.load('pytorch/vision:v0.9.0', 'resnet18', pretrained=True)
train_loader = torch.utils.data.DataLoader(train_dataset, batch_size=32, shuffle=True)
val_loader = torch.utils.data.DataLoader(val_dataset, batch_size=32, shuffle=False)
optimizer = optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
for epoch in range(epochs):
    pass
"""


def as_printed(y, p):
    """The formula term by term: the minus sign and the mean reach only the first sum."""
    return -(y * p.log()).mean() + ((1 - y) * (1 - p).log()).sum()


def repaired_loss(y, p):
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def test_the_printed_cross_entropy_rewards_wrong_answers_without_bound():
    y = torch.zeros(1, dtype=torch.float64)
    values = [as_printed(y, torch.tensor([p], dtype=torch.float64)) for p in (0.1, 0.9, 1 - 1e-9)]
    assert 0 > values[0] > values[1] > values[2]
    assert values[2] < -20


def test_the_printed_cross_entropy_pushes_negatives_towards_one():
    y, step = torch.zeros(1, dtype=torch.float64), 1e-6
    for p in (0.2, 0.5, 0.8):
        ends = [torch.tensor([p + s], dtype=torch.float64) for s in (-step, step)]
        slopes = [(f(y, ends[1]) - f(y, ends[0])) / (2 * step) for f in (as_printed, repaired_loss)]
        assert slopes[0].item() == pytest.approx(-1 / (1 - p), rel=1e-6)
        assert slopes[1].item() == pytest.approx(1 / (1 - p), rel=1e-6)


def test_the_repaired_cross_entropy_is_the_usual_one():
    p, y = torch.rand(20, dtype=torch.float64), torch.randint(2, (20,)).double()
    assert torch.allclose(repaired_loss(y, p), F.binary_cross_entropy(p, y))


def test_the_binary_form_is_the_two_class_case_of_the_form_the_listing_uses():
    logits, y = torch.randn(12, 2, dtype=torch.float64), torch.randint(2, (12,))
    binary = repaired_loss(y.double(), torch.sigmoid(logits[:, 1] - logits[:, 0]))
    assert torch.allclose(F.cross_entropy(logits, y), binary)
    with pytest.raises(RuntimeError):
        F.binary_cross_entropy(torch.rand(12).double(), torch.full((12,), 2.0).double())


@pytest.fixture
def resnet():
    return torchvision.models.resnet18(weights=None)


def test_a_head_of_a_thousand_classes_accepts_two_labels_in_silence(resnet):
    assert resnet.fc.out_features == 1000
    logits = resnet(torch.randn(4, 3, 32, 32))
    assert torch.isfinite(F.cross_entropy(logits, torch.tensor([0, 1, 0, 1])))
    assert logits.shape == (4, 1000)


def test_validation_without_eval_moves_the_statistics_of_batchnorm(resnet):
    batch = torch.randn(4, 3, 32, 32) + 1
    before = resnet.bn1.running_mean.clone()
    with torch.no_grad():
        resnet(batch)
    assert not resnet.bn1.running_mean.equal(before)
    resnet.eval()
    before = resnet.bn1.running_mean.clone()
    with torch.no_grad():
        resnet(batch)
    assert resnet.bn1.running_mean.equal(before)


def test_without_eval_a_prediction_depends_on_its_neighbours(resnet):
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(resnet(images)[0], resnet(images[:2])[0], atol=1e-3)
        resnet.eval()
        assert torch.allclose(resnet(images)[0], resnet(images[:2])[0], atol=1e-4)


def test_the_listing_trains_every_layer_and_not_the_last_few(resnet):
    F.cross_entropy(resnet(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 0, 1])).backward()
    optimiser = torch.optim.SGD(resnet.parameters(), lr=0.001, momentum=0.9)
    before = resnet.conv1.weight.detach().clone()
    optimiser.step()
    assert not resnet.conv1.weight.equal(before)


def test_the_listing_uses_names_that_it_never_defines():
    tree = ast.parse(LISTING)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {"torch", "optim", "range"}
    loaded = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    assert loaded - stored == {"train_dataset", "val_dataset", "epochs"}


def test_pretrained_is_deprecated_in_this_torchvision():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torchvision.models.resnet18(pretrained=False)
    assert any("'pretrained' is deprecated" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    ("first", "runs"), [("", "the copy of the tag"), ("import torchvision; ", "torchvision.models")]
)
def test_the_hub_tag_decides_nothing_once_torchvision_is_imported(tmp_path, first, runs):
    models = tmp_path / "torchvision" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    (models / "__init__.py").touch()
    (models / "resnet.py").write_text(
        textwrap.dedent("""
            class Copy:
                __module__ = "the copy of the tag"

            def resnet18(pretrained=False):
                return Copy()
        """)
    )
    (tmp_path / "hubconf.py").write_text("from torchvision.models.resnet import resnet18\n")
    program = (
        f"{first}import torch; "
        f"model = torch.hub.load({str(tmp_path)!r}, 'resnet18', source='local', pretrained=False); "
        "print(type(model).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith(runs), done.stderr


def test_the_repaired_listing_keeps_the_best_epoch_and_not_the_last(repaired):
    names = repaired("repaired-s1")
    model = nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[-1.0], [1.0]])
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    wrong, right = ([(x, labels)] for labels in (1 - y, y))  # it learns the opposite of the truth
    history = names["fine_tune"](model, wrong, right, epochs=50, lr=0.1)
    assert (history[0], history[-1]) == (1, 0)
    assert names["accuracy"](model, right) == 1


def test_the_repaired_listing_gets_a_new_head_and_leaves_validation_alone(repaired, resnet):
    names = repaired("repaired-s1")
    model = names["with_new_head"](resnet, classes=2)
    assert model.fc.out_features == 2
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
    loader = DataLoader(data, batch_size=4)
    history = names["fine_tune"](model, loader, loader, epochs=2)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert names["accuracy"](model, loader) == max(history)
    assert all(value.equal(buffers[name]) for name, value in model.named_buffers())


def test_the_printed_loop_ends_with_a_model_that_its_own_validation_had_refused():
    x, y = torch.randn(64, 2), torch.arange(64) % 2
    x[:, 0] = 2.0 * y - 1
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    printed = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):  # it is taught the opposite of what it is asked
        optimizer.zero_grad()
        F.cross_entropy(model(x), 1 - y).backward()
        optimizer.step()
        with torch.no_grad():
            printed.append((torch.max(model(x).data, 1)[1] == y).float().mean().item())
    assert printed[0] == max(printed) == 1 and printed[-1] == 0
    assert (model(x).argmax(1) == y).float().mean() == printed[-1]


class OneOrTwo(nn.Module):
    """A classifier of items with one or two inputs, which share their first layer."""

    def __init__(self, inputs, source=None):
        super().__init__()
        self.branch, self.head = nn.Linear(6, 8), nn.Linear(8 * inputs, 2)
        if source is not None:
            self.branch.load_state_dict(source.branch.state_dict())

    def forward(self, x):  # (n, inputs, 6)
        return self.head(torch.tanh(self.branch(x)).flatten(1))


def trained(model, x, y, steps=60):
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("transferred", [False, True])
def test_where_a_network_starts_and_how_many_inputs_it_has_are_two_questions(inputs, transferred):
    x = torch.randn(64, 2, 6)
    source = OneOrTwo(1)
    trained(source, x[:, :1], (x[:, 0, 0] > 0).long())  # the source has one input
    model = OneOrTwo(inputs, source if transferred else None)
    started_at_the_source = torch.equal(model.branch.weight, source.branch.weight)
    assert started_at_the_source == transferred
    losses = trained(model, x[:, :inputs], (x[:, :inputs, 0].sum(1) > 0).long())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.branch.weight, source.branch.weight)  # the branch learnt, too


def multiplications(model, x, y):
    """Of one forward and backward pass, twice over: each is counted with its addition."""
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    return counter.get_total_flops()


def test_an_update_costs_the_same_wherever_the_weights_start(resnet):
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    other = torchvision.models.resnet18(weights=None)
    other.load_state_dict({k: v + 0.01 for k, v in resnet.state_dict().items()})
    assert multiplications(resnet, x, y) == multiplications(other, x, y) > 0


def test_a_linear_model_costs_a_small_part_of_an_update_of_the_network(resnet):
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1000))
    assert multiplications(linear, x, y) < multiplications(resnet, x, y) / 10


def test_momentum_makes_the_printed_rate_ten_times_as_large_on_a_steady_slope():
    def last_step(**settings):
        weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.SGD([weight], lr=0.001, **settings)
        for _ in range(300):
            before, weight.grad = weight.item(), torch.full_like(weight, -2.0)
            optimiser.step()
        return weight.item() - before

    assert "lr=0.001, momentum=0.9" in LISTING
    assert last_step() == pytest.approx(0.001 * 2, rel=1e-9)
    assert last_step(momentum=0.9) == pytest.approx(10 * 0.001 * 2, rel=1e-9)


def test_no_last_layer_repairs_what_a_first_layer_repairs_exactly():
    torch.manual_seed(0)
    first, last = nn.Linear(6, 20).double(), nn.Linear(20, 1).double()
    images = torch.rand(4000, 6, dtype=torch.float64)
    with torch.no_grad():
        last.weight.normal_()
        answers = last(torch.relu(first(images)))
        negatives = 1 - images
        seen = torch.cat([torch.relu(first(negatives)), torch.ones(4000, 1).double()], 1)
        best = torch.linalg.lstsq(seen, answers).solution  # of all last layers
        left = (seen @ best - answers).square().mean() / answers.var()
        repaired = nn.Linear(6, 20).double()
        repaired.weight.copy_(-first.weight)
        repaired.bias.copy_(first.bias + first.weight.sum(1))
        assert torch.allclose(last(torch.relu(repaired(negatives))), answers, atol=1e-12)
    assert left > 0.01
