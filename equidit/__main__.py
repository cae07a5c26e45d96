"""The `equidit` command, as `python -m equidit` runs it too."""

import sys


def main() -> int:
    """The `equidit` command; its status is 0, 1 for an error, 130 for Ctrl-C."""
    try:
        from .cli import run
    except ModuleNotFoundError as error:
        print(f"equidit: {error}", file=sys.stderr)
        return 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
