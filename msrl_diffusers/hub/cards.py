"""Model cards: rendered from a study's report, a memorization audit and what the folder holds. No figure is typed."""

import re
from pathlib import Path

import diffusers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from safetensors import safe_open

from ..errors import InputError
from ..pipelines.remote_code import PIPELINE
from .contents import PEFT_WEIGHTS, Contents, inspect_folder, is_local, read_json


NO_AUDIT = "Memorization has not been audited."
AUDITED = "generated volumes look like copies"
TEMPLATES = Path(__file__).parents[1] / "templates"
GENERATION = "unconditional-image-generation"  # the Hub has no task for volumes
TEXT_TO_IMAGE = "text-to-image"
FACTS = "facts.json"  # what a text-to-image study says of its adapter
TAGS = ("medical", "mri", "3d", "nifti", "brain", "msrl_diffusers", "not-for-clinical-use")
ARMS = {
    "real_floor": "real, held out (floor)",
    "limit": "autoencoder (limit)",
    "standard": "before {}",
    "rl": "after {}",
}
REWARDED_BY = {
    "images": "what a classifier finds of what a prompt states",
    "volumes": "rewards regressed on Frechet distances",
}
UNREWARDED = {  # methods whose loss is no reward: what it is
    "frechet": "with the Frechet distance to the training volumes as the loss",
    "ddo": "by discriminative self-play against its own samples (DDO)",
}
MODELS = {  # what it is, task on the Hub
    "VQModel3D": ("an autoencoder of volumes", GENERATION),
    "UNet3DModel": ("a class-conditional denoiser of latents", GENERATION),
    "VolumeRewardModel": ("a reward model of whole volumes", None),
    "SliceRewardModel": ("a reward model of axial slices", None),
    "SliceFeatureExtractor": ("a feature extractor on slices of the three planes", "image-feature-extraction"),
    "VolumeFeatureExtractor": ("a feature extractor on whole volumes", "image-feature-extraction"),
    "PatchFeatureExtractor": ("a feature extractor on patches of volumes", "image-feature-extraction"),
}
GENERATORS = ("UNet3DModel", "VQModel3D")
FOLDERS = {
    "vqvae": "autoencoder",
    "unet": "denoiser",
    "scheduler": "sampler's settings",
    "reward_volume": "reward model of whole volumes",
    "reward_slice": "reward model of axial slices",
    "reward_heldout": "reward model of another seed and width: a watchdog, never trained on",
    "extractor_label": "feature extractor that labels and selects",
    "extractor_judge": "feature extractor that only judges",
    "extractor_second_judge": "another that only judges, of other architecture",
    "vae": "autoencoder",
    "text_encoder": "text encoder",
    "classifier_reward": "classifier of attributes that rewards",
    "classifier_judge": "classifier of attributes that only judges",
    "classifier_features": "classifier of attributes whose features give the Frechet distances",
}
COMPANIONS = ("reward_", "extractor_", "classifier_")  # models beside a pipeline, which are none of its parts
DATA_SETS = {  # title; terms
    "phantoms": (
        "Phantoms",
        "Synthetic brains, computed by the package `msrl_diffusers`: no person's data, no terms.",
    ),
    "dermoscopy": (
        "Drawn dermoscopy images",
        "Images drawn by the package `msrl_diffusers`, with prompts such as *dermoscopy image of melanoma with hair, ruler and ink*: "
        "no person's data, no terms.",
    ),
    "brats2019": (
        "BraTS (2019, or another release in its layout)",
        "Handed out by its organizers to registered users, on terms that ask for citations. They bind whoever shares what "
        "was made from the images: check them before you use or pass on these weights.",
    ),
    "oasis1": (
        "OASIS-1",
        "Handed out under the OASIS data use agreement. It binds whoever shares what was made from the images: check it "
        "before you use or pass on these weights.",
    ),
}
COMPUTED = ("phantoms", "dermoscopy")  # of no person
IMAGES = ("dermoscopy", "image_folder")  # the others are of volumes
OWN_TITLES = {"bids": "a BIDS data set", "datalist": "a data set with a JSON list"}
UNKNOWN_TERMS = "The terms of these data were not stated; ask whoever shared this model before you use it."
PEFT_LINES = ("### Framework versions", "- PEFT ")  # what it adds to a card, and to its metadata
PEFT_KEYS = {"base_model", "library_name", "pipeline_tag", "tags"}
AUDIT_KEYS = {"n_generated", "n_train", "n_copies", "interval", "expected_false_positives"}


def render_card(
    report: dict | None,
    folder: str | Path | Contents,
    *,
    audit: dict | None = None,
    arm: str | None = None,
    name: str | None = None,
    license: str | None = None,
    data_terms: str | None = None,
    base_model: str | None = None,
) -> str:
    """The model card of a folder, with its metadata on top.

    Args:
        report: a study's `report.json`, or None. Whatever it lacks, the card lacks; without `fid` it says that the model
            was not evaluated.
        folder: a pipeline, a model or a LoRA adapter, as `inspect_folder` takes it. Its `scores.json` is used, and an adapter's
            `facts.json`.
        audit: an `audit.json`, or a report with a `memorization` section; that of `report` by default.
        arm: which one of the report's the folder holds, `"rl"` or `"standard"`. By default told from the names
            `pipeline_rl` and `pipeline_standard`.
        name: repository or folder it is loaded from; the folder's name by default.
        license: of the weights; by default Apache-2.0 where the data were computed and no other model was the base, else `unknown`.
        data_terms: a sentence on the terms of the training data.
        base_model: Hub repository that was fine-tuned or that an adapter belongs to.

    Raises:
        InputError: the folder can't be shared, the audit is none, the arm can't be told, or the report is none of a study.
    """
    contents = folder if isinstance(folder, Contents) else inspect_folder(folder)
    report = report or {}
    stated = {"license": license, "data_terms": data_terms, "base_model": base_model}
    try:
        values = _values(contents, report, audit, arm, name, stated)
        return _environment().get_template("card.md").render(values, metadata=_metadata(contents, values, report))
    except (AttributeError, KeyError, TypeError, UndefinedError) as error:
        raise InputError(
            f"The report lacks figures that a card needs ({error}); give the report.json that a study has written."
        ) from error


def audited_share(audit: dict) -> str:
    """How a card states what an audit found; `msrl push` looks for it in a card of one's own."""
    return f"{audit['n_copies']} of {audit['n_generated']} {AUDITED}"


def memorization_section(audit: dict | None) -> str:
    """The section of a card on what an audit found, or that there was none."""
    return _memorization(audit, "volumes", generates=False)


def with_audit(card: str, audit: dict) -> str:
    """The card with what an audit found in place of the section in which this package says that there was none; as it is where
    there is no such section, or its words were changed."""
    denials = {_memorization(None, samples, said) for samples in ("volumes", "images") for said in (False, True)}
    section = "|".join(re.escape(denial.rstrip()) for denial in denials)
    return re.sub(
        rf"^(?:{section})(?=\n\n## |\s*\Z)", lambda _: memorization_section(audit).rstrip(), card, flags=re.MULTILINE
    )


def _memorization(audit: dict | None, samples: str, generates: bool) -> str:
    values = {"memorization": audit, "no_audit": NO_AUDIT, "samples": samples, "generates": generates}
    return _environment().get_template("memorization.md").render(values)


def find_arm(contents: Contents, reports: tuple[dict, ...], arm: str | None) -> str | None:
    """Which one of a report's models the folder holds; None where the reports tell none apart.

    Raises:
        InputError: they do, and neither `arm` nor the folder's name says which; or `arm` is no arm.
    """
    if arm not in (None, "rl", "standard"):
        raise InputError(f"arm must be rl or standard, got {arm!r}.")
    if arm is None:
        arm = {"pipeline_rl": "rl", "pipeline_standard": "standard"}.get(contents.folder.resolve().name)
    if arm is None and any("fid" in report or report.get("memorization") for report in reports):
        raise InputError(
            "The report has figures of two models, before and after reinforcement learning; say by --arm standard or "
            f"--arm rl which of them {contents.folder} holds."
        )
    return arm


def audit_source(audit: dict | None, report: dict) -> dict:
    """Where figures of memorization are looked for."""
    return audit if audit is not None else {"memorization": report.get("memorization")}


def find_memorization(source: dict, arm: str | None) -> dict | None:
    """What an audit found about this model, of an audit.json or a report; None where the report has no audit of it.

    Raises:
        InputError: `source` is neither.
    """
    found = source
    if "memorization" in source:
        found = (source["memorization"] or {}).get(arm)
        if found is None:
            return None
    if not (AUDIT_KEYS <= found.keys() and found["n_generated"] > 0):
        raise InputError("The audit lacks its figures; give the audit.json of msrl audit, or a study's report.json.")
    return found


def data_title(dataset: str | None) -> str | None:
    """A data set's name for people."""
    if dataset is None:
        return None
    return DATA_SETS[dataset][0] if dataset in DATA_SETS else OWN_TITLES.get(dataset, "a folder of images")


def read_card(path: Path) -> str | None:
    """A folder's own card; None where it has none, or the template that PEFT writes with nothing filled in.

    Raises:
        InputError: the block on top is no YAML, lacks or garbles what the Hub needs, or names a folder of this machine.
    """
    if not path.is_file():
        return None
    content = path.read_text(encoding="utf-8")
    if _is_template(content):
        return None
    try:
        card = ModelCard(content)
    except Exception as error:
        sentence = " ".join(str(error).split())
        raise InputError(
            f"The metadata on top of {path} can't be read: {sentence}; mend them, or use msrl card."
        ) from error
    named = card.data.get("base_model") or []
    for place in [named] if isinstance(named, str) else named:
        if is_local(place):
            raise InputError(
                f"{path} names the base model {place}, which is a place on this machine; name its Hub repository, or take it out."
            )
    return content


def _is_template(content: str) -> bool:
    """Whether PEFT wrote all of it: the Hub's template, as it is, with the version, and the metadata that PEFT knows (which are no
    valid YAML where it was given a `Path`)."""
    metadata, _, text = content.removeprefix("---\n").partition("\n---\n")
    template = ModelCard.from_template(ModelCardData()).text.splitlines()
    lines = [line for line in text.splitlines() if line and not line.startswith(PEFT_LINES)]
    keys = set(re.findall(r"^(\w+):", metadata, re.MULTILINE))
    return lines == [line for line in template if line] and keys <= PEFT_KEYS


def _values(
    contents: Contents,
    report: dict,
    audit: dict | None,
    arm: str | None,
    name: str | None,
    stated: dict[str, str | None],
) -> dict:
    """What the templates show."""
    scores, source = contents.read_json("scores.json") or {}, audit_source(audit, report)
    facts = _facts(contents)
    arm = find_arm(contents, (report, source), arm)
    data, of_given = report.get("data", {}), "pretrained_model_name_or_path" in report.get("given", {})
    # what `msrl prepare` read tells more than that it was prepared; a study of a given pipeline knows its own images alone
    dataset = None if of_given else data.get("dataset") or report.get("dataset")
    dataset = facts.get("dataset", dataset)  # which may be none: of a given pipeline that does not say
    if data.get("dataset") not in (None, dataset):
        data = {}  # counts and fingerprint of others than what the model was trained on
    base = facts.get("base_model") or report.get("base_model")  # the latter of a release
    task, base_model = task_of(contents), stated["base_model"] or base
    on_hub = stated["base_model"] or "/" in (base_model or "")  # a study names a folder by its last part
    of_images = "attribute_match" in report  # a text-to-image study's
    own_base = not base and not of_given
    known = "apache-2.0" if dataset in COMPUTED and own_base else "unknown"  # ids of the Hub's
    generates = contents.kind != "model" or contents.class_name in GENERATORS
    samples, method = (
        "images" if task == TEXT_TO_IMAGE or dataset in IMAGES else "volumes",
        report.get("method", "ppo"),
    )
    rewarded = report.get("rewarded", True)  # the first reports, all by rewards, do not say
    tuning = "reinforcement learning" if rewarded else "fine-tuning"
    return {
        "name": name or contents.folder.resolve().name,
        "kind": contents.kind,
        "class_name": contents.class_name,
        "is_ours": contents.class_name in (PIPELINE, *MODELS) or not hasattr(diffusers, contents.class_name),
        "what": MODELS.get(contents.class_name, (None, None))[0],
        "samples": samples,
        "task": task,
        "classes": list((contents.config.get("id2label") or {}).values()),
        "spacing": contents.config.get("spacing"),
        "shape": report.get("data", {}).get("shape"),
        "arm": arm,
        "arms": {name: title.format(tuning) for name, title in ARMS.items()},
        "tuning": tuning,
        "tuned": f"by {tuning} ({method}), from {REWARDED_BY[samples]}" if rewarded else UNREWARDED[method],
        "kept_pretrained": report.get(method, {}).get("kept_after") == 0,
        "rewarded": rewarded,
        "loss_extractor": "label" if "label" in report.get("frechet_features", ()) else None,
        "options": f', variant="{contents.variant}"' if contents.variant else "",  # of from_pretrained
        "channels": _channels(contents),
        "of_peft": contents.class_name == PEFT_WEIGHTS,
        "prefixed": contents.kind == "adapter" and _is_prefixed(contents),
        "sampler": _sampler(report, scores, arm),
        "folders": {folder: FOLDERS.get(folder, name) for folder, name in contents.classes.items()},
        "has_companions": any(folder.startswith(COMPANIONS) for folder in contents.classes),
        "dataset": dataset,
        "data_title": data_title(dataset),
        "data_terms": stated["data_terms"] or DATA_SETS.get(dataset, (None, UNKNOWN_TERMS))[1],
        "data": data,
        "generates": generates,
        "has_results": generates and "fid" in report and not of_images,
        "figures": f"`{FACTS}`" if "results" in facts else "the study's `report.json`" if of_images else None,
        "report": report,
        "memorization": find_memorization(source, arm),
        "no_audit": NO_AUDIT,
        "license": stated["license"] or known,
        "own_base": own_base,
        "base_model": base_model if on_hub else None,
        "base_folder": None if on_hub else base_model,
    }  # fmt: skip


def task_of(contents: Contents) -> str | None:
    """What the Hub calls what the folder's models do."""
    if contents.kind == "model":
        return MODELS.get(contents.class_name, (None, None))[1]
    if contents.kind == "adapter":
        of_images = any(".transformer_blocks." in key for key in _adapter_keys(contents))  # of attention to a prompt
        return _facts(contents).get("pipeline_tag") or (TEXT_TO_IMAGE if of_images else GENERATION)
    return TEXT_TO_IMAGE if "text_encoder" in contents.classes else GENERATION


def _facts(contents: Contents) -> dict:
    return (contents.kind == "adapter" and contents.read_json(FACTS)) or {}


def _sampler(report: dict, scores: dict, arm: str | None) -> dict:
    """Steps, eta and guidance to sample with: those the report chose for this arm, else the best of the scores."""
    chosen = report.get("chosen", {}).get(arm or "", "")
    sampler = report.get("samplers", {}).get(chosen.partition(" @ ")[2])
    if sampler is None and "best_sampler" in scores:
        sampler = scores["samplers"][scores["best_sampler"]]
    found = {"num_inference_steps": 25, "eta": 1.0, "guidance_scale": 1.0, **(sampler or {})}
    return {key: found[key] for key in ("num_inference_steps", "eta", "guidance_scale")}


def _metadata(contents: Contents, values: dict, report: dict) -> str:
    """The YAML block, without its fences."""
    tags = [*(TAGS if values["is_ours"] and values["samples"] == "volumes" else TAGS[-2:])]
    if values["arm"] == "rl":
        tags += [values["tuning"].replace(" ", "-"), report.get("method", "ppo")]
    if contents.kind == "adapter":
        tags.append("lora")
    results = _eval_results(values, report) if values["generates"] else []
    base = {}
    if values["base_model"]:
        relation = "adapter" if contents.kind == "adapter" else "finetune"
        base = {"base_model": values["base_model"], "base_model_relation": relation}
    data = ModelCardData(
        library_name="peft" if contents.class_name == PEFT_WEIGHTS else "diffusers",
        pipeline_tag=values["task"],
        license=values["license"],
        tags=tags,
        datasets=[values["dataset"]] if values["dataset"] else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=values["name"].split("/")[-1] if results else None,
        eval_results=results or None,
        **base,
    )
    return data.to_yaml()


def _eval_results(values: dict, report: dict) -> list[EvalResult]:
    """The arm's figures as the Hub's model-index has them; each with its extractor, interval, number and seed."""
    arm, found = values["arm"], []
    place = {
        "task_type": values["task"] or GENERATION,
        "dataset_type": values["dataset"] or "unknown",
        "dataset_name": values["data_title"] or "unknown",
        "dataset_args": {"fingerprint": report["data_fingerprint"]} if report.get("data_fingerprint") else None,
    }
    for role in report["extractors"] if values["has_results"] and arm else ():
        extractor = report["extractors"][role]
        args = {
            "extractor": extractor["name"],
            "extractor_sha256": extractor["sha256"],
            "num_volumes": report["n"]["all"],
        }
        args |= {"seed": report.get("seed")}
        interval = report.get("fid_interval", {}).get(role, {}).get(arm)
        for metric, value, split, extra in (
            ("fid", report["fid"][role][arm]["all"], "train", {"interval": interval}),
            ("fid", report.get("fid_heldout", {}).get(role, {}).get(arm, {}).get("all"), "held-out", {}),
            ("kid", report.get("kid", {}).get(role, {}).get(arm), "train", {}),
        ):
            if value is not None:
                title = f"{metric.upper()}, {role} extractor, to {split} volumes"
                found.append(
                    EvalResult(
                        **place, dataset_split=split, metric_type=metric, metric_value=value, metric_name=title,
                        metric_args={**args, **extra},
                    )
                )  # fmt: skip
    if values["memorization"]:
        audit = values["memorization"]
        found.append(
            EvalResult(
                **place, dataset_split="train", metric_type="memorization_rate",
                metric_value=audit["n_copies"] / audit["n_generated"],
                metric_name="share of generated volumes that look like copies of training volumes",
                metric_args={"num_volumes": audit["n_generated"], "interval": audit["interval"]},
            )
        )  # fmt: skip
    return found


def _channels(contents: Contents) -> int:
    """Of the volumes that a pipeline makes."""
    config = contents.folder / "vqvae" / "config.json"
    return read_json(config).get("out_channels", 1) if config.is_file() else 1


def _is_prefixed(contents: Contents) -> bool:
    """Whether an adapter's keys name the components they belong to, as pipelines save them."""
    return any(key.startswith("unet.") for key in _adapter_keys(contents))


def _adapter_keys(contents: Contents) -> list[str]:
    with safe_open(contents.folder / contents.class_name, "pt") as file:
        return list(file.keys())


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    environment.filters |= {
        "audited_share": audited_share,
        "number": lambda value, digits=4: "" if value is None else f"{value:.{digits}f}",
        "signed": lambda value: f"{value:+.4f}",
        "percent": lambda value: f"{100 * value:.1f} %",
        "cell": lambda value: re.sub(r"\s+", " ", str(value)).replace("|", "\\|"),
        "edges": lambda values: " x ".join(f"{value:g}" for value in values),
    }
    return environment
