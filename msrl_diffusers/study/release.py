"""A study's pretrained models as one folder that can be pushed to the Hub, and that a later study can start from."""

import json
from pathlib import Path

import torch

from ..files import write_json, write_text
from .artifacts import load_extractors, load_pipeline, load_reward_models, load_scores, load_split
from .config import StudyConfig
from .report import git_commit, versions


CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: apache-2.0
tags: [medical, mri, 3d, nifti, brain, msrl_diffusers, not-for-clinical-use]
---

# {title}

A class-conditional latent diffusion model of {image_size}^3 volumes ({classes}), before reinforcement learning, with two
reward models, a third that only watches, and the label and judge feature extractors. **Not for clinical use.**

```python
from msrl_diffusers import MedVolumePipeline

pipe = MedVolumePipeline.from_pretrained("{title}")
pipe("{first_class}", num_inference_steps={steps}, eta={eta}, output_type="nifti").volumes[0].to_filename("brain.nii.gz")
```

| folder | what |
|---|---|
| `vqvae`, `unet`, `scheduler` | the pipeline, float16 |
| `reward_volume`, `reward_slice` | reward models, float16 |
| `reward_heldout` | reward model of another seed and width; a watchdog, never trained on |
| `extractor_label`, `extractor_judge` | feature extractors: the first labels and selects, the second only judges |
| `scores.json` | label FID of every trajectory set, reward targets, and the samplers tried |

Training data: {dataset}, {train} training and {heldout} held-out volumes per class, fingerprint `{fingerprint}`.
Made by `examples/run_study.py --release` at commit `{commit}` (seed {seed}; {versions}).

Memorization has not been audited.
"""


def write_release(config: StudyConfig, path: str | Path) -> None:
    """Write the pipeline, the reward models and extractors in float16, the scores and a card to
    `path`. The stages up to `rewards` must be done."""
    path, commit = Path(path), git_commit()  # asked before files change that may lie in the tree themselves
    prepared = json.loads((Path(config.output_dir) / "prepare" / "stage.json").read_text())["result"]
    scores, id2label = load_scores(config), load_split(config, "train").id2label
    load_pipeline(config).to(dtype=torch.float16).save_pretrained(path)
    for role, model in load_reward_models(config).items():
        model.half().save_pretrained(path / f"reward_{role}")
    for role, model in load_extractors(config).items():
        model.half().save_pretrained(path / f"extractor_{role}")
    for file in path.rglob("*.json"):  # where the models lay on this machine is nobody's business
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None) is not None:
            write_json(file, content)
    write_json(path / "scores.json", scores)
    best = scores["samplers"][scores["best_sampler"]]
    card = CARD.format(
        title=path.name,
        image_size=config.image_size,
        classes=", ".join(id2label.values()),
        first_class=id2label[0],
        steps=best["num_inference_steps"],
        eta=best["eta"],
        dataset=config.dataset,
        train=" + ".join(map(str, prepared["train"].values())),
        heldout=" + ".join(map(str, prepared["heldout"].values())),
        fingerprint=prepared["fingerprint"],
        commit=commit,
        seed=config.seed,
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )
    write_text(path / "README.md", card)
