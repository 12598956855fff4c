"""Procedures that learn: one config and one visible loop per method, on the services of `base`."""
