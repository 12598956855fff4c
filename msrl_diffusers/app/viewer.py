"""The viewer of the page: NIfTI images as three orthogonal slices, with one cursor for all of them.

Components that wrap NiiVue fetch it from a content delivery network; this one needs nothing but the page it is on. It is
an HTML component with a script, not a class of its own: Gradio writes a stub file beside the source of every such class.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from gradio.data_classes import FileData

from .comparison import MadeVolume
from .volume_files import write_bytes


HERE = Path(__file__).parent


def nifti_viewer(**kwargs) -> gr.HTML:
    """A component that shows what `shown` returns. `kwargs` are those of `gr.HTML`.

    Left stands on the left, as in the data, unless the reader wants it as radiologists do; letters say which is which. The
    images may differ in grid and orientation; the cursor is at the same share of every axis.
    """
    return gr.HTML(
        html_template=(HERE / "nifti_viewer.html").read_text(encoding="utf-8"),
        css_template=(HERE / "nifti_viewer.css").read_text(encoding="utf-8"),
        js_on_load=(HERE / "nifti_viewer.js").read_text(encoding="utf-8"),
        **kwargs,
    )


def shown(volumes: Sequence[MadeVolume], folder: str | Path) -> dict:
    """The value of a viewer that shows these volumes: `{"volumes": [{"title": str, "file": a Gradio FileData}]}`.

    Their files are written to `folder/DIGEST/NAME`, which is of the server's making alone. `folder` must be Gradio's own
    (GRADIO_TEMP_DIR), or it would copy them there.
    """
    entries = []
    for volume in volumes:
        path = Path(folder) / hashlib.sha256(volume.content).hexdigest() / volume.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, volume.content)
        file = FileData(path=str(path), orig_name=volume.file_name, size=len(volume.content))
        entries.append({"title": volume.title, "file": file.model_dump()})
    return {"volumes": entries}
