"""With the network cut, nothing beyond the machine answers, and the loopback still does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import unplugged

PROGRAM = Path(unplugged.__file__)

# 192.0.2.1 is an address for documentation: nobody answers there, so what counts is that the call
# is refused on this machine, and by whom.
PROBES = {
    "connect": "socket.create_connection(('192.0.2.1', 80), 5)",
    "lookup": "socket.getaddrinfo('example.org', 80)",
    "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    "asyncio": "asyncio.run(asyncio.open_connection('192.0.2.1', 80))",
}
REFUSED = """\
import asyncio, errno, socket
try:
    {probe}
except socket.gaierror as error:
    print("namespace" if error.errno == socket.EAI_AGAIN else error)
except OSError as error:
    told = "sockets" if "unplugged" in str(error) else error
    print("namespace" if error.errno == errno.ENETUNREACH else told)
"""
LOOPBACK = """\
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    with socket.create_connection(server.getsockname()) as client:
        client.sendall(b"here")
        print(server.accept()[0].recv(4).decode())
"""


@pytest.fixture(params=["namespace", "sockets"])
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "namespace" and not unplugged.namespace_works():
        pytest.skip("this machine allows no network namespace")
    return request.param


def cut(way: str, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, PROGRAM, *command],
        env={**os.environ, "UNPLUGGED": way},
        text=True,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize("probe", PROBES)
def test_nothing_beyond_the_machine_answers(way, probe):
    # A second Python below the first: the cut must reach the children of the command.
    child = REFUSED.format(probe=PROBES[probe])
    result = cut(way, "sh", "-c", 'exec "$0" -c "$1"', sys.executable, child)
    assert result.stdout.splitlines()[-1] == way, result.stderr


def test_a_namespace_has_nothing_but_a_loopback():
    if not unplugged.namespace_works():
        pytest.skip("this machine allows no network namespace")
    listing = "import socket; print([name for _, name in socket.if_nameindex()])"
    result = cut("namespace", sys.executable, "-c", listing)
    assert result.stdout.splitlines()[-1] == "['lo']"


def test_the_loopback_works(way):
    assert cut(way, sys.executable, "-c", LOOPBACK).stdout.splitlines()[-1] == "here"


def test_it_says_which_way_was_taken(way):
    said = {"namespace": "a namespace without routes", "sockets": "sockets are blocked"}
    assert said[way] in cut(way, "true").stdout


def test_the_status_of_the_command_is_passed_on(way):
    assert cut(way, "sh", "-c", "exit 7").returncode == 7


def test_without_a_command_it_says_how_to_call_it():
    result = cut("sockets")
    assert result.returncode == 2 and "name a command" in result.stdout


def test_other_programs_find_a_dead_proxy():
    result = cut("sockets", "sh", "-c", "echo $https_proxy $HTTPS_PROXY $no_proxy")
    assert result.stdout.split()[-3:] == [unplugged.DEAD_PROXY] * 2 + ["localhost,127.0.0.1"]
