"""Formulas: pure functions on tensors, each naming its equation. No I/O and no random numbers of their own."""
