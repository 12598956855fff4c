from pathlib import Path

from setuptools import find_packages, setup


here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "msrl_diffusers" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="msrl_diffusers",
    version=version,
    description="3D diffusion models of medical volumes, fine-tuned by reinforcement learning, on diffusers and accelerate",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["msrl_diffusers", "msrl_diffusers.*"]),
    package_data={"msrl_diffusers": ["py.typed", "templates/*.md", "app/*.css", "app/*.html", "app/*.js"]},
    entry_points={"console_scripts": ["msrl = msrl_diffusers.cli:main"]},
    install_requires=[
        "accelerate>=1.10",
        "datasets>=5.0",
        "diffusers>=0.41",
        "filelock>=3.12",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "monai>=1.5",
        "nibabel>=5.2",
        "numpy>=1.26",
        "packaging>=23",
        "peft>=0.17",
        "pillow>=10.1",
        "psutil>=5.9",
        "safetensors>=0.5",
        "scipy>=1.12",
        "tensorboard>=2.15",
        "torch>=2.6",
        "torchmetrics>=1.6",
        "tqdm>=4.66",
        "transformers>=5.5",
        "trl>=1.0",
    ],
    extras_require={
        "evaluation": ["torch-fidelity>=0.3"],  # Inception-v3 as FID knows it
        "demo": ["gradio>=6.31,<7"],  # the page of `msrl demo`
        "browser": ["playwright>=1.50"],  # its test, with a Chromium of the system
        "test": ["pytest>=8", "pytest-timeout>=2.3"],
        "dev": ["ruff>=0.12"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
