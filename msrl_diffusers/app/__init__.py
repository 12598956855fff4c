"""The web page of `msrl demo`: a pretrained and a tuned generator side by side, from the same noise."""
