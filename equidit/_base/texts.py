"""What errors say of a value that others gave."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def brief(text: str, limit: int = 200) -> str:
    """A text that others made, in one line and cut for an error's text."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """`ValueError` naming the argument and the valid choices, unless `value` is one."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown: {choose_from(known, value)}")


def choose_from(choices: Iterable[str], value: str) -> str:
    """What an error says to do about an unknown `value`: the nearest choices, if few, then all."""
    choices, word = list(choices), _bare(value)
    likeness = {name: SequenceMatcher(None, word, _bare(name)).ratio() for name in choices}
    near = {n: r for n, r in likeness.items() if r >= 0.6 or (word and word in _bare(n))}
    best = [repr(name) for name, ratio in near.items() if ratio == max(near.values())]
    some = choices if len(choices) <= 30 else [*choices[:30], f"... ({len(choices)} in all)"]
    known = f"hoose from {', '.join(some)}"
    return f"did you mean {' or '.join(best)}? C{known}" if 1 <= len(best) <= 3 else f"c{known}"


def _bare(name: str) -> str:
    return "".join(filter(str.isalnum, str(name).casefold()))
