"""The first article (BERT for Chinese sentences): its errors happen, and their repairs work."""

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

GOOD, BAD = "the film is good", "a bad film"


class AsPrinted(nn.Module):
    """The article's classifier: the encoder, a linear layer, two named arguments."""

    def __init__(self, folder):
        super().__init__()
        self.bert = transformers.BertModel.from_pretrained(folder)
        self.fc = nn.Linear(self.bert.config.hidden_size, 2)

    def forward(self, input_ids, attention_mask):
        return self.fc(self.bert(input_ids=input_ids, attention_mask=attention_mask)[1])


def test_training_only_the_head_has_another_minimum_than_training_everything():
    x = torch.randn(50, 3, dtype=torch.float64)
    y = x[:, :1] - 2 * x[:, 2:]
    theta = torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)  # blind to the third column
    head_only = torch.linalg.lstsq(x @ theta, y).solution
    both = torch.linalg.lstsq(x, y).solution
    assert F.mse_loss(x @ both, y) < 1e-20
    assert F.mse_loss(x @ theta @ head_only, y) > 1


def test_the_gradient_of_the_sum_grows_with_the_data_and_that_of_the_mean_does_not():
    weight = torch.randn(4, 3, requires_grad=True)
    x, y = torch.randn(10, 4), torch.randint(3, (10,))

    def gradient(reduction, times):
        logits = x.repeat(times, 1) @ weight
        loss = F.cross_entropy(logits, y.repeat(times), reduction=reduction)
        return torch.autograd.grad(loss, weight)[0]

    assert torch.allclose(gradient("sum", 7), 7 * gradient("sum", 1), atol=1e-5)
    assert torch.allclose(gradient("mean", 7), gradient("mean", 1), atol=1e-6)
    assert nn.CrossEntropyLoss().reduction == "mean"


def test_the_listing_trains_the_feature_extractor_too(tiny_bert, tiny_tokenizer):
    model = AsPrinted(tiny_bert)
    before = {name: value.clone() for name, value in model.named_parameters()}
    batch = tiny_tokenizer([GOOD, BAD], return_tensors="pt", padding=True)
    batch.pop("token_type_ids")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5)
    F.cross_entropy(model(**batch), torch.tensor([1, 0])).backward()
    optimiser.step()
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert any(name.startswith("bert.encoder") for name in moved)


def test_the_listing_stops_at_token_type_ids(tiny_bert, tiny_tokenizer):
    batch = tiny_tokenizer([GOOD, BAD], return_tensors="pt", padding=True, truncation=True)
    with pytest.raises(TypeError, match="token_type_ids"):
        AsPrinted(tiny_bert)(**batch)


def test_from_pretrained_leaves_the_encoder_without_dropout(tiny_bert, tiny_tokenizer):
    model = AsPrinted(tiny_bert)
    assert model.training
    assert not any(m.training for m in model.modules() if isinstance(m, nn.Dropout))
    batch = tiny_tokenizer([GOOD], return_tensors="pt")
    batch.pop("token_type_ids")
    assert model(**batch).equal(model(**batch))
    model.train()
    assert not model(**batch).equal(model(**batch))


def test_two_right_answers_of_two_are_compatible_with_a_poor_classifier():
    interval = binomtest(2, 2).proportion_ci(0.95, method="exact")
    assert (round(interval.low, 2), interval.high) == (0.16, 1.0)
    assert 0.5**2 == 0.25  # how often a coin gets both right


def train(model, x, y, steps=200):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()


def test_fine_tuning_forgets_the_old_task_and_a_frozen_backbone_does_not():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y.astype(np.int64))
    shuffled = x[:, torch.randperm(64)]  # the new task: the same digits in another pixel order
    backbone, old_head = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10)
    old = nn.Sequential(backbone, old_head)

    def on_the_old_task():
        with torch.no_grad():
            return (old(x).argmax(1) == y).float().mean().item()

    train(old, x, y)
    before = on_the_old_task()
    train(nn.Sequential(backbone.requires_grad_(False), nn.Linear(64, 10)), shuffled, y)
    assert on_the_old_task() == before > 0.95
    train(nn.Sequential(backbone.requires_grad_(True), nn.Linear(64, 10)), shuffled, y)
    assert on_the_old_task() < before - 0.1


def test_features_made_alike_make_a_head_wrong_where_the_shares_of_the_labels_differ():
    random = np.random.default_rng(0)

    def domain(positive, n=10_000):
        y = np.arange(n) < positive * n
        return 4 * y + random.normal(size=n), y

    (source, y_source), (target, y_target) = domain(0.5), domain(0.1)
    assert np.mean((source > 2) != y_source) < 0.03 and np.mean((target > 2) != y_target) < 0.03
    ranks = target.argsort().argsort()
    alike = np.sort(source)[ranks]  # the target's features, with the source's distribution
    assert np.array_equal(np.sort(alike), np.sort(source))
    errors = [
        np.mean((source > cut) != y_source) + np.mean((alike > cut) != y_target)
        for cut in np.quantile(source, np.linspace(0, 1, 101))
    ]
    assert min(errors) > 0.5 - 0.1 - 1e-9


def test_the_repaired_listing_trains_with_dropout_and_judges_without(
    repaired, tiny_bert, tiny_tokenizer
):
    names = repaired("repaired-s0")
    encoder = transformers.BertModel.from_pretrained(tiny_bert)
    model = names["TextClassifier"](encoder, classes=2)
    batch = tiny_tokenizer([GOOD, BAD], return_tensors="pt", padding=True)
    labels = torch.tensor([1, 0])
    losses = names["fine_tune"](model, batch, labels, epochs=30, lr=1e-2)
    assert losses[-1] < losses[0]
    assert all(m.training for m in model.modules() if isinstance(m, nn.Dropout))
    assert names["accuracy"](model, batch, labels) == 1
    assert not model.training
