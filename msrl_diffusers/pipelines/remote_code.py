"""Files that let diffusers load a shared pipeline by `trust_remote_code=True` where this package is installed but was not
imported.

Diffusers 0.42 imports no module that `model_index.json` names. With `trust_remote_code` it runs two kinds of file: a root
`pipeline.py`, where `_class_name` is `["pipeline", CLASS]`, and `COMPONENT/LIBRARY.py`, where a component's library is
`LIBRARY`. Both import this package here. The library is named `msrl_components` and not `msrl_diffusers`: diffusers runs
such a file wherever it finds one of the library's name, and would then ask for `trust_remote_code` from those too who have
imported the package. `MedVolumePipeline` reads `plain_index` of an index, so its own `from_pretrained` needs no trust.
"""

PACKAGE = "msrl_diffusers"
COMPONENT_MODULE = "msrl_components"
PIPELINE = "MedVolumePipeline"

CODE_FILES = {
    "pipeline.py": f'''"""The pipeline of this repository, for trust_remote_code; its code is the package {PACKAGE}."""

from {PACKAGE} import {PIPELINE}


__all__ = ["{PIPELINE}"]
''',
    f"{COMPONENT_MODULE}.py": f'''"""The models of this repository, for trust_remote_code; their code is the package {PACKAGE}."""

import {PACKAGE}


def __getattr__(name):
    return getattr({PACKAGE}, name)
''',
}


def plain_index(index: dict) -> dict:
    """A `model_index.json` as `save_pretrained` writes it, of that or of one by `remote_index`."""
    plain = {}
    for name, value in index.items():
        if name == "_class_name" and isinstance(value, list):
            value = value[-1]
        elif isinstance(value, list) and value[:1] == [COMPONENT_MODULE]:
            value = [PACKAGE, *value[1:]]
        plain[name] = value
    return plain


def remote_index(index: dict) -> tuple[dict, dict[str, str]]:
    """The `model_index.json` that is shared, and the code beside it by path. Only a `MedVolumePipeline` needs any; other
    pipelines are diffusers' own."""
    index = plain_index(index)
    if index.get("_class_name") != PIPELINE:
        return index, {}
    remote, code = {}, {"pipeline.py": CODE_FILES["pipeline.py"]}
    for name, value in index.items():
        if name == "_class_name":
            value = ["pipeline", value]
        elif isinstance(value, list) and value[:1] == [PACKAGE]:
            value = [COMPONENT_MODULE, *value[1:]]
            code[f"{name}/{COMPONENT_MODULE}.py"] = CODE_FILES[f"{COMPONENT_MODULE}.py"]
        remote[name] = value
    return remote, code
