"""The stage report: report.json, report.md, report.html, figures, and the models, from what the other stages found."""

import json
import shutil
from pathlib import Path

from ..data.image_folder import ImageDataset
from ..evaluation.page import Figure, write_report
from ..files import write_json
from ..precision import precision_name
from ..processes import device_name, process_state
from ..study.report import git_commit, kept_line, stage_records, versions
from ..trainers.lora import LORA_FILE
from .artifacts import data_facts, dataset_name, load_base, load_split, place_name, stages_left_out
from .config import TextToImageStudyConfig
from .figures import plot_attributes, plot_prompts, plot_rollouts


ROLES = {"judge": "judge, used for nothing but this", "reward": "reward classifier, which was trained on"}


def report(config: TextToImageStudyConfig) -> dict:
    """Write `report.json`, `report.md`, `report.html` and `figures/` into the study's folder, and the models: `lora/`
    (the adapter and `facts.json` for its card), and `pipeline_standard/` where the pipeline was trained here.
    """
    output_dir = Path(config.output_dir)
    records = stage_records(output_dir, stages_left_out(config))
    results = {name: record["result"] for name, record in records.items()}
    content = {
        **results["evaluate"],
        "augmentation": results["augmentation"] if config.augmentation else None,
        "ppo": results["ppo"],
        "select_by": config.select_by,
        "kl": results["ppo"]["ppo/kl"],
        "unet_forwards": results["ppo"]["unet_forwards"],
        "training": {name: results[name] for name in ("autoencoder", "diffusion", "classifiers") if name in results},
        "data": {"dataset": dataset_name(config), **results["data"]},
        "dataset": "a folder of images" if config.data_dir else "procedurally drawn dermoscopy-like images",
        "seed": config.seed_of("report"),
        "given": {
            name: place_name(value)
            for name in ("pretrained_model_name_or_path", "reward_classifier", "judge_classifier", "fid_extractor")
            if (value := getattr(config, name))
        },
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "device": device_name(),
        "precision": precision_name(config.mixed_precision, process_state().device),
        "commit": git_commit(),
        "versions": versions(),
    }
    figures = _draw(config, content)
    _export(config, content)
    write_report(output_dir, "report", "Text-to-image report", content, _sections(content, figures))
    return {"report": str(output_dir / "report.md")}


def _draw(config: TextToImageStudyConfig, content: dict) -> dict[str, Path]:
    output_dir = Path(config.output_dir)
    paths = {name: output_dir / "figures" / f"{name}.png" for name in ("prompts", "attributes", "rollouts")}
    arms = {arm: ImageDataset.load(output_dir / "evaluate" / f"{arm}.safetensors") for arm in ("before", "after")}
    real = load_split(config, "heldout")
    plot_prompts({"real, held out": real, **arms}, [row["prompt"] for row in content["prompts"]], paths["prompts"])
    plot_attributes({role: content["attribute_match"][role] for role in ROLES}, paths["attributes"])
    plot_rollouts(output_dir / "ppo", paths["rollouts"])
    return paths


def _export(config: TextToImageStudyConfig, content: dict) -> None:
    """The adapter with its facts and the pipeline it belongs to, side by side."""
    output_dir, facts = Path(config.output_dir), Path(config.output_dir) / "ppo" / "lora" / "facts.json"
    for earlier in ("pipeline_standard", "lora"):  # of other settings
        shutil.rmtree(output_dir / earlier, ignore_errors=True)
    if not config.pretrained_model_name_or_path:
        load_base(config).save_pretrained(output_dir / "pipeline_standard")
    if not facts.is_file():
        return
    (output_dir / "lora").mkdir(exist_ok=True)
    shutil.copyfile(facts.with_name(LORA_FILE), output_dir / "lora" / LORA_FILE)
    measured = {
        name: content[name] for name in ("n", "attribute_match", "fid", "diversity", "kl", "commit", "versions")
    }
    # of data and sampler here, since PPO is not run again where these change
    now = {**json.loads(facts.read_text()), **data_facts(config), "results": measured}
    write_json(output_dir / "lora" / "facts.json", now)


def _sections(content: dict, figures: dict[str, Path]) -> list[tuple]:
    ppo, sampler = content["ppo"], content["sampler"]
    return [
        (
            "What was measured",
            f"Data: {content['dataset']} ({content['data']['fingerprint']}); {content['n']} images before and after, "
            f"as many of every prompt, from the same noise; {sampler['num_inference_steps']} steps, eta "
            f"{sampler['eta']:g}, guidance {sampler['guidance_scale']:g}; seed {content['seed']}. Before is the "
            f"fine-tuned model, after the same with reinforcement learning: {ppo['rollouts']} rollouts, "
            f"{content['unet_forwards']} denoiser forwards, stopped: {ppo['stopped'] or 'at max_steps'}. {_weights_line(content)} Intervals: "
            "95 % bootstrap over the samples of each prompt, in pairs.",
        ),
        (
            "Do images show all that their prompt states?",
            "Share of images all of whose attributes a classifier finds as the prompt states them. A gain by the "
            f"reward classifier that the judge{_judge_apart(content)} does not confirm is over-optimization.{_prompts_shown(content)}",
            _match_rows(content),
            Figure(figures["attributes"], "Match rates of attributes before and after, by judge and reward"),
        ),
        ("Fidelity and diversity", *_fidelity_blocks(content)),
        ("Images", Figure(figures["prompts"], "Images of every prompt: real, before and after, from the same noise")),
        (
            "Over the rollouts",
            Figure(figures["rollouts"], "Reward, match by both classifiers, divergence, diversity by rollout"),
        ),
        ("Prompt by prompt", _prompt_rows(content)),
        *_augmentation_sections(content["augmentation"]),
        (
            "Limits",
            "The judge is a network too; no physician has looked at these images. Prompts are those of the templates, "
            "others are outside of what was trained or measured."
            + (f" {', '.join(content['given'])} were given: what they were trained on is not known here." if content["given"] else ""),
        ),
    ]  # fmt: skip


def _weights_line(content: dict) -> str:
    """Which weights "after" has, and what picked them; stage ppo of an earlier version does not say."""
    if "kept_after" not in content["ppo"]:
        return ""
    line = kept_line(content["ppo"]["kept_after"], strong="")
    return f"{line} The reward of held-out prompts picked these weights." if content["select_by"] != "last" else line


def _prompts_shown(content: dict) -> str:
    """What the figures are means of, and over how many prompts those of real images are; stage evaluate of an earlier version counted
    images alike, and does not say."""
    if "real_prompts" not in content:
        return ""
    shown, asked = content["real_prompts"], len(content["prompts"])
    fewer = f"; held-out images, and so their reconstructions, show {shown} of the {asked}" if shown < asked else ""
    return f" All are means over prompts{fewer}."


def _judge_apart(content: dict) -> str:
    """What tells the judge from the reward classifier, beside its weights, as far as it is known here."""
    found, given = content["attribute_match"], {"judge_classifier", "reward_classifier"} & set(content["given"])
    parts = ["of another architecture"] if found["judge"]["architecture"] != found["reward"]["architecture"] else []
    parts += [] if given else ["trained on other images"]
    return f", {' and '.join(parts)}," if parts else ""


def _match_rows(content: dict) -> list[list]:
    rows = [
        [
            "by the",
            "before",
            "after",
            "difference",
            "trained prompts",
            "held-out prompts",
            "real",
            "autoencoder (limit)",
        ]
    ]
    for role, title in ROLES.items():
        found = content["attribute_match"][role]
        rows.append(
            [
                title,
                _percent(found["before"], found["interval"]["before"]),
                _percent(found["after"], found["interval"]["after"]),
                _percent(found["difference"]["value"], found["difference"]["interval"], sign="+"),
                _pair(found["trained_prompts"]),
                _pair(found["heldout_prompts"]),
                f"{found['real']:.1%}",
                f"{found['reconstruction']:.1%}",
            ]
        )
    return rows  # fmt: skip


def _fidelity_blocks(content: dict) -> list:
    fid, diversity = content["fid"], content["diversity"]
    identity = fid["extractor"]
    blocks = [
        f"Frechet distance to held-out images, {fid['n']} on each side{_other_sizes(fid)}, by features of {identity['id']} "
        f"({identity['sha256']}), which neither classifier has a part in; lower is better. MS-SSIM of pairs of images "
        "of one prompt, over the prompts that all these sets have enough images of: the lower, the more diverse. KL "
        "divergence from the fine-tuned model, per step and element, in the last rollout that counts: "
        f"{content['kl']:.3g}."
    ]
    if fid["before"] is None:
        return [*blocks, "Too few images for a distance."]
    rows = [["", "Frechet distance", "interval", "KID", "MS-SSIM within prompts"]]
    for arm in ("before", "after"):
        low, high = fid["interval"][arm]
        rows.append([arm, fid[arm], f"{low:.4g} .. {high:.4g}", fid["kid"][arm], _similarity(diversity[arm])])
    floor = f"real, {'others' if 'pretrained_model_name_or_path' in content['given'] else 'training'} (floor)"
    for name, title in (("reconstruction", "autoencoder (limit)"), ("real", floor)):
        if fid[name]:
            size = None if fid[name]["n"] == fid["n"] else f"n = {fid[name]['n']}"
            rows.append([title, fid[name]["value"], size, fid[name].get("kid"), None])
    if diversity["real"]:
        rows.append(["real, held out", None, None, None, _similarity(diversity["real"])])
    low, high = fid["difference"]["interval"]
    return [
        *blocks,
        rows,
        f"After minus before: {fid['difference']['value']:+.4g} ({low:+.4g} .. {high:+.4g}, in pairs).",
    ]


def _other_sizes(fid: dict) -> str:
    """A word on rows of another number of images: the distance of fewer is larger."""
    differ = any(found and found["n"] != fid["n"] for found in (fid["real"], fid["reconstruction"]))
    return " (where n is another, the row is not comparable)" if differ else ""


def _prompt_rows(content: dict) -> list[list]:
    rows = [["prompt", "held out from training", "judge, before and after", "reward classifier", "MS-SSIM"]]
    for row in content["prompts"]:
        similarity = row["ms_ssim"]
        shown = None if None in similarity.values() else f"{similarity['before']:.3f}, {similarity['after']:.3f}"
        rows.append([row["prompt"], row["held_out"], _pair(row["judge"]), _pair(row["reward"]), shown])
    return rows


def _augmentation_sections(found: dict | None) -> list[tuple]:
    if not found:
        return []
    rows = [["", "accuracy in the subgroup", *(f"accuracy, {name}" for name in found["groups"]),
             *(f"AUC, {name}" for name in found["groups"])]]  # fmt: skip
    for arm, accuracy in found["subgroup_accuracy"].items():
        cells = [
            f"{group['arms'][arm][metric]['mean']:.3f} (sd {group['arms'][arm][metric]['std'] or 0:.3f})"
            for metric in ("accuracy", "auc")
            for group in found["groups"].values()
        ]
        rows.append([arm, accuracy and f"{accuracy['mean']:.1%}", *cells])
    n = found["n"]
    synthetic = ", ".join(f"{count} ({arm})" for arm, count in n["synthetic"].items() if count) or "none"
    text = (
        f"A classifier of the diagnosis; rare in its training: {' with '.join(found['subgroup'])} "
        f"({n['train_subgroup']} of {n['train']} images). Synthetic images of it added: {synthetic}. "
        f"{n['test']['all']} held-out images, "
        f"{n['test_subgroup']} of the subgroup; seeds {found['seeds']}."
    )
    return [("A classifier with synthetic images of a rare subgroup", text, rows)]


def _percent(value: float, interval: list[float], sign: str = "") -> str:
    return f"{value:{sign}.1%} ({interval[0]:{sign}.1%} .. {interval[1]:{sign}.1%})"


def _pair(values: dict | None) -> str | None:
    return values and f"{values['before']:.0%}, {values['after']:.0%}"


def _similarity(found: dict | None) -> str | None:
    if not found:
        return None
    interval = "{:.3f} .. {:.3f}, ".format(*found["interval"]) if found["interval"] else ""
    return f"{found['value']:.3f} ({interval}{found['pairs']} pairs)"
