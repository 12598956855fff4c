"""Lines of the page of results on images: text to image, and the trainer beside TRL's."""

import json
from pathlib import Path


RESULTS = Path(__file__).parents[1] / "results"


def story_lines(reports: dict[Path, dict]) -> list[str]:
    """One table, one row per seed: what two classifiers see, distance and diversity, before and after."""
    first = next(iter(reports.values()))
    sampler, limits = first["sampler"], first["attribute_match"]["judge"]
    lines = [
        f"{first['n']} images before and after PPO, from the same noise, by {sampler['num_inference_steps']} steps, eta "
        f"{sampler['eta']:g}, guidance {sampler['guidance_scale']:g}, {_rank_of_sampler(sampler)} before any tuning. Seeds are of PPO and "
        "what follows; the fine-tuned model is one. *Exact match*: share of "
        f"images that show all six attributes as their prompt states them; by the judge {limits['real']:.0%} of real images do and "
        f"{limits['reconstruction']:.0%} of reconstructions by the autoencoder. FID: {first['fid']['n']} on each side, by a third classifier. In "
        "brackets 95 % bootstrap intervals: of the match by draws within each prompt, of FID by draws "
        f"{'within each prompt' if 'drawn_within' in first['fid'] else 'over the images of all prompts at once'}.",
        "",
        "| seed | exact match by the judge | difference | by the reward classifier | FID | difference | KL | MS-SSIM within prompts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path, report in reports.items():
        judge, reward = (report["attribute_match"][role] for role in ("judge", "reward"))
        fid, diversity = report["fid"], report["diversity"]
        (low, high), (fid_low, fid_high) = judge["difference"]["interval"], fid["difference"]["interval"]
        cells = [
            f"[{report['seed']}]({path.name})",
            f"{judge['before']:.1%} -> {judge['after']:.1%}",
            f"{100 * judge['difference']['value']:+.1f} points ({100 * low:+.1f} .. {100 * high:+.1f})",
            f"{reward['before']:.1%} -> {reward['after']:.1%}",
            f"{fid['before']:.1f} -> {fid['after']:.1f}",
            f"{fid['difference']['value']:+.1f} ({fid_low:+.1f} .. {fid_high:+.1f})",
            f"{report['kl']:.4f}",
            " -> ".join(f"{diversity[arm]['value']:.3f}" for arm in ("before", "after")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", _weaker_penalty_line(), "", _guided_line(), "", *_augmentation_lines(list(reports.values()))]


def _weaker_penalty_line() -> str:
    """What the first runs did, whose KL term was weaker."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("dermoscopy-kl*-seed*.json"))]
    gains = ", ".join(f"{100 * report['attribute_match']['judge']['difference']['value']:+.1f}" for report in reports)
    differences = [report["fid"]["difference"] for report in reports]
    rises = ", ".join(f"{difference['value']:+.1f}" for difference in differences)
    worse = sum(difference["interval"][0] > 0 for difference in differences)
    return (
        f"With a weaker KL term (`--kl_coef {reports[0]['ppo']['ppo/kl_coef']:g} --rl_seed "
        f"{'`, `'.join(str(report['seed']) for report in reports)}`) the "
        f"judge's match rises as much, by {gains} points, but FID by {rises}, beyond "
        f"the interval in {worse} of {len(reports)}: over-optimization that neither classifier shows. Those runs came first; the term "
        "was then set on a further seed, by the reward classifier and a feature extractor that has no part here, and the rows above "
        "are of seeds that had not run before."
    )


def _guided_line() -> str:
    """What guidance gives a model that was trained for it, beside what reinforcement learning gives one that was not."""
    content = json.loads((RESULTS / "text-to-image-samplers-guided.json").read_text())
    best = min(content["rows"], key=lambda row: row["fid"])
    plain, guided = _with_and_without_guidance()
    return (
        "The fine-tuned model was trained without prompt dropout, so guidance costs fidelity: with a scale of "
        f"{guided['guidance_scale']:g} at {guided['num_inference_steps']} steps, eta {guided['eta']:g}, its match goes from "
        f"{plain['reward_match']:.1%} to {guided['reward_match']:.1%} and its FID from {plain['fid']:.1f} to {guided['fid']:.1f}. One that was trained for longer, and for "
        f"guidance, matches without reinforcement learning: {best['reward_match']:.1%} by the reward classifier, FID {best['fid']:.1f}, "
        f"at {best['num_inference_steps']} steps, eta {best['eta']:g}, guidance {best['guidance_scale']:g} "
        "([its samplers](text-to-image-samplers-guided.md)); each of its steps costs two forwards."
    )


def _with_and_without_guidance() -> tuple[dict, dict]:
    """The guided sampler of the fine-tuned model with the lowest distance, and before it the same without guidance."""
    rows = json.loads((RESULTS / "text-to-image-samplers.json").read_text())["rows"]
    guided = min((row for row in rows if row["guidance_scale"] > 1), key=lambda row: row["fid"])
    (plain,) = (
        row
        for row in rows
        if row["guidance_scale"] == 1 and all(row[name] == guided[name] for name in ("num_inference_steps", "eta"))
    )
    return plain, guided


def _rank_of_sampler(sampler: dict) -> str:
    """Where a sampler stands by FID among those that were measured."""
    rows = json.loads((RESULTS / "text-to-image-samplers.json").read_text())["rows"]
    (own,) = [row["fid"] for row in rows if all(row[name] == value for name, value in sampler.items())]
    rank = sum(row["fid"] < own for row in rows) + 1
    return f"number {rank} by FID of [{len(rows)} samplers](text-to-image-samplers.md)"


def _augmentation_lines(reports: list[dict]) -> list[str]:
    """What synthetic images of a rare subgroup do to a classifier of the diagnosis, by seed."""
    found = [report["augmentation"] for report in reports]
    accuracies = {
        arm: ", ".join(f"{study['subgroup_accuracy'][arm]['mean']:.1%}" for study in found)
        for arm in found[0]["subgroup_accuracy"]
    }
    first = found[0]
    return [
        f"A classifier of the diagnosis with synthetic images of a rare subgroup ({' with '.join(first['subgroup'])}, "
        f"{first['n']['train_subgroup']} of {first['n']['train']} training images) sees it right, by seed (means of "
        f"{len(first['seeds'])} trainings): "
        + "; ".join(f"{arm}: {values}" for arm, values in accuracies.items())
        + ".",
    ]


def race_lines(race: dict) -> list[str]:
    """Three ratios, and by how much each side's reward rose in one common sampler."""
    sides = race["time_to_reward"]
    seconds = {side: ", ".join(f"{value:.0f}" for value in sides[side]["seconds"]) for side in ("ours", "trl")}
    rises = {
        side: ", ".join(f"{rise:.1f}" for rise in sides[side]["rise_in_common_sampler"]) for side in ("ours", "trl")
    }
    return [
        f"A tiny Stable Diffusion ({race['denoiser_parameters'] / 1e6:.1f} million parameters) with LoRA, {race['threads']} CPU threads, "
        f"TRL {race['versions']['trl']['trl']}, medians of {race['seeds']} seeds ([JSON](ppo-vs-trl.json)), at equal work:",
        "",
        "| | ours / TRL's |",
        "|---|---|",
        f"| samples per second | {race['ratio_equal_work']:.2f} |",
        f"| peak memory | {race['peak_memory_ratio']:.2f} |",
        "",
        "Each by its own settings (ours trains half of the steps, without guidance, `mixed_precision` auto, with a KL penalty; TRL's "
        "guides, as its documentation does), until the mean reward had risen by one standard deviation of its own first samples: "
        f"{seconds['ours']} s (ours), {seconds['trl']} s (TRL's). Sampled again, both with the same guidance, the reward was higher by "
        f"{rises['ours']} deviations (ours) and {rises['trl']} (TRL's): this does not show that either learns faster.",
    ]
