"""Packaging of Decant. Tool settings live in pyproject.toml; everything that pip needs is here."""

import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithCommit(build_py):
    """Leaves in the package which commit it was built from: an installation has no checkout that could be asked (export/fingerprint.py)."""

    def run(self):
        super().run()
        commit = self.asked("rev-parse", "HEAD")
        if commit and not getattr(self, "editable_mode", False):
            changed = "-modified" if self.asked("status", "--porcelain", "--untracked-files=no") else ""
            (Path(self.build_lib) / "export" / "commit.txt").write_text(f"{commit}{changed}\n", encoding="ascii")

    @staticmethod
    def asked(*arguments):
        """What git says of this checkout; None where this is none of its own, even inside another repository."""
        try:
            if not (HERE / ".git").exists():
                return None
            return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None


# tensorrt_rtx publishes wheels for Linux and Windows on x86-64 only; elsewhere its targets say "not measured".
RTX = (
    "tensorrt_rtx>=1.3; (sys_platform == 'linux' or sys_platform == 'win32') "
    "and (platform_machine == 'x86_64' or platform_machine == 'AMD64')"
)

TEST = [
    "pytest>=8",
    "pytest-timeout>=2",
    "jsonschema>=4.18",
    "beartype>=0.19",
    "ruff>=0.9",
    "mypy>=1.14",
    "types-PyYAML",
    "transformers>=4.57",
    "torchmetrics>=1.4",
    "openvino>=2025.0",
    "nncf>=2.13",
    "gradio>=6.0",
    "av>=14",
    "tensorboard>=2.18",
    "cyclonedx-python-lib[json-validation]>=8",  # holds CycloneDX's schema, to validate what bundles carry
    "securesystemslib[crypto]>=1.0",  # in-toto's own reader of DSSE envelopes
]

setup(
    cmdclass={"build_py": BuildWithCommit},
    name="decant-vision",
    version="0.1.0",
    description="Pour a large vision model into small ones that ship: pretrain, distil, quantize, compile, measure, bundle.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["distill*", "export*", "recipes*"]),
    package_data={
        "recipes": ["*.yaml"],
        "export": [
            "templates/*",
            "templates/bundle/*",
            "templates/bundle/samples/cpp/*",
            "templates/device/*",
            "templates/layouts/*",
        ],
    },
    install_requires=[
        "torch>=2.11,!=2.13.0",  # the CPU wheel of 2.13.0 breaks torchvision, and with it timm
        "accelerate>=1.2",
        "timm>=1.0.20",
        "torch-pruning>=1.5",
        "onnx>=1.17",
        "onnxscript>=0.5",  # torch's ONNX exporter is built on it
        "onnxruntime>=1.20",
        "datasets>=3.2",
        "pyarrow>=17",
        "fsspec>=2024.6",
        "numpy>=1.26",
        "pillow>=11",
        "safetensors>=0.4.5",
        "jaxtyping>=0.3",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "pydantic>=2.10",
        "pyyaml>=6",
        "typer>=0.15",
        "rich>=13",
        "jinja2>=3.1",
        "psutil>=6",
        "cryptography>=43",  # Ed25519 for bundles; the standard library has none, and nobody should write his own
        RTX,
    ],
    extras_require={
        "test": TEST,
        "demo": ["gradio>=6.0"],
        "video": ["av>=14"],
        "nvml": ["nvidia-ml-py>=12"],  # clocks, throttling and energy of NVIDIA GPUs beside latencies
        "tensorboard": ["tensorboard>=2.18"],
        "tensorrt": ["tensorrt>=10.3"],  # fetches its libraries from the vendor's own index
        "openvino": ["openvino>=2025.0", "nncf>=2.13"],
        # Not its [onnx] extra, which pulls a second ONNX Runtime; it imports requests.
        "modelopt": ["nvidia-modelopt>=0.40", "requests"],
    },
    entry_points={"console_scripts": ["decant = recipes.cli:main"]},
)
