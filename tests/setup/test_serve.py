"""The book for a classroom: served, and to this machine only unless asked."""

import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tools import serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("<title>The book</title>")
    (tmp_path / "secret").write_text("not a page")
    return tmp_path / "html"


class Served:
    """The server as a program, and what it said."""

    def __init__(self, *options: str):
        command = [sys.executable, "-m", "tools.serve", *options]
        # a shell that runs the tests in the background lets them ignore Ctrl-C
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, **heard
        )
        self.said = self.process.stdout.readline()
        self.port = int(re.search(r":(\d+)/", self.said)[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=20)
        self.process.stdout.close()

    def listens_on(self) -> set[str]:
        """The IPv4 addresses on which the port is taken, tried by binding to them."""
        taken = set()
        for address in ("127.0.0.1", "127.0.0.2"):
            with socket.socket() as probe:
                try:
                    probe.bind((address, self.port))
                except OSError:
                    taken.add(address)
        return taken


def test_the_book_is_served_to_this_machine_only(book):
    with Served("--book", str(book)) as served:
        assert "this machine only" in served.said
        assert served.listens_on() == {"127.0.0.1"}
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/", timeout=10) as page:
            assert b"The book" in page.read()


def test_nothing_outside_the_book_is_served(book):
    with Served("--book", str(book)) as served, pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"http://127.0.0.1:{served.port}/../secret", timeout=10)


def test_sharing_opens_it_to_the_local_network_and_says_so(book):
    with Served("--book", str(book), "--host", "0.0.0.0") as served:
        assert "everyone on the local network" in served.said
        assert served.listens_on() == {"127.0.0.1", "127.0.0.2"}


def test_ctrl_c_ends_it_without_a_traceback(book):
    with Served("--book", str(book)) as served:
        pass
    assert served.process.returncode == 0


def test_a_taken_port_is_passed_over(book):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Served("--book", str(book), "--port", str(port)) as served:
            assert served.port > port


def test_without_a_built_book_it_says_what_to_do(tmp_path, capsys):
    assert serve.main(["--book", str(tmp_path)]) == 1
    assert "run `make book` first" in capsys.readouterr().err
