"""The fourth article (sentiment, tags, advice): its errors happen, and their repairs work."""

import importlib.metadata

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import transferkit as tk

TAGS = {"O": 0, "B-PER": 1, "I-PER": 2, "B-ORG": 3, "I-ORG": 4, "B-LOC": 5, "I-LOC": 6}


def test_partial_fine_tuning_and_freezing_as_described_train_the_same_layers():
    layers = list(range(12))
    partial = {"trains": layers[-2:]}
    frozen = {"freezes": layers[:-2]}
    assert partial["trains"] == [layer for layer in layers if layer not in frozen["freezes"]]


def test_the_minimum_is_the_same_wherever_training_starts_and_what_is_found_is_not():
    def loss(theta):
        return (theta**2 - 1) ** 2 + 0.3 * theta

    def train(start):
        theta = torch.tensor(start, requires_grad=True)
        optimiser = torch.optim.SGD([theta], lr=0.01)
        for _ in range(500):
            optimiser.zero_grad()
            loss(theta).backward()
            optimiser.step()
        return theta.item()

    grid = torch.linspace(-2, 2, 4001)
    best = grid[loss(grid).argmin()].item()
    assert train(-1.5) == pytest.approx(best, abs=1e-2)
    assert train(1.5) > 0 > best


def test_cross_entropy_takes_features_for_classes_and_leaves_the_head_alone():
    backbone, head = nn.Linear(3, 8), nn.Linear(8, 2)
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    eight_classes = -F.log_softmax(backbone(x), dim=1)[torch.arange(5), y].mean()
    loss = F.cross_entropy(backbone(x), y)
    assert loss.item() == pytest.approx(eight_classes.item(), rel=1e-6)
    loss.backward()
    assert backbone.weight.grad is not None
    assert head.weight.grad is None
    F.cross_entropy(head(backbone(x)), y).backward()
    assert head.weight.grad is not None


def test_a_tokenizer_cannot_be_moved_to_a_device(tiny_tokenizer):
    with pytest.raises(AttributeError):
        tiny_tokenizer.to("cpu")


@pytest.fixture
def encoder(tiny_bert):
    return transformers.BertModel.from_pretrained(tiny_bert)


def test_the_bare_encoder_has_no_output_for_classes(encoder, tiny_tokenizer):
    output = encoder(**tiny_tokenizer(["a good film"], return_tensors="pt"))
    assert not hasattr(output, "logits")
    assert output.pooler_output.shape == (1, encoder.config.hidden_size)


def test_an_optimiser_made_for_the_encoder_never_moves_a_head(encoder, tiny_tokenizer):
    head = nn.Linear(encoder.config.hidden_size, 2)
    before = head.weight.detach().clone()
    optimiser = torch.optim.Adam(encoder.parameters(), lr=2e-5)
    features = encoder(**tiny_tokenizer(["a good film"], return_tensors="pt")).pooler_output
    F.cross_entropy(head(features), torch.tensor([1])).backward()
    optimiser.step()
    assert head.weight.equal(before)


def test_neither_the_loss_nor_max_accepts_a_model_output(encoder, tiny_tokenizer):
    output = encoder(**tiny_tokenizer(["a good film"], return_tensors="pt"))
    with pytest.raises(TypeError):
        nn.CrossEntropyLoss()(output, torch.tensor([1]))
    with pytest.raises(TypeError):
        torch.max(output, 1)


def test_the_last_part_of_the_listing_uses_data_that_nothing_made():
    program = """
epochs = 5
batch_size = 32
for epoch in range(epochs):
    train_loss = train(model, train_data, batch_size)
    dev_accuracy = evaluate(model, dev_data, batch_size)
test_accuracy = evaluate(model, test_data, batch_size)
"""
    given = {"model": None, "train": lambda *_: 0, "evaluate": lambda *_: 0}
    with pytest.raises(NameError, match="train_data"):
        exec(program, dict(given))
    exec(program, given | {"train_data": [], "dev_data": [], "test_data": []})


def test_five_epochs_of_few_examples_hardly_move_a_new_head():
    def five_epochs(lr):
        torch.manual_seed(0)
        x = torch.randn(1200, 64)
        y = (x.sum(1) > 0).long()
        head = nn.Linear(64, 2)
        nn.init.normal_(head.weight, std=0.02)
        start = head.weight.detach().clone()
        optimiser = torch.optim.Adam(head.parameters(), lr=lr)
        for rows in torch.cat([torch.randperm(200) for _ in range(5)]).view(5, 200):
            for batch in rows.split(32):
                optimiser.zero_grad()
                F.cross_entropy(head(x[batch]), y[batch]).backward()
                optimiser.step()
        accuracy = (head(x[200:]).argmax(1) == y[200:]).float().mean().item()
        return accuracy, (head.weight - start).abs().max().item()

    accuracy, travelled = five_epochs(2e-5)  # of 7 updates each
    assert travelled < 1.4 * 35 * 2e-5 < 0.02 / 20
    assert accuracy < 0.65
    assert five_epochs(1e-2)[0] > 0.85


def test_the_mean_of_batch_means_is_not_the_mean_over_the_examples():
    losses = torch.tensor([0.0] * 16 + [1.0])
    batches = [batch for (batch,) in DataLoader(TensorDataset(losses), batch_size=16)]
    as_printed = sum(batch.mean().item() for batch in batches) / len(batches)
    assert as_printed == 0.5
    assert losses.mean().item() == pytest.approx(1 / 17)


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8).numpy()])
def test_a_text_tokenizer_refuses_an_image(tiny_tokenizer, image):
    with pytest.raises(ValueError, match="text input"):
        tiny_tokenizer(image)


class AsPrinted(Dataset):
    """The labels of the article's data set, word for word; the inputs do not matter here."""

    def __init__(self, labels, max_len=128):
        self.labels, self.max_len = labels, max_len

    def __getitem__(self, item):
        encoded_label = [TAGS[label] for label in self.labels]
        encoded_label.extend([TAGS["O"]] * (self.max_len - len(encoded_label)))
        return torch.tensor(encoded_label)


def test_every_item_gets_the_labels_of_all_items():
    data = AsPrinted(["B-PER", "O", "B-LOC"])
    assert data[0].equal(data[1]) and data[1].equal(data[2])
    assert len(AsPrinted(["O"] * 200)[0]) == 200  # and no longer fits 128 inputs


def test_padding_labelled_as_outside_dominates_the_loss():
    logits = torch.zeros(1, 128, 7)
    logits[..., 0] = 5  # a model that answers "O" everywhere
    printed = torch.zeros(1, 128, dtype=torch.long)
    printed[0, 1:6] = torch.tensor([1, 2, 0, 5, 6])
    ignored = printed.clone()
    ignored[0, 0] = -100
    ignored[0, 6:] = -100
    as_printed, right = (F.cross_entropy(logits[0], y[0]).item() for y in (printed, ignored))
    assert (printed == 0).sum().item() == 124
    assert right > 10 * as_printed


def test_words_and_pieces_differ_in_number(english_pieces):
    words = ["Unforgettable", "film", "by", "Almodóvar"]
    assert len(english_pieces(" ".join(words))) == 10 > len(words) == 4


def test_adamw_has_left_transformers_and_lives_in_torch():
    with pytest.raises(ImportError):
        from transformers import AdamW  # noqa: F401
    assert issubclass(torch.optim.AdamW, torch.optim.Optimizer)


def test_the_report_refuses_nested_lists():
    truth, guess = [["O", "B-PER"], ["O", "O"]], [["O", "O"], ["O", "O"]]
    with pytest.raises(ValueError, match="not supported"):
        classification_report(truth, guess)


def test_scores_of_tags_flatter_where_scores_of_entities_do_not(repaired):
    truth = [["B-PER", "I-PER", "O", "O", "O", "O", "O", "O"]]
    guess = [["B-PER", "O", "O", "O", "O", "O", "O", "O"]]
    right = sum(a == b for a, b in zip(truth[0], guess[0], strict=True))
    assert right / len(truth[0]) == 0.875
    assert repaired("repaired-s3")["entity_f1"](truth, guess) == 0


def digits_head(lr, steps=200):
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x - x.mean(0)) / (x.std(0) + 1e-6)).float(), torch.tensor(y)
    torch.manual_seed(0)
    head = nn.Linear(64, 10)
    start = head.weight.detach().clone()
    optimiser = torch.optim.Adam(head.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(head(x), y).backward()
        optimiser.step()
    accuracy = (head(x).argmax(1) == y).float().mean().item()
    return accuracy, (head.weight - start).abs().max().item()


def test_a_new_head_learns_nothing_at_the_recommended_learning_rate():
    accuracy, travelled = digits_head(lr=1e-5)
    assert travelled <= 200 * 1e-5 * 1.1
    assert accuracy < 0.3
    assert digits_head(lr=1e-2)[0] > 0.95


def test_the_rate_of_the_articles_own_programs_is_outside_its_search():
    tried = [1e-5 / 2**step for step in range(20)]
    assert max(tried) < 2e-5
    best = max(digits_head(lr, steps=100)[0] for lr in tried[:4])
    assert best < 0.3 < 0.9 < digits_head(1e-2, steps=100)[0]


def test_rates_that_shrink_by_a_factor_stop_a_head_where_it_is():
    weight = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=1e-5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9)
    places = []
    for _ in range(300):
        optimiser.zero_grad()
        (weight - 1).square().sum().backward()
        optimiser.step()
        schedule.step()
        places.append(weight.item())
    assert places[-1] == places[-50]  # it has converged
    assert places[-1] < 1.01 * 1e-5 / (1 - 0.9)  # and not to the minimum at 1


def test_one_rate_means_three_lengths_of_a_step():
    start, moved = 5 * torch.ones(4, 4), {}
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor):
        weight = nn.Parameter(start.clone())
        optimiser = make([weight], lr=1e-3, weight_decay=0.0)
        weight.grad = torch.full_like(weight, 20.0)
        optimiser.step()
        moved[make.__name__] = (start - weight.detach()).mean().item()
    assert moved["SGD"] == pytest.approx(1e-3 * 20, rel=1e-3)  # times the gradient
    assert moved["AdamW"] == pytest.approx(1e-3, rel=1e-2)  # whatever the gradient
    assert moved["Adafactor"] == pytest.approx(1e-3 * 5, rel=1e-2)  # times the weights


def test_the_python_of_the_instructions_is_refused_by_the_versions_of_today():
    for package in ("torch", "transformers", "torchvision"):
        wanted = importlib.metadata.metadata(package)["Requires-Python"]
        assert not SpecifierSet(wanted).contains("3.8")


def test_hidden_tokens_are_labels_without_anybody_and_classes_are_not():
    tokens = torch.randint(3, 20, (8, 12))
    hidden = tk.masked(tk.data.tensors(tokens), rate=0.5, mask=1, special=(0, 2), vocabulary=20)
    model = tk.Staged([("tokens", nn.Embedding(20, 4)), ("head", nn.Linear(4, 20))])
    tk.fit(model, tk.masked_lm(), hidden, plan=tk.finetune(1), device="cpu")

    images = tk.data.tensors(torch.randn(8, 12))
    model = tk.Staged([("features", nn.Linear(12, 4)), ("head", nn.Linear(4, 3))])
    with pytest.raises((ValueError, TypeError), match="label"):
        tk.fit(model, tk.classification(), images, plan=tk.finetune(1), device="cpu")


def test_the_repaired_listing_gives_each_word_its_own_label_and_ignores_the_rest(
    repaired, tiny_tokenizer
):
    names = repaired("repaired-s3")
    words, tags = [["anna", "lives"], ["films"]], [["B-PER", "O"], ["O"]]
    batch = names["encode"](tiny_tokenizer, words, tags, TAGS)
    assert batch["labels"].tolist() == [[-100, 1, 0, -100], [-100, 0, -100, -100]]
    assert batch["input_ids"].shape == batch["labels"].shape


def test_the_repaired_score_counts_whole_entities(repaired):
    entity_f1 = repaired("repaired-s3")["entity_f1"]
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "B-ORG"]]
    assert entity_f1(truth, truth) == 1
    guess = [["B-PER", "I-PER", "O", "B-ORG"], ["B-ORG", "O"]]
    assert entity_f1(truth, guess) == pytest.approx(2 * 2 / (4 + 3))


def test_a_classifier_made_robust_can_be_right_less_often():
    # labels +-1; one loud clue that is right in 0.9 of the cases, 100 faint ones of mean 0.3 y.
    # The faint ones are exchangeable and the loss is convex, so they may share one weight.
    random = torch.Generator().manual_seed(0)
    y = 2.0 * torch.randint(2, (20_000,), generator=random) - 1
    loud = torch.where(torch.rand(20_000, generator=random) < 0.9, y, -y)
    faint = 100 * 0.3 * y + 10 * torch.randn(20_000, generator=random)  # their sum

    def margins(w, rows, radius):  # after the worst move of each clue by at most the radius
        scores = y[rows] * (w[0] * loud[rows] + w[1] * faint[rows])
        return scores - radius * (w[0].abs() + 100 * w[1].abs())

    right = {}
    train, test = slice(0, 10_000), slice(10_000, None)
    for trained in (0.0, 0.6):
        w = torch.zeros(2, requires_grad=True)
        optimiser = torch.optim.Adam([w], lr=0.02)
        for _ in range(400):
            optimiser.zero_grad()
            F.softplus(-margins(w, train, trained)).mean().backward()
            optimiser.step()
        for attacked in (0.0, 0.6):
            right[trained, attacked] = (margins(w, test, attacked) > 0).float().mean().item()
    assert right[0.0, 0.0] > 0.99
    assert right[0.6, 0.0] == pytest.approx(0.9, abs=0.02)
    assert right[0.6, 0.6] > 0.85 > 0.1 > right[0.0, 0.6]
