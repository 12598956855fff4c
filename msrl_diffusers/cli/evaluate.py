"""msrl evaluate: how far generated volumes are from real ones, with intervals, the floor between real ones, and diversity.

Folders of NIfTI, prepared files, or a pipeline on the second place:

    msrl evaluate data/brats/train.safetensors outputs/brains --held_out data/brats/heldout.safetensors --output_dir outputs/figures
    msrl evaluate REAL_NIFTI GENERATED_NIFTI --image_size 64 --extractor inception --output_dir outputs/figures
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..arguments import parse
from ..errors import InputError
from ..evaluation.comparison import compare_sets
from ..evaluation.extractors import load_extractor
from ..evaluation.page import Figure, write_report
from ..evaluation.sources import VolumeSource, check_comparable
from ..plots import plot_volumes
from ..processes import check_writable, keep_freed_memory
from ..study.report import git_commit, versions
from .sets import SET, SetArguments, open_generated, open_set


SHOWN_VOLUMES = 6
MAX_SHARE_DIFFERENCE = 0.05  # of a class in two sets, before it is pointed out


@dataclass
class EvaluateArguments:
    """Options of `msrl evaluate`."""

    real: str = field(metadata={"help": f"The real volumes, such as those of the training: {SET}."})
    generated: str = field(metadata={"help": f"What is judged: {SET}, a pipeline's folder or Hub repository."})
    output_dir: str = field(
        metadata={"help": "Folder to write evaluate.json, evaluate.md, evaluate.html and a figure to."}
    )
    held_out: str | None = field(
        default=None,
        metadata={"help": f"Real volumes that no training saw: {SET}. A distance to REAL alone rewards copies of it."},
    )
    extractor: str = field(
        default="random",
        metadata={
            "help": "Feature network: a folder of an extractor, random, inception[:FILE], medicalnet:FILE, radimagenet:FILE or "
            "transformers:NAME. No figure of random is for publication."
        },
    )
    bootstrap_draws: int = field(default=200, metadata={"help": "Bootstrap draws of the intervals."})
    infinity: bool = field(default=False, metadata={"help": "Also extrapolate to infinitely many volumes."})

    def __post_init__(self):
        if self.bootstrap_draws < 1:
            raise InputError(f"bootstrap_draws must be positive, got {self.bootstrap_draws}.")


def run(arguments: Sequence[str]) -> None:
    """Evaluate what the command line says."""
    args, set_args = parse(
        [EvaluateArguments, SetArguments], None, arguments,
        positionals=("real", "generated"), prog="msrl evaluate", description=__doc__,
    )  # fmt: skip
    check_writable(args.output_dir)
    keep_freed_memory()
    extractor = load_extractor(args.extractor)
    extractor.to("cuda" if torch.cuda.is_available() else "cpu")
    real = open_set(args.real, set_args)
    held_out = args.held_out and open_set(args.held_out, set_args)
    if held_out is not None:
        check_comparable(real, held_out)
    generated = open_generated(args.generated, set_args, args.output_dir, real, in_proportion=True)
    found = compare_sets(
        real, generated, extractor, held_out, args.infinity, args.bootstrap_draws, set_args.batch_size, set_args.seed
    )
    output_dir = Path(args.output_dir)
    figure = output_dir / "volumes.png"
    plot_volumes({name: _shown(source) for name, source in (("real", real), ("generated", generated))}, figure)
    content = {
        **found,
        "extractor": extractor.identity,
        "counts": {"real": len(real), "generated": len(generated), "held_out": held_out and len(held_out)},
        "warnings": [*_warnings(args, found), *_share_warnings(real, {"generated": generated, "held-out": held_out})],
        "settings": {**asdict(args), **asdict(set_args)},
        "shape": list(real.shape),
        "spacing": list(real.spacing),
        "seed": set_args.seed,
        "versions": versions(),
        "commit": git_commit(),
    }
    write_report(output_dir, "evaluate", "Generated against real volumes", content, _sections(content, figure))
    for warning in content["warnings"]:
        sys.stderr.write(f"warning: {warning}\n")
    sys.stdout.write(f"{_finding(content)} Report: {output_dir / 'evaluate.html'}\n")


def _shown(source: VolumeSource) -> torch.Tensor:
    """Some volumes, evenly spaced: sets may be sorted by class."""
    count = min(SHOWN_VOLUMES, len(source))
    return source.take(torch.linspace(0, len(source) - 1, count).round().long())


def _warnings(args: EvaluateArguments, found: dict) -> list[str]:
    """What a reader must know before the numbers."""
    warnings = []
    if found["n"] < found["num_features"]:
        warnings.append(
            f"{found['n']} volumes a side are fewer than the {found['num_features']} features, so the covariances are estimated "
            "from too little and most of the Frechet distance is bias; compare it with the floor alone, or read KID."
        )
    if args.extractor == "random":
        warnings.append("The extractor has random weights: for a first look, not for publication.")
    if args.held_out is None:
        warnings.append(
            "Without --held_out the distance is to the volumes the generator may have been trained on, where copies score best; "
            "run msrl audit too."
        )
    return warnings


def _share_warnings(real: VolumeSource, others: Mapping[str, VolumeSource | None]) -> list[str]:
    """One sentence for every set whose classes have other shares than those of the real volumes."""
    warnings = []
    for name, source in others.items():
        if not (source and source.class_names and real.class_names):
            continue
        shares = [{c: n / len(part) for c, n in Counter(part.class_names).items()} for part in (real, source)]
        differences = {c: abs(shares[0].get(c, 0) - shares[1].get(c, 0)) for c in sorted({*shares[0], *shares[1]})}
        worst = max(differences, key=differences.get)
        if differences[worst] > MAX_SHARE_DIFFERENCE:
            warnings.append(
                f"Classes have other shares in the {name} than in the real volumes ({worst}: {shares[1].get(worst, 0):.0%} and "
                f"{shares[0].get(worst, 0):.0%}), which a distance over all classes takes for a difference in quality; read those by class."
            )
    return warnings


def _finding(content: dict) -> str:
    fid, floor = content["fid"], content["fid_floor"]
    return (
        f"FID {fid['value']:.4g} ({fid['low']:.4g} .. {fid['high']:.4g}) at {content['n']} volumes a side by "
        f"{content['extractor']['id']}; between real volumes {floor['value']:.4g} at {floor['n']}."
    )


def _sections(content: dict, figure: Path) -> list[tuple]:
    alt = "Orthogonal slices of some real and some generated volumes."
    sections = [
        ("Finding", "\n\n".join([_finding(content), *content["warnings"]])),
        ("Distances", _distance_table(content), _reading(content)),
        ("Volumes", Figure(figure, alt, "Real volumes above, generated ones below; not pairs. Share real ones only as you may.")),
        ("Diversity", _diversity_table(content)),
        ("Intensities, size and symmetry", _statistics_table(content["statistics"])),
        ("Origin", _origin(content)),
    ]  # fmt: skip
    return sections


def _distance_table(content: dict) -> list[list]:
    rows = [["", "volumes a side", "FID", "95 % interval", "KID", "95 % interval"]]
    named = {"all, to real": content, **{f"{name}, to real": row for name, row in content["by_class"].items()}}
    if "held_out" in content:
        named["all, to held-out"] = content["held_out"]
    for name, row in named.items():
        fid, kid = row["fid"], row["kid"]
        rows.append([name, row["n"], fid["value"], _range(fid), kid["value"], _range(kid)])
    floor = content["fid_floor"]
    kind = {"halves": "two halves of the real volumes", "held_out": "real, held-out to real"}[floor["kind"]]
    rows.append([f"floor: {kind}", floor["n"], floor["value"], _range(floor), None, None])
    if "fid_infinity" in content:
        infinite = content["fid_infinity"]
        error = f"standard error of the fit {infinite['standard_error']:.2g}"
        rows.append(["all, extrapolated", "infinitely many", infinite["value"], error, None, None])
    return rows


def _reading(content: dict) -> str:
    text = (
        "Lower is better. A Frechet distance of finite sets is biased upwards, more so at fewer volumes, and its scale is the "
        "extractor's: compare only figures of one extractor, one preparation and one size."
    )
    if content["fid_floor"]["n"] != content["n"]:
        text += (
            f" The floor is at {content['fid_floor']['n']} volumes a side; there the generated set's own distance is "
            f"{content['fid_at_floor_n']:.4g}."
        )
    return text


def _diversity_table(content: dict) -> list[list]:
    rows = [["", "value", "95 % interval", "meaning"]]
    for name, figures in content["ms_ssim"].items():
        if figures:
            interval = figures["interval"] and "{:.4g} .. {:.4g}".format(*figures["interval"])
            within = ", within classes" if figures["within_classes"] else ""
            title = f"MS-SSIM, {figures['pairs']} pairs of {name}{within}"
            rows.append([title, figures["value"], interval, "lower: more diverse"])
    if content["manifold"]:
        meanings = {
            "precision": "share of generated volumes near real ones",
            "recall": "share of real volumes near generated ones",
            "density": "1 for equal distributions",
            "coverage": f"{content['manifold']['expected_coverage']:.3f} for equal distributions",
        }
        rows += [[name, content["manifold"][name], None, meaning] for name, meaning in meanings.items()]
    return rows


def _statistics_table(statistics: dict) -> list[list]:
    real, generated, difference = (statistics[name] for name in ("real", "generated", "difference"))
    rows = [["", "real", "generated"]]
    for channel in range(len(real["intensity"]["mean"])):
        suffix = f", channel {channel}" if len(real["intensity"]["mean"]) > 1 else ""
        for name in ("mean", "sd"):
            rows.append([
                f"intensity in the head, {name}{suffix}", real["intensity"][name][channel], generated["intensity"][name][channel],
            ])  # fmt: skip
        distance = difference["intensity"]["wasserstein"][channel]
        spectral = difference["spectrum"]["log_spectral_distance_db"][channel]
        rows.append([f"Wasserstein distance of the intensities{suffix}", 0.0, distance])
        rows.append([f"log-spectral distance in dB{suffix}", 0.0, spectral])
    for name, title in (("head_volume_ml", "head in ml"), ("asymmetry", "left-right asymmetry")):
        rows.append([title, *(f"{part[name]['mean']:.4g} +- {part[name]['sd']:.2g}" for part in (real, generated))])
    return rows


def _origin(content: dict) -> list[list]:
    rows = [
        ["extractor", f"{content['extractor']['id']} ({content['extractor']['sha256']})"],
        *([f"volumes, {name}", count] for name, count in content["counts"].items() if count),
        ["shape", " x ".join(map(str, content["shape"]))],
        ["spacing in mm", " x ".join(f"{edge:.4g}" for edge in content["spacing"])],
        ["seed", content["seed"]],
        ["commit", content["commit"]],
        *([f"version of {name}", version] for name, version in content["versions"].items()),
    ]
    return [["", "value"], *rows]


def _range(figure: dict) -> str:
    return f"{figure['low']:.4g} .. {figure['high']:.4g}"
