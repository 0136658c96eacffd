"""Serve the built book: `make serve`, and `make serve SHARE=1` for the machines of a classroom.

Without SHARE (or HOST=address) only this machine can reach it.
"""

import argparse
import functools
import http.server
import socket
import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent / "_build" / "html"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the terminal for the address."""


def local_address() -> str:
    """The address other machines of the local network see; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]


def open_server(book: Path, host: str, port: int) -> http.server.ThreadingHTTPServer:
    """A server of the folder on the first free port from `port` on, of ten."""
    handler = functools.partial(Handler, directory=str(book))
    for candidate in range(port, port + 10):
        try:
            return http.server.ThreadingHTTPServer((host, candidate), handler)
        except OSError as error:
            last = error
    raise SystemExit(
        f"no free port for {host} from {port} to {port + 9} ({last}): name another with PORT="
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: the whole local network")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--book", type=Path, default=BOOK)
    options = parser.parse_args(arguments)
    if not (options.book / "index.html").is_file():
        print(f"There is no built book in {options.book}: run `make book` first.", file=sys.stderr)
        return 1
    server = open_server(options.book, options.host, options.port)
    shown = local_address() if options.host in ("0.0.0.0", "::") else options.host
    reach = "this machine only" if shown.startswith("127.") else "everyone on the local network"
    try:
        print(f"The book, for {reach}: http://{shown}:{server.server_port}/", flush=True)
        print("Ctrl-C stops.", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
