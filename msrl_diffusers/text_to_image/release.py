"""The models of a study before reinforcement learning as one folder, fit for the Hub and for a later study to start from."""

from pathlib import Path

from ..files import write_text
from ..hub import render_card
from ..models.image_classifiers import load_image_classifier, save_image_classifier
from ..study.release import check_outside, forget_places
from ..study.report import git_commit, versions
from .artifacts import data_facts, load_base, place_name
from .config import CLASSIFIERS, TextToImageStudyConfig


def write_release(config: TextToImageStudyConfig, path: str | Path) -> None:
    """Write the fine-tuned Stable Diffusion, or the given one, to `path`, and the trained classifiers to `path/classifier_ROLE`, all in
    float16, with a card. The stages up to `classifiers` must be done.

    Raises:
        InputError: `path` lies in the given pipeline.
    """
    check_outside(path, config.pretrained_model_name_or_path)
    path, commit = Path(path), git_commit()  # asked before files change that may lie in the tree themselves
    pipeline = load_base(config).to("cpu")
    for name in ("vae", "unet", "text_encoder"):
        getattr(pipeline, name).half()
    pipeline.save_pretrained(path)
    for role in config.trained_classifiers:
        model, processor = load_image_classifier(Path(config.output_dir) / "classifiers" / role)
        save_image_classifier(model.half(), processor, path / f"classifier_{role}")
    forget_places(path)
    facts = {
        "dataset": data_facts(config, CLASSIFIERS)["dataset"],
        "seed": config.seed,
        "commit": commit,
        "versions": versions(),
    }
    if given := config.pretrained_model_name_or_path:
        facts["base_model"] = place_name(given)
    write_text(path / "README.md", render_card(facts, path, arm="standard"))
