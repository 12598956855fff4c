"""Figures and lists in words, as the page of results and the README print them."""


def mean_and_sd(figure: dict | None, digits: int) -> str:
    """Mean, and deviation over seeds where there are several."""
    if figure is None:
        return ""
    return f"{figure['mean']:.{digits}f}" + ("" if figure["sd"] is None else f" +- {figure['sd']:.{digits}f}")


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
        return "no gap"
    interval = figure["interval"]
    return f"{figure['mean']:.0%}" + (f" ({interval[0]:.0%} .. {interval[1]:.0%})" if interval else "")
