"""Run a command with the network cut: `python -m tools.unplugged make book`.

On Linux the command gets a network namespace of its own, with a loopback (Jupyter's kernels and
the browser talk over 127.0.0.1) and no route anywhere. Where the machine forbids that, every Python
process below refuses to connect beyond the loopback, and other programs find a dead proxy.
UNPLUGGED=sockets in the environment takes the second way at once.
"""

import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
DEAD_PROXY = "http://127.0.0.1:9"


def enter_namespace() -> None:
    """Move this process into a network namespace with nothing but a loopback.

    Another user than root also needs a user namespace, in which it keeps its own number. Raises
    OSError where the machine does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | (CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def namespace_works() -> bool:
    """Whether `enter_namespace` succeeds, tried in a child because there is no way back."""
    if not sys.platform.startswith("linux"):
        return False
    child = os.fork()
    if child == 0:
        try:
            enter_namespace()
        except (OSError, AttributeError):
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host in ("", "localhost")


def guard() -> None:
    """Make this process refuse every address beyond the loopback, names to look up included."""

    def refuse(event: str, arguments: tuple) -> None:
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address = arguments[1]  # a path or None is a Unix socket or one connected before
            host = address[0] if isinstance(address, tuple) else None
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if isinstance(host, str) and not is_loopback(host):
            raise OSError(f"unplugged: {host} is beyond this machine, and the network is cut")

    sys.addaudithook(refuse)


def run_guarded(command: list[str]) -> int:
    """Run the command with `guard` in every Python process below it."""
    with tempfile.TemporaryDirectory() as folder:
        start = f"import runpy\nrunpy.run_path({str(Path(__file__).resolve())!r})['guard']()\n"
        Path(folder, "sitecustomize.py").write_text(start)
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            value = "localhost,127.0.0.1" if name == "no_proxy" else DEAD_PROXY
            environment[name] = environment[name.upper()] = value
        return subprocess.call(command, env=environment)


def main(command: list[str]) -> int:
    if not command:
        print("unplugged: name a command to run: python -m tools.unplugged make book")
        return 2
    if os.environ.get("UNPLUGGED") != "sockets" and namespace_works():
        print("unplugged: the network is cut by a namespace without routes", flush=True)
        enter_namespace()
        os.execvp(command[0], command)
    print(
        "unplugged: no network namespace here; Python's sockets are blocked beyond the loopback, "
        "other programs get a dead proxy",
        flush=True,
    )
    return run_guarded(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
