"""Run the static gates: ``python -m tools.checks [--built]`` prints one finding a line."""

import sys

from tools.checks import built, static
from tools.labs import Book


def main() -> int:
    found = (built if "--built" in sys.argv else static)(Book())
    for finding in found:
        print(finding)
    print(f"checks: {len(found)} findings" if found else "checks: nothing found")
    return 1 if found else 0


sys.exit(main())
