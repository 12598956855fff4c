"""The page: a class, some numbers, a button, and the viewer."""

from collections.abc import Callable
from pathlib import Path

import gradio as gr

from ..errors import InputError
from .comparison import MAX_GUIDANCE, MAX_SEED, MIN_GUIDANCE, Comparison
from .viewer import nifti_viewer, shown


TITLE = "msrl_diffusers"
MAX_WAITING = 16  # requests
KEEP_SECONDS = 3600  # of an image on the server
THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)  # no font from afar
NEW_SEED = f"() => Math.floor(Math.random() * {MAX_SEED})"


def build_page(comparison: Comparison, folder: str | Path) -> gr.Blocks:
    """The page over `comparison`, which writes images to `folder`; its function is `/generate` for `gradio_client`, too."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, KEEP_SECONDS), fill_width=True) as page:
        gr.Markdown(_introduction(comparison))
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                names = comparison.class_names
                class_name = gr.Dropdown(names, value=names[0], label="Class")
                steps = gr.Slider(1, comparison.max_steps, value=min(25, comparison.max_steps), step=1, label="Steps")
                guidance = gr.Slider(
                    MIN_GUIDANCE, MAX_GUIDANCE, value=1, step=0.1, label="Guidance", info="1 is none."
                )
                eta = gr.Slider(0, 1, value=1, step=0.05, label="Eta", info="0 is DDIM, 1 as DDPM.")
                seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed")
                new_seed = gr.Button("New seed", size="sm")
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=4):
                viewer = nifti_viewer(elem_id="viewer", min_height=480)
        new_seed.click(None, None, seed, js=NEW_SEED, api_visibility="private")
        button.click(
            _answer(comparison, folder), [class_name, steps, guidance, eta, seed], viewer,
            api_name="generate", concurrency_limit=1, show_progress="full",
        )  # fmt: skip
    page.queue(max_size=MAX_WAITING, api_open=False, default_concurrency_limit=1)
    return page


def _introduction(comparison: Comparison) -> str:
    titles = " beside ".join(comparison.pipelines)
    same = ", from the same noise" if len(comparison.pipelines) > 1 else ""
    return (
        f"## Generated volumes: {titles}\n\nOne volume of a class by every model{same}. **Not for clinical use.** Click or "
        "drag in a slice to move the cursor of all of them; the wheel goes through the slices."
    )


def _answer(comparison: Comparison, folder: str | Path) -> Callable:
    """What the button calls; Gradio reads the names of its parameters for the API."""

    def generate(
        class_name: str,
        num_inference_steps: float,
        guidance_scale: float,
        eta: float,
        seed: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio recognizes it)
    ) -> dict:
        try:
            made = comparison.generate(
                class_name, num_inference_steps, guidance_scale, eta, seed,
                lambda done, total: progress((done, total), desc="Denoising", unit="steps"),
            )  # fmt: skip
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return shown(made, folder)

    return generate
