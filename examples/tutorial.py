# %% [markdown]
# # From phantoms to a tuned pipeline, in small
#
# The whole method once, on synthetic brains, in about three minutes on two CPU cores: generate, look, learn what a Frechet
# distance says, see that the reward models say the same without real volumes, tune by PPO, measure again, save.
# The cells run in Jupyter, VS Code or Spyder from the root of the repository, or all at once:
#
#     python examples/tutorial.py
#
# Every number here is small, so that you wait for nothing; two rollouts are no training. `make demo` is the same in earnest.
# What is made is no patient, and not for clinical use.

# %%
from pathlib import Path

from tqdm import tqdm

from msrl_diffusers import (
    DiffusionPPOConfig,
    DiffusionPPOTrainer,
    LearnedReward,
    MedVolumePipeline,
    SliceRewardModel,
    VolumeRewardModel,
    audit,
    compare_sets,
    load_extractor,
    load_phantoms,
    open_source,
    render_card,
    sample_volumes,
)
from msrl_diffusers.files import write_json, write_text
from msrl_diffusers.plots import plot_curves, plot_volumes
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trajectories import SetSpec, sample_set, score_set


RELEASE = Path("model_cards/phantoms-32")
OUTPUT_DIR = Path("outputs/tutorial")
SEED = 0
NUM_PER_CLASS = 64
NUM_RECONSTRUCTED = 32  # of each class
NOISE_STEPS = (1, 30, 60, 90)
NUM_STEPS = 8
ROLLOUT_BATCH_SIZE = 64
NUM_ROLLOUTS = 2

# %% [markdown]
# ## Data
#
# Phantoms are computed, so everybody has the same ones: brains with a ring-shaped (HGG) or a dark (LGG) tumour. Volumes are
# `[N, C, D, H, W]` in [-1, 1]; every one belongs to a subject, and subjects, not volumes, are split. The released models were
# trained on the first phantoms of each class, and chosen by the next; nothing has seen those from 1024 on. A model that copies
# looks good beside its training volumes alone, so the comparison below has both.

# %%
train = load_phantoms(NUM_PER_CLASS, image_size=32)
held_out = load_phantoms(NUM_PER_CLASS, image_size=32, first_index=1024)
print(f"{len(train)} training volumes {tuple(train.pixel_values.shape[1:])}, {train.class_counts()}")

# %% [markdown]
# ## Generate and look
#
# The pipeline is an ordinary one of diffusers: autoencoder, denoiser, scheduler. One generator per volume makes a volume depend
# on its own seed alone, whatever the batch. The figure cuts every brain where left and right differ most, which is where its
# tumour is; a slice through the middle would often miss it.

# %%
pipe = MedVolumePipeline.from_pretrained(RELEASE)
pipe.set_progress_bar_config(disable=True)
labels = train.class_labels[:8]
generators = sample_generators(SEED, "tutorial", range(len(labels)))
volumes = pipe(labels, NUM_STEPS, generator=generators).volumes
plot_volumes(
    {"phantoms": train.pixel_values[:8], "generated": volumes},
    OUTPUT_DIR / "phantoms_and_generated.png",
    at_asymmetry=True,
)

# %% [markdown]
# As NIfTI, the first of them opens in any viewer: RAS+, millimetres, the origin at its center.

# %%
generators = sample_generators(SEED, "tutorial", [0])
image = pipe(labels[:1], NUM_STEPS, generator=generators, output_type="nifti").volumes[0]
image.to_filename(OUTPUT_DIR / "brain.nii.gz")

# %% [markdown]
# ## Volumes of known quality
#
# Nobody labels quality here. Instead real volumes are noised up to a step and denoised again: from step 1 next to nothing is
# lost, from step 90 of 100 the model must invent nearly all. How far such a set is from the real one is measured by the Frechet
# distance in the features of a network that was trained on the training volumes: the label extractor. Sets of equal size only:
# the distance falls with their size. All sets start from the same volumes and the same noise, so that their differences are
# those of the noise step.

# %%
label_extractor = load_extractor(str(RELEASE / "extractor_label"))
originals = train.select(list(range(2 * NUM_RECONSTRUCTED)))  # the classes take turns
reconstructions = {}
with tqdm(total=len(originals) * sum(NOISE_STEPS), desc="reconstruct", unit="forward") as bar:
    for step in NOISE_STEPS:
        reconstructions[step] = sample_set(pipe, originals, SetSpec("reconstruction", step), SEED, progress=bar)
distances = [score_set(label_extractor, originals, reconstructions[step])["all"] for step in NOISE_STEPS]
plot_volumes(
    {"phantoms": originals.pixel_values}
    | {f"from noise step {step}": reconstructions[step].pixel_values for step in NOISE_STEPS},
    OUTPUT_DIR / "reconstructions.png",
    max_volumes=6,
)

# %% [markdown]
# ## What the reward models say of them
#
# They are regressed on such distances, the first from whole volumes, the second from slices. A distance needs a set of real
# volumes beside it; a reward is one number for one volume, and has gradients. Where the distance rises in the figure, the
# rewards should fall: on volumes of new subjects, too, which `check_validity` asks of them before a study.

# %%
rewards = [
    LearnedReward("volume", VolumeRewardModel.from_pretrained(RELEASE / "reward_volume")),
    LearnedReward("slice", SliceRewardModel.from_pretrained(RELEASE / "reward_slice")),
]
curves = {"label FID": (NOISE_STEPS, distances)}
for reward in rewards:
    scores = [reward(made.pixel_values, made.class_labels).mean().item() for made in reconstructions.values()]
    curves[f"reward of the {reward.name}"] = (NOISE_STEPS, scores)
plot_curves(curves, OUTPUT_DIR / "noise_steps.png", "noise step")
for name, (_, values) in curves.items():
    print(f"{name} from noise steps {NOISE_STEPS}: {', '.join(f'{value:.3f}' for value in values)}")

# %% [markdown]
# ## Before
#
# As many volumes as there are training volumes, kept for the comparison. Volume i depends on the seed and i alone, so those
# of the tuned pipeline will come from the same noise, and their differences are of the weights.

# %%
before = sample_volumes(pipe, len(train), NUM_STEPS, seed=SEED)

# %% [markdown]
# ## Tune
#
# Sampling is a chain of Gaussian steps, each an action whose probability is known: PPO raises that of steps which led to
# rewards above the mean of their class. Only steps with enough noise are actions (`min_std`).
# The KL term holds the policy near the pretrained one. That is no ornament: reward models are wrong far from
# what they were trained on, and a policy that nothing holds near the pretrained one goes there.

# %%
config = DiffusionPPOConfig(
    output_dir=str(OUTPUT_DIR / "ppo"),
    seed=SEED,
    max_steps=NUM_ROLLOUTS,
    rollout_batch_size=ROLLOUT_BATCH_SIZE,
    num_rollout_batches=2,
    train_batch_size=ROLLOUT_BATCH_SIZE // 2,
    num_updates=2,
    num_inference_steps=NUM_STEPS,
    use_lora=True,
    learning_rate=1e-3,
    min_std=0.1,
    clip_shift=0.05,
    kl_coef=0.02,
    mixed_precision="auto",
    report_to="none",
)
DiffusionPPOTrainer(pipe, rewards, config).train()
for line in read_log(config.output_dir):
    print(
        f"rollout {line['step']}: reward of the volume {line['reward/volume']:.3f}, of the slices {line['reward/slice']:.3f}, "
        f"KL per step and element {line['ppo/kl']:.1e}"
    )

# %% [markdown]
# ## After
#
# The label extractor made the rewards' targets, so it is no neutral witness. The judge is another architecture, and has scored
# and selected nothing. Beside each distance stands its interval, and the floor: the distance between real volumes, below which
# there is nothing to gain. After two rollouts the intervals overlap; say nothing of a difference that small.

# %%
after = sample_volumes(pipe, len(train), NUM_STEPS, seed=SEED)
extractors = {"label": label_extractor, "judge": load_extractor(str(RELEASE / "extractor_judge"))}
real, unseen = open_source(train), open_source(held_out)
comparison = {}
for role, extractor in extractors.items():
    figures = {
        name: compare_sets(real, open_source(made), extractor, unseen, bootstrap_draws=50)
        for name, made in (("before", before), ("after", after))
    }
    comparison[role] = {name: found["fid"] for name, found in figures.items()}
    comparison[role]["floor"] = figures["before"]["fid_floor"]
    for name, distance in comparison[role].items():
        print(f"{role} FID, {name}: {distance['value']:.3f} ({distance['low']:.3f} .. {distance['high']:.3f})")
write_json(OUTPUT_DIR / "comparison.json", comparison)
plot_volumes(
    {"before": before.pixel_values, "after": after.pixel_values},
    OUTPUT_DIR / "before_and_after.png",
    at_asymmetry=True,
)

# %% [markdown]
# ## Save, audit, describe
#
# The folder loads by `MedVolumePipeline.from_pretrained`, `msrl demo --rl` and `msrl generate --model`. Before a model of patients
# is shared, ask whether it copies them: the audit compares generated volumes with the training volumes, and held-out ones tell
# how near is too near. The card carries what was found. `msrl push` sends such a folder to the Hub, and refuses one without an
# audit.

# %%
folder = OUTPUT_DIR / "pipeline_rl"
pipe.save_pretrained(folder)
found = audit(real, open_source(after), unseen).summary()
write_json(folder / "audit.json", found)
card = render_card(
    None,
    folder,
    audit=found,
    license="apache-2.0",
    data_terms="Phantoms, computed by the package msrl_diffusers: no person's data.",
)
write_text(folder / "README.md", card)
print(
    f"{found['n_copies']} of {found['n_generated']} generated volumes look like copies; everything is in {OUTPUT_DIR}."
)

# %% [markdown]
# ## On from here
#
# - Longer, with a report: `make demo`. Your own volumes: `msrl prepare`, then `examples/train_ppo.py`; README.md has the commands.
# - Another reward is any function of volumes and labels: `DiffusionPPOTrainer(pipe, [my_function], config)`.
# - Other methods on the same rewards: `DiffusionNFTTrainer`, `RewardBackpropTrainer`; without rewards: `FrechetTrainer`, `DDOTrainer`.
