"""Figures and lists in words, as the page of results and the README print them."""


def listed(values: list) -> str:
    """At least one value, as in "a, b and c"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} and {last}" if others else last


def copies(row: dict) -> str:
    """The share of samples that the audit flags as copies, before and after."""
    return " -> ".join(f"{row['copies'][arm]['mean']:.1%}" for arm in ("standard", "rl"))


def closed(figure: dict | None) -> str:
    """A share of a gap that was closed, with its interval where there are several seeds."""
    if figure is None:
        return "no gap in one seed or more"
    interval = figure["interval"]
    return f"{figure['mean']:.0%}" + (f" ({interval[0]:.0%} .. {interval[1]:.0%})" if interval else "")
