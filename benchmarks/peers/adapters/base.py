"""What the laws ask of every library: to train, and to say a mean loss."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmarks.peers.tasks import Task

Settings = dict[str, dict[str, dict[str, Any]]]  # law → label → options


class Adapter:
    """One library, set up in one way.

    Attributes:
        key, title: what it is called in the record and in the table.
        packages: the distributions whose versions matter.
        setup: how it was set up, in words, with all that departs from the defaults everywhere.
        notes: law → what was set for this law, or what its figure means.
        not_offered: law → why the library has nothing that the law could be asked of.
        settings: law → label → options of `train` or `evaluate`, measured besides the defaults.
    """

    key: str
    title: str
    packages: tuple[str, ...]
    setup: str
    notes: ClassVar[dict[str, str]] = {}
    not_offered: ClassVar[dict[str, str]] = {}
    settings: ClassVar[Settings] = {}

    def train(self, task: Task) -> None:
        """Train `task.model` in place."""
        raise NotImplementedError

    def evaluate(self, task: Task, batch_size: int) -> float:
        """The mean loss of `task.model` on the held-out items, in batches of `batch_size`."""
        raise NotImplementedError
