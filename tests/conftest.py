"""What holds for all tests: Ctrl-C is heard, and a card is used by the tests that ask for one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from unittest.mock import patch

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited, and handed on to every program
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, for deterministic products
NO_CARD = "needs a CUDA card, and torch finds none here: `make gpu` where there is one"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests with the marker `gpu` where there is no card."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=NO_CARD))


def _auto(name: str) -> AbstractContextManager:
    # where `device="auto"` means this device
    import torch

    from transferkit import devices

    device, resolve = torch.device(name), devices.resolve_device

    def resolved(given="auto"):
        return device if given == "auto" else resolve(given)

    return patch.object(devices, "resolve_device", resolved)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The processor, then a card: `device="auto"` means it in a test that asks for this.

    The card computes with deterministic algorithms and without TF32, as laws that hold bit for bit,
    or to the last digits of float32, need it.
    """
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with _auto(request.param), exact:
        torch.use_deterministic_algorithms(before or request.param == "cuda")
        yield request.param
        torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def on_the_processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a machine with a card, too, a test that does not ask for it computes on the processor.

    One that asks must use it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        yield
    elif request.node.get_closest_marker("gpu"):
        before = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
        yield
        after = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
        assert after > before, "the test has the marker gpu, but nothing was computed on the card"
    elif "device" in request.fixturenames:
        yield
    else:
        with _auto("cpu"):
            yield
