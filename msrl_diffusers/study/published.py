"""What arXiv 2603.06173 reports, to stand beside a study's own tables. Other data, other sizes, extractor not stated."""

SOURCE = "arXiv 2603.06173"

# Frechet distance, lower is better (its Table 2).
FID = {
    "BraTS 2019": {
        "limit": {"HGG": 25.82, "LGG": 35.14, "all": 24.64},
        "standard": {"HGG": 53.98, "LGG": 62.28, "all": 50.38},
        "rl": {"HGG": 40.11, "LGG": 51.86, "all": 38.05},
    },
    "OASIS-1": {
        "limit": {"AD": 33.81, "CN": 30.51, "all": 29.42},
        "standard": {"AD": 68.21, "CN": 60.70, "all": 57.45},
        "rl": {"AD": 61.88, "CN": 55.84, "all": 52.92},
    },
}

# Classification of real test volumes, mean and deviation (its Table 3).
DOWNSTREAM = {
    "BraTS 2019": {
        "real only": {"accuracy": [0.59, 0.07], "f1": [0.67, 0.04], "auc": [0.65, 0.07]},
        "+ standard synthetic": {"accuracy": [0.62, 0.05], "f1": [0.68, 0.04], "auc": [0.65, 0.08]},
        "+ RL synthetic": {"accuracy": [0.71, 0.02], "f1": [0.71, 0.01], "auc": [0.74, 0.03]},
    },
    "OASIS-1": {
        "real only": {"accuracy": [0.76, 0.03], "f1": [0.75, 0.04], "auc": [0.81, 0.01]},
        "+ standard synthetic": {"accuracy": [0.77, 0.03], "f1": [0.75, 0.03], "auc": [0.80, 0.02]},
        "+ RL synthetic": {"accuracy": [0.78, 0.04], "f1": [0.77, 0.03], "auc": [0.86, 0.06]},
    },
}

# Other generators in the same downstream study, BraTS 2019 (its Table 4).
COMPARATORS = {
    "3D-WGAN": {"accuracy": 0.59, "f1": 0.59, "auc": 0.70},
    "3D-Med-DDPM": {"accuracy": 0.61, "f1": 0.64, "auc": 0.69},
    "TAMT": {"accuracy": 0.67, "f1": 0.71, "auc": 0.77},
}

# What is lost by leaving something out, BraTS 2019 (its Table 5).
ABLATIONS = {
    "full": {"fid": 38.05, "accuracy": 0.71},
    "sparse_steps": {"fid": 47.05, "accuracy": 0.67},
    "reward_3d_only": {"fid": 43.92, "accuracy": 0.69},
}
